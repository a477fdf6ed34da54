"""A run can resume after a process was killed at any point of a save, a deletion or a start."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lrd.checkpoint import store
from tests.helpers.checkpoints import content, flip_a_bit, listed, make_state, same
from tests.helpers.processes import in_child

# Python's audit events for what changes or reads a folder.
FILE_EVENTS = {
    "open",
    "os.chmod",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "shutil.rmtree",
}
KEEP_LAST = 2
state_of = functools.cache(make_state)


def die_at(number: int, folder: Path) -> None:
    """Have this process killed right before its `number`-th operation on `folder` (from 1)."""
    operations_left = number

    def count() -> None:
        nonlocal operations_left
        operations_left -= 1
        if operations_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and is_in_folder(arguments[0]):
            count()

    def is_in_folder(file: Any) -> bool:
        if isinstance(file, int):
            file = os.readlink(f"/proc/self/fd/{file}")
        path = os.fspath(file)
        # shutil.rmtree names files relative to the folder that it is in.
        return not os.path.isabs(path) or path.startswith(str(folder))

    def in_halves(write: Callable[..., None]) -> Callable[..., None]:
        """Make a function that writes a file leave half of it first, with a point to die there."""

        def write_in_halves(value: Any, target: Any, *more: Any) -> None:
            count()

            write(value, target, *more)
            if isinstance(target, Path):
                os.truncate(target, target.stat().st_size // 2)
            else:
                target.flush()
                target.truncate(target.tell() // 2)
                target.seek(0)
            count()

            write(value, target, *more)
            count()

        return write_in_halves

    def fsync(_: int) -> None:
        count()

    safetensors.torch.save_file = in_halves(safetensors.torch.save_file)
    torch.save = in_halves(torch.save)
    os.fsync = fsync
    sys.addaudithook(hook)


def killed_at_each_point(
    tmp_path: Path,
    prepare: Callable[[Path], object],
    action: Callable[[Path], object],
    check: Callable[[Path], object],
) -> int:
    """Kill `action` once before each of its operations on the checkpoints, and check what is left.

    Args:
        tmp_path: where the run directories are made.
        prepare: makes a run directory.
        action: what is killed in that run directory.
        check: asserts what must hold of the run directory afterwards.

    Returns:
        How often the action was killed.
    """
    for number in itertools.count(1):
        run_dir = tmp_path / str(number)
        prepare(run_dir)

        def act(run_dir: Path = run_dir, number: int = number) -> None:
            die_at(number, store.checkpoints_dir(run_dir))
            action(run_dir)

        signal_number = in_child(act)
        check(run_dir)
        shutil.rmtree(run_dir)
        if signal_number == 0:
            return number - 1
        assert signal_number == signal.SIGKILL
    raise AssertionError


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch):
    """Save time: what a killed process wrote is there whether it was flushed to the disk or not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def prepare(tmp_path) -> Callable[[Path], None]:
    """Return a function that makes a run directory with checkpoints of the steps 1, 2 and 3."""
    for step in (1, 2, 3):
        store.save(tmp_path / "template", state_of(step))

    def copy(run_dir: Path) -> None:
        shutil.copytree(tmp_path / "template", run_dir)

    return copy


def save_and_delete_old(run_dir: Path, state: store.TrainState) -> list[str]:
    store.save(run_dir, state)
    return store.delete_old(run_dir, KEEP_LAST, None)


def is_state(read: store.TrainState, saved: store.TrainState) -> bool:
    weights = {key: read.model.get(key) for key in saved.model}
    return same(weights, dict(saved.model)) and same(read.optimizer, saved.optimizer)


def check_a_start(run_dir: Path, expected: list[store.TrainState]) -> None:
    """Assert that a start finds one of the expected states, and that saves go on.

    There must be a second valid checkpoint, and none that is damaged.
    """
    path, lines = store.recover_newest(run_dir)
    assert path is not None
    assert lines == []
    assert any(is_state(store.read(path), state) for state in expected)

    names = listed(run_dir)
    assert names == [store.checkpoint_name(step) for step in store.list_steps(run_dir)]
    assert len(names) >= 2
    assert all(store.find_damage(store.checkpoints_dir(run_dir) / name) is None for name in names)

    assert save_and_delete_old(run_dir, state_of(5)) == []
    assert listed(run_dir) == [path.name, "step-00000005"]
    assert store.recover_newest(run_dir) == (store.checkpoint_path(run_dir, 5), [])


def test_killed_at_any_point_of_a_save(tmp_path, prepare):
    points = killed_at_each_point(
        tmp_path,
        prepare,
        action=lambda run_dir: save_and_delete_old(run_dir, state_of(4)),
        check=lambda run_dir: check_a_start(run_dir, expected=[state_of(3), state_of(4)]),
    )
    assert points > 30


@pytest.mark.slow
def test_killed_at_any_point_of_a_second_save_of_the_same_step(tmp_path, prepare):
    new = make_state(3)
    new.model["half"] += 1
    points = killed_at_each_point(
        tmp_path,
        prepare,
        action=lambda run_dir: store.save(run_dir, new),
        check=lambda run_dir: check_a_start(run_dir, expected=[state_of(3), new]),
    )
    assert points > 20


def test_killed_at_any_point_of_a_start(tmp_path, prepare):
    damaged: dict[str, str] = {}

    def prepare_leftovers(run_dir: Path) -> None:
        """Damage step 3; leave a part of step 4 and steps 1 and 2 set aside, as killed saves do."""
        prepare(run_dir)
        folder = store.checkpoints_dir(run_dir)
        newest = store.checkpoint_path(run_dir, 3)

        shutil.copytree(newest, folder / ".step-00000004.77.tmp")
        (folder / ".step-00000004.77.tmp" / "manifest.json").unlink()
        shutil.copytree(newest, folder / ".step-00000001.77.old.tmp")
        store.checkpoint_path(run_dir, 2).rename(folder / ".step-00000002.78.old.tmp")

        flip_a_bit(newest / "model.safetensors")
        damaged.update(content(newest))

    def check(run_dir: Path) -> None:
        path, _ = store.recover_newest(run_dir)
        assert path == store.checkpoint_path(run_dir, 2)
        assert listed(run_dir) == ["step-00000001", "step-00000002", "step-00000003.damaged"]
        assert content(store.checkpoints_dir(run_dir) / "step-00000003.damaged") == damaged
        assert store.find_damage(store.checkpoint_path(run_dir, 1)) is None
        assert store.recover_newest(run_dir) == (path, [])

    points = killed_at_each_point(tmp_path, prepare_leftovers, store.recover_newest, check)
    assert points > 20


def test_interrupted_between_the_two_renames_of_a_second_save_of_the_same_step(
    tmp_path, prepare, monkeypatch
):
    """An interrupt is none of the errors of a disk, and the old checkpoint may be the only one."""
    run_dir = tmp_path / "run"
    prepare(run_dir)
    before = content(store.checkpoint_path(run_dir, 3))
    rename = Path.rename
    targets: list[Path] = []

    def rename_or_interrupt(path: Path, target: Path) -> Path:
        targets.append(target)
        if len(targets) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.save(run_dir, make_state(3))

    assert content(store.checkpoint_path(run_dir, 3)) == before
    assert listed(run_dir) == ["step-00000001", "step-00000002", "step-00000003"]
