"""Checkpoints written in the background: what is written is the moment of the call, and faults do no harm."""

from __future__ import annotations

import copy
import errno
import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
from test_checkpoint import flip_a_bit, make_state, same
from test_checkpoint_crash import in_child
from torch.utils.tensorboard.summary import scalar

from lrd import checkpoint
from lrd import recipe as recipes
from lrd.checkpoint import State
from lrd.events import EventFile
from lrd.writer import Writer, copied

PATIENCE = 60  # seconds; for what comes at once unless it never comes


def make_writer(run_dir: Path, **section: object) -> Writer:
    return Writer(run_dir, recipes.Checkpoint(**section), EventFile(run_dir, 0))


def saved_weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.read(checkpoint.path_of(run_dir, step)).model


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Gate:
    """Holds each checkpoint.save until it is opened; counts how many are in it at once."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.inside = self.most_inside = 0
        self._save = checkpoint.save

    def save(self, run_dir: Path, state: State) -> Path:
        self.inside += 1
        self.most_inside = max(self.inside, self.most_inside)
        self.entered.set()
        assert self.opened.wait(PATIENCE)
        path = self._save(run_dir, state)
        self.inside -= 1
        return path


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(checkpoint, "save", gate.save)
    yield gate
    gate.opened.set()


def test_the_caller_goes_on_while_a_checkpoint_is_written(tmp_path, gate):
    writer = make_writer(tmp_path)
    writer.save(make_state(1), None)
    assert gate.entered.wait(PATIENCE)
    assert (writer.requested, writer.published, writer.written) == (1, None, 0)
    assert checkpoint.steps(tmp_path) == []
    gate.opened.set()
    assert writer.finish() == ([], True)
    assert (writer.requested, writer.published, writer.written) == (1, 1, 1)
    assert checkpoint.damage(checkpoint.path_of(tmp_path, 1)) is None


def test_not_in_the_background_it_is_written_when_save_returns(tmp_path):
    writer = make_writer(tmp_path, background=False)
    writer.save(make_state(1), None)
    assert writer.published == 1
    assert checkpoint.damage(checkpoint.path_of(tmp_path, 1)) is None


def test_what_is_written_is_the_moment_of_the_call(tmp_path, gate):
    state = make_state(1)
    expected = copy.deepcopy(state)
    writer = make_writer(tmp_path)
    writer.save(state, None)
    group, moments = state.optimizer["optimizer"]["param_groups"][0], state.optimizer["optimizer"]["state"]
    for tensor in (*state.model.values(), *(value for one in moments.values() for value in one.values())):
        tensor.zero_()
    group["lr"] = 77.0
    group["params"].append(77)
    state.optimizer["schedule"]["scheduler"]["milestones"].append(77)
    state.optimizer["schedule"]["scheduled"][0] = 77.0
    moments.clear()
    gate.opened.set()
    writer.wait()
    back = checkpoint.read(checkpoint.path_of(tmp_path, 1))
    assert same({key: back.model[key] for key in expected.model}, dict(expected.model))
    assert same(back.optimizer, expected.optimizer)


def test_the_memory_of_one_checkpoint_serves_the_next(tmp_path):
    writer = make_writer(tmp_path)
    states = [make_state(step) for step in (1, 2)]
    for state in states:
        writer.save(state, None)
    writer.wait()
    for state in states:
        weights = saved_weights(tmp_path, state.step)
        assert same({key: weights[key] for key in state.model}, dict(state.model))


def test_a_second_save_waits_for_the_first(tmp_path, gate):
    writer = make_writer(tmp_path)
    writer.save(make_state(1), None)
    assert gate.entered.wait(PATIENCE)
    second = threading.Thread(target=writer.save, args=(make_state(2), None))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.opened.set()
    second.join(PATIENCE)
    assert writer.finish() == ([], True)
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert gate.most_inside == 1


def test_the_caller_stands_still_only_while_it_waits(tmp_path, gate):
    writer = make_writer(tmp_path)
    writer.save(make_state(1), None)
    assert gate.entered.wait(PATIENCE)
    opener = threading.Timer(0.2, gate.opened.set)
    opener.start()
    began = time.perf_counter()
    writer.wait()
    assert time.perf_counter() - began > 0.15
    assert writer.working > 0.15
    began = time.perf_counter()
    writer.wait()
    assert time.perf_counter() - began < 0.1


def test_a_write_that_fails_is_told_and_harms_none_before(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    writer.save(make_state(1), None)
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_room)
        writer.save(make_state(2), None)
        writer.wait()
    (line,) = writer.take_faults()
    assert line.startswith(f"{checkpoint.path_of(tmp_path, 2)}: the checkpoint could not be written: ")
    assert os.strerror(errno.ENOSPC) in line
    assert writer.take_faults() == []
    assert (writer.requested, writer.published, writer.written) == (2, 1, 1)
    assert [path.name for path in checkpoint.folder(tmp_path).iterdir()] == ["step-00000001"]
    assert checkpoint.damage(checkpoint.path_of(tmp_path, 1)) is None


def test_the_end_tells_whether_the_last_one_is_saved(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    assert writer.finish() == ([], True)
    for step in (1, 2, 3):
        with monkeypatch.context() as patch:
            if step != 2:
                patch.setattr(torch, "save", no_room)
            writer.save(make_state(step), None)
            lines, is_saved = writer.finish()
        assert is_saved == (step == 2)
        assert len(lines) == (step != 2)
    assert checkpoint.steps(tmp_path) == [2]


def test_a_fault_that_was_not_taken_is_not_forgotten_by_a_later_success(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_room)
        writer.save(make_state(1), None)
        writer.wait()
    writer.save(make_state(2), None)
    (line,), is_saved = writer.finish()
    assert "step-00000001" in line
    assert is_saved


@pytest.mark.parametrize("method", ["flush", "sync"])
def test_without_the_event_files_records_there_is_no_checkpoint(tmp_path, monkeypatch, method):
    writer = make_writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(EventFile, method, no_room)
        writer.save(make_state(1), None)
        (line,), is_saved = writer.finish()
    assert os.strerror(errno.ENOSPC) in line
    assert not is_saved
    assert checkpoint.steps(tmp_path) == []
    writer.save(make_state(2), None)
    assert writer.finish() == ([], True)
    assert checkpoint.steps(tmp_path) == [2]


def test_records_are_in_the_file_before_the_checkpoint_is_there(tmp_path, gate):
    writer = make_writer(tmp_path)
    writer.events.add(scalar("loss", 1.0), 1)
    before = writer.events.path.stat().st_size if writer.events.path.exists() else 0
    writer.save(make_state(1), None)
    assert writer.events.path.stat().st_size > before


@pytest.mark.parametrize(("best_step", "kept"), [(None, [4, 5]), (2, [2, 4, 5]), (5, [4, 5])])
def test_the_last_and_the_best_are_kept(tmp_path, best_step, kept):
    writer = make_writer(tmp_path)
    for step in range(1, 6):
        writer.save(make_state(step), best_step)
    assert writer.finish() == ([], True)
    assert checkpoint.steps(tmp_path) == kept


def test_damage_on_the_disk_is_told_and_older_ones_are_kept(tmp_path):
    writer = make_writer(tmp_path)
    for step in (1, 2):
        writer.save(make_state(step), None)
    writer.wait()
    flip_a_bit(checkpoint.path_of(tmp_path, 2) / "model.safetensors")
    writer.save(make_state(3), None)
    (line,), is_saved = writer.finish()
    assert line.startswith(f"{checkpoint.path_of(tmp_path, 2)}: damaged: model.safetensors: ")
    assert is_saved
    assert checkpoint.steps(tmp_path) == [1, 3]


def test_a_retention_that_fails_is_told_and_the_checkpoint_counts(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    monkeypatch.setattr(checkpoint, "retain", no_room)
    writer.save(make_state(1), None)
    (line,), is_saved = writer.finish()
    assert line == os.strerror(errno.ENOSPC)
    assert is_saved


def test_an_error_does_not_cut_short_what_is_under_way(tmp_path, gate):
    writer = make_writer(tmp_path)

    def train() -> None:
        with writer:
            writer.save(make_state(1), None)
            assert gate.entered.wait(PATIENCE)
            raise KeyError("an error of the training")

    threading.Timer(0.2, gate.opened.set).start()
    with pytest.raises(KeyError, match="an error of the training"):
        train()
    assert writer.published == 1
    assert checkpoint.damage(checkpoint.path_of(tmp_path, 1)) is None


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_disk_that_takes_no_more_is_one_line(tmp_path, part):
    first, second = make_state(1), make_state(2)
    large = {"large": torch.randn(50_000)}
    state = State(second.model | large, second.optimizer, second.trainer)
    if part == "optimizer":
        state = State(second.model, second.optimizer | large, second.trainer)
    checkpoint.save(tmp_path, first)

    def write() -> None:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))  # no file may grow beyond: EFBIG
        writer = make_writer(tmp_path)
        writer.save(state, None)
        (line,), is_saved = writer.finish()
        assert line.startswith(f"{checkpoint.path_of(tmp_path, 2)}: the checkpoint could not be written: ")
        assert len(line.splitlines()) == 1
        assert not is_saved
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        writer.save(state, None)
        assert writer.finish() == ([], True)

    assert in_child(write) == 0
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert checkpoint.newest(tmp_path) == (checkpoint.path_of(tmp_path, 2), [])
    assert checkpoint.damage(checkpoint.path_of(tmp_path, 1)) is None


TENSORS = {
    "plain": lambda: torch.randn(3, 4),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(3, 4).t(),
    "no dimension": lambda: torch.tensor(1.5),
    "empty": lambda: torch.empty(0, 3),
    "bfloat16": lambda: torch.randn(5).bfloat16(),
    "bool": lambda: torch.randn(5) > 0,
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "needs grad": lambda: torch.nn.Parameter(torch.randn(3)),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_copy_has_the_layout_and_the_memory_of_the_copy_before(kind):
    first, second = TENSORS[kind](), TENSORS[kind]()
    copy_of_first = copied({"nested": [first]})["nested"][0]
    assert same(copy_of_first, first.detach())
    assert copy_of_first.stride() == first.stride()
    assert not copy_of_first.requires_grad
    assert first.numel() == 0 or copy_of_first.data_ptr() != first.data_ptr()
    copy_of_second = copied({"nested": [second]}, {"nested": [copy_of_first]})["nested"][0]
    assert copy_of_second.data_ptr() == copy_of_first.data_ptr()
    assert same(copy_of_second, second.detach())


@pytest.mark.parametrize("step", [slice(None, None, 2), slice(1, None)])
def test_views_are_copied_too(step):
    tensor = torch.randn(6, 6)[:, step]
    older = copied(tensor)
    assert same(older, tensor)
    assert same(copied(tensor + 1, older), tensor + 1)


def test_a_repeated_element_is_copied_as_often_as_it_is_seen():
    tensor = torch.randn(3, 1).expand(3, 4)
    assert same(copied(tensor, copied(tensor)), tensor)


@pytest.mark.parametrize(
    "older",
    [None, torch.zeros(3), torch.zeros(2).double(), torch.zeros(4)[::2], {"a": 1}, [torch.zeros(2)], "text"],
    ids=["none", "shape", "type", "stride", "a dict", "a list", "a string"],
)
def test_an_older_copy_that_does_not_fit_is_left_alone(older):
    before = copy.deepcopy(older)
    tensor = torch.randn(2)
    new = copied([tensor, 3], [older, 5])
    assert same(new[0], tensor)
    assert new[1] == 3
    assert same(older, before)


def test_a_copy_keeps_plain_values_and_kinds_of_nests():
    value = {"a": (1, 2.5, torch.zeros(2)), "b": [None, "text", {"c": True}], 3: ()}
    for older in (None, value, {"a": [], "b": 7, 3: (1,)}):
        new = copied(value, copy.deepcopy(older))
        assert same(new, value)
        assert isinstance(new["a"], tuple)
        assert isinstance(new["b"], list)
        assert new["b"] is not value["b"]
