"""The `lrd` command: exit status, one clear line on standard error, and what is left in the run directory."""

import gc
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from launching import scalars
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from lrd import checkpoint, console
from lrd.cli import app
from lrd.errors import UserError
from lrd.events import EventFile

RECIPE = """
data: {dataset: digits, batch_size: 64}
model: {arch: resnet18, width: 4}
optimizer: {lr: 0.05, momentum: 0.9}
lr_dropout: {keep_prob: 0.5}
trainer: {epochs: 2, max_steps: 3, device: cpu}
"""


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()  # a run holds the lock of its directory while any part of it lives
    return result


def complaints(result: Result) -> list[str]:
    """What an ending that is not a crash said on standard error."""
    assert isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.splitlines()
    assert all(line.startswith("lrd: ") for line in lines)
    return lines


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setattr(console, "stdout", Console(width=200))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a machine that is busy, threads that wait for each other cost a tiny network most of its time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def trained(one_thread, tmp_path_factory) -> tuple[Result, Path]:
    """Three steps of a narrow network with a checkpoint at each; of those the last two are kept."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(RECIPE)
    every = ["checkpoint.every_steps=1", "checkpoint.keep_last=2", "checkpoint.keep_best=false"]
    return invoke("train", folder / "small.yaml", f"run_dir={folder / 'run'}", *every), folder / "run"


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    """A copy of that run, for one test to go on with or to spoil."""
    return shutil.copytree(trained[1], tmp_path / "run")


def test_training_ends_well_and_leaves_a_whole_run(trained):
    result, run_dir = trained
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert status(run_dir)["state"] == "finished"
    assert status(run_dir)["step"] == status(run_dir)["total_steps"] == 3
    assert 0 <= status(run_dir)["best_accuracy"] <= 1
    assert checkpoint.steps(run_dir) == [2, 3]
    assert all(checkpoint.damage(path) is None for path in checkpoint.folder(run_dir).iterdir())
    assert list(run_dir.glob("events.out.tfevents.*"))
    resolved = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    assert resolved["model"]["width"] == 4
    assert resolved["checkpoint"]["every_steps"] == 1


def test_the_same_command_again_says_that_the_run_is_finished(run_dir, recipe):
    before = (checkpoint.folder(run_dir) / checkpoint.name(3) / "manifest.json").read_bytes()
    result = invoke("train", recipe, f"run_dir={run_dir}")
    assert result.exit_code == 0, result.output
    assert "3 in all, 0 by this start" in result.stdout
    assert status(run_dir)["state"] == "finished"
    assert checkpoint.steps(run_dir) == [2, 3]
    assert (checkpoint.folder(run_dir) / checkpoint.name(3) / "manifest.json").read_bytes() == before


def test_a_longer_run_goes_on_where_the_shorter_one_ended(run_dir, recipe):
    result = invoke("train", recipe, f"run_dir={run_dir}", "trainer.max_steps=5")
    assert result.exit_code == 0, result.output
    assert "5 in all, 2 by this start" in result.stdout
    state = checkpoint.read(checkpoint.folder(run_dir) / checkpoint.name(5))
    assert [group["mask_step"] for group in state.optimizer["optimizer"]["param_groups"]] == [5]


def test_a_damaged_newest_checkpoint_is_passed_over_and_its_steps_are_done_again(run_dir, recipe):
    newest = checkpoint.folder(run_dir) / checkpoint.name(3)
    weights = (newest / "model.safetensors").read_bytes()
    flip_a_bit(newest / "model.safetensors")
    result = invoke("train", recipe, f"run_dir={run_dir}")
    assert result.exit_code == 0, result.output
    assert f"{newest}: damaged: model.safetensors" in result.stdout
    assert "3 in all, 1 by this start" in result.stdout
    assert (newest / "model.safetensors").read_bytes() == weights


def test_runs_shows_what_each_run_is_about(run_dir):
    result = invoke("runs", run_dir.parent)
    assert result.exit_code == 0
    (row,) = [line for line in result.stdout.splitlines() if "resnet18" in line]
    for part in ("digits", "SGD lr 0.05", "keep_prob 0.5", "3/3", "finished"):
        assert part in row


def test_runs_tells_an_interrupted_run_from_a_finished_one(run_dir):
    (run_dir / "status.json").write_text(json.dumps({**status(run_dir), "state": "running"}))
    assert "interrupted" in invoke("runs", run_dir.parent).stdout


@pytest.mark.parametrize("flag", [[], ["--verify"]])
def test_checkpoints_that_are_whole_give_status_0(run_dir, flag):
    result = invoke("checkpoints", run_dir, *flag)
    assert result.exit_code == 0
    assert all(checkpoint.name(step) in result.stdout for step in (2, 3))
    assert ("whole" in result.stdout) == bool(flag)
    assert "damaged" not in result.stdout


def test_checkpoints_verify_finds_one_flipped_bit(run_dir):
    flip_a_bit(checkpoint.folder(run_dir) / checkpoint.name(2) / "optimizer.pt")
    result = invoke("checkpoints", run_dir, "--verify")
    assert result.exit_code == 1
    rows = {step: line for line in result.stdout.splitlines() for step in (2, 3) if checkpoint.name(step) in line}
    assert "damaged: optimizer.pt" in rows[2]
    assert "whole" in rows[3]
    assert checkpoint.steps(run_dir) == [2, 3]


@pytest.mark.parametrize("command", ["runs", "checkpoints"])
@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_where_there_is_no_run_it_says_so(tmp_path, command, name):
    (tmp_path / "empty").mkdir()
    result = invoke(command, tmp_path / name)
    (line,) = complaints(result)
    assert result.exit_code == 2
    assert str(tmp_path / name) in line


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate"),
        ("optimizer.name=AdamX", "optimizer.name"),
        ("optimizer.momentum=-1", "optimizer.momentum"),
        ("schedule.name=OneCycleLR", "schedule.name"),
        ("schedule.gamma=0.5", "schedule.gamma"),
        ("data.batch_size=5000", "data.batch_size"),
        ("trainer.accumulation_steps=7", "data.batch_size"),
        ("data={dataset: imagefolder, root: nowhere}", "data.root"),
        ("model.num_classes=3", "model.num_classes"),
        ("model.depth=3", "model.depth"),
        ("optimizer.groups=[{match: nothing.*}]", "optimizer.groups.0.match"),
        ("lr_dropout.keep_prob=0", "lr_dropout.keep_prob"),
        pytest.param(
            "trainer.device=cuda",
            "trainer.device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, recipe, override, key):
    result = invoke("train", recipe, f"run_dir={tmp_path / 'run'}", override)
    (line,) = complaints(result)
    assert result.exit_code == 2
    assert key in line
    assert not (tmp_path / "run").exists()


def test_a_bad_recipe_ends_the_process_with_status_2_and_no_trace_back(tmp_path):
    (tmp_path / "bad.yaml").write_text("optimizer: {lr: fast}\nmodel: {widht: 4}")
    command = [sys.executable, "-c", "from lrd.cli import main; main()", "train", "bad.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stdout == ""
    first, second = ended.stderr.splitlines()
    assert first.startswith("lrd: bad.yaml: optimizer.lr: ") or second.startswith("lrd: bad.yaml: optimizer.lr: ")
    assert "did you mean width?" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize(
    ("override", "key", "was", "now"),
    [
        ("model.width=8", "model.width", "4", "8"),
        ("optimizer.lr=0.02", "optimizer.lr", "0.05", "0.02"),
        ("lr_dropout.keep_prob=0.25", "lr_dropout.keep_prob", "0.5", "0.25"),
        ("seed=1", "seed", "0", "1"),
    ],
)
def test_a_run_of_another_recipe_is_not_gone_on_with(run_dir, recipe, override, key, was, now):
    before = sorted(path.name for path in run_dir.rglob("*"))
    result = invoke("train", recipe, f"run_dir={run_dir}", "trainer.max_steps=5", override)
    lines = complaints(result)
    assert result.exit_code == 2
    (line,) = [line for line in lines if line.startswith(f"lrd: {key}: ")]
    assert was in line
    assert now in line
    assert "checkpoint.allow_changed" in lines[-1]
    assert checkpoint.newest(run_dir)[0].name == checkpoint.name(3)
    assert sorted(path.name for path in run_dir.rglob("*")) == before


def test_allow_changed_goes_on_with_the_new_lr_and_the_old_momentum(run_dir, recipe):
    changed = ["optimizer.lr=0", "checkpoint.allow_changed=true", "trainer.max_steps=4"]
    result = invoke("train", recipe, f"run_dir={run_dir}", *changed)
    assert result.exit_code == 0, result.output
    assert "4 in all, 1 by this start" in result.stdout
    was, now = (checkpoint.read(checkpoint.folder(run_dir) / checkpoint.name(step)) for step in (3, 4))
    (old_group,), (new_group,) = (state.optimizer["optimizer"]["param_groups"] for state in (was, now))
    assert (old_group["lr"], new_group["lr"]) == (0.05, 0)
    assert (old_group["mask_step"], new_group["mask_step"]) == (3, 3)
    assert torch.equal(was.model["conv1.weight"], now.model["conv1.weight"])
    momentum = [state.optimizer["optimizer"]["state"][0]["momentum_buffer"].flatten() for state in (was, now)]
    assert not torch.equal(*momentum)
    assert torch.cosine_similarity(*momentum, dim=0) > 0.5


def test_allow_changed_does_not_make_another_model_fit(run_dir, recipe):
    result = invoke("train", recipe, f"run_dir={run_dir}", "model.width=8", "checkpoint.allow_changed=true")
    (line,) = complaints(result)
    assert result.exit_code == 2
    assert checkpoint.name(3) in line
    assert "another model" in line
    assert checkpoint.newest(run_dir)[0].name == checkpoint.name(3)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(tmp_path, recipe):
    run_dir = tmp_path / "run"
    result = invoke("train", recipe, f"run_dir={run_dir}", "optimizer.lr=1e30", "checkpoint.every_steps=1")
    (line,) = complaints(result)
    assert result.exit_code == 1
    assert "step 2" in line
    assert "rank 0" in line
    assert checkpoint.steps(run_dir) == [1]
    assert checkpoint.damage(checkpoint.newest(run_dir)[0]) is None
    assert status(run_dir)["state"] == "failed"
    assert status(run_dir)["step"] == 1
    assert "not finite" in invoke("runs", tmp_path).stdout


def test_a_folder_of_images_is_trained_on(tmp_path, recipe):
    for part, count in (("train", 6), ("test", 2)):
        for name, colour in (("dark", 40), ("light", 200)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (10, 10), (colour + i, colour, colour)).save(tmp_path / part / name / f"{i}.png")
    of_folder = f"data={{dataset: imagefolder, root: {tmp_path}, batch_size: 4, image_size: 8, augment: crop_flip}}"
    result = invoke("train", recipe, f"run_dir={tmp_path / 'run'}", of_folder)
    assert result.exit_code == 0, result.output
    assert status(tmp_path / "run")["step"] == 3
    assert checkpoint.read(checkpoint.newest(tmp_path / "run")[0]).model["fc.weight"].shape[0] == 2


def test_lr_draws_all_recipes_though_their_images_are_not_there(tmp_path, recipe):
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(f"data: {{dataset: imagefolder, root: {tmp_path / 'nowhere'}}}")
    result = invoke("lr", recipe, elsewhere, "-o", tmp_path / "lr.png")
    assert result.exit_code == 0
    assert "elsewhere: no images in" in result.stdout
    assert (tmp_path / "lr.png").stat().st_size > 10_000


def test_fewer_steps_than_are_done_is_nothing_left_to_do(tmp_path, recipe):
    run_dir = tmp_path / "run"
    first = invoke("train", recipe, f"run_dir={run_dir}", "checkpoint.every_steps=2")
    assert first.exit_code == 0
    shutil.rmtree(checkpoint.folder(run_dir) / checkpoint.name(3))  # what is left was never evaluated
    result = invoke("train", recipe, f"run_dir={run_dir}", "trainer.max_steps=1")
    assert result.exit_code == 0, result.exception
    assert "nothing left to do: 2 of 1 steps are done" in result.stdout


FULL = "events.out: No space left on device"


@pytest.fixture
def train_on_full_disk(tmp_path, recipe, monkeypatch) -> Callable[..., Result]:
    """Trains with a checkpoint at each step; the event file takes no records when it is asked the `fails`-th times."""

    def train(fails: Collection[int], *overrides: str) -> Result:
        flush, calls = EventFile.flush, itertools.count(1)

        def fail_at_times(events: EventFile) -> None:
            if next(calls) in fails:
                raise OSError(28, "No space left on device", "events.out")
            flush(events)

        with monkeypatch.context() as patch:
            patch.setattr("lrd.events._SECONDS_BETWEEN_FLUSHES", math.inf)
            patch.setattr(EventFile, "flush", fail_at_times)
            every = ["checkpoint.every_steps=1", "checkpoint.keep_best=false"]
            return invoke("train", recipe, f"run_dir={tmp_path / 'run'}", *every, *overrides)

    return train


def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path, train_on_full_disk):
    result = train_on_full_disk(range(1, 100))
    assert result.exit_code == 2
    assert complaints(result) == [f"lrd: {FULL}"]
    assert checkpoint.steps(tmp_path / "run") == []


def test_a_disk_that_stays_full_is_a_line_at_each_checkpoint_and_the_end_is_not_saved(
    tmp_path, recipe, train_on_full_disk
):
    result = train_on_full_disk(range(2, 100))
    assert result.exit_code == 2
    *first, third, last = complaints(result)
    assert first == [
        f"lrd: {FULL}: no checkpoint of step {step} without TensorBoard's records; training goes on" for step in (1, 2)
    ]
    assert third == f"lrd: {FULL}: no checkpoint of step 3 without TensorBoard's records"
    assert last == "lrd: the state after step 3 is not saved; start the same command again"
    assert checkpoint.steps(tmp_path / "run") == []
    assert status(tmp_path / "run")["state"] == "failed"
    again = invoke("train", recipe, f"run_dir={tmp_path / 'run'}")
    assert again.exit_code == 0, again.output
    assert "3 in all, 3 by this start" in again.stdout
    assert [step for step, _ in scalars(tmp_path / "run")["train/loss"]] == [1, 2, 3]


@pytest.mark.parametrize("step", [1, 2])
def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(tmp_path, train_on_full_disk, step):
    result = train_on_full_disk({step + 1})
    assert result.exit_code == 0, result.output
    (line,) = result.stderr.splitlines()
    assert line == f"lrd: {FULL}: no checkpoint of step {step} without TensorBoard's records; training goes on"
    assert checkpoint.steps(tmp_path / "run") == [other for other in (1, 2, 3) if other != step]
    path, passed_over = checkpoint.newest(tmp_path / "run")
    assert path.name == checkpoint.name(3)
    assert passed_over == []
    assert status(tmp_path / "run")["state"] == "finished"
    assert [seen for seen, _ in scalars(tmp_path / "run")["train/loss"]] == [1, 2, 3]


def test_a_full_disk_stops_a_run_that_is_to_stop_then(tmp_path, recipe, train_on_full_disk):
    result = train_on_full_disk({3}, "checkpoint.on_error=stop")
    assert result.exit_code == 2
    assert complaints(result) == [f"lrd: {FULL}: no checkpoint of step 2 without TensorBoard's records"]
    assert checkpoint.steps(tmp_path / "run") == [1]
    assert checkpoint.damage(checkpoint.path_of(tmp_path / "run", 1)) is None
    assert status(tmp_path / "run")["state"] == "failed"
    again = invoke("train", recipe, f"run_dir={tmp_path / 'run'}")
    assert again.exit_code == 0, again.output
    assert "3 in all, 2 by this start" in again.stdout
    assert [step for step, _ in scalars(tmp_path / "run")["train/loss"]] == [1, 2, 3]


def test_a_checkpoint_that_cannot_be_written_is_a_line_and_the_next_one_can(tmp_path, recipe, monkeypatch):
    save = checkpoint.save

    def save_or_fail(run_dir: Path, state: checkpoint.State) -> Path:
        if state.step == 2:
            raise UserError("step-00000002: the checkpoint could not be written: no room")
        return save(run_dir, state)

    monkeypatch.setattr(checkpoint, "save", save_or_fail)
    result = invoke("train", recipe, f"run_dir={tmp_path / 'run'}", "checkpoint.every_steps=1")
    assert result.exit_code == 0, result.output
    assert result.stderr == "lrd: step-00000002: the checkpoint could not be written: no room; training goes on\n"
    assert checkpoint.newest(tmp_path / "run")[0].name == checkpoint.name(3)


def test_export_writes_weights_that_load(run_dir, tmp_path):
    out = tmp_path / "weights.safetensors"
    flip_a_bit(checkpoint.folder(run_dir) / checkpoint.name(3) / "model.safetensors")
    result = invoke("checkpoints", run_dir, "--export", out)
    assert result.exit_code == 0, result.output
    assert checkpoint.name(2) in result.stdout
    assert str(out) in result.stdout
    weights, expected = load_file(out), checkpoint.read(checkpoint.path_of(run_dir, 2)).model
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert checkpoint.steps(run_dir) == [2, 3]


def test_an_export_of_what_is_not_there_is_refused(run_dir, tmp_path):
    out = tmp_path / "weights.safetensors"
    for step in (2, 3):
        flip_a_bit(checkpoint.folder(run_dir) / checkpoint.name(step) / "model.safetensors")
    for place in (run_dir, tmp_path / "nowhere"):
        result = invoke("checkpoints", place, "--export", out)
        (line,) = complaints(result)
        assert result.exit_code == 2
        assert str(place) in line
    assert not out.exists()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_start_says_where_it_begins(run_dir, recipe, damaged):
    for step in checkpoint.steps(run_dir):
        if damaged:
            (checkpoint.path_of(run_dir, step) / "model.safetensors").write_bytes(b"")
    result = invoke("train", recipe, f"run_dir={run_dir}")
    assert result.exit_code == 0
    assert ("no whole checkpoint is left; starting from the beginning" in result.stdout) == damaged
    assert checkpoint.steps(run_dir)[-1] == 3


def test_a_signal_in_the_last_evaluation_leaves_it_for_the_next_start(tmp_path, recipe, monkeypatch):
    import lrd.train

    def cut_short(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(lrd.train, "evaluate", cut_short)
        result = invoke("train", recipe, f"run_dir={run_dir}")
    assert result.exit_code == 75
    assert "stopped by signal 15 after step 3, saved" in result.stdout
    assert status(run_dir)["state"] == "stopped"
    result = invoke("train", recipe, f"run_dir={run_dir}")
    assert result.exit_code == 0
    assert status(run_dir)["state"] == "finished"
    assert status(run_dir)["best_accuracy"] is not None
    assert checkpoint.read_trainer(checkpoint.path_of(run_dir, 3))["evaluated"] == 3
