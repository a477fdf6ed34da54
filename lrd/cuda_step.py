"""A whole masked step of SGD or Adam on a CUDA device: update and mask in one pass, without a copy of the parameters.

Kept elements get the update that torch's `fused=True` gives them, dropped ones keep their bits, and all of the
optimizer's state moves. Two launches for a list of tensors, however many, and one bit an element of memory; see
`lrd.cuda_kernels`.

In a steady state nothing is allocated, and nothing ever waits for the device: addresses and sizes lie there in tables,
built at a list's first step. New gradients at other addresses send theirs, asynchronously.
Numbers that change from step to step may be tensors () on the parameters' device. With these, a step captured in a CUDA
graph draws the next mask at each replay; take one step before each capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrd import mask
from lrd.cuda_kernels import BLOCK, CHUNK, COLUMNS, adam_kernel, draw_kernel, sgd_kernel

_DRAWN_PER_PROGRAM = 256  # Philox blocks: one for each thread of eight warps
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_MOST_LISTS = 16  # of tensors whose tables are kept


class _Tables:
    """What the kernels read about one list of tensors: see `lrd.cuda_kernels`."""

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        indices: Sequence[int],
        steps: Sequence[Tensor],
    ) -> None:
        self.device = params[0].device
        self.layouts = [_layout(param) for param in params]
        for tensors in states:
            self._check(tensors, params)
        rows: list[list[int]] = []
        owners: list[int] = []
        for number, (param, index, layout) in enumerate(zip(params, indices, self.layouts, strict=True)):
            state_addresses = [tensors[number].data_ptr() for tensors in states] + [0] * (2 - len(states))
            step = steps[number].data_ptr() if steps else 0
            rows.append([param.data_ptr(), *state_addresses, param.numel(), len(owners), index, *layout, step])
            owners += [number] * -(-param.numel() // CHUNK)
        self.n_chunks = len(owners)
        self.table = torch.tensor(rows, dtype=torch.int64).view(-1, len(COLUMNS)).to(self.device)
        self.owners = torch.tensor(owners, dtype=torch.int32).to(self.device)
        self.words = torch.empty(self.n_chunks * CHUNK // 64, dtype=torch.uint64, device=self.device)
        self.octets = self.words.view(torch.uint8)
        self.gradients = torch.empty(len(params), dtype=torch.int64, device=self.device)
        self._sent: list[int] = []
        self._spare: Tensor | None = self._stage()
        self.captured: list[Tensor] = []

    def send(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Let the kernels know where the gradients are."""
        addresses = [grad.data_ptr() for grad in grads]
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if addresses == self._sent and not capturing and not self.captured:
            return
        self._check(grads, params)
        if capturing:  # a replay copies from here anew: nothing else may ever be written here, and it must not be freed
            if self._spare is None:
                raise RuntimeError("take a step of these tensors before each capture of a CUDA graph")
            staged, self._spare = self._spare, None
            self.captured.append(staged)
        else:  # torch's pinned memory is not given out again before the copies from it are done
            staged = self._stage()
            self._spare = self._stage() if self._spare is None else self._spare
        staged.copy_(torch.tensor(addresses, dtype=torch.int64))
        self.gradients.copy_(staged, non_blocking=True)
        self._sent = addresses

    def draw(self, seed: int, mask_step: int | Tensor, limit: int) -> None:
        n_planes = mask.RESOLUTION_BITS + 1 - (limit & -limit).bit_length()
        n_blocks = self.n_chunks * (CHUNK // BLOCK)
        draw_kernel[(-(-n_blocks // _DRAWN_PER_PROGRAM),)](
            self.table,
            self.owners,
            self.words,
            n_blocks,
            seed,
            mask_step,
            limit,
            n_planes,
            _DRAWN_PER_PROGRAM,
            **_OPTIONS,
        )

    def _stage(self) -> Tensor:
        return torch.empty(self.gradients.shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def _check(self, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        for tensor, param, layout in zip(tensors, params, self.layouts, strict=True):
            if tensor.shape != param.shape or tensor.device != param.device or _layout(tensor) != layout:
                raise ValueError("gradients and states must have their parameter's shape, device and memory format")


def _layout(tensor: Tensor) -> tuple[int, int]:
    """Channels and area (height times width) of a tensor that lies in memory as channels_last; else (0, 0)."""
    if tensor.dtype != torch.float32:
        raise ValueError(f"tensors must be float32, not {tensor.dtype}")
    if tensor.is_contiguous():
        return 0, 0
    if not tensor.is_contiguous(memory_format=torch.channels_last) or tensor.numel() >= 1 << 31:
        raise ValueError("tensors must be contiguous, or channels_last with less than 2**31 elements")
    return tensor.shape[1], tensor.shape[2] * tensor.shape[3]


_tables: dict[Any, _Tables] = {}


def _tables_of(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    indices: Sequence[int],
    steps: Sequence[Tensor] = (),
) -> _Tables:
    """The tables of a list of tensors: those of the last step with tensors at these addresses, of these sizes."""
    key = (
        params[0].device,
        *((param.data_ptr(), param.shape, param.stride()) for param in params),
        *(tensor.data_ptr() for tensors in (*states, steps) for tensor in tensors),
        *indices,
    )
    tables = _tables.get(key)
    if tables is None:
        tables = _Tables(params, states, indices, steps)
        idle = [key for key, other in _tables.items() if not other.captured]  # a graph reads those of its capture
        if len(idle) >= _MOST_LISTS:
            del _tables[idle[0]]
        _tables[key] = tables
    tables.send(params, grads)
    return tables


@torch.no_grad()
def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    indices: Sequence[int],
    *,
    seed: int,
    mask_step: int | Tensor,
    limit: int,
    rescale: float,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    is_first: bool,
) -> None:
    """One step of torch.optim.SGD under the mask.

    Args:
        params, grads, momentum_buffers: float32, contiguous or channels_last, each parameter's of one format, all on
            one device. No buffers where momentum is 0.
        indices: each parameter's index in the optimizer, counted through its groups.
        seed, mask_step: of the mask. `mask_step` is a number or int64 ().
        limit: T of `lrd.mask`, 1 to 65536; 65536 masks nothing.
        rescale: divide the update by this keep probability; 0 does not.
        lr: a number or float32 ().
        is_first: the buffers, whatever they hold, become the gradients.
    """
    if not any(param.numel() for param in params):
        return
    with torch.cuda.device_of(params[0]):  # type: ignore[no-untyped-call]
        tables = _tables_of(params, grads, [momentum_buffers] if momentum else [], indices)
        if limit < 1 << mask.RESOLUTION_BITS:
            tables.draw(seed, mask_step, limit)
        sgd_kernel[(tables.n_chunks,)](
            *(tables.table, tables.gradients, tables.owners, tables.octets),
            *(_scalar(lr), float(momentum), float(dampening), float(weight_decay), float(rescale)),
            MOMENTUM=momentum != 0,
            NESTEROV=nesterov,
            DECAY=weight_decay != 0,
            MAXIMIZE=maximize,
            FIRST=is_first,
            MASKED=limit < 1 << mask.RESOLUTION_BITS,
            RESCALE=rescale != 0,
            CHUNK=CHUNK,
            **_OPTIONS,
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
    limit: int,
    rescale: float,
    step: int | Tensor | Sequence[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """One step of torch.optim.Adam, or AdamW where `decoupled`, under the mask.

    Args:
        exp_avgs, exp_avg_sqs: as the parameters.
        step: how many updates this one makes, from 1: a number, int64 () or float32 (); or a float32 () of each
            parameter's own, on the device.
        params, grads, indices, seed, mask_step, limit, rescale, lr: as for `sgd`.
    """
    if not any(param.numel() for param in params):
        return
    with torch.cuda.device_of(params[0]):  # type: ignore[no-untyped-call]
        own_steps = step if isinstance(step, Sequence) else ()
        tables = _tables_of(params, grads, [exp_avgs, exp_avg_sqs], indices, own_steps)
        if limit < 1 << mask.RESOLUTION_BITS:
            tables.draw(seed, mask_step, limit)
        adam_kernel[(tables.n_chunks,)](
            *(tables.table, tables.gradients, tables.owners, tables.octets, 0 if own_steps else step, _scalar(lr)),
            *(float(beta1), float(beta2), float(weight_decay), float(eps), float(rescale)),
            DECAY=weight_decay != 0,
            DECOUPLED=decoupled,
            MAXIMIZE=maximize,
            MASKED=limit < 1 << mask.RESOLUTION_BITS,
            RESCALE=rescale != 0,
            CHUNK=CHUNK,
            OWN_STEPS=bool(own_steps),
            **_OPTIONS,
        )


def _scalar(lr: float | Tensor) -> float | Tensor:
    return lr if isinstance(lr, Tensor) else float(lr)
