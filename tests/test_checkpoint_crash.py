"""A process killed at any moment of a save, a retention or a start leaves what a run can go on from."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_checkpoint import content, flip_a_bit, listed, make_state, same

from lrd import checkpoint

FILE_EVENTS = {
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir"),
    "shutil.rmtree",
}
KEEP_LAST = 2
state_of = functools.cache(make_state)


def in_child(action: Callable[[], object]) -> int:
    """Act in a forked child. Returns the signal that killed it, 0: none; what it raised fails the test."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            action()
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    assert said == ""
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def die_at(number: int, folder: Path) -> None:
    """From now on this process is killed right before the so-many-th thing that it does to `folder`."""
    left = number

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and is_in_it(arguments[0]):
            count()

    def is_in_it(what: Any) -> bool:
        if isinstance(what, int):
            what = os.readlink(f"/proc/self/fd/{what}")
        path = os.fspath(what)
        return not os.path.isabs(path) or path.startswith(str(folder))  # shutil.rmtree names files relative to folders

    def in_halves(write: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def act(value: Any, to: Any) -> None:
            count()
            write(value, to)
            if isinstance(to, Path):
                os.truncate(to, to.stat().st_size // 2)
            else:
                to.flush()
                to.truncate(to.tell() // 2)
                to.seek(0)
            count()
            write(value, to)
            count()

        return act

    def fsync(_: int) -> None:
        count()

    safetensors.torch.save_file = in_halves(safetensors.torch.save_file)
    torch.save = in_halves(torch.save)
    os.fsync = fsync
    sys.addaudithook(hook)


def killed_at_each_point(
    tmp_path: Path, prepare: Callable[[Path], object], action: Callable[[Path], object], check: Callable[[Path], object]
) -> int:
    """Die once before each thing that `action` does to the checkpoints, and check what is left. Returns how often."""
    for number in itertools.count(1):
        run_dir = tmp_path / str(number)
        prepare(run_dir)

        def act(run_dir: Path = run_dir, number: int = number) -> None:
            die_at(number, checkpoint.folder(run_dir))
            action(run_dir)

        killer = in_child(act)
        check(run_dir)
        shutil.rmtree(run_dir)
        if killer == 0:
            return number - 1
        assert killer == signal.SIGKILL
    raise AssertionError


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """What a killed process wrote is there whether it was flushed to the disk or not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def prepare(tmp_path) -> Callable[[Path], None]:
    """Makes a run directory with checkpoints of the steps 1, 2 and 3."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "template", state_of(step))

    def copy(run_dir: Path) -> None:
        shutil.copytree(tmp_path / "template", run_dir)

    return copy


def save_and_retain(run_dir: Path, state: checkpoint.State) -> list[str]:
    checkpoint.save(run_dir, state)
    return checkpoint.retain(run_dir, KEEP_LAST, None)


def is_state(read: checkpoint.State, saved: checkpoint.State) -> bool:
    weights = {key: read.model.get(key) for key in saved.model}
    return same(weights, dict(saved.model)) and same(read.optimizer, saved.optimizer)


def check_a_start(run_dir: Path, expected: list[checkpoint.State]) -> None:
    """A start finds the state of one of `expected`, a second whole one, nothing damaged; and saves go on."""
    path, lines = checkpoint.newest(run_dir)
    assert path is not None
    assert lines == []
    assert any(is_state(checkpoint.read(path), other) for other in expected)
    names = listed(run_dir)
    assert names == [checkpoint.name(step) for step in checkpoint.steps(run_dir)]
    assert len(names) >= 2
    assert all(checkpoint.damage(checkpoint.folder(run_dir) / name) is None for name in names)
    assert save_and_retain(run_dir, state_of(5)) == []
    assert listed(run_dir) == [path.name, "step-00000005"]
    assert checkpoint.newest(run_dir) == (checkpoint.path_of(run_dir, 5), [])


def test_killed_at_any_point_of_a_save(tmp_path, prepare):
    new, expected = state_of(4), [state_of(3), state_of(4)]
    points = killed_at_each_point(
        *(tmp_path, prepare),
        action=lambda run_dir: save_and_retain(run_dir, new),
        check=lambda run_dir: check_a_start(run_dir, expected),
    )
    assert points > 30


def test_killed_at_any_point_of_a_second_save_of_the_same_step(tmp_path, prepare):
    new = make_state(3)
    new.model["half"] += 1
    expected = [state_of(3), new]
    points = killed_at_each_point(
        *(tmp_path, prepare),
        action=lambda run_dir: checkpoint.save(run_dir, new),
        check=lambda run_dir: check_a_start(run_dir, expected),
    )
    assert points > 20


def test_killed_at_any_point_of_a_start(tmp_path, prepare):
    damaged: dict[str, str] = {}

    def spoil(run_dir: Path) -> None:
        prepare(run_dir)
        folder = checkpoint.folder(run_dir)
        newest = checkpoint.path_of(run_dir, 3)
        shutil.copytree(newest, folder / ".step-00000004.77.tmp")
        (folder / ".step-00000004.77.tmp" / "manifest.json").unlink()
        shutil.copytree(newest, folder / ".step-00000001.77.old.tmp")
        checkpoint.path_of(run_dir, 2).rename(folder / ".step-00000002.78.old.tmp")
        flip_a_bit(newest / "model.safetensors")
        damaged.update(content(newest))

    def check(run_dir: Path) -> None:
        path, _ = checkpoint.newest(run_dir)
        assert path == checkpoint.path_of(run_dir, 2)
        assert listed(run_dir) == ["step-00000001", "step-00000002", "step-00000003.damaged"]
        assert content(checkpoint.folder(run_dir) / "step-00000003.damaged") == damaged
        assert checkpoint.damage(checkpoint.path_of(run_dir, 1)) is None
        assert checkpoint.newest(run_dir) == (path, [])

    assert killed_at_each_point(tmp_path, spoil, checkpoint.newest, check) > 20
