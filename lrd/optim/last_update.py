"""Which elements the latest update kept.

Nothing is counted during training: the masks are drawn again from their position when asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrd.optim import group_settings, mask


@dataclass(frozen=True)
class GroupUpdate:
    """An update of one group: the parameters it moved, and what their masks were drawn with."""

    group_number: int
    granularity: str
    draw_arguments: dict[str, Any]  # of `mask.draw`; the step may be a tensor
    params: list[tuple[int, Tensor]]  # (index in the position of the masks, parameter)

    @cached_property
    def shapes(self) -> dict[int, torch.Size]:
        """The shapes of the whole parameters, in real numbers, by their index."""
        return {index: _real_shape(param) for index, param in self.params}

    @classmethod
    def from_group(
        cls, number: int, group: dict[str, Any], params: list[tuple[int, Tensor]]
    ) -> GroupUpdate:
        """The update that a group has just made.

        Call it before ``mask_step`` goes up: the count before the update is the masks' position.

        Args:
            number: the group's number in the optimizer.
            group: the group.
            params: (index, parameter) of the parameters that the update moved. The index is that
                in the position of the masks.
        """
        return cls(
            group_number=number,
            granularity=group["mask_granularity"],
            draw_arguments=group_settings.draw_arguments(group),
            params=params,
        )

    def draw_arguments_on_host(self) -> dict[str, Any]:
        """The same with all numbers on the host: a sync point where the step is a tensor."""
        return {**self.draw_arguments, "step": int(self.draw_arguments["step"])}

    def draw_shape(self, index: int) -> tuple[int, ...]:
        """The shape of a parameter's independent draws."""
        return mask.draw_shape(tuple(self.shapes[index]), self.granularity)


def _real_shape(param: Tensor) -> torch.Size:
    """The shape of a whole parameter's real view. A DTensor's shape is that of the whole."""
    return torch.Size((*param.shape, 2)) if param.is_complex() else param.shape


def kept_fractions(updates: list[GroupUpdate], n_groups: int) -> list[float]:
    """The fraction of its elements that each group kept; 0 where none moved."""
    kept = [0] * n_groups
    total = [0] * n_groups

    for update in updates:
        draw_arguments = update.draw_arguments_on_host()
        for index, shape in update.shapes.items():
            n_draws = math.prod(update.draw_shape(index))
            kept_draws = mask.count_kept(n_draws, index=index, **draw_arguments)

            elements_per_draw = shape.numel() // n_draws
            kept[update.group_number] += kept_draws * elements_per_draw
            total[update.group_number] += shape.numel()

    return [n_kept / n if n else 0.0 for n_kept, n in zip(kept, total, strict=True)]


def is_kept(updates: list[GroupUpdate], index: int, element: int) -> bool:
    """Whether an element was kept.

    Args:
        updates: the groups' updates.
        index: the parameter's index in the optimizer, counted through its groups.
        element: the element's index in the flattened parameter.
    """
    update = next((update for update in updates if index in update.shapes), None)
    if update is None:
        return False

    shape = update.shapes[index]
    drawn_shape = update.draw_shape(index)

    # The element's coordinates, with 0 in the dimensions that share a draw, are its draw's.
    element_coordinates = np.unravel_index(element, shape) if shape else ()
    draw_coordinates = tuple(
        0 if size == 1 else int(coordinate)
        for coordinate, size in zip(element_coordinates, drawn_shape, strict=True)
    )
    draw_index = int(np.ravel_multi_index(draw_coordinates, drawn_shape)) if shape else 0

    draw_arguments = update.draw_arguments_on_host()
    return bool(mask.draw(1, offset=draw_index, index=index, **draw_arguments))
