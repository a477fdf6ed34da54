"""A whole masked step of SGD or Adam on a CPU: update and mask in one pass over the memory, see `lrd.cpu_kernels`.

Stock SGD with momentum reads parameter, gradient and buffer and writes two of them, and this is what bounds it. So does
this step; the mask adds arithmetic only. It runs in torch's own OpenMP threads: others would find the cores taken, for
torch's wait awake for the next parallel region.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import cfunc
from numpy.typing import NDArray

from lrd.cpu_kernels import ADAM, JOB, SGD, adam, sgd

_CHUNK = 1 << 16  # elements that a thread claims at a time
_parallel_in: set[int] = set()  # processes, by number: this one and those that it was forked from


def step(tensors: NDArray[np.void]) -> None:
    """One masked update of float32 tensors, contiguous and row-major.

    Args:
        tensors: of dtype SGD or ADAM, a row each: addresses, hyper-parameters as torch's kernels get them (rounded to
            float32), and the mask's position; `limit` is T of `lrd.mask`, `rescale` 0 for none.
    """
    chunks = _chunks(tuple(tensors["numel"].tolist()))
    claims = np.zeros(1, np.int64)  # the next chunk that nobody works at
    addresses = tensors.ctypes.data, len(tensors), chunks.ctypes.data, len(chunks), claims.ctypes.data
    job = np.array((*addresses, *_square_root()), JOB)
    in_parallel, kernel = _library().get("GOMP_parallel"), _compiled(tensors.dtype)
    threads = min(torch.get_num_threads(), 1 + int(tensors["numel"].sum()) // _CHUNK)
    if in_parallel is None or threads < 2 or _is_orphaned():
        kernel(job.ctypes.data)
    else:
        _parallel_in.add(os.getpid())
        in_parallel(kernel, ctypes.c_void_p(job.ctypes.data), threads, 0)


def _is_orphaned() -> bool:
    """Whether this process was forked from one whose OpenMP threads had worked here: it would wait for them forever."""
    return bool(_parallel_in) and os.getpid() not in _parallel_in


@cache
def _compiled(dtype: Any) -> Any:
    """The kernel for a table: compiled in seconds, and kept on disk for the next process where that can be written."""
    kernel = {SGD: sgd, ADAM: adam}[dtype]
    try:
        return _c_function(kernel, cache=True)
    except Exception:  # neither beside this file nor in the user's home; or what is there cannot be read
        return _c_function(kernel, cache=False)


def _c_function(kernel: Any, cache: bool) -> Any:
    return cfunc("void(int64)", nopython=True, cache=cache, error_model="numpy")(kernel).ctypes


@cache
def _library() -> dict[str, Any]:
    """What torch was built with, by name: OpenMP's entry to a parallel region, MKL's square roots and its threads."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return {}
    names = ("GOMP_parallel", "vmsSqrt_64", "MKL_Set_Num_Threads_Local")
    return {name: getattr(library, name) for name in names if hasattr(library, name)}


@cache
def _square_root() -> tuple[int, int]:
    """Addresses of the square root that torch takes and of what sets its threads; zeros: the processor's own.

    MKL's is not correctly rounded everywhere. Left to itself it starts threads for 256 elements, in each of ours.
    """
    values = torch.linspace(0.5, 2.0, 4096, dtype=torch.float32, device="cpu")
    names = ("vmsSqrt_64", "MKL_Set_Num_Threads_Local")
    if torch.equal(values.sqrt(), torch.from_numpy(np.sqrt(values.numpy()))) or not _library().keys() >= {*names}:
        return 0, 0
    square_root, set_threads = (ctypes.cast(_library()[name], ctypes.c_void_p).value or 0 for name in names)
    return square_root, set_threads


@lru_cache(maxsize=64)
def _chunks(numels: tuple[int, ...]) -> NDArray[np.int64]:
    """int64 (chunks, 3): tensor, first element, count. Large ones first: the last to be claimed are short."""
    starts = [(t, start, numel - start) for t, numel in enumerate(numels) for start in range(0, numel, _CHUNK)]
    chunks = sorted(((t, start, min(_CHUNK, rest)) for t, start, rest in starts), key=lambda chunk: -chunk[2])
    return np.array(chunks, dtype=np.int64).reshape(-1, 3)
