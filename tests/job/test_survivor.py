"""A run that fails in the middle of a step saves the state of the step before it."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from lrd.checkpoint import store
from lrd.checkpoint.run_dir import SURVIVORS_LOCK, RunDir
from lrd.errors import RankError, RunError
from lrd.job import survivor
from lrd.job.buffers import BufferSnapshot
from lrd.job.state import Job
from lrd.train import run
from tests.helpers.checkpoints import make_state
from tests.helpers.equality import assert_same_final_state
from tests.helpers.metrics_csv import read_metrics, read_records_by_step
from tests.helpers.tensorboard_events import read_scalars
from tests.helpers.training import train

FAILING_STEP = 8  # of 10; the second of the second epoch is 7
OVERRIDES = (
    "trainer.accumulation_steps=2",
    "trainer.ema_decay=0.5",
    "optimizer.momentum=0.9",
    "schedule.name=StepLR",
    "schedule.step_size=1",
)


def fail_in(monkeypatch: pytest.MonkeyPatch, step: int, error: Exception) -> None:
    """Raise an error in the second micro step of a step, whose first one has changed buffers."""
    load_micro_batch = Job.load_micro_batch

    def load_or_fail(job: Job, number: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if (number + 1, micro_step) == (step, 1):
            raise error
        return load_micro_batch(job, number, micro_step)

    monkeypatch.setattr(Job, "load_micro_batch", load_or_fail)


def start_and_fail(folder: Path, run_dir: Path) -> int:
    status = run(str(folder / "recipe.yaml"), [f"run_dir={run_dir}", *OVERRIDES])
    AcceleratorState._reset_state(reset_partial_state=True)
    return status


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_cannot_read_a_sample_goes_on_without_losing_a_step(
    tmp_path, monkeypatch, capsys
):
    train(tmp_path, tmp_path / "undisturbed" / "run", *OVERRIDES)

    run_dir = tmp_path / "disturbed" / "run"
    with monkeypatch.context() as patch:
        fail_in(patch, FAILING_STEP, RankError("sample 3 is gone"))
        assert start_and_fail(tmp_path, run_dir) == 1
    assert "step 8: sample 3 is gone" in capsys.readouterr().err

    assert store.list_steps(run_dir)[-1] == FAILING_STEP - 1
    path = store.checkpoint_path(run_dir, FAILING_STEP - 1)
    assert store.find_damage(path) is None
    rescued = json.loads((path / "trainer.json").read_text())["rescued"]
    assert rescued["rank"] == 0
    assert "sample 3 is gone" in rescued["reason"]
    assert rescued["scalars"]["7"].keys() >= {"train/loss", "lr/group0"}

    train(tmp_path, run_dir, *OVERRIDES)
    assert_same_final_state(run_dir, tmp_path / "undisturbed" / "run")
    records = read_scalars(run_dir)
    expected = read_scalars(tmp_path / "undisturbed" / "run")
    del records["train/images_per_second"], expected["train/images_per_second"]
    assert records == expected
    assert read_metrics(run_dir) == read_records_by_step(run_dir)
    assert "rescued" not in store.read_trainer(store.checkpoint_path(run_dir, 10))


@pytest.mark.usefixtures("one_thread")
def test_a_fault_that_puts_the_state_in_doubt_saves_nothing(tmp_path, monkeypatch):
    train(tmp_path, tmp_path / "first" / "run", *OVERRIDES)  # writes the recipe
    run_dir = tmp_path / "disturbed" / "run"
    fail_in(monkeypatch, FAILING_STEP, RunError("the replicas differ"))
    assert start_and_fail(tmp_path, run_dir) == 1
    assert store.list_steps(run_dir) == [5]


def fake_job(**changes) -> SimpleNamespace:
    """What `save_state` looks at before it saves anything."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=1)
    values = {
        "accelerator": accelerator,
        "first_step": 2,
        "is_sharded": False,
        "has_local_momentum": False,
        "is_updating": False,
        "step": 4,
    }
    return SimpleNamespace(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_sharded": True}, "each rank has a shard of it"),
        ({"has_local_momentum": True}, "the momentum of the lost rank's own gradients is lost"),
        ({"is_updating": True}, "an update has failed in the middle"),
        ({"accelerator": SimpleNamespace(device=torch.device("cuda"))}, "on a GPU"),
    ],
)
def test_a_state_that_is_not_whole_is_not_saved_and_there_is_a_reason(changes, reason):
    job = fake_job(**changes)
    assert reason in survivor.reason_to_save_nothing(job)
    survivor.save_state(job, "a rank is gone")  # a fake job has no state


def test_a_start_that_completed_no_step_has_nothing_to_save():
    survivor.save_state(fake_job(step=2), "a rank is gone")


def test_one_rank_of_a_host_writes_unless_another_one_has_a_later_state(tmp_path):
    def save(step: int) -> None:
        job = SimpleNamespace(
            **vars(fake_job(step=step)),
            recipe=SimpleNamespace(run_dir=str(tmp_path), checkpoint=SimpleNamespace(keep_last=2)),
            buffers=SimpleNamespace(step=None),
            kept_best_step=None,
            recorder=SimpleNamespace(latest_scalars=dict),
            train_state=lambda: make_state(step),
        )
        survivor.save_state(job, "a rank is gone")

    threads = [threading.Thread(target=save, args=(step,)) for step in (4, 5, 5, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    steps = store.list_steps(tmp_path)
    assert steps[-1] == 5
    for step in steps:
        assert store.find_damage(store.checkpoint_path(tmp_path, step)) is None
    assert [path.name for path in (tmp_path / "checkpoints").glob(".*")] == []


def test_a_stopped_rank_that_holds_the_lock_is_not_waited_for_forever(tmp_path, monkeypatch):
    monkeypatch.setattr(survivor, "_SECONDS_TO_WAIT", 0.2)
    with (tmp_path / SURVIVORS_LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with survivor._one_rank_at_a_time(tmp_path):
            pass


def test_the_next_start_waits_for_a_rank_that_still_saves(tmp_path):
    with (tmp_path / SURVIVORS_LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        timer = threading.Timer(0.3, lock.close)
        began = time.monotonic()
        timer.start()
        RunDir(tmp_path).close()
        assert time.monotonic() - began > 0.25


def test_a_snapshot_puts_back_buffers_of_any_dtype_and_keeps_the_tensors():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    network.register_buffer("flags", torch.tensor([True, False]))
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    buffers = list(network.buffers())

    snapshot = BufferSnapshot(network)
    assert snapshot.step is None
    snapshot.take(3)
    assert snapshot.step == 3
    network(torch.randn(8, 3, 6, 6))
    network.flags.logical_not_()
    assert not torch.equal(network[1].running_mean, before["1.running_mean"])
    assert network[1].num_batches_tracked == 1

    snapshot.restore()
    for (name, buffer), kept in zip(network.named_buffers(), buffers, strict=True):
        assert buffer is kept
        assert torch.equal(buffer, before[name]), name


def test_a_buffer_of_another_shape_may_take_the_place_of_one():
    network = nn.BatchNorm2d(4)
    network.register_buffer("seen", torch.zeros(2))
    snapshot = BufferSnapshot(network)
    snapshot.take(0)
    network.seen = torch.ones(3)
    snapshot.take(1)
    network.seen.zero_()
    snapshot.restore()
    assert network.seen.tolist() == [1, 1, 1]
