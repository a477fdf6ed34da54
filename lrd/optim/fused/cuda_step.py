"""One masked step of SGD or Adam on a CUDA device: update and mask in one pass over the memory.

Kept elements get the update that torch's `fused=True` gives them, dropped ones keep their bits, and
all of the optimizer's state moves. A step takes two launches for a list of tensors, however many,
and one bit of memory for each element; there is no copy of the parameters.

In a steady state nothing is allocated, and nothing ever waits for the device. Addresses and sizes
lie on the device in tables, which a list's first step builds. If the gradients are at other
addresses than at the last step, the new addresses are sent asynchronously.

Numbers that change from step to step may be tensors () on the parameters' device. With these, a
step captured in a CUDA graph draws the next mask at each replay. Take one step before each capture.

The kernels are in `lrd.optim.fused.cuda_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrd.optim import mask
from lrd.optim.fused.cuda_kernels import BLOCK, CHUNK, COLUMNS, adam_kernel, draw_kernel, sgd_kernel

_BLOCKS_PER_PROGRAM = 256  # Philox blocks: one for each thread of eight warps
_LAUNCH_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_MAX_IDLE_STEPS = 16  # for which the tables of a list of tensors stay in memory
_KEEP_EVERYTHING = 1 << mask.RESOLUTION_BITS  # the threshold that masks nothing


class _Tables:
    """What the kernels read about one list of tensors, see `lrd.optim.fused.cuda_kernels`.

    Args:
        params: the n_tensors parameters.
        states: none, one or two lists of state tensors, each as long as `params`.
        indices: each parameter's index in the optimizer.
        steps: each parameter's count of updates, float32 () on the device; empty: not in the table.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        indices: Sequence[int],
        steps: Sequence[Tensor],
    ) -> None:
        self.device = params[0].device
        self.layouts = [_layout(param) for param in params]
        for state_tensors in states:
            self._check(state_tensors, params)

        rows: list[list[int]] = []
        tensor_of_chunk: list[int] = []
        for number, param in enumerate(params):
            channels, area = self.layouts[number]
            row = {
                "param": param.data_ptr(),
                "first_state": states[0][number].data_ptr() if len(states) > 0 else 0,
                "second_state": states[1][number].data_ptr() if len(states) > 1 else 0,
                "numel": param.numel(),
                "first_chunk": len(tensor_of_chunk),
                "index": _as_int64(indices[number]),
                "channels": channels,
                "area": area,
                "step": steps[number].data_ptr() if steps else 0,
            }
            # By name: the kernels follow these addresses, and a slip would corrupt memory.
            rows.append([row[name] for name in COLUMNS])
            tensor_of_chunk += [number] * _ceil_divide(param.numel(), CHUNK)

        self.n_chunks = len(tensor_of_chunk)
        table = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, len(COLUMNS))
        self.table = table.to(self.device)  # int64 (n_tensors, 9)
        chunks = torch.tensor(tensor_of_chunk, dtype=torch.int32, device="cpu")
        self.tensor_of_chunk = chunks.to(self.device)  # int32 (n_chunks,)

        # The mask, packed: uint64 (n_chunks * CHUNK / 64,), and the same memory as bytes
        self.keep_words = torch.empty(
            self.n_chunks * CHUNK // 64, dtype=torch.uint64, device=self.device
        )
        self.keep_bytes = self.keep_words.view(torch.uint8)

        # int64 (n_tensors,)
        self.gradient_addresses = torch.empty(len(params), dtype=torch.int64, device=self.device)
        self._sent_addresses: list[int] = []

        # Host memory that the gradients' addresses are copied from: one that is ready for the next
        # capture of a CUDA graph, and those that captured graphs copy from at each replay.
        self._spare_staging: Tensor | None = self._new_staging()
        self.captured: list[Tensor] = []

        self.last_step = 0  # of the cache that holds these tables

    def send_gradient_addresses(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Copy the gradients' addresses to the device, if they are not those of the last step."""
        addresses = [grad.data_ptr() for grad in grads]
        is_capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if addresses == self._sent_addresses and not is_capturing and not self.captured:
            return

        self._check(grads, params)
        if is_capturing:
            # A replay copies from here again: nothing else may ever be written here, and it must
            # not be freed. It was allocated before the capture.
            if self._spare_staging is None:
                raise RuntimeError(
                    "take a step of these tensors before each capture of a CUDA graph"
                )
            staging = self._spare_staging
            self._spare_staging = None
            self.captured.append(staging)
            _tables_of_graphs.add(self)
        else:
            # torch does not give out pinned memory again before the copies from it are done.
            staging = self._new_staging()
            if self._spare_staging is None:
                self._spare_staging = self._new_staging()

        staging.copy_(torch.tensor(addresses, dtype=torch.int64, device="cpu"))
        self.gradient_addresses.copy_(staging, non_blocking=True)
        self._sent_addresses = addresses

    def draw_mask(self, seed: int, mask_step: int | Tensor, threshold: int) -> None:
        """Launch the kernel that draws the mask's bits into `keep_words`."""
        # The planes below the threshold's lowest set bit decide nothing.
        lowest_set_bit = (threshold & -threshold).bit_length() - 1
        n_planes = mask.RESOLUTION_BITS - lowest_set_bit

        n_blocks = self.n_chunks * (CHUNK // BLOCK)
        grid = (_ceil_divide(n_blocks, _BLOCKS_PER_PROGRAM),)
        draw_kernel[grid](
            table=self.table,
            tensor_of_chunk=self.tensor_of_chunk,
            keep_bits=self.keep_words,
            n_blocks=n_blocks,
            seed=seed,
            mask_step=mask_step,
            threshold=threshold,
            n_planes=n_planes,
            BLOCKS=_BLOCKS_PER_PROGRAM,
            **_LAUNCH_OPTIONS,
        )

    def _new_staging(self) -> Tensor:
        """Host memory for the gradients' addresses, int64 (n_tensors,)."""
        return torch.empty(
            self.gradient_addresses.shape,
            dtype=torch.int64,
            device="cpu",  # the process may have set another default device
            pin_memory=self.device.type == "cuda",
        )

    def _check(self, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        """Raise ValueError if a tensor does not lie in memory as its parameter does."""
        for tensor, param, layout in zip(tensors, params, self.layouts, strict=True):
            if (
                tensor.shape != param.shape
                or tensor.device != param.device
                or _layout(tensor) != layout
            ):
                raise ValueError(
                    "gradients and states must have their parameter's shape, device "
                    "and memory format"
                )


def _layout(tensor: Tensor) -> tuple[int, int]:
    """Channels and area (height times width) of a tensor in channels_last; else (0, 0)."""
    if tensor.dtype != torch.float32:
        raise ValueError(f"tensors must be float32, not {tensor.dtype}")
    if tensor.is_contiguous():
        return 0, 0

    # The kernels compute an element's place in channels_last with 32 bits.
    is_channels_last = tensor.is_contiguous(memory_format=torch.channels_last)
    if not is_channels_last or tensor.numel() >= 1 << 31:
        raise ValueError(
            "tensors must be contiguous, or channels_last with less than 2**31 elements"
        )
    return tensor.shape[1], tensor.shape[2] * tensor.shape[3]


# A captured graph reads the tables of its capture: these must stay.
_tables_of_graphs: set[_Tables] = set()


class TableCache:
    """The tables of one optimizer's lists of tensors, kept from step to step.

    A step has one list for each launch, and any number of launches. When tables are built, those
    that the latest `_MAX_IDLE_STEPS` steps did not need are freed: of lists that no longer occur,
    because a parameter was frozen or the tensors have moved.
    """

    def __init__(self) -> None:
        self._tables: dict[Any, _Tables] = {}
        self._step = 0

    def __len__(self) -> int:
        return len(self._tables)

    def begin_step(self) -> None:
        """Count one more step of the optimizer."""
        self._step += 1

    def prepare(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        indices: Sequence[int],
        steps: Sequence[Tensor] = (),
    ) -> _Tables:
        """The tables of a list of tensors, ready for a step with these gradients.

        Those of an earlier step with tensors at the same addresses, of the same sizes, are used
        again.
        """
        key = (
            params[0].device,
            *((param.data_ptr(), param.shape, param.stride()) for param in params),
            *(tensor.data_ptr() for tensors in (*states, steps) for tensor in tensors),
            *indices,
        )
        tables = self._tables.get(key)

        if tables is None:
            self._free_idle()
            tables = _Tables(params, states, indices, steps)
            self._tables[key] = tables

        tables.last_step = self._step
        tables.send_gradient_addresses(params, grads)
        return tables

    def _free_idle(self) -> None:
        oldest_step = self._step - _MAX_IDLE_STEPS
        self._tables = {
            key: tables for key, tables in self._tables.items() if tables.last_step >= oldest_step
        }


@torch.no_grad()
def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    indices: Sequence[int],
    *,
    seed: int,
    mask_step: int | Tensor,
    threshold: int,
    update_divisor: float,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
    table_cache: TableCache | None = None,
) -> None:
    """One step of torch.optim.SGD under the mask.

    Args:
        params: float32, contiguous or channels_last, all on one device.
        grads: each of its parameter's shape and memory format.
        momentum_buffers: each of its parameter's shape and memory format. Empty if momentum is 0.
        indices: each parameter's index in the optimizer, counted through its groups.
        seed: of the mask.
        mask_step: the mask's update count, a number or int64 ().
        threshold: of the mask, 1 to 65536, see `lrd.optim.mask`. 65536 masks nothing.
        update_divisor: the keep probability that a kept element's update is divided by. 0: no
            division.
        lr: a number or float32 ().
        momentum: as for torch.optim.SGD, as are the arguments up to `maximize`.
        dampening: see there.
        weight_decay: see there.
        nesterov: see there.
        maximize: see there.
        is_first_step: the buffers become the gradients, whatever they hold.
        table_cache: of the optimizer. None: the tables are built for this call alone.

    Raises:
        ValueError: tensors of a shape, dtype, device or memory format that is not as above.
    """
    if not any(param.numel() for param in params):
        return

    with torch.cuda.device_of(params[0]):  # type: ignore[no-untyped-call]
        states = [momentum_buffers] if momentum else []
        table_cache = TableCache() if table_cache is None else table_cache
        tables = table_cache.prepare(params, grads, states, indices)

        is_masked = threshold < _KEEP_EVERYTHING
        if is_masked:
            tables.draw_mask(seed, mask_step, threshold)

        sgd_kernel[(tables.n_chunks,)](
            table=tables.table,
            gradient_addresses=tables.gradient_addresses,
            tensor_of_chunk=tables.tensor_of_chunk,
            keep_bits=tables.keep_bytes,
            lr=_scalar(lr),
            momentum=float(momentum),
            dampening=float(dampening),
            weight_decay=float(weight_decay),
            update_divisor=float(update_divisor),
            MOMENTUM=momentum != 0,
            NESTEROV=nesterov,
            WEIGHT_DECAY=weight_decay != 0,
            MAXIMIZE=maximize,
            FIRST_STEP=is_first_step,
            MASKED=is_masked,
            RESCALE=update_divisor != 0,
            CHUNK=CHUNK,
            **_LAUNCH_OPTIONS,
        )


@torch.no_grad()
def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    indices: Sequence[int],
    *,
    seed: int,
    mask_step: int | Tensor,
    threshold: int,
    update_divisor: float,
    step: float | Tensor | Sequence[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    decoupled: bool,
    maximize: bool,
    table_cache: TableCache | None = None,
) -> None:
    """One step of torch.optim.Adam, or AdamW if `decoupled`, under the mask.

    Args:
        params: as for `sgd`, as are the arguments that are not listed here.
        exp_avgs: each of its parameter's shape and memory format.
        exp_avg_sqs: each of its parameter's shape and memory format.
        step: how many updates this one makes, from 1: a number, int64 () or float32 (); or for each
            parameter its own, float32 () on the device.
        beta1: as for torch.optim.Adam, as are `beta2`, `weight_decay`, `eps` and `maximize`.
        decoupled: AdamW's weight decay.

    Raises:
        ValueError: tensors of a shape, dtype, device or memory format that is not as above.
    """
    if not any(param.numel() for param in params):
        return

    with torch.cuda.device_of(params[0]):  # type: ignore[no-untyped-call]
        step_tensors = step if isinstance(step, Sequence) else ()
        table_cache = TableCache() if table_cache is None else table_cache
        tables = table_cache.prepare(params, grads, [exp_avgs, exp_avg_sqs], indices, step_tensors)

        is_masked = threshold < _KEEP_EVERYTHING
        if is_masked:
            tables.draw_mask(seed, mask_step, threshold)

        adam_kernel[(tables.n_chunks,)](
            table=tables.table,
            gradient_addresses=tables.gradient_addresses,
            tensor_of_chunk=tables.tensor_of_chunk,
            keep_bits=tables.keep_bytes,
            step=0 if step_tensors else step,
            lr=_scalar(lr),
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=float(weight_decay),
            eps=float(eps),
            update_divisor=float(update_divisor),
            WEIGHT_DECAY=weight_decay != 0,
            DECOUPLED=decoupled,
            MAXIMIZE=maximize,
            MASKED=is_masked,
            RESCALE=update_divisor != 0,
            CHUNK=CHUNK,
            STEP_IN_TABLE=bool(step_tensors),
            **_LAUNCH_OPTIONS,
        )


def _scalar(lr: float | Tensor) -> float | Tensor:
    """The lr as a kernel takes it: a tensor for a pointer, else a float, never an int."""
    return lr if isinstance(lr, Tensor) else float(lr)


def _as_int64(index: int) -> int:
    """The int64 of the same bits as a uint64: an index that is a hash needs all 64."""
    return index - (1 << 64) if index >= 1 << 63 else index


def _ceil_divide(number: int, divisor: int) -> int:
    return -(-number // divisor)
