"""Which rank is slow, from the seconds of all ranks."""

from __future__ import annotations

import math
import time

import pytest
import torch

from lrd.job import rank_speed
from lrd.job.rank_speed import ComputeTimer, SlowRanks, describe_spread

NAMES = [f"rank {rank} on host{rank // 2}" for rank in range(4)]
EQUAL = [0.1, 0.11, 0.12, 0.1]
SLOW = [0.1, 0.11, 0.3, 0.1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(rank_speed.time, "monotonic", lambda: now[0])
    return now


def add(ranks: SlowRanks, clock: list[float], seconds: list[float], times: int) -> list[str]:
    lines = []
    for _ in range(times):
        clock[0] += max(seconds)
        lines += ranks.add(seconds)
    return lines


def test_a_rank_is_named_once_and_again_when_it_has_recovered(clock):
    ranks = SlowRanks(NAMES)
    assert add(ranks, clock, EQUAL, 200) == []
    (line,) = add(ranks, clock, SLOW, 200)
    assert line.startswith("rank 2 on host1 is slow, and the others wait for it: it computed ")
    assert "the median of the others is 100 ms" in line
    assert add(ranks, clock, EQUAL, 300) == ["rank 2 on host1 is as fast as the others again"]


def test_a_few_slow_steps_are_nothing_to_name(clock):
    ranks = SlowRanks(NAMES)
    for _ in range(20):
        assert add(ranks, clock, SLOW, 5) == []
        assert add(ranks, clock, EQUAL, 95) == []


def test_of_two_ranks_each_is_compared_with_the_other(clock):
    ranks = SlowRanks(NAMES[:2])
    (line,) = add(ranks, clock, [0.1, 0.2], 200)
    assert line.startswith("rank 1 on host0 is slow")
    assert add(ranks, clock, [0.1, 0.14], 200) == []  # not yet recovered


def test_a_rank_that_is_alone_or_has_not_measured_is_not_compared(clock):
    assert add(SlowRanks(NAMES[:1]), clock, [0.1], 300) == []
    assert add(SlowRanks(NAMES[:2]), clock, [0.1, math.nan], 300) == []
    assert describe_spread([0.1]) == {}
    assert describe_spread([0.1, math.nan]) == {}
    assert describe_spread(SLOW) == {
        "ranks/compute_seconds/max": 0.3,
        "ranks/compute_seconds/median": pytest.approx(0.105),
        "ranks/slowest": 2.0,
    }


def test_the_timer_ends_before_callbacks_that_are_queued_later_in_the_backward_pass():
    timer = ComputeTimer(torch.device("cpu"))
    assert math.isnan(timer.take())

    weight = torch.ones(3, requires_grad=True)

    def queue_a_wait(gradient: torch.Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: time.sleep(0.3))

    weight.register_hook(queue_a_wait)
    timer.begin_step()
    time.sleep(0.02)
    loss = (2 * weight).sum()
    timer.end_with_backward(loss)
    began = time.perf_counter()
    loss.backward()
    assert time.perf_counter() - began > 0.29
    with timer.measure():
        time.sleep(0.02)
    assert 0.04 <= timer.take() < 0.25
    assert math.isnan(timer.take())
