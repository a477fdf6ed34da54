"""The kept elements of updates, packed and unpacked, against torch's own SGD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lrd.exchange import packing
from lrd.exchange.packing import Part, pack
from lrd.optim import mask

SHAPES = ((70_001,), (3, 5), (1,), (8, 32))
KEEP_PROBS = (0.3, 1.0)  # of the two groups; the second one has the last shape
STOCK: dict[str, Any] = {
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
}


def test_the_kernels_are_what_is_tested_here() -> None:
    assert packing.matches_torch()


def make_parts(
    options: dict[str, Any], dtype: torch.dtype, buffers: list[Tensor | None], step: int
) -> list[Part]:
    generator = torch.Generator().manual_seed(step)
    groups = [
        {
            **STOCK,
            **options,
            "keep_prob": keep_prob,
            "mask_seed": 7,
            "mask_step": step,
            "mask_granularity": "element",
        }
        for keep_prob in KEEP_PROBS
    ]
    return [
        Part(
            index,
            param=torch.randn(shape, generator=generator, dtype=dtype),
            gradient=torch.randn(shape, generator=generator, dtype=dtype),
            momentum_buffer=buffers[index],
            settings=groups[index == len(SHAPES) - 1],
        )
        for index, shape in enumerate(SHAPES)
    ]


def keep_mask(part: Part) -> Tensor:
    drawn = mask.draw(
        part.param.numel(),
        seed=part.settings["mask_seed"],
        step=part.settings["mask_step"],
        index=part.index,
        keep_prob=part.settings["keep_prob"],
    )
    return drawn.view(part.param.shape)


def sgd_update(part: Part, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """By how much torch's SGD moves a parameter of zeros at lr 1, and its buffer afterwards.

    The weight decay is that of the part's parameter.
    """
    sign = -1 if options.get("maximize") else 1
    gradient = part.gradient + sign * options.get("weight_decay", 0.0) * part.param
    param = torch.nn.Parameter(torch.zeros_like(part.param))
    optimizer = torch.optim.SGD([param], lr=1.0, **{**options, "weight_decay": 0.0})
    if part.momentum_buffer is not None:
        optimizer.state[param]["momentum_buffer"] = part.momentum_buffer.clone()
    param.grad = gradient
    optimizer.step()
    return -param.detach(), optimizer.state[param].get("momentum_buffer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"momentum": 0.8, "dampening": 0.3, "maximize": True, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    ],
)
def test_what_is_packed_and_unpacked_is_torchs_update(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Float32 goes through the kernels, float64 through plain torch."""
    monkeypatch.setenv("LRD_FUSED", "1")
    tables: dict[Any, Any] = {}
    buffers: list[Tensor | None] = [None] * len(SHAPES)

    for step in range(3):
        parts = make_parts(options, dtype, buffers, step)
        expected = [sgd_update(part, options) for part in parts]
        keeps = [keep_mask(part) for part in parts]

        packed = pack(parts, tables)
        kept = [update[keep] for (update, _), keep in zip(expected, keeps, strict=True)]
        torch.testing.assert_close(packed.values, torch.cat(kept))

        # The other ranks have sent as much again.
        gradients = [part.gradient for part in parts]
        buffers = packed.unpack(packed.values * 2, gradients)
        for (update, buffer), keep, gradient, new_buffer in zip(
            expected, keeps, gradients, buffers, strict=True
        ):
            torch.testing.assert_close(gradient, torch.where(keep, 2 * update, 0.0))
            assert (buffer is None) == (new_buffer is None)
            if buffer is not None:
                torch.testing.assert_close(new_buffer, buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packing_alone_changes_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The step may still be skipped."""
    monkeypatch.setenv("LRD_FUSED", "1")
    buffers: list[Tensor | None] = [torch.ones(shape, dtype=dtype) for shape in SHAPES]
    parts = make_parts({"momentum": 0.9, "weight_decay": 0.1}, dtype, buffers, step=0)
    before = [(part.param.clone(), part.gradient.clone()) for part in parts]
    pack(parts, {})
    for part, (param, gradient) in zip(parts, before, strict=True):
        assert torch.equal(part.param, param)
        assert torch.equal(part.gradient, gradient)
        assert torch.equal(part.momentum_buffer, torch.ones_like(param))


@pytest.mark.parametrize("fused", ["0", "1"])
def test_a_parameter_without_a_gradient_keeps_its_momentum(
    monkeypatch: pytest.MonkeyPatch, fused: str
) -> None:
    """DDP finds that no rank has used it."""
    monkeypatch.setenv("LRD_FUSED", fused)
    buffers: list[Tensor | None] = [torch.ones(shape) for shape in SHAPES]
    parts = make_parts({"momentum": 0.9}, torch.float32, buffers, step=0)
    packed = pack(parts, {})
    gradients = [None, *(part.gradient for part in parts[1:])]
    new_buffers = packed.unpack(packed.values, gradients)
    assert torch.equal(new_buffers[0], torch.ones(SHAPES[0]))
    assert not torch.equal(new_buffers[1], torch.ones(SHAPES[1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_packs_and_unpacks_what_a_cpu_does(dtype: torch.dtype) -> None:
    options = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    results = []
    for device in ("cpu", "cuda"):
        buffers: list[Tensor | None] = [None] * len(SHAPES)
        for step in range(2):
            parts = make_parts(options, dtype, buffers, step)
            for part in parts:
                part.param = part.param.to(device)
                part.gradient = part.gradient.to(device)
            packed = pack(parts, {})
            gradients = [part.gradient for part in parts]
            buffers = packed.unpack(packed.values * 2, gradients)
        results.append([packed.values.cpu(), *(gradient.cpu() for gradient in gradients)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("granularity", ["row", "column", "tensor"])
def test_elements_that_share_a_draw_are_packed_together(granularity: str) -> None:
    (part,) = make_parts({}, torch.float32, [None] * len(SHAPES), step=3)[3:]
    part.settings = {**part.settings, "keep_prob": 0.5, "mask_granularity": granularity}
    packed = pack([part], {})
    kept_gradient = part.gradient.clone()
    packed.unpack(packed.values, [kept_gradient])

    keep = kept_gradient != 0
    assert torch.equal(kept_gradient[keep], packed.values)
    rows_and_columns = {"row": keep.all(1) | ~keep.any(1), "column": keep.all(0) | ~keep.any(0)}
    assert rows_and_columns.get(granularity, keep.all() | ~keep.any()).all()
