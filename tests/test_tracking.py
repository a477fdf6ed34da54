"""What TensorBoard shows: tags, lr trajectories of groups and single elements, each step once; and the pictures."""

import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from typer.testing import CliRunner

from lrd import recipe as recipes
from lrd import tracking
from lrd.cli import app
from lrd.optim import build_optimizer
from lrd.tracking import Tracker, choose_probes

LRS = [0.25, 0.5]
GROUPS = ["group0", "head"]


def make_recipe(keep_prob: float | None = 0.5, probes: int = 4) -> recipes.Recipe:
    values = {
        "optimizer": {"lr": LRS[0], "momentum": 0.9, "groups": [{"match": "2.*", "name": "head", "lr": LRS[1]}]},
        "lr_dropout": None if keep_prob is None else {"keep_prob": keep_prob},
        "tracking": {"probes": probes},
    }
    return recipes.parse(values, "test")


class Run:
    """A tiny network with its optimizer and tracker; each step has random gradients."""

    def __init__(self, run_dir: Path, step: int = 0, recipe: recipes.Recipe | None = None) -> None:
        torch.manual_seed(0)
        self.recipe = recipe or make_recipe()
        self.network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.optimizer = build_optimizer(self.network, self.recipe)
        self.tracker = Tracker(run_dir, step, self.recipe, self.network, self.optimizer)

    def update(self, step: int, loss: float = 0.0) -> list[torch.Tensor]:
        """One tracked step. Returns which elements of each parameter moved."""
        before = [parameter.detach().clone() for parameter in self.network.parameters()]
        for parameter in self.network.parameters():
            parameter.grad = torch.randn_like(parameter)
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.step()
        self.tracker.probe(step, lrs)
        self.tracker.step(step, lrs, {"train/loss": loss})
        return [now.detach() != was for now, was in zip(self.network.parameters(), before, strict=True)]


def events(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """tag -> step -> value, each step once."""
    accumulator = events(run_dir)
    found = {}
    for tag in accumulator.Tags()["scalars"]:
        points = accumulator.Scalars(tag)
        found[tag] = {point.step: point.value for point in points}
        assert len(found[tag]) == len(points), f"{tag} has a step twice"
    return found


def test_tags_are_those_of_the_module_text(tmp_path):
    run = Run(tmp_path)
    run.update(1)
    run.tracker.evaluation(1, {"loss": 2.0, "accuracy": 0.5})
    run.tracker.flush()
    tags = set(scalars(tmp_path))
    of_groups = {f"{kind}/{group}" for kind in ("lr", "lr_effective", "lr_dropout/kept") for group in GROUPS}
    of_probes = {probe.tag for probe in run.tracker.probes}
    assert len(of_probes) == 4
    assert all(re.fullmatch(r"probes/[02]\.(weight|bias)\[\d+(,\d+)?\]", tag) for tag in of_probes)
    assert tags == {"train/loss", "test/loss", "test/accuracy"} | of_groups | of_probes


def test_lr_of_groups_and_probes_is_what_was_applied(tmp_path):
    run = Run(tmp_path)
    moved = {step: run.update(step) for step in range(1, 13)}
    run.tracker.flush()
    seen = scalars(tmp_path)
    names = [name for name, _ in run.network.named_parameters()]
    for number, (group, lr) in enumerate(zip(GROUPS, LRS, strict=True)):
        for step, elements in moved.items():
            own = torch.cat([part.flatten() for part in elements[2 * number : 2 * number + 2]])
            kept = own.float().mean().item()
            assert 0 < kept < 1
            assert seen[f"lr/{group}"][step] == lr
            assert seen[f"lr_dropout/kept/{group}"][step] == pytest.approx(kept)
            assert seen[f"lr_effective/{group}"][step] == pytest.approx(lr * kept)
    for probe in run.tracker.probes:
        name, place = re.fullmatch(r"probes/(.+)\[(.+)\]", probe.tag).groups()
        index = names.index(name)
        at = tuple(int(i) for i in place.split(","))
        assert seen[probe.tag] == {
            step: LRS[index // 2] * bool(elements[index][at]) for step, elements in moved.items()
        }
        assert set(seen[probe.tag].values()) == {0.0, LRS[index // 2]}


def test_without_lr_dropout_every_element_has_the_lr_of_its_group(tmp_path):
    run = Run(tmp_path, recipe=make_recipe(keep_prob=None))
    for step in (1, 2):
        run.update(step)
    run.tracker.flush()
    seen = scalars(tmp_path)
    for group, lr in zip(GROUPS, LRS, strict=True):
        assert set(seen[f"lr_effective/{group}"].values()) == {lr}
        assert set(seen[f"lr_dropout/kept/{group}"].values()) == {1.0}
    for probe in run.tracker.probes:
        assert set(seen[probe.tag].values()) == {LRS[probe.group]}


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (3, 3), (4, 4), (9, 4)])
def test_probes_are_of_different_parameters(count, expected):
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    probes = choose_probes(network, optimizer, count)
    assert len({probe.index for probe in probes}) == len({probe.tag for probe in probes}) == len(probes) == expected


@pytest.fixture
def clock(monkeypatch):
    """Each start of a run is some seconds after the one before: event files are read in the order of their times."""
    offset = 0.0
    now = time.time

    def later() -> None:
        nonlocal offset
        offset += 10.0

    monkeypatch.setattr(time, "time", lambda: now() + offset)
    return later


@pytest.mark.parametrize("resumed_at", [0, 6, 10])
def test_each_step_is_shown_once_after_a_resume(tmp_path, clock, resumed_at):
    first = Run(tmp_path)
    for step in range(1, 11):
        first.update(step, loss=step)
    first.tracker.evaluation(10, {"loss": 1.0})
    first.tracker.flush()
    clock()
    second = Run(tmp_path, step=resumed_at)
    for step in range(resumed_at + 1, 13):
        second.update(step, loss=100 + step)
    second.tracker.evaluation(12, {"loss": 2.0})
    second.tracker.flush()
    seen = scalars(tmp_path)
    assert seen["train/loss"] == {step: step if step <= resumed_at else 100 + step for step in range(1, 13)}
    for tag in ("lr/group0", "lr_effective/head", second.tracker.probes[0].tag):
        assert list(seen[tag]) == list(range(1, 13))
    assert seen["test/loss"] == ({10: 1.0, 12: 2.0} if resumed_at == 10 else {12: 2.0})
    first.tracker.flush()


def test_each_step_is_shown_once_after_many_resumes(tmp_path, clock):
    for start in (0, 2, 2, 3, 1):
        run = Run(tmp_path, step=start)
        for step in range(start + 1, start + 5):
            run.update(step, loss=start)
        run.tracker.flush()
        clock()
    assert scalars(tmp_path)["train/loss"] == {1: 0.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}


def test_the_recipe_stands_in_the_texts(tmp_path):
    run = Run(tmp_path)
    run.tracker.flush()
    (text,) = events(tmp_path).Tensors("recipe/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert yaml.safe_load(shown) == yaml.safe_load(run.recipe.dump())


def test_hyper_parameters_stand_beside_the_final_metrics(tmp_path):
    run = Run(tmp_path)
    run.update(1)
    run.tracker.hyper_parameters(1, {"accuracy": 0.75, "loss": 1.5})
    run.tracker.flush()
    metadata = events(tmp_path).summary_metadata
    start = HParamsPluginData.FromString(metadata["_hparams_/session_start_info"].plugin_data.content)
    values = start.session_start_info.hparams
    assert values["optimizer.lr"].number_value == LRS[0]
    assert values["lr_dropout.keep_prob"].number_value == 0.5
    assert values["optimizer.name"].string_value == "SGD"
    assert set(values) == {key for key, value in run.recipe.mathematics().items() if value is not None}
    experiment = HParamsPluginData.FromString(metadata["_hparams_/experiment"].plugin_data.content).experiment
    assert {info.name.tag for info in experiment.metric_infos} == {"hparam/test_accuracy", "hparam/test_loss"}
    assert scalars(tmp_path)["hparam/test_accuracy"] == {1: 0.75}


RECIPE = """
data: {dataset: synthetic, num_samples: 640, batch_size: 64}
optimizer: {lr: 0.1}
lr_dropout: {keep_prob: 0.5}
schedule: {name: StepLR, step_size: 1, gamma: 0.5, warmup_steps: 5}
trainer: {epochs: 3}
"""


@pytest.fixture
def sources(tmp_path) -> dict[str, list[str]]:
    """What the command is given, by the names that the tests use."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = Run(tmp_path / "run")
    for step in range(1, 9):
        run.update(step)
    run.tracker.flush()
    (tmp_path / "empty").mkdir()
    alone = {name: [str(tmp_path / name)] for name in ("recipe.yaml", "run", "empty", "nowhere.yaml")}
    return {**alone, "recipe.yaml and run": alone["recipe.yaml"] + alone["run"]}


@pytest.mark.parametrize("what", ["recipe.yaml", "run"])
def test_lr_draws_a_picture(tmp_path, sources, what):
    out = tmp_path / "lr.png"
    result = CliRunner().invoke(app, ["lr", *sources[what], "-o", str(out)])
    assert result.exit_code == 0
    with Image.open(out) as image:
        coloured = sum(
            count
            for count, (red, green, blue) in image.convert("RGB").getcolors(1 << 24)
            if max(red, green, blue) - min(red, green, blue) > 80
        )
        assert image.format == "PNG"
        assert min(image.size) > 200
    assert coloured > 500


@pytest.mark.parametrize(
    ("what", "out", "said"),
    [
        ("recipe.yaml and run", "lr.png", "one picture"),
        ("empty", "lr.png", "empty"),
        ("nowhere.yaml", "lr.png", "nowhere.yaml"),
        ("recipe.yaml", "nowhere/lr.png", "nowhere"),
        ("recipe.yaml", "lr.nonsense", "lr.nonsense"),
    ],
)
def test_lr_refuses_in_one_line(tmp_path, sources, what, out, said):
    result = CliRunner().invoke(app, ["lr", *sources[what], "-o", str(tmp_path / out)])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("lrd: ")
    assert said in line
    assert not (tmp_path / out).exists()


def test_an_evaluation_that_is_recorded_already_is_not_recorded_twice(tmp_path):
    first = Run(tmp_path)
    first.update(1)
    first.tracker.evaluation(1, {"loss": 2.0})
    first.tracker.flush()
    known = tracking.recorded_at(tmp_path, 1)
    assert {"train/loss", "test/loss"} <= known
    assert tracking.recorded_at(tmp_path, 2) == set()
    again = Tracker(tmp_path, 1, first.recipe, first.network, first.optimizer, known)
    again.evaluation(1, {"loss": 2.0, "accuracy": 0.5})
    again.evaluation(2, {"loss": 1.0})
    again.flush()
    seen = scalars(tmp_path)
    assert seen["test/loss"] == {1: 2.0, 2: 1.0}
    assert seen["test/accuracy"] == {1: 0.5}


def test_a_skipped_step_moved_nothing(tmp_path):
    run = Run(tmp_path)
    run.update(1)
    run.tracker.probe(2, LRS, moved=False)
    run.tracker.step(2, LRS, {}, moved=False)
    run.tracker.flush()
    seen = scalars(tmp_path)
    for group, lr in zip(GROUPS, LRS, strict=True):
        assert seen[f"lr/{group}"][2] == lr
        assert seen[f"lr_effective/{group}"][2] == seen[f"lr_dropout/kept/{group}"][2] == 0
    assert all(seen[probe.tag][2] == 0 for probe in run.tracker.probes)
