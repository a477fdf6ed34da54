"""The kept elements of several parameters in one tensor, to be averaged over the ranks, and back.

The arithmetic is that of torch's SGD, on this rank's own gradient and momentum. On a CPU, kernels
do it in one pass over float32 tensors, with the bits of the other way, which is in plain torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version

from lrd import philox
from lrd.errors import first_line, stacklevel_of_user
from lrd.optim import mask
from lrd.optim.fused import loading, restore


@dataclass(slots=True)
class Part:
    """One parameter's part in an exchange."""

    index: int  # the parameter's, in the position of its masks
    param: Tensor
    gradient: Tensor  # this rank's own, of the parameter's shape
    momentum_buffer: Tensor | None  # of this rank's own gradients; None: there is none yet
    settings: dict[str, Any]  # of its group, an SGD's and `LRDropout`'s; a copy that parts share


class Packed:
    """The kept elements of this rank's own updates.

    Attributes:
        values: float (num_kept,): the elements that the masks keep, parameter by parameter, in
            row-major order. Their number is the same on every rank.
    """

    values: Tensor

    def unpack(self, means: Tensor, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Put the mean updates in the place of the gradients, and update this rank's momentum.

        Args:
            means: `values`, averaged over the ranks.
            gradients: each parameter's own gradient, as it was packed; None: the parameter takes no
                step. Overwritten by the mean update, which is zero where the mask drops.

        Returns:
            The momentum buffer of each parameter; None: it has none.
        """
        raise NotImplementedError


def pack(parts: Sequence[Part], tables: dict[Any, Any]) -> Packed:
    """Compute this rank's updates and pack what the masks keep of them. Nothing else is written.

    Args:
        parts: the parameters of a bucket.
        tables: for this function, which keeps in it what it can use again.
    """
    numels = [part.param.numel() for part in parts]
    is_due = loading.is_due("cpu", numels, loading.user_choice())
    if is_due and all(map(_can_pack_compiled, parts)) and matches_torch():
        return _CompiledPacked(parts, tables)
    return _PlainPacked(parts)


# In plain torch


class _PlainPacked(Packed):
    """On a GPU the CPU never waits for the device here: how many elements are kept it knows."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        updates = [_update_of(part) for part in parts]
        self._buffers = [buffer for _, buffer in updates]
        flat = torch.cat([update.reshape(-1) for update, _ in updates])  # float (numel,)

        keep = _draw_keep(parts)  # bool (numel,), on the CPU
        num_kept = int(keep.sum())
        keep = keep.to(flat.device, non_blocking=True)

        # Where each element goes, int64 (numel,). All that are dropped go to one place beyond.
        self._places = torch.where(keep, keep.cumsum(0) - 1, num_kept)
        self.values = flat.new_empty(num_kept + 1).scatter_(0, self._places, flat)[:-1]

    def unpack(self, means: Tensor, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        zero = self.values.new_zeros(1)
        mean_updates = torch.cat([means.to(self.values.dtype), zero])[self._places]
        sizes = [part.param.numel() for part in self._parts]
        for gradient, update in zip(gradients, torch.split(mean_updates, sizes), strict=True):
            if gradient is not None:
                gradient.copy_(update.view(gradient.shape))
        return [
            part.momentum_buffer if gradient is None else buffer
            for part, gradient, buffer in zip(self._parts, gradients, self._buffers, strict=True)
        ]


def _draw_keep(parts: Sequence[Part]) -> Tensor:
    """Whether each element of the parameters is kept, bool (numel,), on the CPU."""
    shapes = [part.param.shape for part in parts]
    drawn = restore.draw_masks(
        [
            restore.MaskedTensor(part.index, part.settings, torch.empty(shape, device="cpu"))
            for part, shape in zip(parts, shapes, strict=True)
        ]
    )
    expanded = [keep.expand(shape) for keep, shape in zip(drawn, shapes, strict=True)]
    return torch.cat([keep.reshape(-1) for keep in expanded])


def _update_of(part: Part) -> tuple[Tensor, Tensor | None]:
    """This rank's own update as torch's SGD computes it, and its momentum buffer afterwards."""
    group = part.settings
    gradient = -part.gradient if group["maximize"] else part.gradient
    if group["weight_decay"] != 0:
        gradient = gradient.add(part.param, alpha=group["weight_decay"])

    momentum = group["momentum"]
    if momentum == 0:
        return gradient, None

    if part.momentum_buffer is None:
        buffer = gradient.clone()
    else:
        buffer = part.momentum_buffer.mul(momentum)
        buffer.add_(gradient, alpha=1 - group["dampening"])
    update = gradient.add(buffer, alpha=momentum) if group["nesterov"] else buffer
    return update, buffer


# By the kernels


def _can_pack_compiled(part: Part) -> bool:
    """Whether the kernels can pack a parameter: dense, row-major float32 memory on a CPU."""
    if part.settings["mask_granularity"] != "element":
        return False

    tensors = [part.param, part.gradient]
    if part.momentum_buffer is not None:
        tensors.append(part.momentum_buffer)
    return all(
        tensor.is_cpu
        and tensor.dtype is torch.float32
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
        for tensor in tensors
    )


@dataclass(slots=True)
class _Tables:
    """What the kernels read about the parameters of a bucket, kept from step to step.

    Attributes:
        pack: a `cpu_step.Table` of the kernel that packs.
        unpack: one of the kernel that unpacks.
        first_words: of each parameter, the number of its first word of keep bits.
        first_chunks: of each parameter, the number of its first chunk.
        chunk_words: of each chunk, the number of its first word, int64 (n_chunks,).
        num_words: of all parameters.
    """

    pack: Any
    unpack: Any
    first_words: list[int]
    first_chunks: list[int]
    chunk_words: NDArray[np.int64]
    num_words: int


def _make_tables(shapes: Any, ranges: Any) -> _Tables:
    kernels = loading.load_kernels("cpu")
    parts = [(index, numel, None) for index, numel in shapes]
    num_blocks = [-(-numel // philox.BLOCK_BITS) for _, numel in shapes]
    num_chunks = [-(-numel // kernels.CHUNK) for _, numel in shapes]
    first_words = [0, *accumulate(4 * blocks for blocks in num_blocks)]
    words_in_chunk = kernels.CHUNK // philox.WORD_BITS
    chunk_words = [
        np.arange(chunks) * words_in_chunk + first
        for chunks, first in zip(num_chunks, first_words, strict=False)
    ]
    return _Tables(
        pack=kernels.Table(kernels.PACK, parts, ranges),
        unpack=kernels.Table(kernels.UNPACK, parts, ranges),
        first_words=first_words[:-1],
        first_chunks=[0, *accumulate(num_chunks)][:-1],
        chunk_words=np.concatenate(chunk_words).astype(np.int64),
        num_words=first_words[-1],
    )


class _CompiledPacked(Packed):
    def __init__(self, parts: Sequence[Part], tables: dict[Any, Any]) -> None:
        self._parts = parts
        shapes = tuple((part.index, part.param.numel()) for part in parts)
        ranges = restore.ranges_of_equal([id(part.settings) for part in parts])
        key = (shapes, ranges)
        if key not in tables:
            tables.clear()  # DDP has made other buckets, or groups have changed
            tables[key] = _make_tables(shapes, ranges)
        self._tables: _Tables = tables[key]
        self._numbers = [
            (_numbers_of(parts[first].settings), int(parts[first].settings["mask_step"]))
            for first, _ in ranges
        ]

        # One bit for each element: whether it is kept.
        self._words = _draw_words(parts, self._tables.num_words)  # uint64 (num_words,)
        num_kept = np.bitwise_count(self._words)  # uint8 (num_words,)
        kept_in_chunk = np.add.reduceat(num_kept, self._tables.chunk_words, dtype=np.int64)
        stops = np.cumsum(kept_in_chunk)
        self._chunk_starts = stops - kept_in_chunk  # int64 (n_chunks,)

        # The kernel that unpacks reads one more.
        self._memory = torch.empty(int(stops[-1]) + 1, dtype=torch.float32, device="cpu")
        self.values = self._memory[:-1]
        self._run(self._tables.pack, [part.gradient for part in parts], self._memory)

    def unpack(self, means: Tensor, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        # A parameter that takes no step keeps its momentum: let the kernel write to a copy.
        is_stepping = [gradient is not None for gradient in gradients]
        memory = [
            torch.zeros_like(part.param) if gradient is None else gradient.contiguous()
            for part, gradient in zip(self._parts, gradients, strict=True)
        ]
        buffers: list[Tensor | None] = []
        for part, steps in zip(self._parts, is_stepping, strict=True):
            buffer = part.momentum_buffer
            if part.settings["momentum"] == 0:
                buffer = None
            elif buffer is None:
                buffer = torch.empty_like(part.param)
            elif not steps:
                buffer = buffer.clone()
            buffers.append(buffer)

        if means.data_ptr() != self._memory.data_ptr():
            self.values.copy_(means)
        self._run(self._tables.unpack, memory, self._memory, buffers)

        for gradient, written in zip(gradients, memory, strict=True):
            if gradient is not None and gradient.data_ptr() != written.data_ptr():
                gradient.copy_(written)
        # The kernel writes through addresses: autograd is to notice.
        changed = [tensor for tensor in (*gradients, *buffers) if tensor is not None]
        increment_version([tensor for tensor in changed if not tensor.is_inference()])
        return [
            buffer if steps else part.momentum_buffer
            for part, buffer, steps in zip(self._parts, buffers, is_stepping, strict=True)
        ]

    def _run(
        self,
        table: Any,
        gradients: Sequence[Tensor],
        packed: Tensor,
        buffers: Sequence[Tensor | None] | None = None,
    ) -> None:
        for number, (numbers, mask_step) in enumerate(self._numbers):
            table.set_group_numbers(number, numbers, mask_step)
        table.set_tensor_numbers(
            "is_first_step", [part.momentum_buffer is None for part in self._parts]
        )

        addresses = []
        for number, part in enumerate(self._parts):
            buffer = part.momentum_buffer if buffers is None else buffers[number]
            addresses.append(
                (
                    part.param.data_ptr(),
                    gradients[number].data_ptr(),
                    (part.param if buffer is None else buffer).data_ptr(),
                    self._words.ctypes.data + 8 * self._tables.first_words[number],
                    self._chunk_starts.ctypes.data + 8 * self._tables.first_chunks[number],
                    packed.data_ptr(),
                )
            )
        table.run(addresses)


def _numbers_of(group: dict[str, Any]) -> dict[str, Any]:
    """What `cpu_kernels.EXCHANGE_FIELDS` need to know of a group, but for its mask step."""
    return {
        "seed": group["mask_seed"],
        "threshold": mask.threshold(group["keep_prob"]),
        "is_maximized": group["maximize"],
        "weight_decay": group["weight_decay"],
        "momentum": group["momentum"],
        "one_minus_dampening": 1 - group["dampening"],
        "is_nesterov": group["nesterov"],
    }


def _draw_words(parts: Sequence[Part], num_words: int) -> NDArray[np.uint64]:
    """Draw one bit for each element of the parameters, each parameter's from a block's first bit.

    Returns:
        uint64 (num_words,): set where an element is kept, and not set beyond a parameter's last.
    """
    words = np.full(num_words, ~np.uint64(0))
    blocks = []
    first = 0
    ranges: list[tuple[int, int]] = []
    for part in parts:
        group = part.settings
        num_blocks = -(-part.param.numel() // philox.BLOCK_BITS)
        ranges.append((first, first + philox.WORDS_PER_BLOCK * num_blocks))
        first = ranges[-1][1]
        limit = mask.threshold(group["keep_prob"])
        if limit < 1 << mask.RESOLUTION_BITS:
            step = int(group["mask_step"])
            blocks.append(mask.Blocks(limit, group["mask_seed"], step, part.index, 0, num_blocks))

    if len(blocks) == len(parts):
        restore.draw_compiled(blocks, words)
    elif blocks:
        drawn = np.empty(sum(4 * item.n_blocks for item in blocks), np.uint64)
        restore.draw_compiled(blocks, drawn)
        _place_words(parts, ranges, drawn, words)

    for part, (_, stop) in zip(parts, ranges, strict=True):
        num_bits_beyond = -part.param.numel() % philox.BLOCK_BITS
        whole_words, bits = divmod(num_bits_beyond, philox.WORD_BITS)
        words[stop - whole_words : stop] = 0
        if bits:
            words[stop - whole_words - 1] &= ~np.uint64(0) >> np.uint64(bits)
    return words


def _place_words(
    parts: Sequence[Part],
    ranges: Sequence[tuple[int, int]],
    drawn: NDArray[np.uint64],
    words: NDArray[np.uint64],
) -> None:
    """Copy the words that were drawn to those of their parameters; others keep everything."""
    first = 0
    for part, (start, stop) in zip(parts, ranges, strict=True):
        if mask.threshold(part.settings["keep_prob"]) < 1 << mask.RESOLUTION_BITS:
            words[start:stop] = drawn[first : first + stop - start]
            first += stop - start


@cache
def matches_torch() -> bool:
    """Whether the kernels do what plain torch does, bit for bit, tried on a few tensors.

    If they do something else or fail, the user is warned.
    """
    try:
        if loading.load_kernels("cpu") is None or not restore.matches_masks():
            return False
        if _do_kernels_match():
            return True
        reason = "its results are not those of plain torch"
    except Exception as error:
        # For example, the compiler does not support this processor.
        reason = f"{type(error).__name__}: {first_line(error)}"

    warnings.warn(
        f"the compiled exchange of kept elements does not work ({reason}); "
        "training goes on without it, more slowly",
        stacklevel=stacklevel_of_user(),
    )
    return False


_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"momentum": 0.9, "weight_decay": 5e-4},
    {"momentum": 0.8, "dampening": 0.1, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    {"momentum": 0.9, "keep_prob": 1.0},
)


_TRIAL_SIZES = (1, 63, 64, 65, 255, 1030, (1 << 16) + 77)  # elements of each tensor


@dataclass
class _Trial:
    """Tensors of odd sizes in two groups, for `_do_kernels_match`."""

    options: dict[str, Any]
    buffers: list[Tensor | None] = field(default_factory=lambda: [None] * len(_TRIAL_SIZES))

    def make_parts(self, mask_step: int, generator: torch.Generator) -> list[Part]:
        settings: dict[str, Any] = {
            "momentum": 0.0,
            "weight_decay": 0.0,
            "dampening": 0.0,
            "nesterov": False,
        }
        settings |= {"maximize": False, "mask_granularity": "element", "mask_step": mask_step}
        groups = [
            {**settings, "mask_seed": 1 << 63, "keep_prob": 0.625, **self.options},
            {**settings, "mask_seed": 3, "keep_prob": 0.1},
        ]
        numbers: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        return [
            Part(
                index,
                param=torch.randn(size, **numbers),
                gradient=torch.randn(size, **numbers),
                momentum_buffer=self.buffers[index],
                settings=groups[index % 3 == 1],
            )
            for index, size in enumerate(_TRIAL_SIZES)
        ]


@torch.no_grad()
def _do_kernels_match() -> bool:
    """Take a few steps in both ways and compare."""
    generator = torch.Generator("cpu").manual_seed(0)
    for options in _OPTIONS:
        trial = _Trial(options)
        for mask_step in range(3):
            parts = trial.make_parts(mask_step, generator)
            plain = _PlainPacked(parts)
            compiled = _CompiledPacked(parts, {})
            if not torch.equal(plain.values, compiled.values):
                return False

            gradients = [part.gradient.clone() for part in parts]
            compiled_gradients = [part.gradient.clone() for part in parts]
            means = plain.values * 2
            trial.buffers = plain.unpack(means, gradients)
            compiled_buffers = compiled.unpack(means, compiled_gradients)
            results = zip(
                (*gradients, *trial.buffers),
                (*compiled_gradients, *compiled_buffers),
                strict=True,
            )
            for expected, actual in results:
                if expected is None or actual is None:
                    if expected is not actual:
                        return False
                elif not torch.equal(expected, actual):
                    return False
    return True
