"""One masked step of SGD or Adam on a CPU: update and mask in one pass over the memory.

Stock SGD with momentum reads parameter, gradient and buffer and writes two of them; this memory
traffic is what bounds it. This step moves the same bytes, and the mask adds arithmetic only.

It runs in torch's own OpenMP threads. Other threads would find the cores taken, because torch's
threads stay awake while they wait for the next parallel region.

The kernels are in `lrd.optim.fused.cpu_kernels`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import cfunc
from numpy.typing import NDArray

from lrd.optim.fused.cpu_kernels import (
    ADAM_FIELDS,
    BLOCK,
    JOB_FIELDS,
    SGD_FIELDS,
    adam_kernel,
    sgd_kernel,
)

Row = dict[str, Any]  # a field's name -> its value, for one record of a table

# Elements that a thread claims at a time. A chunk must begin where a Philox block does.
_CHUNK = 1 << 16
assert _CHUNK % BLOCK == 0

_pids_with_threads: set[int] = set()  # this process and those it was forked from


def sgd(rows: Sequence[Row]) -> None:
    """One step of torch.optim.SGD under the mask, for float32 tensors, contiguous and row-major.

    Args:
        rows: one for each parameter, with the fields of `cpu_kernels.SGD_FIELDS`. Hyper-parameters
            are what torch's kernels get; the table rounds them to float32.

    Raises:
        ValueError: a row whose fields are not those of the table.
    """
    _run(sgd_kernel, make_table(rows, SGD_FIELDS))


def adam(rows: Sequence[Row]) -> None:
    """One step of torch.optim.Adam, or AdamW where `is_decoupled`, under the mask.

    Args:
        rows: as for `sgd`, with the fields of `cpu_kernels.ADAM_FIELDS`.

    Raises:
        ValueError: a row whose fields are not those of the table.
    """
    _run(adam_kernel, make_table(rows, ADAM_FIELDS))


def make_table(rows: Sequence[Row], dtype: np.dtype[np.void]) -> NDArray[np.void]:
    """Records in memory as the kernels read them, filled by field name.

    Args:
        rows: one for each record.
        dtype: the structured dtype of a record.

    Returns:
        A structured array of shape (len(rows),).

    Raises:
        ValueError: a row lacks a field or has one too many. The kernels follow addresses in these
            fields, so a wrong one would corrupt memory without an error.
    """
    assert dtype.names is not None
    expected = set(dtype.names)
    for row in rows:
        if row.keys() != expected:
            wrong = ", ".join(sorted(row.keys() ^ expected))
            raise ValueError(f"a row's fields do not match the kernel's table: {wrong}")

    table = np.empty(len(rows), dtype)
    for name in dtype.names:
        table[name] = np.array([row[name] for row in rows], dtype[name])
    return table


def _run(kernel: Any, tensors: NDArray[np.void]) -> None:
    """Run a kernel over a table of tensors, in as many threads as are worth while."""
    chunks = _split_into_chunks(tuple(tensors["numel"].tolist()))  # int64 (n_chunks, 3)
    next_chunk = np.zeros(1, np.int64)  # the kernels claim chunks by counting this up
    square_root, set_num_threads = _mkl_square_root()

    job_row = {
        "tensors": tensors.ctypes.data,
        "n_tensors": len(tensors),
        "chunks": chunks.ctypes.data,
        "n_chunks": len(chunks),
        "next_chunk": next_chunk.ctypes.data,
        "square_root": square_root,
        "set_num_threads": set_num_threads,
    }
    job = make_table([job_row], JOB_FIELDS)
    job_address = job.ctypes.data

    compiled = _compile(kernel)
    run_in_parallel = _torch_library_functions().get("GOMP_parallel")
    n_threads = min(torch.get_num_threads(), 1 + int(tensors["numel"].sum()) // _CHUNK)

    if run_in_parallel is None or n_threads < 2 or _is_forked_from_threads():
        compiled(job_address)
    else:
        _pids_with_threads.add(os.getpid())
        run_in_parallel(compiled, ctypes.c_void_p(job_address), n_threads, 0)


def _is_forked_from_threads() -> bool:
    """Whether this process was forked from one whose OpenMP threads had run a step.

    It has not got these threads, and a parallel region would wait for them forever. We can only
    know of threads that our own steps started.
    """
    return bool(_pids_with_threads) and os.getpid() not in _pids_with_threads


@cache
def _compile(kernel: Any) -> Any:
    """A kernel's C function. Compiling takes seconds, so it is stored on disk where possible."""
    try:
        return _as_c_function(kernel, store_on_disk=True)
    except Exception:
        # Numba can write neither beside this file nor in the user's home, or cannot read what is
        # stored there.
        return _as_c_function(kernel, store_on_disk=False)


def _as_c_function(kernel: Any, store_on_disk: bool) -> Any:
    decorate = cfunc("void(int64)", nopython=True, cache=store_on_disk, error_model="numpy")
    return decorate(kernel).ctypes


@cache
def _torch_library_functions() -> dict[str, Any]:
    """C functions in torch's library by name, as far as this build of torch has them.

    GOMP_parallel runs a function in OpenMP's threads, vmsSqrt_64 is MKL's square root of an array,
    and MKL_Set_Num_Threads_Local sets how many threads MKL may use.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return {}

    names = ("GOMP_parallel", "vmsSqrt_64", "MKL_Set_Num_Threads_Local")
    return {name: getattr(library, name) for name in names if hasattr(library, name)}


@cache
def _mkl_square_root() -> tuple[int, int]:
    """Addresses of MKL's square root and of the function that sets MKL's number of threads.

    (0, 0) where torch takes the processor's square root, or where MKL is missing.

    MKL's square root is not correctly rounded everywhere. Left to itself it starts threads for 256
    elements, in each of our threads.
    """
    values = torch.linspace(0.5, 2.0, 4096, dtype=torch.float32, device="cpu")
    processor_roots = torch.from_numpy(np.sqrt(values.numpy()))
    if torch.equal(values.sqrt(), processor_roots):
        return 0, 0

    functions = _torch_library_functions()
    if "vmsSqrt_64" not in functions or "MKL_Set_Num_Threads_Local" not in functions:
        return 0, 0

    square_root = ctypes.cast(functions["vmsSqrt_64"], ctypes.c_void_p).value or 0
    set_num_threads = ctypes.cast(functions["MKL_Set_Num_Threads_Local"], ctypes.c_void_p).value
    return square_root, set_num_threads or 0


@lru_cache(maxsize=64)
def _split_into_chunks(numels: tuple[int, ...]) -> NDArray[np.int64]:
    """The chunks that threads claim one by one, the largest first.

    With the short ones last, no thread still has a large one when the others are done.

    Args:
        numels: the number of elements of each tensor.

    Returns:
        int64 (n_chunks, 3): the tensor's number, the first element, how many elements.
    """
    chunks = []
    for number, numel in enumerate(numels):
        for start in range(0, numel, _CHUNK):
            chunks.append((number, start, min(_CHUNK, numel - start)))

    chunks.sort(key=lambda chunk: -chunk[2])
    return np.array(chunks, dtype=np.int64).reshape(-1, 3)
