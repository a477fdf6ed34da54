"""What this host has, and what a recipe's `auto` and the threads of a rank become on it."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lrd import console
from lrd import recipe as recipes
from lrd.errors import UserError
from lrd.host import share_of_cores

_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
_CPUINFO = Path("/proc/cpuinfo")
_TRUE = ("y", "yes", "t", "true", "on", "1")
_FALSE = ("n", "no", "f", "false", "off", "0")


def resolve_auto(recipe: recipes.Recipe) -> recipes.Recipe:
    """Replace `auto` in `trainer.precision` and `trainer.channels_last` by what it is on this host.

    `trainer.device` may still be `auto` afterwards. Ranks compare what the two settings became, and
    so does a resume, which may be on another processor.

    Returns:
        The recipe with the two settings resolved.

    Raises:
        UserError: see `uses_cpu`.
    """
    trainer = recipe.trainer
    if "auto" not in (trainer.precision, trainer.channels_last):
        return recipe

    on_cpu = uses_cpu(trainer.device)
    resolved: dict[str, Any] = {}

    if trainer.precision == "auto":
        if on_cpu:
            has_bf16 = has_bf16_instructions()
        else:
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        resolved["precision"] = "bf16" if has_bf16 else "fp32"

    # Tensor Cores want channels_last. On a CPU it gains 2 to 11 % on 32x32 images and loses as much
    # on 8x8 ones (docs/results.md), so there it is off.
    if trainer.channels_last == "auto":
        precision = resolved.get("precision", trainer.precision)
        resolved["channels_last"] = not on_cpu and precision == "bf16"

    for key, value in resolved.items():
        console.info(f"trainer.{key}: auto is {str(value).lower()} here")
    return recipe.model_copy(update={"trainer": trainer.model_copy(update=resolved)})


def uses_cpu(device: str) -> bool:
    """Whether training runs on the CPU, as `trainer.device` and the launch file ask for it.

    `accelerate launch` passes a launch file's `use_cpu` on, as ACCELERATE_USE_CPU, only where it
    starts a single process without torch's launcher. Several ranks are not told of `use_cpu`; for
    them hidden GPUs (`gpu_ids: "-1,-1"`) ask for the CPU.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        UserError: CUDA is asked for, by `trainer.device=cuda` or by a launch file for GPUs, and
            there is none; or ACCELERATE_USE_CPU is neither true nor false.
    """
    first_visible_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "unset").split(",")[0]
    are_gpus_hidden = first_visible_gpu in ("", "-1")
    is_cpu_asked_for = _read_flag("ACCELERATE_USE_CPU")

    if device == "cpu" or (device == "auto" and (are_gpus_hidden or is_cpu_asked_for)):
        return True
    if torch.cuda.is_available():
        return False

    if device == "cuda":
        raise UserError(
            "trainer.device: is 'cuda', but this host has no CUDA device that torch can use"
        )

    # Accelerate's launchers set this variable for every process that they start.
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if is_launched:
        raise UserError(
            "accelerate launch asks for GPUs, as it does where neither a launch file nor --cpu is "
            "given, but this host has no CUDA device that torch can use; take `lrd launch`, "
            "--config_file launch/accelerate/cpu.yaml, or trainer.device=cpu"
        )
    return True


def _read_flag(name: str) -> bool:
    """An environment variable that is true or false, as Accelerate reads it."""
    text = os.environ.get(name, "false")
    if text.lower() not in (*_TRUE, *_FALSE):
        raise UserError(f"{name}: is {text!r} in the environment, should be true or false")
    return text.lower() in _TRUE


def has_bf16_instructions() -> bool:
    """Whether the processor multiplies in bfloat16: AVX512-BF16 or AMX.

    Without these, a step in bf16 takes 2.5 times as long as one in fp32.
    """
    try:
        capabilities = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):  # a torch without it, a processor that it does not know
        flags = _cpu_flags()
        return any(name in flags for name in _BF16_INSTRUCTIONS)
    return any(capabilities.get(name, False) for name in _BF16_INSTRUCTIONS)


def limit_threads() -> None:
    """Take no more threads than this rank's share of the cores.

    OMP_NUM_THREADS, set by the user or by a launcher, is what a rank has unless that is more than
    its share. Accelerate sets it to the host's cores divided by the ranks, however few of these
    cores a container, `taskset` or SLURM leaves to this process.
    """
    share = share_of_cores()
    if torch.get_num_threads() > share:
        torch.set_num_threads(share)


@lru_cache(maxsize=1)
def describe_processor() -> str:
    """The family of this host's processor and the instructions that torch uses on it.

    Two that are described alike compute the same bits with the same number of threads, as far as
    this is known.
    """
    values = _read_cpuinfo()
    name = values.get("model name") or platform.machine()
    numbers = [f"{key} {values[key]}" for key in ("cpu family", "model") if key in values]
    return ", ".join([name, *numbers, torch.backends.cpu.get_cpu_capability()])


def _cpu_flags() -> set[str]:
    """The processor's features as the kernel lists them; empty where it does not."""
    return set(_read_cpuinfo().get("flags", "").split())


def _read_cpuinfo() -> dict[str, str]:
    """What the kernel says of the first processor, by its keys; empty where it says nothing."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}

    values = {}
    for line in text.partition("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        values[key.strip()] = value.strip()
    return values
