"""How worker processes end: when they are done, hang, are killed, or end themselves."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import psutil
import pytest
import torch

from lrd.data.streaming import loader as loader_module
from lrd.data.streaming.loader import Loader
from lrd.data.streaming.readers import Sample
from lrd.errors import RankError

ENDLESS = 1_000  # batches


class Reader:
    """Reads samples whose pixels are their index; what happens at `fault_at` a test says."""

    def __init__(self, fault: str = "", fault_at: int = -1) -> None:
        self.fault = fault
        self.fault_at = fault_at

    def __len__(self) -> int:
        return ENDLESS

    def read(self, epoch: int | None, index: int) -> Sample:
        if index == self.fault_at:
            if self.fault == "hang":
                time.sleep(600)
            if self.fault == "exit":
                os._exit(7)
            if self.fault == "raise":
                raise MemoryError("no memory")
        return Sample(torch.full((3, 2, 2), index % 256, dtype=torch.uint8), index)


def make_loader(workers: int, fault: str = "", fault_at: int = -1) -> Loader:
    return Loader(Reader(fault, fault_at), [[(0, i)] for i in range(ENDLESS)], workers)


_children_before: set[psutil.Process] = set()  # of this process; others than workers


@pytest.fixture(autouse=True)
def find_other_children() -> None:
    """Other tests may have started a server for all tests, for example."""
    _children_before.clear()
    _children_before.update(psutil.Process().children())


def worker_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child not in _children_before]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_the_global_generators_stay_as_they_are(workers: int) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = (torch.rand(1).item(), np.random.rand(), random.random())

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    loader = make_loader(workers)
    labels = [loader.next()[1].item() for _ in range(10)]
    loader.close()
    assert labels == list(range(10))
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
    assert worker_processes() == []


def test_a_killed_worker_is_reported_at_the_next_batch_and_nowhere_else() -> None:
    loader = make_loader(workers=2)
    loader.next()
    victim = worker_processes()[0]
    victim.kill()
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:  # torch's handler would raise in one of these lines
        sum(range(1000))

    with pytest.raises(RankError, match=r"was killed by signal 9 \(Killed\); .* memory runs out"):
        loader.next()
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 10
    assert worker_processes() == []


def test_a_worker_that_dies_while_its_batch_is_awaited_is_reported_in_seconds() -> None:
    loader = make_loader(workers=1, fault="exit", fault_at=3)
    began = time.monotonic()
    # Batches that it has read but not handed over are lost.
    with pytest.raises(RankError, match="ended itself with status 7"):
        [loader.next() for _ in range(4)]
    assert time.monotonic() - began < 30
    loader.close()
    assert worker_processes() == []


def test_a_worker_whose_connections_are_closed_is_waited_for() -> None:
    def close_connections_and_exit() -> None:
        os.closerange(3, 1000)  # as the system does it, a little before a process has ended
        time.sleep(0.5)
        os._exit(7)

    class Iterator:
        """Of torch's DataLoader: the next batch is to be fetched from a worker."""

        def __init__(self) -> None:
            self._workers = [
                multiprocessing.get_context("fork").Process(target=close_connections_and_exit)
            ]
            self._workers[0].start()

        def __next__(self) -> None:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    loader = make_loader(workers=0)
    loader._workers = 1
    loader._iterator = Iterator()
    with pytest.raises(RankError, match="ended itself with status 7"):
        loader.next()


def test_workers_that_hang_are_killed_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "_SECONDS_TO_END", 0.5)
    loader = make_loader(workers=2, fault="hang", fault_at=2)
    loader.next()
    loader.next()
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 4
    assert worker_processes() == []


def test_workers_end_with_a_process_that_is_killed() -> None:
    source, sink = os.pipe()
    parent = os.fork()
    if parent == 0:
        loader = make_loader(workers=2)
        loader.next()
        os.write(sink, json.dumps([worker.pid for worker in worker_processes()]).encode())
        time.sleep(600)

    workers = [psutil.Process(pid) for pid in json.loads(os.read(source, 1000))]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert len(workers) == 2
    deadline = time.monotonic() + 2
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_fault_of_the_reader_is_one_line() -> None:
    loader = make_loader(workers=1, fault="raise", fault_at=0)
    with pytest.raises(RankError) as caught:
        loader.next()
    loader.close()
    line = str(caught.value)
    assert line.startswith("sample 0: MemoryError: no memory (test_loader_ends.py, line ")
    assert line.endswith("(worker 0 of 1)")


def test_workers_ignore_the_signals_that_stop_a_run() -> None:
    loader = make_loader(workers=1)
    loader.next()
    (worker,) = worker_processes()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        worker.send_signal(number)
    assert [loader.next()[1].item() for _ in range(20)] == list(range(1, 21))
    loader.close()
    assert worker_processes() == []
