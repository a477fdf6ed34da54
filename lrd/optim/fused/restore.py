"""Gives dropped elements their old bits back after a step that the optimizer has taken by itself.

All tensors of a step are handled together. On a CPU where the kernels are loaded (see `loading`)
one call draws and restores them, in torch's threads. Elsewhere the masks are drawn together, by
NumPy or the kernels, and travel to the tensors' device in one transfer.

The bits are the same either way: those of `lrd.optim.mask`.
"""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version

from lrd import philox
from lrd.errors import first_line, stacklevel_of_user
from lrd.optim import mask, tensor_bits
from lrd.optim.fused import loading
from lrd.optim.mask import Blocks, Draw
from lrd.optim.placement import Placement

# Elements that are restored at a time. Their masks have a byte an element.
_BATCH_ON_CPU = 1 << 20  # in the cache
_BATCH_ON_DEVICE = 1 << 26

# Runs of as many elements of a shard are drawn one by one, shorter ones as parts of whole rows.
_LONG_RUN = 1 << 16

_ELEMENT_SIZES = (1, 2, 4, 8)  # bytes, that the kernel knows


@dataclass(slots=True)
class MaskedTensor:
    """A tensor and the position of its mask."""

    index: int  # the parameter's, in the position of its masks
    group: dict[str, Any]  # with the settings of `LRDropout`
    new: Tensor  # plain and real: what is masked
    old: Tensor | None = None  # its values before the step
    placement: Placement | None = None  # of `new` in the whole parameter; None: it is the whole


def save_values(values: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Copy values before a step.

    Args:
        values: the tensors.
        saved: where to, each of its tensor's shape, dtype and device; overwritten.
    """
    if values:
        torch._foreach_copy_(list(saved), list(values))


@torch.no_grad()
def restore_dropped(items: Sequence[MaskedTensor]) -> None:
    """Give the dropped elements of all tensors of a step their old bits back.

    Call it before any group's ``mask_step`` goes up: the count is the masks' position. Where the
    group asks for it, kept updates are divided by ``keep_prob`` first.

    Args:
        items: with new and old values.
    """
    items = [item for item in items if item.new.numel() > 0 and item.group["keep_prob"] < 1.0]
    if not items:
        return

    for item in items:
        assert item.old is not None
        if item.group["mask_rescale"]:
            keep_prob = mask.effective_keep_prob(item.group["keep_prob"])
            item.new.sub_(item.old).div_(keep_prob).add_(item.old)

    for_kernel: list[MaskedTensor] = []
    others: list[MaskedTensor] = []
    for item in items:
        (for_kernel if _can_restore_compiled(item) else others).append(item)

    numels = [item.new.numel() for item in for_kernel]
    is_due = loading.is_due("cpu", numels, loading.user_choice())
    if for_kernel and is_due and matches_masks():
        _restore_compiled(for_kernel)
    else:
        loading.count_step(numels)
        others = items

    for batch in _batches(others):
        for item, keep in zip(batch, draw_masks(batch), strict=True):
            assert item.old is not None
            tensor_bits.select(item.new, item.old, keep)


def draw_masks(items: Sequence[MaskedTensor]) -> list[Tensor]:
    """Draw the masks of tensors together.

    Args:
        items: the tensors.

    Returns:
        For each, a bool tensor on its device that broadcasts to its shape.
    """
    by_device: dict[torch.device, list[int]] = {}
    for number, item in enumerate(items):
        by_device.setdefault(item.new.device, []).append(number)

    masks: dict[int, Tensor] = {}
    for device, numbers in by_device.items():
        drawn = _draw_masks_on(device, [items[number] for number in numbers])
        masks.update(zip(numbers, drawn, strict=True))

    return [masks[number] for number in range(len(items))]


def _draw_masks_on(device: torch.device, items: Sequence[MaskedTensor]) -> list[Tensor]:
    """The masks of tensors on one device."""
    # A tensor count of steps may lie on the device: read it once for each group.
    steps = {id(item.group): item.group["mask_step"] for item in items}
    steps = {key: int(step) for key, step in steps.items()}

    draws: list[Draw] = []
    draws_of_items = []
    for item in items:
        group = item.group
        first = len(draws)
        for numel, offset in _parts_to_draw(item):
            draws.append(
                Draw(
                    numel,
                    seed=group["mask_seed"],
                    step=steps[id(group)],
                    index=item.index,
                    keep_prob=group["keep_prob"],
                    offset=offset,
                )
            )
        draws_of_items.append(slice(first, len(draws)))

    numels = [draw.numel for draw in draws]
    is_compiled = loading.is_due("cpu", numels, loading.user_choice()) and matches_masks()
    fill_keep_words = draw_compiled if is_compiled else None
    drawn = mask.draw_many(draws, device, fill_keep_words)

    return [
        _mask_of_item(item, drawn[part]) for item, part in zip(items, draws_of_items, strict=True)
    ]


def _parts_to_draw(item: MaskedTensor) -> list[tuple[int, int]]:
    """What `_mask_of_item` is made from: (number of draws, index of the first), for each part."""
    box = item.placement
    granularity = item.group["mask_granularity"]
    if granularity != "element":
        whole_shape = tuple(item.new.shape) if box is None else box.shape
        return [(math.prod(mask.draw_shape(whole_shape, granularity)), 0)]
    if box is None:
        return [(item.new.numel(), 0)]

    first_elements, run_length = box.runs()
    if _is_drawn_by_runs(first_elements, run_length):
        return [(run_length, int(first)) for first in first_elements]

    # Whole rows, of which the box is a part: cheaper than many short runs.
    row_size = math.prod(box.shape[1:])
    return [(box.local_shape[0] * row_size, box.starts[0] * row_size)]


def _mask_of_item(item: MaskedTensor, parts: list[Tensor]) -> Tensor:
    """The mask of a tensor from what was drawn for it, see `_parts_to_draw`."""
    box = item.placement
    granularity = item.group["mask_granularity"]
    if granularity != "element":
        whole_shape = tuple(item.new.shape) if box is None else box.shape
        whole_mask = parts[0].view(mask.draw_shape(whole_shape, granularity))
        return whole_mask if box is None else box.box(whole_mask)
    if box is None:
        return parts[0].view(item.new.shape)

    if _is_drawn_by_runs(*box.runs()):
        return torch.cat(parts).view(box.local_shape)

    rows_shape = (box.local_shape[0], *box.shape[1:])
    box_in_rows = Placement(rows_shape, (0, *box.starts[1:]), box.local_shape)
    return box_in_rows.box(parts[0].view(rows_shape))


def _is_drawn_by_runs(first_elements: NDArray[np.int64], run_length: int) -> bool:
    return len(first_elements) == 1 or run_length >= _LONG_RUN


def _batches(items: Sequence[MaskedTensor]) -> Iterator[list[MaskedTensor]]:
    """The items in batches on one device, with a limited number of elements each."""
    by_device: dict[torch.device, list[MaskedTensor]] = {}
    for item in items:
        by_device.setdefault(item.new.device, []).append(item)

    for device, items_on_device in by_device.items():
        limit = _BATCH_ON_CPU if device.type == "cpu" else _BATCH_ON_DEVICE
        batch: list[MaskedTensor] = []
        n_elements = 0

        for item in items_on_device:
            if batch and n_elements + item.new.numel() > limit:
                yield batch
                batch = []
                n_elements = 0
            batch.append(item)
            n_elements += item.new.numel()

        yield batch


# The kernels


def _can_restore_compiled(item: MaskedTensor) -> bool:
    """Whether the kernel can restore a tensor's dropped elements.

    It draws masks of elements for dense, row-major memory.
    """
    if item.group["mask_granularity"] != "element":
        return False

    for tensor in (item.new, item.old):
        assert tensor is not None
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            return False
        if not tensor.is_cpu or tensor.dtype is not item.new.dtype or tensor.is_neg():
            return False
        if tensor.shape != item.new.shape or not tensor.is_contiguous() or tensor.data_ptr() == 0:
            return False

    return item.new.element_size() in _ELEMENT_SIZES


def _restore_compiled(items: Sequence[MaskedTensor]) -> None:
    """Restore the dropped elements of tensors for which `_can_restore_compiled` is true."""
    by_element_size: dict[int, list[MaskedTensor]] = {}
    for item in items:
        by_element_size.setdefault(item.new.element_size(), []).append(item)

    for element_size, same_size in by_element_size.items():
        parts = tuple((item.index, item.new.numel(), item.placement) for item in same_size)
        groups = [item.group for item in same_size]
        ranges = ranges_of_equal([id(group) for group in groups])

        table = _restore_table(threading.get_ident(), element_size, parts, ranges)
        for number, (first, _) in enumerate(ranges):
            group = groups[first]
            numbers = {
                "seed": group["mask_seed"],
                "threshold": mask.threshold(group["keep_prob"]),
                "element_size": element_size,
            }
            table.set_group_numbers(number, numbers, int(group["mask_step"]))

        addresses = []
        for item in same_size:
            assert item.old is not None
            addresses.append((item.new.data_ptr(), item.old.data_ptr()))
        table.run(addresses)

    # The kernel writes through addresses: autograd is to notice.
    increment_version([item.new for item in items if not item.new.is_inference()])


@lru_cache(maxsize=64)
def _restore_table(_thread: int, element_size: int, parts: Any, ranges: Any) -> Any:
    """A table that is kept from step to step. Each thread has its own: it writes into it."""
    kernels = loading.load_kernels("cpu")
    return kernels.Table(kernels.RESTORE, parts, ranges, element_size)


def draw_compiled(all_blocks: Sequence[Blocks], words: NDArray[np.uint64]) -> None:
    """Draw masks with the kernel; see `mask.fill_keep_words`."""
    kernels = loading.load_kernels("cpu")
    parts = []
    addresses = []
    address = words.ctypes.data

    for blocks in all_blocks:
        numel = blocks.n_blocks * philox.BLOCK_BITS
        offset = blocks.first_block * philox.BLOCK_BITS
        parts.append((blocks.index, numel, Placement((offset + numel,), (offset,), (numel,))))
        addresses.append((address,))
        address += numel // 8

    settings = [(blocks.limit, blocks.seed, blocks.step) for blocks in all_blocks]
    ranges = ranges_of_equal(settings)

    table = kernels.Table(kernels.DRAW, parts, ranges)
    for number, (first, _) in enumerate(ranges):
        limit, seed, step = settings[first]
        table.set_group_numbers(number, {"threshold": limit, "seed": seed}, step)
    table.run(addresses)

    if sys.byteorder == "big":
        words.byteswap(inplace=True)


def ranges_of_equal(values: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """The ranges of consecutive equal values: (number of the first, that after the last)."""
    firsts = [
        number for number, value in enumerate(values) if number == 0 or value != values[number - 1]
    ]
    return tuple(pairwise([*firsts, len(values)]))


@cache
def matches_masks() -> bool:
    """Whether the kernels draw and apply the masks of `lrd.optim.mask`, tried on a few tensors.

    If they do something else or fail, the user is warned.
    """
    try:
        if loading.load_kernels("cpu") is None:
            return False
        if _do_kernels_match():
            return True
        reason = "their masks are not those of lrd.optim.mask"
    except Exception as error:
        # For example, the compiler does not support this processor.
        reason = f"{type(error).__name__}: {first_line(error)}"

    warnings.warn(
        f"the compiled masks do not work on the CPU ({reason}); "
        "training goes on without them, more slowly",
        stacklevel=stacklevel_of_user(),
    )
    return False


def _do_kernels_match() -> bool:
    """Compare the kernels with `mask.draw_many` and `torch.where`."""
    # 0.625 is 0.101 in binary, so its mask takes three bit planes, and both ways to combine them.
    settings = {"mask_seed": 1 << 63, "mask_step": 3, "mask_granularity": "element"}
    group = settings | {"keep_prob": 0.625}

    items = []
    for number, dtype in enumerate((torch.int8, torch.int16, torch.int32, torch.int64)):
        for numel in (1, 33, 255, 1030):
            new = torch.zeros(numel, dtype=dtype, device="cpu")
            old = torch.ones_like(new)
            items.append(MaskedTensor(number, group, new, old))

        # The columns 5 to 42 of a matrix of 70
        box = Placement((20, 70), (3, 5), (9, 38))
        new = torch.zeros(box.local_shape, dtype=dtype, device="cpu")
        items.append(MaskedTensor(number, group, new, torch.ones_like(new), box))

    draws = [Draw(1400, 1 << 63, 3, number, 0.625) for number in range(4)]
    whole_masks = mask.draw_many(draws)
    drawn_compiled = mask.draw_many(draws, fill_keep_words=draw_compiled)
    _restore_compiled(items)

    for item in items:
        keep = whole_masks[item.index]
        if item.placement is None:
            expected = keep[: item.new.numel()]
        else:
            expected = item.placement.box(keep.view(item.placement.shape))
        if not torch.equal(item.new == 0, expected):
            return False

    pairs = zip(drawn_compiled, whole_masks, strict=True)
    return all(torch.equal(compiled, expected) for compiled, expected in pairs)
