"""The newest valid checkpoint of all hosts is copied to rank 0; here the ranks are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrd.checkpoint import store, transfer
from lrd.distributed import communication
from lrd.errors import RunError, UserError
from tests.helpers.checkpoints import content, flip_a_bit, listed, make_state

NUM_RANKS = 2


class ThreadGroup:
    """What `communication` needs of torch.distributed, with a thread for each rank."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(NUM_RANKS, timeout=30)
        self._rows = [torch.empty(0)] * NUM_RANKS
        self._thread = threading.local()

    def run(self, action: Callable[[int], Any]) -> list[Any]:
        """Call `action` with each rank. Returns the results, or the UserErrors that it raised."""

        def act(rank: int) -> Any:
            self._thread.rank = rank
            try:
                return action(rank)
            except UserError as error:
                return error

        with ThreadPoolExecutor(NUM_RANKS) as pool:
            return list(pool.map(act, range(NUM_RANKS)))

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return NUM_RANKS

    def get_rank(self) -> int:
        return int(self._thread.rank)

    def get_backend(self) -> str:
        return "gloo"

    def all_gather(self, rows: list[torch.Tensor], row: torch.Tensor) -> None:
        self._rows[self.get_rank()] = row
        self._barrier.wait()
        for target, source in zip(rows, self._rows, strict=True):
            target.copy_(source)
        self._barrier.wait()

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self._rows[self.get_rank()] = tensor
        self._barrier.wait()
        if self.get_rank() != src:
            tensor.copy_(self._rows[src])
        self._barrier.wait()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> ThreadGroup:
    group = ThreadGroup()
    monkeypatch.setattr(communication, "dist", group)
    return group


@pytest.fixture
def run_dirs(tmp_path: Path) -> list[Path]:
    """The run directory on the host of each rank."""
    return [tmp_path / f"host{rank}" / "run" for rank in range(NUM_RANKS)]


def fetch(group: ThreadGroup, run_dirs: list[Path]) -> list[Any]:
    return group.run(lambda rank: transfer.fetch_newest(run_dirs[rank]))


def save(run_dir: Path, *steps: int) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    for step in steps:
        store.save(run_dir, make_state(step))


def damage(run_dir: Path, step: int) -> None:
    flip_a_bit(store.checkpoint_path(run_dir, step) / "model.safetensors")


def test_a_later_checkpoint_is_copied_with_the_best_one_and_the_records(group, run_dirs):
    save(run_dirs[0])
    save(run_dirs[1], 1, 2, 3)
    (run_dirs[1] / "events.out.tfevents.0").write_bytes(b"records")
    (run_dirs[1] / "metrics.csv").write_bytes(b"a table")

    assert fetch(group, run_dirs) == [None, None]
    assert listed(run_dirs[0]) == ["step-00000001", "step-00000003"]
    for step in (1, 3):
        copied, source = (content(store.checkpoint_path(path, step)) for path in run_dirs)
        assert copied == source
    assert (run_dirs[0] / "events.out.tfevents.0").read_bytes() == b"records"
    assert (run_dirs[0] / "metrics.csv").read_bytes() == b"a table"
    assert not (run_dirs[0] / ".transfer").exists()


def test_what_a_survivor_saved_comes_without_the_older_records_of_its_host(group, run_dirs):
    save(run_dirs[0], 1)
    (run_dirs[0] / "events.out.tfevents.0").write_bytes(b"records")
    state = make_state(2)
    trainer = {**state.trainer, "rescued": {"rank": 1, "reason": "rank 0 is gone", "scalars": {}}}
    store.save(run_dirs[1], replace(state, trainer=trainer))
    (run_dirs[1] / "events.out.tfevents.0").write_bytes(b"rec")

    assert fetch(group, run_dirs) == [None, None]
    assert listed(run_dirs[0]) == ["step-00000001", "step-00000002"]
    assert (run_dirs[0] / "events.out.tfevents.0").read_bytes() == b"records"


def test_nothing_is_copied_if_no_rank_has_a_later_valid_checkpoint(group, run_dirs):
    save(run_dirs[0], 2)
    save(run_dirs[1], 1, 2, 3)
    damage(run_dirs[1], 3)
    assert fetch(group, run_dirs) == [None, None]
    assert listed(run_dirs[0]) == ["step-00000002"]


@pytest.mark.parametrize("other_steps", [[2, 3], [2]])
def test_a_damaged_checkpoint_of_rank_0_does_not_hide_a_valid_one_of_another_host(
    group, run_dirs, other_steps
):
    save(run_dirs[0], 1, 3)
    damage(run_dirs[0], 3)
    save(run_dirs[1], *other_steps)

    assert fetch(group, run_dirs) == [None, None]
    newest, _ = store.recover_newest(run_dirs[0])
    assert newest == store.checkpoint_path(run_dirs[0], other_steps[-1])
    assert "step-00000003.damaged" in listed(run_dirs[0])


def test_what_a_killed_copy_left_is_not_added_to(group, run_dirs):
    save(run_dirs[0], 1)
    save(run_dirs[1], 2)
    (run_dirs[1] / "events.out.tfevents.0").write_bytes(b"records")

    staging = run_dirs[0] / ".transfer"
    left = store.checkpoint_path(staging, 2)
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"a part")
    (staging / "events.out.tfevents.0").write_bytes(b"a part")
    store.checkpoint_path(staging, 5).mkdir()

    assert fetch(group, run_dirs) == [None, None]
    assert listed(run_dirs[0]) == ["step-00000001", "step-00000002"]
    assert store.find_damage(store.checkpoint_path(run_dirs[0], 2)) is None
    assert (run_dirs[0] / "events.out.tfevents.0").read_bytes() == b"records"
    assert not staging.exists()


def test_a_rank_that_cannot_list_its_checkpoints_does_not_leave_the_others_waiting(
    group, run_dirs, monkeypatch
):
    list_steps = store.list_steps

    def list_or_fail(run_dir: Path) -> list[int]:
        if run_dir == run_dirs[1]:
            raise PermissionError(13, "Permission denied", str(run_dir))
        return list_steps(run_dir)

    monkeypatch.setattr(store, "list_steps", list_or_fail)
    errors = fetch(group, run_dirs)
    assert len(errors) == NUM_RANKS
    for error in errors:
        assert "rank 1 on " in str(error)
        assert str(error).endswith(f"{run_dirs[1]}: Permission denied")


@pytest.mark.parametrize(
    "name",
    [
        "../metrics.csv",
        "/etc/cron.d/x",
        "checkpoints/step-00000002/../../../x",
        "checkpoints/step-00000002/sub/x",
        "checkpoints/step-00000002/.x",
        "checkpoints/step-00000002/",
        "checkpoints/../x",
        "checkpoints/step-2/x",
        "events.out.tfevents.1/../../x",
        "recipe.yaml",
        "metrics.csv\n",
        "checkpoints\\step-00000002\\x",
        "",
        "metrics.csv\0",
    ],
)
def test_a_name_from_another_host_cannot_leave_the_run_directory(
    group, run_dirs, monkeypatch, name
):
    save(run_dirs[0], 1)
    save(run_dirs[1], 2)
    monkeypatch.setattr(transfer, "_list_files", lambda *_: {"metrics.csv": 1, name: 1})

    before = sorted(run_dirs[0].parent.rglob("*"))
    for error in fetch(group, run_dirs):
        assert isinstance(error, RunError)
        (line,) = str(error).splitlines()
        assert line.startswith("rank 1 on ")
        assert line.endswith("which is none that a run writes; nothing was copied")
    assert sorted(run_dirs[0].parent.rglob("*")) == before


def test_a_staging_folder_that_leads_elsewhere_is_refused(group, run_dirs, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save(run_dirs[0], 1)
    save(run_dirs[1], 2)
    (run_dirs[0] / ".transfer").symlink_to(elsewhere)

    for error in fetch(group, run_dirs):
        assert isinstance(error, UserError)
        assert len(str(error).splitlines()) == 1
    assert list(elsewhere.iterdir()) == []


def test_other_files_beside_a_checkpoint_stay_where_they_are(group, run_dirs):
    save(run_dirs[0], 1)
    save(run_dirs[1], 2)
    (store.checkpoint_path(run_dirs[1], 2) / ".nfs0001").write_bytes(b"")
    assert fetch(group, run_dirs) == [None, None]
    assert listed(run_dirs[0]) == ["step-00000001", "step-00000002"]
