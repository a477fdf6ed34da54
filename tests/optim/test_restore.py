"""Dropped elements get their old bits back: for all tensors of a step at once, compiled or not."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lrd.optim import mask
from lrd.optim.fused import loading, restore
from lrd.optim.fused.restore import MaskedTensor
from lrd.optim.placement import Placement

WAYS = {"compiled": "1", "NumPy": "0"}  # LRD_FUSED

DTYPES = [torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES: list[tuple[int, ...]] = [(), (1,), (31,), (257,), (40, 30), (5, 3, 2), (70_000,)]

BOX = Placement(shape=(9, 300), starts=(1, 250), local_shape=(8, 40))
LONG_RUNS = Placement(shape=(2, 200_000), starts=(0, 300), local_shape=(2, 150_000))


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setenv("LRD_FUSED", WAYS[request.param])
    return request.param


def make_group(**settings: Any) -> dict[str, Any]:
    return {
        "keep_prob": 0.9,
        "mask_seed": (1 << 64) - 1,
        "mask_step": 7,
        "mask_granularity": "element",
        "mask_rescale": False,
        "masks": "update",
        **settings,
    }


def make_item(
    index: int,
    group: dict[str, Any],
    shape: tuple[int, ...] = (300,),
    dtype: torch.dtype = torch.float32,
    placement: Placement | None = None,
) -> MaskedTensor:
    generator = torch.Generator().manual_seed(index)
    old = torch.randint(-99, 99, shape, generator=generator).to(dtype)
    new = torch.randint(100, 127, shape, generator=generator).to(dtype)
    return MaskedTensor(index, group, new, old, placement)


def expected_mask(item: MaskedTensor) -> Tensor:
    """The item's mask, drawn alone."""
    group = item.group
    box = item.placement
    keep = mask.keep_mask(
        tuple(item.new.shape) if box is None else box.shape,
        seed=group["mask_seed"],
        step=int(group["mask_step"]),
        index=item.index,
        keep_prob=group["keep_prob"],
        granularity=group["mask_granularity"],
    )
    return keep if box is None else box.box(keep)


def assert_restored(items: list[MaskedTensor]) -> None:
    expected = [torch.where(expected_mask(item), item.new, item.old) for item in items]
    restore.restore_dropped(items)
    for item, values in zip(items, expected, strict=True):
        assert torch.equal(item.new, values), item


@pytest.mark.parametrize("threads", [1, 3])
def test_all_shapes_and_dtypes_in_one_step(way, threads):
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        groups = [make_group(), make_group(keep_prob=0.5, mask_step=torch.tensor(1 << 40))]
        items = [
            make_item(index, groups[index % 2], shape, dtype)
            for index, (shape, dtype) in enumerate(product(SHAPES, DTYPES))
        ]
        assert_restored(items)
    finally:
        torch.set_num_threads(threads_before)


@pytest.mark.parametrize("granularity", mask.GRANULARITIES)
@pytest.mark.parametrize("box", [BOX, LONG_RUNS], ids=["short runs", "long runs"])
def test_parts_of_parameters(way, box, granularity):
    group = make_group(mask_granularity=granularity)
    items = [
        make_item(0, group, box.local_shape, placement=box),
        make_item((1 << 64) - 1, group, box.shape),
        make_item(2, group, box.local_shape, torch.float64, placement=box),
    ]
    assert_restored(items)


def test_memory_that_is_not_row_major(way):
    group = make_group()
    old = torch.randn(4, 5, 6).transpose(0, 2)
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    items = [
        MaskedTensor(0, group, torch.randn(6, 5, 4), old),
        MaskedTensor(1, group, channels_last, torch.zeros(2, 3, 4, 5)),
        MaskedTensor(2, group, torch.randn(600)[::2], torch.zeros(300)),
        make_item(3, group),
    ]
    assert_restored(items)


def test_bits_of_nan_and_negative_zero_survive(way):
    old = torch.tensor([0x7FC12345, -0x80000000] * 300, dtype=torch.int32).view(torch.float32)
    new = torch.tensor([0x7F8BCDEF, 0] * 300, dtype=torch.int32).view(torch.float32)
    item = MaskedTensor(0, make_group(keep_prob=0.5), new, old)

    old_bits = old.view(torch.int32)
    expected = torch.where(expected_mask(item), new.view(torch.int32), old_bits).clone()
    restore.restore_dropped([item])
    assert torch.equal(new.view(torch.int32), expected)


def test_kept_updates_are_rescaled(way):
    item = make_item(0, make_group(keep_prob=0.5, mask_rescale=True))
    assert item.old is not None
    expected = torch.where(expected_mask(item), item.old + (item.new - item.old) * 2, item.old)
    restore.restore_dropped([item])
    assert torch.equal(item.new, expected)


def test_a_group_that_keeps_everything_is_left_alone(way):
    item = make_item(0, make_group(keep_prob=1.0, mask_rescale=True))
    before = item.new.clone()
    restore.restore_dropped([item])
    assert torch.equal(item.new, before)


def test_autograd_notices(way):
    item = make_item(0, make_group())
    version = item.new._version
    restore.restore_dropped([item])
    assert item.new._version > version


@pytest.mark.parametrize("granularity", mask.GRANULARITIES)
def test_masks_drawn_together_are_those_drawn_alone(way, granularity):
    groups = [make_group(mask_granularity=granularity), make_group(keep_prob=1.0)]
    items = [make_item(index, groups[index % 2], shape) for index, shape in enumerate(SHAPES)]
    items.append(make_item(9, groups[0], BOX.local_shape, placement=BOX))

    for item, keep in zip(items, restore.draw_masks(items), strict=True):
        assert torch.equal(keep, expected_mask(item))
    assert restore.draw_masks([]) == []


def test_values_are_saved():
    values = [torch.randn(3), torch.randn(2, 2).to(torch.float64)]
    saved = [torch.empty_like(value) for value in values]
    restore.save_values(values, saved)
    assert all(torch.equal(a, b) for a, b in zip(values, saved, strict=True))
    restore.save_values([], [])


def test_a_kernel_that_draws_wrong_masks_is_not_used(monkeypatch):
    monkeypatch.setenv("LRD_FUSED", "1")
    table_class = loading.load_kernels("cpu").Table
    set_numbers = table_class.set_group_numbers

    def set_wrong_numbers(table, group_number, numbers, mask_step):
        set_numbers(table, group_number, numbers, mask_step + 1)

    with monkeypatch.context() as context:
        context.setattr(table_class, "set_group_numbers", set_wrong_numbers)
        restore.matches_masks.cache_clear()
        with pytest.warns(UserWarning, match="masks are not those of"):
            assert_restored([make_item(0, make_group())])
    restore.matches_masks.cache_clear()


def test_small_steps_count_until_the_kernels_are_worth_loading(monkeypatch):
    monkeypatch.delenv("LRD_FUSED", raising=False)
    monkeypatch.delitem(restore.loading.sys.modules, "lrd.optim.fused.cpu_step", raising=False)
    monkeypatch.setattr(loading._SpentCost, "elements", 0)

    items = [make_item(index, make_group(), (1000,)) for index in range(10)]
    numels = [1000] * 10
    for _ in range(53):
        assert not loading.is_due("cpu", numels, None)
        restore.restore_dropped(items)
    assert loading.is_due("cpu", numels, None)
    assert not loading.is_due("cpu", numels, "0")
