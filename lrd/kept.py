"""What the latest update kept: drawn anew from its position when somebody asks, and so counted nowhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrd import kernels, mask, settings


@dataclass(frozen=True)
class Moved:
    """Parameters of one group that an update moved, and where their masks stand."""

    group: int  # its number
    granularity: str
    position: dict[str, Any]  # arguments of `lrd.mask`, all but `index`
    shapes: dict[int, torch.Size]  # by the parameter's index in the optimizer

    @classmethod
    def by(cls, number: int, group: dict[str, Any], params: list[tuple[int, Tensor]]) -> Moved:
        """By the next update of a group."""
        shapes = {index: kernels.real(param).shape for index, param in params}
        return cls(number, group["mask_granularity"], settings.position(group), shapes)

    @property
    def place(self) -> dict[str, Any]:
        """`position` with all numbers on the host."""
        return {**self.position, "step": int(self.position["step"])}

    def draw_shape(self, index: int) -> tuple[int, ...]:
        return mask.draw_shape(tuple(self.shapes[index]), self.granularity)


def fractions(moved: list[Moved], n_groups: int) -> list[float]:
    """For each group, the fraction of its elements that were kept; 0 where none moved."""
    kept, total = ([0] * n_groups for _ in range(2))
    for own in moved:
        for index, shape in own.shapes.items():
            draws = math.prod(own.draw_shape(index))
            kept[own.group] += mask.count_kept(draws, index=index, **own.place) * (shape.numel() // draws)
            total[own.group] += shape.numel()
    return [some / whole if whole else 0.0 for some, whole in zip(kept, total, strict=True)]


def keeps(moved: list[Moved], index: int, element: int) -> bool:
    """Whether an element was kept: the parameter's index in the optimizer, the element's in the flattened parameter."""
    own = next((own for own in moved if index in own.shapes), None)
    if own is None:
        return False
    shape, draws = own.shapes[index], own.draw_shape(index)
    place = np.unravel_index(element, shape) if shape else ()
    shared = tuple(0 if size == 1 else int(i) for i, size in zip(place, draws, strict=True))
    draw = int(np.ravel_multi_index(shared, draws)) if shared else 0
    return bool(mask.draw(1, offset=draw, index=index, **own.place))
