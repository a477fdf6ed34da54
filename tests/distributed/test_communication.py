"""Communication on a single rank; tests/launchers has several ranks."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import torch

from lrd.distributed import communication
from lrd.errors import UserError


def raise_user_error() -> None:
    raise UserError("data.root: not there")


def raise_disk_error() -> None:
    raise OSError(errno.EIO, "Input/output error", "shard-3.bin")


@pytest.mark.parametrize("run", [communication.run_on_all_ranks, communication.run_on_main_process])
def test_errors_of_users_and_disks_become_one_line(
    run: Callable[[Callable[[], object]], object],
) -> None:
    with pytest.raises(UserError, match=r"^data.root: not there$"):
        run(raise_user_error)
    with pytest.raises(UserError, match=r"^shard-3.bin: Input/output error$"):
        run(raise_disk_error)
    assert run(lambda: 3) == 3


def test_the_statistics_of_a_step() -> None:
    statistics = communication.gather_step_statistics(
        torch.tensor(2.5),
        torch.tensor(float("inf")),
        torch.tensor(0.75),
        stop_signal=15,
        has_checkpoint_error=True,
    )
    assert statistics.losses == [2.5]
    assert statistics.mean_accuracy == 0.75
    assert statistics.mean_loss == 2.5
    assert statistics.stop_signal == 15
    assert statistics.has_checkpoint_error
    assert statistics.has_finite_losses
    assert not statistics.is_finite
