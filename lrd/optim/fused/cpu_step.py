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
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import cfunc
from numpy.typing import NDArray

from lrd.optim.fused.cpu_kernels import (
    ADAM_FIELDS,
    CHUNK,
    DRAW_FIELDS,
    EXCHANGE_FIELDS,
    JOB_FIELDS,
    RESTORE_FIELDS,
    SGD_FIELDS,
    adam_kernel,
    draw_kernel,
    pack_kernel,
    restore_kernel,
    sgd_kernel,
    unpack_kernel,
)
from lrd.optim.placement import Placement

_pids_with_threads: set[int] = set()  # this process and those it was forked from


class Kernel(NamedTuple):
    """A kernel, and the records that it reads.

    The first fields of a record are addresses, in the order of `address_fields`.
    """

    function: Any
    fields: np.dtype[np.void]
    address_fields: tuple[str, ...]


# Float32 steps of torch.optim.SGD and torch.optim.Adam (or AdamW, where `is_decoupled`) under the
# mask. Hyper-parameters are what torch's kernels get; the records round them to float32.
SGD = Kernel(sgd_kernel, SGD_FIELDS, ("param", "grad", "momentum_buffer"))
ADAM = Kernel(adam_kernel, ADAM_FIELDS, ("param", "grad", "exp_avg", "exp_avg_sq"))

# Dropped elements get their old bits back.
RESTORE = Kernel(restore_kernel, RESTORE_FIELDS, ("new", "old"))

# Masks are drawn into memory, one bit an element.
DRAW = Kernel(draw_kernel, DRAW_FIELDS, ("keep_words",))

# The kept elements of a rank's own update are packed to be sent, and their means are unpacked.
_EXCHANGE_ADDRESSES = ("param", "grad", "momentum_buffer", "keep_words", "chunk_starts", "packed")
PACK = Kernel(pack_kernel, EXCHANGE_FIELDS, _EXCHANGE_ADDRESSES)
UNPACK = Kernel(unpack_kernel, EXCHANGE_FIELDS, _EXCHANGE_ADDRESSES)

# A tensor as a table knows it: the parameter's index, as in the position of its masks; the number
# of elements, which are contiguous in memory; where they lie in the whole parameter (None: they are
# the whole).
TensorPart = tuple[int, int, Placement | None]


class Table:
    """What a kernel reads about a list of tensors, kept from step to step.

    Kept are sizes, positions and numbers. Addresses are given for each run: the kernels follow
    them, so an old one would corrupt memory without an error.

    Args:
        kernel: which reads the table.
        parts: the tensors.
        group_ranges: of each group of tensors with common numbers, the number of its first tensor
            and of the tensor after its last.
        element_size: bytes of an element in memory, all tensors alike.
    """

    def __init__(
        self,
        kernel: Kernel,
        parts: Sequence[TensorPart],
        group_ranges: Sequence[tuple[int, int]],
        element_size: int = 4,
    ) -> None:
        self._function = kernel.function
        self._parts = parts
        self._group_ranges = group_ranges

        # A record for each run of elements: one for each tensor, but more for some shards.
        runs = [_runs(numel, placement) for _, numel, placement in parts]
        self._n_runs = np.array([len(offsets) for offsets, _ in runs], np.int64)  # (n_tensors,)
        first_records = np.cumsum(self._n_runs) - self._n_runs
        stop_records = first_records + self._n_runs
        self._records = np.zeros(int(self._n_runs.sum()), kernel.fields)

        assert kernel.fields.names is not None
        self._columns = {name: self._records[name] for name in kernel.fields.names}
        self._unset = set(kernel.fields.names) - {"mask_step", *kernel.address_fields}

        indices = np.array([index for index, _, _ in parts], np.uint64)
        numels = np.array([length for _, length in runs], np.int64).repeat(self._n_runs)
        self._set("index", indices.repeat(self._n_runs))
        self._set("numel", numels)
        self._set("offset", np.concatenate([offsets for offsets, _ in runs]))

        # The addresses, int64 (n_records, n_addresses): the first fields of the records
        n_addresses = len(kernel.address_fields)
        assert kernel.fields.names[:n_addresses] == kernel.address_fields
        self._addresses = np.ndarray(
            shape=(len(self._records), n_addresses),
            dtype=np.int64,
            buffer=self._records.data,
            strides=(kernel.fields.itemsize, 8),
        )

        # From its tensor's first byte, where each record's first byte lies: int64 (n_records, 1)
        number_in_tensor = np.arange(len(numels)) - first_records.repeat(self._n_runs)
        self._first_bytes = (number_in_tensor * numels * element_size)[:, None]
        self._has_a_record_each = bool((self._n_runs == 1).all())

        # The numbers as they were set last, and the records of each group
        self._group_numbers: list[dict[str, Any] | None] = [None] * len(group_ranges)
        self._tensor_numbers: dict[str, list[Any]] = {}
        self._group_records = [
            slice(int(first_records[first]), int(stop_records[stop - 1]))
            for first, stop in group_ranges
        ]

        self._chunks = _split_into_chunks(numels)  # int64 (n_chunks, 3)
        self._next_chunk = np.zeros(1, np.int64)  # the kernels claim chunks by counting this up
        self._max_threads = 1 + int(numels.sum()) // CHUNK
        self._job = self._make_job()
        self._job_address = self._job.ctypes.data

    def fits(self, parts: Sequence[TensorPart], group_ranges: Sequence[tuple[int, int]]) -> bool:
        """Whether this is the table of such tensors in such groups."""
        return parts == self._parts and group_ranges == self._group_ranges

    def set_group_numbers(self, group_number: int, numbers: dict[str, Any], mask_step: int) -> None:
        """Set numbers that the tensors of a group have in common.

        Args:
            group_number: the group's place in `group_ranges`.
            numbers: by field; of all fields but addresses and what `set_tensor_numbers` sets. Not
                to be changed afterwards: if it is the dictionary of the last step, it is not read.
            mask_step: which changes from step to step.

        Raises:
            ValueError: the kernel has no such field.
        """
        records = self._group_records[group_number]
        self._columns["mask_step"][records] = mask_step

        if numbers is not self._group_numbers[group_number]:
            for name, number in numbers.items():
                self._set(name, number, records)
            self._group_numbers[group_number] = numbers

    def set_tensor_numbers(self, name: str, numbers: list[Any]) -> None:
        """Set a number of each tensor.

        Args:
            name: the field.
            numbers: one for each tensor.

        Raises:
            ValueError: the kernel has no such field, or there is not one number for each tensor.
        """
        if numbers == self._tensor_numbers.get(name):
            return

        if len(numbers) != len(self._parts):
            raise ValueError(f"{len(numbers)} numbers for a table of {len(self._parts)} tensors")

        if numbers.count(numbers[0]) == len(numbers):  # as usual
            self._set(name, numbers[0])
        else:
            self._set(name, np.array(numbers).repeat(self._n_runs))
        self._tensor_numbers[name] = numbers

    def run(self, addresses: Sequence[Sequence[int]]) -> None:
        """Run the kernel, in as many threads as are worth while.

        Args:
            addresses: where the memory of each tensor begins, for each of the kernel's
                `address_fields`.

        Raises:
            ValueError: a field was never set, or an address is missing.
        """
        if self._unset:
            raise ValueError(f"fields of the kernel's table are not set: {sorted(self._unset)}")
        if len(addresses) != len(self._parts):
            raise ValueError(f"{len(addresses)} tensors for a table of {len(self._parts)}")

        if self._has_a_record_each:
            self._addresses[:] = addresses
        else:
            self._addresses[:] = np.array(addresses).repeat(self._n_runs, axis=0)
            self._addresses += self._first_bytes

        self._next_chunk[0] = 0
        _call_in_threads(_compile(self._function), self._job_address, self._max_threads)

    def _set(self, name: str, values: Any, records: slice = slice(None)) -> None:
        if name not in self._columns:
            raise ValueError(f"the kernel's table has no field {name}")

        self._columns[name][records] = values
        self._unset.discard(name)

    def _make_job(self) -> NDArray[np.void]:
        """What the kernel is called with, a record of JOB_FIELDS."""
        square_root, set_num_threads = _mkl_square_root()
        job = np.zeros(1, JOB_FIELDS)
        job["records"] = self._records.ctypes.data
        job["n_records"] = len(self._records)
        job["chunks"] = self._chunks.ctypes.data
        job["n_chunks"] = len(self._chunks)
        job["next_chunk"] = self._next_chunk.ctypes.data
        job["square_root"] = square_root
        job["set_num_threads"] = set_num_threads
        return job


def _runs(numel: int, placement: Placement | None) -> tuple[NDArray[np.int64], int]:
    """Where a tensor's contiguous runs begin in the whole parameter, and their length."""
    if placement is None:
        return np.zeros(1, np.int64), numel
    return placement.runs()


def _call_in_threads(compiled: Any, job_address: int, max_threads: int) -> None:
    """Call a kernel's C function in torch's threads, or in this one."""
    n_threads = min(max_threads, torch.get_num_threads())
    run_in_parallel = _torch_library_functions().get("GOMP_parallel") if n_threads > 1 else None

    if run_in_parallel is None or _is_forked_from_threads():
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


def _split_into_chunks(numels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The chunks that threads claim one by one, the largest first.

    With the short ones last, no thread still has a large one when the others are done.

    Args:
        numels: the number of elements of each record.

    Returns:
        int64 (n_chunks, 3): the record's number, the first element, how many elements.
    """
    n_chunks = -(-numels // CHUNK)  # of each record
    records = np.repeat(np.arange(len(numels)), n_chunks)
    first_chunks = np.cumsum(n_chunks) - n_chunks
    starts = (np.arange(len(records)) - first_chunks[records]) * CHUNK
    counts = np.minimum(CHUNK, numels[records] - starts)

    chunks = np.stack([records, starts, counts], axis=1).astype(np.int64)
    return np.ascontiguousarray(chunks[np.argsort(-counts, kind="stable")])
