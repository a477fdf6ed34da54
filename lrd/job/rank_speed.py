"""How long each rank computes in a step, and which rank the others wait for.

All ranks of a step end it together, so its duration says nothing about who is slow. Here each rank
measures its own part: from the start of the step to the end of its own backward pass, and the
optimizer's step. What it waits for the other ranks is not in it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable

SLOW_FACTOR = 1.5  # times the median of the other ranks: such a rank is slow
RECOVERED_FACTOR = 1.25  # below this it is slow no longer
LEAST_STEPS = 20  # over which ranks are compared
LEAST_SECONDS = 10.0  # so that a write in the background, for example, is not taken for more


class ComputeTimer:
    """Measures the seconds that this rank computes in each step, without the waiting.

    On a GPU they are those of the GPU; events in its stream mark their ends, and the CPU does not
    wait for them.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._start: Any = None
        self._spans: deque[_Span] = deque()

    def begin_step(self) -> None:
        """A step begins."""
        self._start = self._now()

    def end_with_backward(self, loss: Tensor) -> None:
        """The first part of the step ends where this rank has computed all of its gradients.

        Args:
            loss: of the last micro step, before its backward pass.
        """
        # Callbacks run in the order in which they were queued. DDP queues the one in which it waits
        # for the other ranks at the end of the backward pass, this one comes at its beginning.
        loss.register_hook(  # type: ignore[no-untyped-call]
            lambda _: Variable._execution_engine.queue_callback(self._end_backward)
        )

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Another part of the step that no rank waits in."""
        start = self._now()
        yield
        self._spans.append(_Span(start, self._now()))

    def take(self) -> float:
        """The mean seconds of a step since the last call; nan: there is none that has ended."""
        seconds = 0.0
        num_steps = 0
        while self._spans and (not self._is_cuda or self._spans[0].end.query()):
            span = self._spans.popleft()
            num_steps += span.has_backward
            if self._is_cuda:
                seconds += span.start.elapsed_time(span.end) / 1e3
            else:
                seconds += span.end - span.start
        return seconds / num_steps if num_steps else float("nan")

    def _end_backward(self) -> None:
        self._spans.append(_Span(self._start, self._now(), has_backward=True))

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class _Span(NamedTuple):
    """A part of a step.

    Attributes:
        start, end: seconds on the clock of `time.perf_counter`, or events of a GPU.
        has_backward: whether it is the part with the backward pass, of which a step has one.
    """

    start: Any
    end: Any
    has_backward: bool = False


class SlowRanks:
    """Finds ranks that stay slower than the others, from the seconds of all ranks.

    Args:
        names: of the ranks, for messages.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._slow: set[int] = set()
        self._sums = [0.0] * len(names)
        self._num_steps = 0
        self._began = time.monotonic()

    def add(self, seconds: list[float]) -> list[str]:
        """Add the seconds of each rank in a step.

        Returns:
            A line for each rank that has become slow, or is slow no longer.
        """
        if len(seconds) < 2 or any(map(math.isnan, seconds)):
            return []

        self._num_steps += 1
        self._sums = [total + value for total, value in zip(self._sums, seconds, strict=True)]
        elapsed = time.monotonic() - self._began
        if self._num_steps < LEAST_STEPS or elapsed < LEAST_SECONDS:
            return []

        lines = self._compare(elapsed)
        self._sums = [0.0] * len(self._names)
        self._num_steps = 0
        self._began = time.monotonic()
        return lines

    def _compare(self, elapsed: float) -> list[str]:
        """A line for each rank that has become slow, or is slow no longer."""
        lines = []
        means = [total / self._num_steps for total in self._sums]
        for rank, mean in enumerate(means):
            median = statistics.median([*means[:rank], *means[rank + 1 :]])  # of the other ranks
            was_slow = rank in self._slow
            if not was_slow and mean > SLOW_FACTOR * median:
                self._slow.add(rank)
                lines.append(
                    f"{self._names[rank]} is slow, and the others wait for it: it computed "
                    f"{1e3 * mean:.0f} ms a step, the median of the others is {1e3 * median:.0f} ms"
                    f" ({self._num_steps} steps in {elapsed:.0f} s)"
                )
            elif was_slow and mean < RECOVERED_FACTOR * median:
                self._slow.remove(rank)
                lines.append(f"{self._names[rank]} is as fast as the others again")
        return lines


def describe_spread(seconds: list[float]) -> dict[str, float]:
    """What TensorBoard shows of the seconds of all ranks in a step, by tag; of one rank nothing."""
    if len(seconds) < 2 or any(map(math.isnan, seconds)):
        return {}

    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return {
        "ranks/compute_seconds/max": seconds[slowest],
        "ranks/compute_seconds/median": statistics.median(seconds),
        "ranks/slowest": float(slowest),
    }
