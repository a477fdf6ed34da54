"""The global random generators of torch, NumPy and Python: set them, and leave them as they were.

lrd itself draws from none of them. Parts of the user's and of torchvision do.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def set_generators(torch_seed: int, numpy_seed: int, python_seed: int) -> None:
    """Let the generators begin at seeds, each in [0, 2**64); torch's is the one of the CPU."""
    # torch.manual_seed would do this a hundred times as slowly: it formats a stack for CUDA. It
    # would also seed the generator of every GPU.
    torch.default_generator.manual_seed(torch_seed)
    np.random.seed([numpy_seed & 0xFFFFFFFF, numpy_seed >> 32])
    random.seed(python_seed)


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Within this context the global generators begin at a seed; after it they are as before.

    Args:
        seed: in [0, 2**64), for torch, NumPy and Python.
    """
    with preserved_generators():
        set_generators(seed, seed, seed)
        yield


@contextmanager
def preserved_generators() -> Iterator[None]:
    """After this context the global generators of torch, NumPy and Python are as before."""
    numpy_state = np.random.get_state()
    python_state = random.getstate()
    has_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = [torch.cuda.current_device()] if has_gpu else []
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
