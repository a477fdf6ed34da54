"""Decides when the kernels are loaded, and loads them.

On a CPU, loading Numba takes a process about a second. Large steps regain it soon, small ones only
after many steps. What small steps would save is counted until it pays for the loading. From then on
all steps use the kernels, whatever their size.

The environment variable LRD_FUSED, read at each step:
    0: the kernels are not used.
    1: they are loaded at the first step.
    Not set: they are loaded when that is worth while.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

_KERNEL_MODULES = {
    "cpu": "lrd.optim.fused.cpu_step",
    "cuda": "lrd.optim.fused.cuda_step",
}

# The cost of a step is counted in elements. A tensor costs as much as this many elements more: the
# calls into torch and NumPy that the kernels make unnecessary.
_ELEMENTS_PER_TENSOR = 1000

# A step of as many elements is worth loading the kernels at once.
_LARGE_STEP = 1 << 18

# Smaller steps are worth it together, when they cost as much as this. So ten tensors of 1000
# elements use the kernels from the 53rd step on, a hundred tensors of 100 from the 10th. A process
# that has come so far has probably most of its steps before it.
_WORTH_LOADING = 1 << 20


class _SpentCost:
    """What the small steps of this process have cost so far that the kernels could have done."""

    elements = 0


def check_user_choice() -> None:
    """Check LRD_FUSED.

    Raises:
        ValueError: it has another value than those above.
    """
    choice = user_choice()
    if choice not in (None, "", "0", "1"):
        raise ValueError(f"LRD_FUSED is {choice!r} in the environment, must be 0 or 1")


def user_choice() -> str | None:
    """What the user has chosen: "0" or "1", see above."""
    return os.environ.get("LRD_FUSED")


def is_due(device_type: str, numels: Iterable[int], choice: str | None) -> bool:
    """Whether a step that the kernels can do is to use them, also if they must be loaded first.

    Args:
        device_type: of the step's tensors.
        numels: how many elements each tensor has.
        choice: what `user_choice` has returned.
    """
    if choice in ("0", "1"):
        return choice == "1"
    if device_type != "cpu" or _KERNEL_MODULES["cpu"] in sys.modules:
        return True
    return _SpentCost.elements >= _WORTH_LOADING or sum(numels) >= _LARGE_STEP


def count_step(numels: Sequence[int]) -> None:
    """Count what a step has cost that the kernels could have done.

    Args:
        numels: how many elements each of these tensors has.
    """
    _SpentCost.elements += sum(numels) + len(numels) * _ELEMENTS_PER_TENSOR


@cache
def load_kernels(device_type: str) -> Any:
    """The module with the kernels for a device type; None if its compiler is missing."""
    try:
        return import_module(_KERNEL_MODULES[device_type])
    except ImportError:
        # No Numba or no Triton, or one that does not work with this NumPy or torch.
        return None
