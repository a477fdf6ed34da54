"""What TensorBoard shows of a run: tags, learning rates of groups and elements, each step once."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS, Experiment
from tensorboard.plugins.hparams.backend_context import Context as BackendContext

from lrd import recipe as recipes
from lrd.tracking import pages
from lrd.tracking.event_file import read_scalars_since
from lrd.tracking.recorder import choose_probes, evaluation_tag
from lrd.tracking.tracker import Tracker
from tests.helpers.metrics_csv import read_metrics, read_records_by_step
from tests.helpers.tensorboard_events import load_events, read_scalars
from tests.helpers.tracked_run import (
    GROUPS,
    LRS,
    STEPS_PER_EPOCH,
    TrackedRun,
    make_network,
    make_recipe,
)


def read_once(run_dir: Path) -> dict[str, dict[int, float]]:
    """Read the value of each tag at each step, and check that no tag has a step twice."""
    values_of_tag = {}
    for tag, points in read_scalars(run_dir).items():
        values_of_tag[tag] = dict(points)
        assert len(values_of_tag[tag]) == len(points), f"{tag} has a step twice"
    return values_of_tag


def test_tags_are_those_of_the_documentation(tmp_path):
    run = TrackedRun(tmp_path)
    run.update(1)
    run.tracker.record_evaluation(1, {"loss": 2.0, "accuracy": 0.5})
    run.tracker.flush()

    kinds = ("lr", "lr_effective", "lr_dropout/kept")
    group_tags = {f"{kind}/{group}" for kind in kinds for group in GROUPS}
    probe_tags = {probe.tag for probe in run.tracker.probes}
    assert len(probe_tags) == 4
    for tag in probe_tags:
        assert re.fullmatch(r"probes/[02]\.(weight|bias)\[\d+(,\d+)?\]", tag)

    other_tags = {"train/loss", "test/loss", "test/accuracy"}
    assert set(read_once(tmp_path)) == other_tags | group_tags | probe_tags


def test_lrs_of_groups_and_probes_are_those_that_were_applied(tmp_path):
    run = TrackedRun(tmp_path)
    moved_in_step = {step: run.update(step) for step in range(1, 13)}
    run.tracker.flush()
    recorded = read_once(tmp_path)

    for i, (group, lr) in enumerate(zip(GROUPS, LRS, strict=True)):
        for step, moved in moved_in_step.items():
            weight, bias = moved[2 * i : 2 * i + 2]
            kept = torch.cat([weight.flatten(), bias.flatten()]).float().mean().item()
            assert 0 < kept < 1
            assert recorded[f"lr/{group}"][step] == lr
            assert recorded[f"lr_dropout/kept/{group}"][step] == pytest.approx(kept)
            assert recorded[f"lr_effective/{group}"][step] == pytest.approx(lr * kept)

    names = [name for name, _ in run.network.named_parameters()]
    for probe in run.tracker.probes:
        name, place = re.fullmatch(r"probes/(.+)\[(.+)\]", probe.tag).groups()
        index = names.index(name)
        element = tuple(int(coordinate) for coordinate in place.split(","))
        lr = LRS[index // 2]

        expected = {step: lr * bool(moved[index][element]) for step, moved in moved_in_step.items()}
        assert recorded[probe.tag] == expected
        assert set(expected.values()) == {0.0, lr}


def test_without_lr_dropout_every_element_has_the_lr_of_its_group(tmp_path):
    run = TrackedRun(tmp_path, recipe=make_recipe(keep_prob=None))
    for step in (1, 2):
        run.update(step)
    run.tracker.flush()

    recorded = read_once(tmp_path)
    for group, lr in zip(GROUPS, LRS, strict=True):
        assert set(recorded[f"lr_effective/{group}"].values()) == {lr}
        assert set(recorded[f"lr_dropout/kept/{group}"].values()) == {1.0}
    for probe in run.tracker.probes:
        assert set(recorded[probe.tag].values()) == {LRS[probe.group]}


def test_a_skipped_step_has_an_effective_lr_of_zero(tmp_path):
    run = TrackedRun(tmp_path)
    run.update(1)
    run.tracker.record_probes(2, LRS, moved=False)
    run.tracker.record_step(2, LRS, {}, moved=False)
    run.tracker.flush()

    recorded = read_once(tmp_path)
    for group, lr in zip(GROUPS, LRS, strict=True):
        assert recorded[f"lr/{group}"][2] == lr
        assert recorded[f"lr_effective/{group}"][2] == 0
        assert recorded[f"lr_dropout/kept/{group}"][2] == 0
    for probe in run.tracker.probes:
        assert recorded[probe.tag][2] == 0


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (3, 3), (4, 4), (9, 4)])
def test_probes_are_of_different_parameters(count, expected):
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    probes = choose_probes(network, optimizer, count)

    assert len(probes) == expected
    assert len({probe.index for probe in probes}) == expected
    assert len({probe.tag for probe in probes}) == expected


@pytest.fixture
def advance_clock(monkeypatch):
    """A function that sets the clock ten seconds forward, as if a run were started again later.

    TensorBoard reads event files in the order of the times in their names.
    """
    offset = 0.0
    real_time = time.time

    def advance() -> None:
        nonlocal offset
        offset += 10.0

    monkeypatch.setattr(time, "time", lambda: real_time() + offset)
    return advance


@pytest.mark.parametrize("resumed_at", [0, 6, 10])
def test_each_step_is_shown_once_after_a_resume(tmp_path, advance_clock, resumed_at):
    first = TrackedRun(tmp_path)
    for step in range(1, 11):
        first.update(step, loss=step)
    first.tracker.record_evaluation(10, {"loss": 1.0})
    first.tracker.flush()

    advance_clock()
    second = TrackedRun(tmp_path, step=resumed_at)
    for step in range(resumed_at + 1, 13):
        second.update(step, loss=100 + step)
    second.tracker.record_evaluation(12, {"loss": 2.0})
    second.tracker.flush()

    recorded = read_once(tmp_path)
    first_losses = {step: step for step in range(1, resumed_at + 1)}
    second_losses = {step: 100 + step for step in range(resumed_at + 1, 13)}
    assert recorded["train/loss"] == first_losses | second_losses
    for tag in ("lr/group0", "lr_effective/head", second.tracker.probes[0].tag):
        assert list(recorded[tag]) == list(range(1, 13))

    first_evaluation = {10: 1.0} if resumed_at == 10 else {}
    assert recorded["test/loss"] == first_evaluation | {12: 2.0}


def test_each_step_is_shown_once_after_many_resumes(tmp_path, advance_clock):
    for start in (0, 2, 2, 3, 1):
        run = TrackedRun(tmp_path, step=start)
        for step in range(start + 1, start + 5):
            run.update(step, loss=start)
        run.tracker.flush()
        advance_clock()

    assert read_once(tmp_path)["train/loss"] == {1: 0.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}


def test_the_recipe_is_recorded_as_text(tmp_path):
    run = TrackedRun(tmp_path)
    run.tracker.flush()

    (record,) = load_events(tmp_path).Tensors("recipe/text_summary")
    text = record.tensor_proto.string_val[0].decode()
    assert yaml.safe_load(text) == yaml.safe_load(run.recipe.dump())


def read_settings(run_dir: Path) -> dict[str, object]:
    """The settings that HParams shows of a run."""
    content = load_events(run_dir).summary_metadata[metadata.SESSION_START_INFO_TAG]
    start = metadata.parse_session_start_info_plugin_data(content.plugin_data.content)
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}


def read_experiment(run_dir: Path) -> Experiment:
    """The columns that HParams takes from a run."""
    content = load_events(run_dir).summary_metadata[metadata.EXPERIMENT_TAG]
    return metadata.parse_experiment_plugin_data(content.plugin_data.content)


def test_hyper_parameters_are_there_from_the_first_step(tmp_path):
    run = TrackedRun(tmp_path)
    settings = read_settings(tmp_path)
    assert settings["optimizer.lr"] == LRS[0]
    assert settings["optimizer.name"] == "SGD"
    assert settings["lr_dropout.keep_prob"] == 0.5
    assert settings["lr_dropout.kind"] == "dropout"
    assert settings["data.skip_corrupt"] is False

    expected = {key for key, value in run.recipe.result_settings().items() if value is not None}
    assert set(settings) == expected | {"lr_dropout.kind"}


@pytest.mark.parametrize("shown_run", ["lrd", "plain"])
def test_runs_with_and_without_lr_dropout_can_be_compared(tmp_path, shown_run):
    """TensorBoard takes the columns from one of the runs, whichever comes first."""
    TrackedRun(tmp_path / "lrd")
    TrackedRun(tmp_path / "plain", recipe=make_recipe(keep_prob=None))
    assert read_settings(tmp_path / "plain")["lr_dropout.keep_prob"] == 1.0
    assert read_settings(tmp_path / "plain")["lr_dropout.kind"] == "none"

    experiment = read_experiment(tmp_path / shown_run)
    columns = {info.name for info in experiment.hparam_infos}
    assert columns >= read_settings(tmp_path / "lrd").keys()
    assert columns >= read_settings(tmp_path / "plain").keys()

    first_columns = {info.name for info in experiment.hparam_infos if info.differs}
    assert {"lr_dropout.keep_prob", "optimizer.lr"} <= first_columns
    assert len(first_columns) == 5  # as many as TensorBoard shows at first


def test_the_metrics_of_the_hyper_parameters_are_tags_of_the_run(tmp_path):
    run = TrackedRun(tmp_path)
    run.update(1)
    run.tracker.record_evaluation(1, {"loss": 2.0, "accuracy": 0.5})
    run.tracker.record_end(1)
    run.tracker.flush()

    tags = [info.name.tag for info in read_experiment(tmp_path).metric_infos]
    assert tags == ["test/accuracy", "test/loss", "train/accuracy", "train/loss"]
    assert not [tag for tag in read_once(tmp_path) if tag.startswith("hparam")]

    content = load_events(tmp_path).summary_metadata[metadata.SESSION_END_INFO_TAG]
    end = metadata.parse_session_end_info_plugin_data(content.plugin_data.content)
    assert end.status == STATUS_SUCCESS


def test_held_out_images_and_the_average_come_first_among_the_metrics():
    settings = {"data": {"validation": 0.1}, "trainer": {"ema_decay": 0.9}}
    hparams, _ = pages.hparams(recipes.parse(settings, "test"))
    experiment = metadata.parse_experiment_plugin_data(
        hparams.value[0].metadata.plugin_data.content
    )
    tags = [info.name.tag for info in experiment.metric_infos]
    assert tags[:4] == [
        "validation/ema_accuracy",
        "validation/accuracy",
        "test/ema_accuracy",
        "test/accuracy",
    ]


def test_a_resume_shows_no_page_twice(tmp_path, advance_clock):
    first = TrackedRun(tmp_path)
    first.update(1)
    first.tracker.flush()
    advance_clock()
    second = TrackedRun(tmp_path, step=1)
    second.update(2)
    second.tracker.flush()

    events = load_events(tmp_path)
    for tag in ("recipe/text_summary", "custom_scalars__config__"):
        assert len(events.Tensors(tag)) == 1
    context = BackendContext(TBContext(data_provider=provide_events(tmp_path)))
    found = context.hparams_metadata(RequestContext(), "")
    assert list(found) == ["."]
    assert len(found["."]) == 2  # the columns and this run's settings


def provide_events(run_dir: Path) -> MultiplexerDataProvider:
    """What TensorBoard's plug-ins read a run from."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(run_dir))
    multiplexer.Reload()
    return MultiplexerDataProvider(multiplexer, str(run_dir))


def test_the_charts_find_all_curves_but_speed_and_gradient_norm(tmp_path):
    run = TrackedRun(tmp_path)
    run.update(1)
    names = ("loss", "accuracy", "ema_loss", "validation_accuracy", "validation_ema_accuracy")
    run.tracker.record_evaluation(1, dict.fromkeys(names, 0.5))
    run.tracker.flush()

    (record,) = load_events(tmp_path).Tensors("custom_scalars__config__")
    layout = Layout.FromString(record.tensor_proto.string_val[0])
    matches = {}
    for category in layout.category:
        for chart in category.chart:
            matches[chart.title] = {
                tag
                for tag in read_once(tmp_path)
                if any(re.match(pattern, tag) for pattern in chart.multiline.tag)
            }

    probes = {probe.tag for probe in run.tracker.probes}
    lrs = {f"{kind}/{group}" for kind in ("lr", "lr_effective") for group in GROUPS}
    assert list(matches.values()) == [
        {"train/loss", "test/loss", "test/ema_loss"},
        {"test/accuracy", "validation/accuracy", "validation/ema_accuracy"},
        lrs,
        lrs | probes,
        {f"lr_dropout/kept/{group}" for group in GROUPS},
    ]


def test_a_table_about_the_run_is_recorded_as_text(tmp_path):
    run = TrackedRun(tmp_path)
    run.tracker.record_summary([("data", "digits"), ("ranks", "2 on cpu")])
    run.tracker.flush()

    (record,) = load_events(tmp_path).Tensors("about/text_summary")
    text = record.tensor_proto.string_val[0].decode()
    assert text == "| data | digits |\n| --- | --- |\n| ranks | 2 on cpu |"


@pytest.mark.parametrize("every", [0, 2])
def test_histograms_are_of_what_the_step_has_changed(tmp_path, every):
    run = TrackedRun(tmp_path, recipe=make_recipe(histograms_every=every))
    expected = {}
    for step in range(1, 5):
        before = [parameter.detach().clone() for parameter in run.network.parameters()]
        run.tracker.before_update(step)
        run.update(step)
        run.tracker.record_update(step)
        parameters = run.network.named_parameters()
        for old, (name, new) in zip(before, parameters, strict=True):
            expected[name, step] = (new - old).detach().flatten()
    run.tracker.flush()

    events = load_events(tmp_path)
    tags = [f"updates/{name}" for name, _ in run.network.named_parameters()]
    assert sorted(events.Tags()["histograms"]) == (sorted(tags) if every else [])
    for tag in events.Tags()["histograms"]:
        records = events.Histograms(tag)
        assert [record.step for record in records] == [2, 4]
        for record in records:
            update = expected[tag.removeprefix("updates/"), record.step]
            histogram = record.histogram_value
            assert histogram.num == sum(histogram.bucket) == update.numel()
            assert (histogram.min, histogram.max) == (update.min(), update.max())
            assert histogram.sum == pytest.approx(float(update.sum()), abs=1e-6)

            # Dropped elements are in the bin around zero.
            (middle,) = [
                count
                for count, low, high in zip(
                    histogram.bucket[1:],
                    histogram.bucket_limit,
                    histogram.bucket_limit[1:],
                    strict=False,
                )
                if low < 0 < high
            ]
            assert middle >= int((update == 0).sum())

    if every:
        assert (expected["0.weight", 2] == 0).any()


def test_a_histogram_of_nothing_finite_is_left_out():
    assert pages.update_histogram("x", torch.tensor([torch.nan, torch.inf])) is None
    histogram = pages.update_histogram("x", torch.tensor([torch.nan, 0.0, 0.0])).value[0].histo
    assert (histogram.num, histogram.min, histogram.max) == (2, 0, 0)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("loss", "test/loss"),
        ("ema_accuracy", "test/ema_accuracy"),
        ("validation_loss", "validation/loss"),
        ("validation_ema_accuracy", "validation/ema_accuracy"),
    ],
)
def test_the_tag_of_a_metric_says_on_which_images_it_was_measured(name, tag):
    assert evaluation_tag(name) == tag


def go_on(run: TrackedRun, run_dir: Path, step: int, **options: Any) -> Tracker:
    """The tracker of the next start."""
    return Tracker(
        run_dir, step, STEPS_PER_EPOCH, run.recipe, run.network, run.optimizer, **options
    )


def test_an_evaluation_that_is_recorded_already_is_not_recorded_twice(tmp_path):
    first = TrackedRun(tmp_path)
    first.update(1)
    first.tracker.record_evaluation(1, {"loss": 2.0})
    first.tracker.flush()

    second = go_on(first, tmp_path, step=1, looks_for_evaluation=True)
    second.record_evaluation(1, {"loss": 3.0, "accuracy": 0.5})
    second.record_evaluation(2, {"loss": 1.0})
    second.flush()

    records = read_once(tmp_path)
    assert records["test/loss"] == {1: 2.0, 2: 1.0}
    assert records["test/accuracy"] == {1: 0.5}
    assert read_metrics(tmp_path) == read_records_by_step(tmp_path)


def test_scalars_that_the_main_process_had_not_written_come_from_a_survivor(tmp_path):
    first = TrackedRun(tmp_path)
    for step in (1, 2, 3):
        first.update(step, loss=float(step))
    first.tracker.flush()
    first.update(4, loss=4.0)
    first.tracker.record_evaluation(4, {"loss": 2.0})
    rescued = first.tracker.latest_scalars()  # the same on every rank
    assert list(rescued) == [1, 2, 3, 4]
    rescued = {step: rescued[step] for step in (3, 4)}

    second = go_on(first, tmp_path, step=4, rescued=rescued, looks_for_evaluation=True)
    second.record_evaluation(4, {"loss": 2.0, "accuracy": 0.5})
    second.flush()

    records = read_once(tmp_path)
    assert records["train/loss"] == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert records["test/loss"] == {4: 2.0}
    assert records["test/accuracy"] == {4: 0.5}
    assert all(len(points) == 4 for tag, points in records.items() if tag.startswith("probes/"))
    assert read_metrics(tmp_path) == read_records_by_step(tmp_path)


def test_only_the_scalars_of_the_last_seconds_are_kept_in_memory(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("lrd.tracking.recorder.time.monotonic", lambda: now)
    run = TrackedRun(tmp_path)
    for step in range(1, 11):
        run.update(step)
        now += 4.0
    # That of step 7 is 12 s older than that of step 10.
    assert list(run.tracker.latest_scalars()) == [7, 8, 9, 10]

    now += 1000.0  # a long evaluation
    run.tracker.record_evaluation(10, {"loss": 2.0})
    assert list(run.tracker.latest_scalars()) == [7, 8, 9, 10]


def test_the_last_scalars_are_read_without_those_that_a_later_start_made_void(tmp_path):
    first = TrackedRun(tmp_path)
    for step in range(1, 7):
        first.update(step, loss=float(step))
    first.tracker.flush()
    second = TrackedRun(tmp_path, step=4)
    second.update(5, loss=50.0)
    second.tracker.flush()

    assert read_scalars_since(tmp_path, 7) == {}
    latest = read_scalars_since(tmp_path, 3)
    assert {step: scalars["train/loss"] for step, scalars in latest.items()} == {
        5: 50.0,
        4: 4.0,
        3: 3.0,
    }
    assert read_scalars_since(tmp_path, 1).keys() == {1, 2, 3, 4, 5}
    by_step = {
        step: {tag: points[step] for tag, points in read_once(tmp_path).items() if step in points}
        for step in (3, 4, 5)
    }
    assert latest == by_step
