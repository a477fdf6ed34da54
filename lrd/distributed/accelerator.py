"""Starts a rank (process group, Accelerator) and ends its process."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from lrd import recipe as recipes
from lrd.distributed import hardware
from lrd.distributed.rank_rendezvous import meet_ranks
from lrd.distributed.roll_call import RollCall


def start_rank(trainer: recipes.Trainer, facts: dict[str, Any], roll_call: RollCall) -> Accelerator:
    """Meet the other ranks, if there are any, and return the Accelerator.

    It is on the device that the launch file and `trainer.device` ask for.

    Args:
        trainer: the recipe's `trainer`.
        facts: what must be equal on all ranks, by the key that a user knows it by; JSON.
        roll_call: the roll call that answers for this rank from here on.

    Raises:
        UserError: CUDA is asked for, by `trainer.device=cuda` or by a launch file for GPUs, and
            there is none; or the ranks do not have the same `facts`.
        RunError: the ranks did not come together.
    """
    use_cpu = hardware.uses_cpu(trainer.device)
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
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )


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
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it was closed before the start
            with suppress(OSError):  # the terminal was closed
                stream.flush()
    if dist.is_initialized():
        os._exit(status)
    sys.exit(status)
