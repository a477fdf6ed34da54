"""Checkpoints written in the background are copies of the moment of `save`; errors do no harm."""

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
from torch.utils.tensorboard.summary import scalar

from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.checkpoint.async_writer import AsyncWriter, copy_to_cpu
from lrd.checkpoint.store import TrainState
from lrd.tracking.event_file import EventFile
from tests.helpers.checkpoints import flip_a_bit, make_state, same
from tests.helpers.processes import in_child

TIMEOUT = 60  # seconds, for what takes no time unless it never happens


def make_writer(run_dir: Path, **section: object) -> AsyncWriter:
    return AsyncWriter(run_dir, recipes.Checkpoint(**section), EventFile(run_dir, 0))


def progress_of(writer: AsyncWriter) -> tuple[int | None, int | None, int]:
    """The step last requested, the step last published, and the number of checkpoints written."""
    return writer.last_requested_step, writer.last_published_step, writer.num_written


def saved_weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return store.read(store.checkpoint_path(run_dir, step)).model


def raise_disk_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Gate:
    """Holds each call of store.save until the gate is opened; counts how many it holds at once."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.num_inside = 0
        self.max_inside = 0
        self._save = store.save

    def save(self, run_dir: Path, state: TrainState) -> Path:
        self.num_inside += 1
        self.max_inside = max(self.num_inside, self.max_inside)
        self.entered.set()
        assert self.opened.wait(TIMEOUT)
        path = self._save(run_dir, state)
        self.num_inside -= 1
        return path


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(store, "save", gate.save)
    yield gate
    gate.opened.set()


def test_save_returns_before_the_checkpoint_is_written(tmp_path, gate):
    writer = make_writer(tmp_path)
    writer.save(make_state(1), None)
    assert gate.entered.wait(TIMEOUT)
    assert progress_of(writer) == (1, None, 0)
    assert store.list_steps(tmp_path) == []

    gate.opened.set()
    assert writer.finish() == ([], True)
    assert progress_of(writer) == (1, 1, 1)
    assert store.find_damage(store.checkpoint_path(tmp_path, 1)) is None


def test_without_background_the_checkpoint_is_written_when_save_returns(tmp_path):
    writer = make_writer(tmp_path, background=False)
    writer.save(make_state(1), None)
    assert writer.last_published_step == 1
    assert store.find_damage(store.checkpoint_path(tmp_path, 1)) is None


def test_changes_to_the_state_after_save_are_not_written(tmp_path, gate):
    state = make_state(1)
    expected = copy.deepcopy(state)
    writer = make_writer(tmp_path)
    writer.save(state, None)

    # Change all that can be changed in place while the write is held.
    for weight in [*state.model.values(), *state.ema.values()]:
        weight.zero_()

    param_states = state.optimizer["optimizer"]["state"]
    for param_state in param_states.values():
        for value in param_state.values():
            value.zero_()

    param_states.clear()

    group = state.optimizer["optimizer"]["param_groups"][0]
    group["lr"] = 77.0
    group["params"].append(77)
    state.optimizer["schedule"]["scheduler"]["milestones"].append(77)
    state.optimizer["schedule"]["scheduled"][0] = 77.0

    gate.opened.set()
    writer.wait()

    back = store.read(store.checkpoint_path(tmp_path, 1))
    assert same({key: back.model[key] for key in expected.model}, dict(expected.model))
    assert same({key: back.ema[key] for key in expected.ema}, expected.ema)
    assert same(back.optimizer, expected.optimizer)
    assert back.config["lrd"]["step"] == 1


def test_two_saves_that_share_one_copy_write_their_own_states(tmp_path):
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
    assert gate.entered.wait(TIMEOUT)
    second = threading.Thread(target=writer.save, args=(make_state(2), None))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.opened.set()
    second.join(TIMEOUT)
    assert writer.finish() == ([], True)
    assert store.list_steps(tmp_path) == [1, 2]
    assert gate.max_inside == 1


def test_wait_returns_when_the_pending_write_is_done(tmp_path, gate):
    writer = make_writer(tmp_path)
    writer.save(make_state(1), None)
    assert gate.entered.wait(TIMEOUT)

    threading.Timer(0.2, gate.opened.set).start()
    start = time.perf_counter()
    writer.wait()
    assert time.perf_counter() - start > 0.15
    assert writer.seconds_writing > 0.15

    start = time.perf_counter()
    writer.wait()
    assert time.perf_counter() - start < 0.1


def test_a_failed_write_is_reported_and_leaves_older_checkpoints_alone(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    writer.save(make_state(1), None)
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", raise_disk_full)
        writer.save(make_state(2), None)
        writer.wait()

    (line,) = writer.take_errors()
    assert line.startswith(
        f"{store.checkpoint_path(tmp_path, 2)}: the checkpoint could not be written: "
    )
    assert os.strerror(errno.ENOSPC) in line
    assert writer.take_errors() == []
    assert progress_of(writer) == (2, 1, 1)
    assert [path.name for path in store.checkpoints_dir(tmp_path).iterdir()] == ["step-00000001"]
    assert store.find_damage(store.checkpoint_path(tmp_path, 1)) is None


def test_finish_reports_whether_the_last_state_was_saved(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    assert writer.finish() == ([], True)
    for step in (1, 2, 3):
        with monkeypatch.context() as patch:
            if step != 2:
                patch.setattr(torch, "save", raise_disk_full)
            writer.save(make_state(step), None)
            lines, is_saved = writer.finish()
        assert is_saved == (step == 2)
        assert len(lines) == (step != 2)

    assert store.list_steps(tmp_path) == [2]


def test_an_error_is_kept_until_it_is_taken_even_if_a_later_save_succeeds(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", raise_disk_full)
        writer.save(make_state(1), None)
        writer.wait()

    writer.save(make_state(2), None)
    (line,), is_saved = writer.finish()
    assert "step-00000001" in line
    assert is_saved


@pytest.mark.parametrize("method", ["flush", "sync"])
def test_no_checkpoint_is_written_if_the_event_file_cannot_be(tmp_path, monkeypatch, method):
    writer = make_writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(EventFile, method, raise_disk_full)
        writer.save(make_state(1), None)
        (line,), is_saved = writer.finish()

    assert os.strerror(errno.ENOSPC) in line
    assert not is_saved
    assert store.list_steps(tmp_path) == []
    writer.save(make_state(2), None)
    assert writer.finish() == ([], True)
    assert store.list_steps(tmp_path) == [2]


def test_tensorboard_records_are_written_before_the_checkpoint(tmp_path, gate):
    writer = make_writer(tmp_path)
    writer.records.add(scalar("loss", 1.0), 1)
    before = writer.records.path.stat().st_size if writer.records.path.exists() else 0
    writer.save(make_state(1), None)
    assert writer.records.path.stat().st_size > before


@pytest.mark.parametrize(("best_step", "kept"), [(None, [4, 5]), (2, [2, 4, 5]), (5, [4, 5])])
def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, best_step, kept):
    writer = make_writer(tmp_path)
    for step in range(1, 6):
        writer.save(make_state(step), best_step)

    assert writer.finish() == ([], True)
    assert store.list_steps(tmp_path) == kept


def test_an_old_damaged_checkpoint_is_reported_but_is_no_error_and_an_older_one_is_kept(
    tmp_path, capsys
):
    writer = make_writer(tmp_path)
    for step in (1, 2):
        writer.save(make_state(step), None)

    writer.wait()
    flip_a_bit(store.checkpoint_path(tmp_path, 2) / "model.safetensors")
    writer.save(make_state(3), None)
    assert writer.finish() == ([], True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{store.checkpoint_path(tmp_path, 2)}: damaged: model.safetensors: ")
    assert store.list_steps(tmp_path) == [1, 3]


def test_if_deleting_fails_that_is_reported_but_is_no_error(tmp_path, monkeypatch, capsys):
    writer = make_writer(tmp_path)
    monkeypatch.setattr(store, "delete_old", raise_disk_full)
    writer.save(make_state(1), None)
    assert writer.finish() == ([], True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"old checkpoints could not be deleted: {os.strerror(errno.ENOSPC)}"


def test_a_pending_write_is_finished_when_training_raises(tmp_path, gate):
    writer = make_writer(tmp_path)

    def train() -> None:
        with writer:
            writer.save(make_state(1), None)
            assert gate.entered.wait(TIMEOUT)
            raise KeyError("an error of the training")

    threading.Timer(0.2, gate.opened.set).start()
    with pytest.raises(KeyError, match="an error of the training"):
        train()

    assert writer.last_published_step == 1
    assert store.find_damage(store.checkpoint_path(tmp_path, 1)) is None


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_full_disk_gives_one_line_and_a_later_save_works(tmp_path, part):
    first = make_state(1)
    second = make_state(2)
    large = {"large": torch.randn(50_000)}
    state = TrainState(second.model | large, second.optimizer, second.trainer)
    if part == "optimizer":
        state = TrainState(second.model, second.optimizer | large, second.trainer)

    store.save(tmp_path, first)

    def write() -> None:
        # No file of this process may grow beyond 100 kB: writing more fails with EFBIG.
        _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard_limit))

        writer = make_writer(tmp_path)
        writer.save(state, None)
        (line,), is_saved = writer.finish()
        assert line.startswith(
            f"{store.checkpoint_path(tmp_path, 2)}: the checkpoint could not be written: "
        )
        assert len(line.splitlines()) == 1
        assert not is_saved

        resource.setrlimit(resource.RLIMIT_FSIZE, (hard_limit, hard_limit))
        writer.save(state, None)
        assert writer.finish() == ([], True)

    assert in_child(write) == 0
    assert store.list_steps(tmp_path) == [1, 2]
    assert store.recover_newest(tmp_path) == (store.checkpoint_path(tmp_path, 2), [])
    assert store.find_damage(store.checkpoint_path(tmp_path, 1)) is None


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
def test_a_copy_keeps_the_layout_and_reuses_the_memory_of_the_older_copy(kind):
    first = TENSORS[kind]()
    copy_of_first = copy_to_cpu({"nested": [first]})["nested"][0]
    assert same(copy_of_first, first.detach())
    assert copy_of_first.stride() == first.stride()
    assert not copy_of_first.requires_grad
    assert first.numel() == 0 or copy_of_first.data_ptr() != first.data_ptr()

    second = TENSORS[kind]()
    copy_of_second = copy_to_cpu({"nested": [second]}, {"nested": [copy_of_first]})["nested"][0]
    assert copy_of_second.data_ptr() == copy_of_first.data_ptr()
    assert same(copy_of_second, second.detach())


@pytest.mark.parametrize("step", [slice(None, None, 2), slice(1, None)])
def test_views_are_copied_too(step):
    tensor = torch.randn(6, 6)[:, step]
    older = copy_to_cpu(tensor)
    assert same(older, tensor)
    assert same(copy_to_cpu(tensor + 1, older), tensor + 1)


def test_an_expanded_tensor_is_copied():
    tensor = torch.randn(3, 1).expand(3, 4)
    assert same(copy_to_cpu(tensor, copy_to_cpu(tensor)), tensor)


@pytest.mark.parametrize(
    "older",
    [
        None,
        torch.zeros(3),
        torch.zeros(2).double(),
        torch.zeros(4)[::2],
        {"a": 1},
        [torch.zeros(2)],
        "text",
    ],
    ids=["none", "shape", "type", "stride", "a dict", "a list", "a string"],
)
def test_an_older_copy_that_does_not_fit_is_not_changed(older):
    before = copy.deepcopy(older)
    tensor = torch.randn(2)
    new = copy_to_cpu([tensor, 3], [older, 5])
    assert same(new[0], tensor)
    assert new[1] == 3
    assert same(older, before)


def test_a_copy_keeps_plain_values_and_container_types():
    value = {"a": (1, 2.5, torch.zeros(2)), "b": [None, "text", {"c": True}], 3: ()}
    for older in (None, value, {"a": [], "b": 7, 3: (1,)}):
        new = copy_to_cpu(value, copy.deepcopy(older))
        assert same(new, value)
        assert isinstance(new["a"], tuple)
        assert isinstance(new["b"], list)
        assert new["b"] is not value["b"]
