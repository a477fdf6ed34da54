"""What TensorBoard shows of a run: tags, learning rates of groups and elements, each step once."""

import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lrd.tracking import tracker
from lrd.tracking.tracker import Tracker, choose_probes
from tests.helpers.tensorboard_events import load_events, read_scalars
from tests.helpers.tracked_run import GROUPS, LRS, TrackedRun, make_network, make_recipe


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


def test_hyper_parameters_are_recorded_with_the_final_metrics(tmp_path):
    run = TrackedRun(tmp_path)
    run.update(1)
    run.tracker.record_hparams(1, {"accuracy": 0.75, "loss": 1.5})
    run.tracker.flush()
    metadata = load_events(tmp_path).summary_metadata

    content = metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["optimizer.lr"].number_value == LRS[0]
    assert values["lr_dropout.keep_prob"].number_value == 0.5
    assert values["optimizer.name"].string_value == "SGD"

    settings = run.recipe.result_settings()
    assert set(values) == {key for key, value in settings.items() if value is not None}

    content = metadata["_hparams_/experiment"].plugin_data.content
    metrics = HParamsPluginData.FromString(content).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"hparam/test_accuracy", "hparam/test_loss"}
    assert read_once(tmp_path)["hparam/test_accuracy"] == {1: 0.75}


def test_an_evaluation_that_is_recorded_already_is_not_recorded_twice(tmp_path):
    first = TrackedRun(tmp_path)
    first.update(1)
    first.tracker.record_evaluation(1, {"loss": 2.0})
    first.tracker.flush()

    tags = tracker.tags_recorded_at(tmp_path, 1)
    assert {"train/loss", "test/loss"} <= tags
    assert tracker.tags_recorded_at(tmp_path, 2) == set()

    second = Tracker(tmp_path, 1, first.recipe, first.network, first.optimizer, tags)
    second.record_evaluation(1, {"loss": 2.0, "accuracy": 0.5})
    second.record_evaluation(2, {"loss": 1.0})
    second.flush()

    recorded = read_once(tmp_path)
    assert recorded["test/loss"] == {1: 2.0, 2: 1.0}
    assert recorded["test/accuracy"] == {1: 0.5}
