"""Starts a rank (process group, Accelerator) and ends its process."""

from __future__ import annotations

import os
import re
import sys
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from lrd import console
from lrd import recipe as recipes
from lrd.distributed import hardware, network
from lrd.distributed.rank_rendezvous import meet_ranks
from lrd.distributed.roll_call import RollCall
from lrd.errors import UserError

_LARGEST_PORT = 65535


def start_rank(trainer: recipes.Trainer, facts: dict[str, Any], roll_call: RollCall) -> Accelerator:
    """Meet the other ranks, if there are any, and return the Accelerator.

    It is on the device that the launch file and `trainer.device` ask for.

    Args:
        trainer: the recipe's `trainer`.
        facts: what must be equal on all ranks, by the key that a user knows it by; JSON.
        roll_call: the roll call that answers for this rank from here on.

    Raises:
        UserError: CUDA is asked for, by `trainer.device=cuda` or by a launch file for GPUs, and
            there is none; the ranks do not have the same `facts`; or see `check_launch_variables`.
        RunError: the ranks did not come together.
    """
    check_launch_variables()
    use_cpu = hardware.uses_cpu(trainer.device)
    _report_ignored_options(trainer.precision)
    _set_torch_flags(trainer, use_cpu)
    hardware.limit_threads()

    timeout = timedelta(minutes=trainer.timeout_minutes)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device_type = "cpu" if use_cpu else "cuda"
        group = meet_ranks({"device": device_type, **facts}, timeout)
        # A process that runs several jobs has one process group, as Accelerate has one state.
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo" if use_cpu else "nccl",
                store=group.store,
                rank=group.rank,
                world_size=group.world_size,
                timeout=timeout,
            )
        roll_call.start(group.prefix)

    return Accelerator(
        cpu=use_cpu,
        mixed_precision="bf16" if trainer.precision == "bf16" else "no",
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            # The training loop copies rank 0's buffers at the end of a step, see `lrd.train`.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        ],
    )


def check_launch_variables() -> None:
    """Check the environment variables by which a launcher tells this process its rank.

    Raises:
        UserError: one is missing, or is no number in its range.
    """
    world_size = _read_number("WORLD_SIZE", default=1, low=1)
    limit = f"less than WORLD_SIZE ({world_size})"
    if world_size > 1 and "RANK" not in os.environ:
        raise UserError(
            f"RANK: is not set, but WORLD_SIZE is {world_size}; "
            "start the ranks with a launcher, which sets both"
        )
    _read_number("RANK", default=0, low=0, high=world_size - 1, limit=limit)

    ranks_on_host = _read_number("LOCAL_WORLD_SIZE", default=world_size, low=1)
    limit = f"less than LOCAL_WORLD_SIZE ({ranks_on_host})"
    _read_number("LOCAL_RANK", default=0, low=0, high=ranks_on_host - 1, limit=limit)

    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(f"{name}: is not set, but WORLD_SIZE is {world_size}")
        limit = f"at most {_LARGEST_PORT}"
        _read_number("MASTER_PORT", default=0, low=0, high=_LARGEST_PORT, limit=limit)


def _read_number(
    name: str, default: int, low: int, high: int | None = None, limit: str = ""
) -> int:
    """A whole number from an environment variable.

    Args:
        name: of the variable.
        default: the number where it is not set.
        low: the smallest number.
        high: the largest number; None: there is none.
        limit: what `high` is, in words.
    """
    text = os.environ.get(name)
    if text is None:
        return default

    number = int(text) if re.fullmatch("[0-9]{1,18}", text) else None
    if number is None or number < low or (high is not None and number > high):
        bounds = f"{low} or more" if high is None else f"{low} or more and {limit}"
        raise UserError(
            f"{name}: is {text[:100]!r} in the environment, should be a whole number, {bounds}"
        )
    return number


def _report_ignored_options(precision: str) -> None:
    """Say which options of a launcher have no effect.

    Args:
        precision: the recipe's `trainer.precision`.
    """
    mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision not in ("no", precision):
        console.info(
            f"mixed_precision: the launcher's {mixed_precision} has no effect; "
            f"the recipe decides, and trainer.precision is {precision}"
        )

    # Accelerate's launcher starts one process on a CPU unless it is to use torch's launcher.
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if is_launched and "WORLD_SIZE" not in os.environ:
        asked = _find_option(_launcher_command(), "--num_processes")
        if asked.isdecimal() and int(asked) > 1:
            console.info(
                f"num_processes: {asked} were asked for, and accelerate has started one, as it "
                "does with --cpu and launch/accelerate/cpu-1.yaml; take launch/accelerate/cpu.yaml"
            )


def _launcher_command() -> list[str]:
    """The command line of the process that started this one; empty if it cannot be read."""
    try:
        return list(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        return []


def _find_option(command: list[str], option: str) -> str:
    """The value of an option on a command line, in either spelling; empty if it is not there."""
    value = ""
    for argument, following in zip(command, [*command, ""][1:], strict=True):
        name, equals, text = argument.replace("-", "_").partition("=")
        if name == option.replace("-", "_"):
            value = text if equals else following
    return value


def _set_torch_flags(trainer: recipes.Trainer, use_cpu: bool) -> None:
    if trainer.deterministic:
        # cuBLAS is deterministic only with a workspace of a fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    if not use_cpu:
        torch.backends.cudnn.benchmark = not trainer.deterministic


def exit_process(status: int) -> NoReturn:
    """End this process.

    A rank does not wait for Python's and torch's clean-up: DDP's destructor joins gloo's threads
    while it holds the interpreter's lock, and such a thread may be waiting for that lock to free a
    tensor. In a few of many stops the rank hung until the launcher killed it 30 s later. All that
    matters is on disk by then.
    """
    if dist.is_initialized() or network.has_abandoned_threads():
        network.exit_at_once(status)
    sys.exit(status)
