"""What this host has, and what a recipe's `auto` and a rank's threads are on it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lrd import console
from lrd import recipe as recipes
from lrd.errors import UserError

_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
_CPUINFO = Path("/proc/cpuinfo")
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def settle(recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe with each `auto` of precision and layout replaced by what it is on this host.

    From here on nothing knows of `auto`: ranks compare what it became, and so does a resume, on another processor too.
    On a CPU channels_last gains 2 to 11 % on 32x32 images and loses as much on 8x8 ones (benchmarks/README.md).

    Raises:
        UserError: see `uses_cpu`.
    """
    trainer = recipe.trainer
    if "auto" not in (trainer.precision, trainer.channels_last):
        return recipe
    on_cpu, settled = uses_cpu(trainer.device), dict[str, Any]()
    if trainer.precision == "auto":
        has_bf16 = has_bf16_instructions() if on_cpu else torch.cuda.is_bf16_supported(including_emulation=False)
        settled["precision"] = "bf16" if has_bf16 else "fp32"
    if trainer.channels_last == "auto":  # Tensor Cores want it
        settled["channels_last"] = not on_cpu and settled.get("precision", trainer.precision) == "bf16"
    for key, value in settled.items():
        console.say(f"trainer.{key}: auto is {str(value).lower()} here")
    return recipe.model_copy(update={"trainer": trainer.model_copy(update=settled)})


def uses_cpu(device: str) -> bool:
    """What `trainer.device` and the launch file say.

    `accelerate launch` does not tell its ranks of `use_cpu`; hidden GPUs (`gpu_ids: "-1,-1"`) do.

    Raises:
        UserError: CUDA is asked for, by `trainer.device=cuda` or by a launch file for GPUs, and there is none.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset").split(",")[0] in ("", "-1")
    asked_for_cpu = hidden or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    if device == "cpu" or (device == "auto" and asked_for_cpu):
        return True
    if torch.cuda.is_available():
        return False
    if device == "cuda":
        raise UserError("trainer.device: is 'cuda', but this host has no CUDA device that torch can use")
    if launched:
        raise UserError(
            "the launch file asks for GPUs, but this host has no CUDA device that torch can use; "
            "take launch/accelerate/cpu.yaml, or trainer.device=cpu"
        )
    return True


def has_bf16_instructions() -> bool:
    """Whether the processor multiplies in bfloat16: AVX512-BF16 or AMX. Without, bf16 takes 2.5 times as long."""
    try:
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in _BF16_INSTRUCTIONS)
    except (AttributeError, RuntimeError):  # a torch that has not got it, a processor that it does not know
        return any(name in _cpu_flags() for name in _BF16_INSTRUCTIONS)


def share_cores() -> None:
    """Take no more threads than this rank's share of the cores: those of several ranks would take turns.

    OMP_NUM_THREADS, of the user or of a launcher, is what a rank has unless that is more. Accelerate sets it to the
    host's cores by the ranks, whatever of them a container, `taskset` or SLURM leaves to this process.
    """
    share = max(1, int(cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if torch.get_num_threads() > share:
        torch.set_num_threads(share)


def cores() -> float:
    """Those this process may run on, or less where its cgroup (version 2) has a quota of CPU time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(allowed), *_quotas()])


def _quotas() -> list[float]:
    """In cores, of this process's cgroup and those above it."""
    try:
        own = next(line[3:] for line in _OWN_CGROUP.read_text(encoding="utf-8").splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    quotas, folder = list[float](), _CGROUPS / own.lstrip("/")
    for one in (folder, *folder.parents):
        with suppress(OSError, ValueError):  # the root has none; a container may not show its own
            quota, period = (one / "cpu.max").read_text(encoding="utf-8").split()
            quotas += [] if quota == "max" or not one.is_relative_to(_CGROUPS) else [int(quota) / int(period)]
    return quotas


def _cpu_flags() -> set[str]:
    """As the kernel tells them; none where there is no such file."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
