"""The `lrd` command: exit status, error messages and the run directory."""

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
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import lrd
from lrd import console
from lrd.checkpoint import store
from lrd.cli.app import app
from lrd.errors import UserError
from lrd.tracking.event_file import EventFile
from tests.helpers.checkpoints import flip_a_bit
from tests.helpers.metrics_csv import read_metrics, read_records_by_step
from tests.helpers.tensorboard_events import read_scalars

RECIPE = """
data: {dataset: digits, batch_size: 64}
model: {arch: resnet18, width: 4}
optimizer: {lr: 0.05, momentum: 0.9}
lr_dropout: {keep_prob: 0.5}
trainer: {epochs: 2, max_steps: 3, device: cpu}
"""


def invoke(*arguments: object) -> Result:
    """Run the `lrd` command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()  # a run keeps the lock of its directory until all its parts are deleted
    return result


def error_lines(result: Result) -> list[str]:
    """Standard error of a command that did not crash; each line must begin with `lrd: `."""
    assert isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.splitlines()
    assert all(line.startswith("lrd: ") for line in lines)
    return lines


def read_status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


def recorded_steps(run_dir: Path) -> list[int]:
    """The steps whose training loss TensorBoard shows."""
    return [step for step, _ in read_scalars(run_dir)["train/loss"]]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setattr(console, "stdout", Console(width=200))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine a tiny network spends most of its time on threads that wait for others."""
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
    """The result and run directory of three steps.

    There is a checkpoint after each step, and the last two are kept.
    """
    folder = tmp_path_factory.mktemp("trained")
    run_dir = folder / "run"
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE)
    settings = ["checkpoint.every_steps=1", "checkpoint.keep_last=2", "checkpoint.keep_best=false"]
    result = invoke("train", recipe, f"run_dir={run_dir}", *settings)
    return result, run_dir


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    """A copy of that run directory, which a test may change."""
    _, original = trained
    return shutil.copytree(original, tmp_path / "run")


def test_training_leaves_a_complete_run_directory(trained):
    result, run_dir = trained
    assert result.exit_code == 0, result.output
    assert result.stderr == ""

    status = read_status(run_dir)
    assert status["state"] == "finished"
    assert status["step"] == 3
    assert status["total_steps"] == 3
    assert 0 <= status["best_accuracy"] <= 1

    assert store.list_steps(run_dir) == [2, 3]
    for path in store.checkpoints_dir(run_dir).iterdir():
        assert store.find_damage(path) is None

    assert list(run_dir.glob("events.out.tfevents.*"))
    resolved = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    assert resolved["model"]["width"] == 4
    assert resolved["checkpoint"]["every_steps"] == 1


def test_the_same_command_again_reports_that_the_run_is_finished(run_dir, recipe):
    manifest = store.checkpoint_path(run_dir, 3) / "manifest.json"
    before = manifest.read_bytes()

    result = invoke("train", recipe, f"run_dir={run_dir}")
    assert result.exit_code == 0, result.output
    assert "3 in all, 0 by this start" in result.stdout
    assert read_status(run_dir)["state"] == "finished"
    assert store.list_steps(run_dir) == [2, 3]
    assert manifest.read_bytes() == before


def test_a_longer_run_resumes_where_the_shorter_one_ended(run_dir, recipe):
    result = invoke("train", recipe, f"run_dir={run_dir}", "trainer.max_steps=5")
    assert result.exit_code == 0, result.output
    assert "5 in all, 2 by this start" in result.stdout

    state = store.read(store.checkpoint_path(run_dir, 5))
    (group,) = state.optimizer["optimizer"]["param_groups"]
    assert group["mask_step"] == 5


def test_after_a_damaged_newest_checkpoint_its_step_is_done_again(run_dir, recipe):
    newest = store.checkpoint_path(run_dir, 3)
    weights = (newest / "model.safetensors").read_bytes()
    flip_a_bit(newest / "model.safetensors")

    result = invoke("train", recipe, f"run_dir={run_dir}")
    assert result.exit_code == 0, result.output
    assert f"{newest}: damaged: model.safetensors" in result.stdout
    assert "3 in all, 1 by this start" in result.stdout
    assert (newest / "model.safetensors").read_bytes() == weights


def test_runs_describes_each_run(run_dir):
    result = invoke("runs", run_dir.parent)
    assert result.exit_code == 0
    (row,) = [line for line in result.stdout.splitlines() if "resnet18" in line]
    for words in ("digits", "SGD lr 0.05", "keep_prob 0.5", "3/3", "finished"):
        assert words in row


def test_runs_shows_that_a_run_was_interrupted(run_dir):
    status = {**read_status(run_dir), "state": "running"}
    (run_dir / "status.json").write_text(json.dumps(status))
    assert "interrupted" in invoke("runs", run_dir.parent).stdout


@pytest.mark.parametrize("flag", [[], ["--verify"]])
def test_checkpoints_lists_all_with_status_0(run_dir, flag):
    result = invoke("checkpoints", run_dir, *flag)
    assert result.exit_code == 0
    for step in (2, 3):
        assert store.checkpoint_name(step) in result.stdout
    assert ("valid" in result.stdout) == bool(flag)
    assert "damaged" not in result.stdout


def test_checkpoints_verify_finds_one_flipped_bit(run_dir):
    flip_a_bit(store.checkpoint_path(run_dir, 2) / "optimizer.pt")
    result = invoke("checkpoints", run_dir, "--verify")
    assert result.exit_code == 1

    (row_2,) = [line for line in result.stdout.splitlines() if store.checkpoint_name(2) in line]
    (row_3,) = [line for line in result.stdout.splitlines() if store.checkpoint_name(3) in line]
    assert "damaged: optimizer.pt" in row_2
    assert "valid" in row_3
    assert store.list_steps(run_dir) == [2, 3]


@pytest.mark.parametrize("command", ["runs", "checkpoints"])
@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_a_run_is_refused(tmp_path, command, name):
    (tmp_path / "empty").mkdir()
    result = invoke(command, tmp_path / name)
    (line,) = error_lines(result)
    assert result.exit_code == 2
    assert str(tmp_path / name) in line


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate"),
        ("optimizer.name=AdamX", "optimizer.name"),
        ("optimizer.momentum=-1", "optimizer.momentum"),
        ("schedule.name=CyclicLR", "schedule.name"),
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
def test_a_wrong_setting_is_refused_before_anything_is_written(tmp_path, recipe, override, key):
    result = invoke("train", recipe, f"run_dir={tmp_path / 'run'}", override)

    (line,) = error_lines(result)
    assert result.exit_code == 2
    assert key in line
    assert not (tmp_path / "run").exists()


def test_a_bad_recipe_ends_the_process_with_status_2_and_no_trace_back(tmp_path):
    (tmp_path / "bad.yaml").write_text("optimizer: {lr: fast}\nmodel: {widht: 4}")
    command = [sys.executable, "-c", "from lrd.cli.app import main; main()", "train", "bad.yaml"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert process.returncode == 2
    assert process.stdout == ""
    lines = process.stderr.splitlines()
    assert len(lines) == 2
    assert any(line.startswith("lrd: bad.yaml: optimizer.lr: ") for line in lines)
    assert "did you mean width?" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize(
    ("override", "key", "old_value", "new_value"),
    [
        ("model.width=8", "model.width", "4", "8"),
        ("optimizer.lr=0.02", "optimizer.lr", "0.05", "0.02"),
        ("lr_dropout.keep_prob=0.25", "lr_dropout.keep_prob", "0.5", "0.25"),
        ("seed=1", "seed", "0", "1"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(
    run_dir, recipe, override, key, old_value, new_value
):
    before = sorted(path.name for path in run_dir.rglob("*"))
    result = invoke("train", recipe, f"run_dir={run_dir}", "trainer.max_steps=5", override)
    assert result.exit_code == 2

    lines = error_lines(result)
    (line,) = [line for line in lines if line.startswith(f"lrd: {key}: ")]
    assert old_value in line
    assert new_value in line
    assert "checkpoint.allow_changed" in lines[-1]

    newest, _ = store.recover_newest(run_dir)
    assert newest.name == store.checkpoint_name(3)
    assert sorted(path.name for path in run_dir.rglob("*")) == before


def test_allow_changed_resumes_with_the_new_lr_and_the_old_momentum(run_dir, recipe):
    settings = ["optimizer.lr=0", "checkpoint.allow_changed=true", "trainer.max_steps=4"]
    result = invoke("train", recipe, f"run_dir={run_dir}", *settings)
    assert result.exit_code == 0, result.output
    assert "4 in all, 1 by this start" in result.stdout

    old = store.read(store.checkpoint_path(run_dir, 3))
    new = store.read(store.checkpoint_path(run_dir, 4))
    (old_group,) = old.optimizer["optimizer"]["param_groups"]
    (new_group,) = new.optimizer["optimizer"]["param_groups"]
    assert old_group["lr"] == 0.05
    assert new_group["lr"] == 0
    assert old_group["mask_step"] == 3
    assert new_group["mask_step"] == 3
    assert torch.equal(old.model["conv1.weight"], new.model["conv1.weight"])

    old_momentum = old.optimizer["optimizer"]["state"][0]["momentum_buffer"].flatten()
    new_momentum = new.optimizer["optimizer"]["state"][0]["momentum_buffer"].flatten()
    assert not torch.equal(old_momentum, new_momentum)
    assert torch.cosine_similarity(old_momentum, new_momentum, dim=0) > 0.5


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("{name: Adam, lr: 0.01}", "{name: Adam, lr: 0.01, amsgrad: true}"),
        ("{name: RMSprop, lr: 0.01}", "{name: RMSprop, lr: 0.01, momentum: 0.9}"),
    ],
)
def test_an_optimizer_that_needs_more_state_begins_it_anew(tmp_path, recipe, before, after):
    run_dir = tmp_path / "run"
    for optimizer, more in ((before, []), (after, ["checkpoint.allow_changed=true"])):
        steps = "trainer.max_steps=2" if optimizer == before else "trainer.max_steps=4"
        settings = [f"optimizer={optimizer}", "schedule=null", steps, *more]
        result = invoke("train", recipe, f"run_dir={run_dir}", *settings)
        assert result.exit_code == 0, result.output
    assert "its state begins anew" in result.stdout

    # The masks do not begin anew: those of the first steps would come again.
    (group,) = store.read(store.checkpoint_path(run_dir, 4)).optimizer["optimizer"]["param_groups"]
    assert group["mask_step"] == 4


def test_export_and_verify_do_not_go_together(run_dir, tmp_path):
    result = invoke("checkpoints", run_dir, "--verify", "--export", tmp_path / "w.safetensors")
    assert result.exit_code == 2
    (line,) = error_lines(result)
    assert "--verify" in line
    assert not (tmp_path / "w.safetensors").exists()


def test_allow_changed_does_not_make_another_model_fit(run_dir, recipe):
    settings = ["model.width=8", "checkpoint.allow_changed=true"]
    result = invoke("train", recipe, f"run_dir={run_dir}", *settings)
    assert result.exit_code == 2

    (line,) = error_lines(result)
    assert store.checkpoint_name(3) in line
    assert "another model" in line

    newest, _ = store.recover_newest(run_dir)
    assert newest.name == store.checkpoint_name(3)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(tmp_path, recipe):
    run_dir = tmp_path / "run"
    settings = ["optimizer.lr=1e30", "checkpoint.every_steps=1"]
    result = invoke("train", recipe, f"run_dir={run_dir}", *settings)
    assert result.exit_code == 1

    (line,) = error_lines(result)
    assert "step 2" in line
    assert "rank 0" in line

    assert store.list_steps(run_dir) == [1]
    newest, _ = store.recover_newest(run_dir)
    assert store.find_damage(newest) is None
    assert read_status(run_dir)["state"] == "failed"
    assert read_status(run_dir)["step"] == 1
    assert "not finite" in invoke("runs", tmp_path).stdout


def test_a_folder_of_images_is_trained_on(tmp_path, recipe):
    for part, count in (("train", 6), ("test", 2)):
        for name, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (10, 10), (shade + i, shade, shade))
                image.save(folder / f"{i}.png")

    run_dir = tmp_path / "run"
    settings = f"dataset: imagefolder, root: {tmp_path}, batch_size: 4, image_size: 8"
    override = f"data={{{settings}, augment: crop_flip}}"
    result = invoke("train", recipe, f"run_dir={run_dir}", override)
    assert result.exit_code == 0, result.output
    assert read_status(run_dir)["step"] == 3

    newest, _ = store.recover_newest(run_dir)
    assert store.read(newest).model["fc.weight"].shape[0] == 2


def test_with_fewer_steps_than_are_done_nothing_is_left_to_do(tmp_path, recipe):
    run_dir = tmp_path / "run"
    first = invoke("train", recipe, f"run_dir={run_dir}", "checkpoint.every_steps=2")
    assert first.exit_code == 0

    # The checkpoint that is left was never evaluated.
    shutil.rmtree(store.checkpoint_path(run_dir, 3))
    second = invoke("train", recipe, f"run_dir={run_dir}", "trainer.max_steps=1")
    assert second.exit_code == 0, second.exception
    assert "nothing left to do: 2 of 1 steps are done" in second.stdout


FULL = "lrd: events.out: No space left on device"


def no_checkpoint(step: int) -> str:
    """The message about a checkpoint that a full disk prevented."""
    return f"{FULL}: no checkpoint of step {step} without its records"


@pytest.fixture
def train_on_full_disk(tmp_path, recipe, monkeypatch) -> Callable[..., Result]:
    """A function that trains with a checkpoint at each step.

    The flushes of the event file whose numbers are in `failing_flushes` fail; the first is 1.
    """

    def train(failing_flushes: Collection[int], *overrides: str) -> Result:
        flush = EventFile.flush
        numbers = itertools.count(1)

        def flush_or_fail(events: EventFile) -> None:
            if next(numbers) in failing_flushes:
                raise OSError(28, "No space left on device", "events.out")
            flush(events)

        with monkeypatch.context() as patch:
            patch.setattr("lrd.tracking.event_file._SECONDS_BETWEEN_FLUSHES", math.inf)
            patch.setattr(EventFile, "flush", flush_or_fail)
            settings = ["checkpoint.every_steps=1", "checkpoint.keep_best=false", *overrides]
            return invoke("train", recipe, f"run_dir={tmp_path / 'run'}", *settings)

    return train


def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path, train_on_full_disk):
    result = train_on_full_disk(range(1, 100))
    assert result.exit_code == 2
    assert error_lines(result) == [FULL]
    assert store.list_steps(tmp_path / "run") == []


def test_on_a_disk_that_stays_full_no_checkpoint_is_saved(tmp_path, recipe, train_on_full_disk):
    run_dir = tmp_path / "run"
    result = train_on_full_disk(range(2, 100))
    assert result.exit_code == 2
    assert error_lines(result) == [
        f"{no_checkpoint(1)}; training goes on",
        f"{no_checkpoint(2)}; training goes on",
        no_checkpoint(3),
        "lrd: the state after step 3 is not saved; start the same command again",
    ]
    assert store.list_steps(run_dir) == []
    assert read_status(run_dir)["state"] == "failed"

    resumed = invoke("train", recipe, f"run_dir={run_dir}")
    assert resumed.exit_code == 0, resumed.output
    assert "3 in all, 3 by this start" in resumed.stdout
    assert recorded_steps(run_dir) == [1, 2, 3]


@pytest.mark.parametrize(("step", "saved_steps"), [(1, [2, 3]), (2, [1, 3])])
def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(
    tmp_path, train_on_full_disk, step, saved_steps
):
    run_dir = tmp_path / "run"
    result = train_on_full_disk({step + 1})
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [f"{no_checkpoint(step)}; training goes on"]
    assert read_status(run_dir)["state"] == "finished"
    assert recorded_steps(run_dir) == [1, 2, 3]

    assert store.list_steps(run_dir) == saved_steps
    newest, passed_over = store.recover_newest(run_dir)
    assert newest.name == store.checkpoint_name(3)
    assert passed_over == []


def test_with_on_error_stop_a_full_disk_stops_the_run(tmp_path, recipe, train_on_full_disk):
    run_dir = tmp_path / "run"
    result = train_on_full_disk({3}, "checkpoint.on_error=stop")
    assert result.exit_code == 2
    assert error_lines(result) == [no_checkpoint(2)]
    assert store.list_steps(run_dir) == [1]
    assert store.find_damage(store.checkpoint_path(run_dir, 1)) is None
    assert read_status(run_dir)["state"] == "failed"

    resumed = invoke("train", recipe, f"run_dir={run_dir}")
    assert resumed.exit_code == 0, resumed.output
    assert "3 in all, 2 by this start" in resumed.stdout
    assert recorded_steps(run_dir) == [1, 2, 3]


def test_after_a_checkpoint_that_cannot_be_written_the_next_one_is(tmp_path, recipe, monkeypatch):
    message = "step-00000002: the checkpoint could not be written: no room"
    save = store.save

    def save_or_fail(run_dir: Path, state: store.TrainState) -> Path:
        if state.step == 2:
            raise UserError(message)
        return save(run_dir, state)

    monkeypatch.setattr(store, "save", save_or_fail)
    result = invoke("train", recipe, f"run_dir={tmp_path / 'run'}", "checkpoint.every_steps=1")
    assert result.exit_code == 0, result.output
    assert result.stderr == f"lrd: {message}; training goes on\n"

    newest, _ = store.recover_newest(tmp_path / "run")
    assert newest.name == store.checkpoint_name(3)


def test_export_writes_the_weights_of_the_newest_valid_checkpoint(run_dir, tmp_path):
    out = tmp_path / "weights.safetensors"
    flip_a_bit(store.checkpoint_path(run_dir, 3) / "model.safetensors")
    result = invoke("checkpoints", run_dir, "--export", out)
    assert result.exit_code == 0, result.output
    assert store.checkpoint_name(2) in result.stdout
    assert str(out) in result.stdout

    weights = load_file(out)
    expected = store.read(store.checkpoint_path(run_dir, 2)).model
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(weights[key], tensor)
    assert store.list_steps(run_dir) == [2, 3]


def test_an_export_without_a_valid_checkpoint_is_refused(run_dir, tmp_path):
    out = tmp_path / "weights.safetensors"
    for step in (2, 3):
        flip_a_bit(store.checkpoint_path(run_dir, step) / "model.safetensors")

    for folder in (run_dir, tmp_path / "nowhere"):
        result = invoke("checkpoints", folder, "--export", out)
        assert result.exit_code == 2
        (line,) = error_lines(result)
        assert str(folder) in line
    assert not out.exists()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_start_reports_that_it_begins_anew(run_dir, recipe, damaged):
    if damaged:
        for step in store.list_steps(run_dir):
            (store.checkpoint_path(run_dir, step) / "model.safetensors").write_bytes(b"")

    result = invoke("train", recipe, f"run_dir={run_dir}")
    assert result.exit_code == 0
    assert ("no valid checkpoint is left; starting from the beginning" in result.stdout) == damaged
    assert store.list_steps(run_dir)[-1] == 3


def test_a_signal_in_the_last_evaluation_leaves_it_for_the_next_start(
    tmp_path, recipe, monkeypatch
):
    import lrd.train

    def stop_in_evaluation(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(lrd.train, "evaluate_parts", stop_in_evaluation)
        stopped = invoke("train", recipe, f"run_dir={run_dir}")
    assert stopped.exit_code == 75
    assert "stopped by signal 15 after step 3, saved" in stopped.stdout
    assert read_status(run_dir)["state"] == "stopped"

    resumed = invoke("train", recipe, f"run_dir={run_dir}")
    assert resumed.exit_code == 0
    assert read_status(run_dir)["state"] == "finished"
    assert read_status(run_dir)["best_accuracy"] is not None
    assert store.read_trainer(store.checkpoint_path(run_dir, 3))["evaluated"] == 3

    # The row of the last step was in the file already, without its evaluation.
    rows = read_metrics(run_dir)
    assert rows == read_records_by_step(run_dir)
    assert {"train/loss", "test/loss"} <= rows[3].keys()


def test_check_tries_a_recipe_out_and_writes_nothing(tmp_path, recipe):
    before = sorted(tmp_path.rglob("*"))
    result = invoke("check", recipe, f"run_dir={tmp_path / 'run'}")
    assert result.exit_code == 0, result.output
    for words in ("1,437 training images", "64x3x8x8", "images/s", "an epoch", "a new run"):
        assert words in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_check_sees_where_a_run_would_go_on(run_dir, recipe):
    result = invoke("check", recipe, f"run_dir={run_dir}")
    assert "goes on after step 3" in result.stdout
    assert store.list_steps(run_dir) == [2, 3]


@pytest.mark.parametrize(
    ("override", "status", "expected"),
    [
        ("data.batch_size=5000", 2, "data.batch_size"),
        ("data.image_size=100000", 2, "data.image_size"),
        ("optimizer.lr=1e30", 1, "step 2: the loss is"),
        ("run_dir=/proc/version/run", 2, "run_dir: /proc/version/run cannot be written"),
    ],
)
def test_check_reports_what_is_wrong_in_one_line(recipe, override, status, expected):
    result = invoke("check", recipe, override)
    (line,) = error_lines(result)
    assert result.exit_code == status
    assert expected in line


def test_the_version_is_shown():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"lrd {lrd.__version__}, torch {torch.__version__}, Python 3.")


@pytest.mark.parametrize(
    "command",
    [
        "",
        "train",
        "launch",
        "check",
        "lr",
        "runs",
        "compare",
        "checkpoints",
        "data",
        "data pack",
        "data verify",
        "doctor",
    ],
)
def test_each_command_has_a_short_option_for_help(command):
    result = invoke(*command.split(), "-h")
    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert "--help" in result.output
