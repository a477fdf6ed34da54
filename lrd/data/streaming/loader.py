"""Worker processes that read batches ahead of need: torch's DataLoader over a list of positions.

A batch is a function of its positions, so the loader has no state that a checkpoint would need, and
the number of workers changes no byte.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lrd import recipe as recipes
from lrd.data.streaming.readers import Reader, Sample, SampleError
from lrd.errors import RankError, describe_error, first_line
from lrd.generators import preserved_generators
from lrd.host import share_of_cores
from lrd.recipe.named import last_line_in_file

_PREFETCHED_BATCHES = 2  # of each worker
_SECONDS_TO_END = 3.0  # of all workers together; a launcher waits 30 s for a rank
_SECONDS_TO_DIE = 10.0  # after a worker's connections are closed; on a busy host two are not enough
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_MOST_WORKERS = 16
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

Position = tuple[int | None, int]  # epoch and index of a sample, see `Reader`


@dataclass(frozen=True)
class Failure:
    """What a worker sends in place of samples that cannot be read.

    Attributes:
        message: one line for the user.
    """

    message: str


# Pixels (B, 3, H, W), labels int64 (B,), and `Sample.unreadable` of each sample that has any.
Batch = tuple[Tensor, Tensor, list[tuple[str, ...]]]


class Loader:
    """Reads batches in worker processes, in order.

    Args:
        reader: reads the samples; it is copied to the workers.
        batches: the positions of the samples of each batch; may be endless.
        workers: number of processes; 0: batches are read when they are asked for, in this process.
        pin_memory: whether the batches go to a GPU.
    """

    def __init__(
        self,
        reader: Reader,
        batches: Iterable[list[Position]],
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        self._workers = workers
        loader = DataLoader(
            _ReaderDataset(reader),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            prefetch_factor=_PREFETCHED_BATCHES if workers else None,
            worker_init_fn=_WorkerStart(os.getpid()) if workers else None,
        )
        # It draws a base seed, which nothing here uses. A worker that begins must not meet a signal
        # before it ignores it, see `_WorkerStart`.
        with preserved_generators(), _blocked_stop_signals():
            self._iterator: Any = iter(loader)
        if workers:
            _leave_dead_workers_to_loader(self._iterator)

    def next(self) -> Batch:
        """The next batch.

        Raises:
            StopIteration: there is none.
            RankError: a sample cannot be read, or a worker process died.
        """
        assert self._iterator is not None, "it is closed"
        if self._workers:
            batch = self._next_of_workers()
        else:
            with preserved_generators():
                batch = next(self._iterator)

        if isinstance(batch, Failure):
            raise RankError(batch.message)
        return batch

    def _next_of_workers(self) -> Batch | Failure:
        self._require_living_workers()
        try:
            batch: Batch | Failure = next(self._iterator)
        except (RuntimeError, OSError, EOFError):
            # torch looks after the workers while it waits. A batch is fetched from its worker,
            # whose connections close a little before it has ended, its sentinel among them.
            workers = {worker.sentinel: worker for worker in self._iterator._workers}
            for sentinel in wait(list(workers), _SECONDS_TO_DIE):
                workers[sentinel].join()
            self._require_living_workers()
            raise
        return batch

    def _require_living_workers(self) -> None:
        """Raises RankError if a worker is gone; none ends before `close`."""
        for worker in self._iterator._workers:
            if not worker.is_alive():
                raise RankError(_describe_end(worker.exitcode or 0))

    def close(self) -> None:
        """End the workers; batches that were read ahead are lost."""
        iterator = self._iterator
        self._iterator = None
        if iterator is None or not self._workers:
            return

        # torch waits five seconds for each worker that hangs, in the user's code or on a disk, and
        # ends it by SIGTERM, which they ignore, see `_WorkerStart`.
        workers = list(iterator._workers)
        killer = threading.Timer(_SECONDS_TO_END, lambda: [worker.kill() for worker in workers])
        killer.start()
        try:
            iterator._shutdown_workers()
        finally:
            killer.cancel()


def count_workers(section: recipes.Data) -> int:
    """The recipe's number of workers, or the rank's share of the cores of its host."""
    if section.workers is not None:
        return section.workers
    return min(_MOST_WORKERS, share_of_cores())


class _ReaderDataset(TorchDataset[Sample | Failure]):
    """What the DataLoader copies to its workers."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitem__(self, position: Position) -> Sample | Failure:
        epoch, index = position
        try:
            return self._reader.read(epoch, index)
        except SampleError as error:
            return Failure(f"{error}{_name_worker()}")
        except Exception as error:  # a fault of lrd, or a disk that is gone
            where = last_line_in_file(error)
            return Failure(f"sample {index}: {describe_error(error)}{where}{_name_worker()}")


def _name_worker() -> str:
    worker = torch.utils.data.get_worker_info()
    return "" if worker is None else f" (worker {worker.id} of {worker.num_workers})"


def _collate(samples: list[Sample | Failure]) -> Batch | Failure:
    """Put samples together; the first failure goes in their place."""
    good = []
    for sample in samples:
        if isinstance(sample, Failure):
            return sample
        good.append(sample)

    try:
        return _stack(good)
    except RuntimeError as error:
        advice = "a larger /dev/shm helps, or fewer data.workers, which need less of it"
        return Failure(f"{first_line(error)}; {advice}{_name_worker()}")


def _stack(samples: list[Sample]) -> Batch:
    """Put samples together.

    Raises:
        RuntimeError: there is no shared memory left for them.
    """
    pixels = [sample.pixels for sample in samples]
    out = None
    if torch.utils.data.get_worker_info() is not None:
        # In shared memory from the start: what is sent to the main process is then not copied.
        num_bytes = len(pixels) * pixels[0].numel() * pixels[0].element_size()
        storage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
        out = torch.empty(0, dtype=pixels[0].dtype).set_(storage)
        out = out.view(len(pixels), *pixels[0].shape)
    labels = torch.tensor([sample.label for sample in samples])  # int64 (B,)
    unreadable = [sample.unreadable for sample in samples if sample.unreadable]
    return torch.stack(pixels, out=out), labels, unreadable


class _WorkerStart:
    """What a worker process does first.

    Args:
        parent: the process that reads from it.
    """

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def __call__(self, worker_id: int) -> None:
        # A launcher sends its signals to the whole process group. The rank still needs batches
        # until it has ended its step and saved.
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)

        # A rank that is killed cannot end its workers. They would keep its sockets open, and its
        # lock on the run directory.
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != self._parent:
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _blocked_stop_signals() -> Iterator[None]:
    """In this context signals that stop a run wait; processes that begin in it block them, too."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _leave_dead_workers_to_loader(iterator: Any) -> None:
    """Have torch raise nothing by itself when a worker dies.

    Its handler of SIGCHLD raises a RuntimeError in the main thread wherever that is just then: in
    the optimizer's step, or while it holds a lock that the thread which writes checkpoints needs.
    """
    _remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False


def _describe_end(exit_code: int) -> str:
    """How a worker process ended, and what to do about it.

    Args:
        exit_code: of `multiprocessing`: minus the signal that killed it.
    """
    if exit_code >= 0:
        return f"a worker process that loads images ended itself with status {exit_code}"

    number = -exit_code
    advices: dict[int, str] = {
        signal.SIGKILL: "the system does that when memory runs out; fewer data.workers need less",
        signal.SIGBUS: "/dev/shm is full; make it larger, fewer data.workers need less of it",
    }
    advice = advices.get(number, "a library that it uses crashed")
    return (
        f"a worker process that loads images was killed by signal {number} "
        f"({signal.strsignal(number)}); {advice}"
    )
