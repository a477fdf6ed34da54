"""Sharded parameters: each rank draws its part of the whole parameter's mask."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from lrd.optim import mask, placement
from lrd.optim.fused import restore
from lrd.optim.fused.restore import MaskedTensor
from lrd.optim.placement import Placement
from tests.helpers.launching import ROOT, command, launch

SCRIPT = str(ROOT / "tests" / "helpers" / "run_shards.py")


class FakeMesh:
    """The part of a DeviceMesh that is asked: its shape, and where this rank is in it."""

    def __init__(self, shape: tuple[int, ...], coordinate: tuple[int, ...]) -> None:
        self._shape = shape
        self._coordinate = coordinate

    def size(self, dim: int) -> int:
        return self._shape[dim]

    def get_coordinate(self) -> list[int]:
        return list(self._coordinate)


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 4, 5), (2, 6, 1, 3)])
def test_runs_and_box_are_those_of_numpy(shape):
    whole = np.arange(np.prod(shape)).reshape(shape)
    slices = [
        [slice(start, stop) for start in range(size + 1) for stop in range(start, size + 1)]
        for size in shape
    ]
    all_boxes = list(itertools.product(*slices))

    for box in all_boxes[:: max(1, len(all_boxes) // 300)]:
        part = whole[box]
        place = Placement(shape, tuple(s.start for s in box), part.shape)

        first_elements, run_length = place.runs()
        elements = first_elements[:, None] + np.arange(run_length)
        assert np.array_equal(elements.reshape(-1), part.reshape(-1)), box
        assert torch.equal(place.box(torch.from_numpy(whole)), torch.from_numpy(part)), box


@pytest.mark.parametrize("mesh_shape", [(1,), (3,), (4,), (2, 3)])
def test_box_is_where_dtensor_puts_a_rank(mesh_shape):
    # Each element holds its index, so the part that torch gives to a rank shows where it lies.
    shape = (7, 5, 2)
    whole = torch.arange(70).view(shape)
    kinds = [Shard(0), Shard(1), Shard(2), Replicate()]

    for placements in itertools.product(kinds, repeat=len(mesh_shape)):
        for coordinate in itertools.product(*(range(size) for size in mesh_shape)):
            part = whole
            for mesh_dim, kind in enumerate(placements):
                if isinstance(kind, Shard):
                    parts = torch.tensor_split(part, 1, dim=kind.dim)
                    chunk = -(-part.shape[kind.dim] // mesh_shape[mesh_dim])
                    start = min(chunk * coordinate[mesh_dim], part.shape[kind.dim])
                    stop = min(start + chunk, part.shape[kind.dim])
                    part = parts[0].narrow(kind.dim, start, stop - start)

            box = placement._box(shape, FakeMesh(mesh_shape, coordinate), placements)
            assert torch.equal(box.box(whole), part), (placements, coordinate)


@pytest.mark.parametrize(
    ("shape", "starts", "local_shape"),
    [
        ((1000,), (300,), (457,)),
        ((40, 30), (10, 0), (7, 30)),
        ((40, 30), (0, 10), (40, 7)),
        ((5, 300, 6), (1, 250, 2), (3, 50, 3)),
        ((3, 100_000), (1, 20_000), (2, 70_000)),
        ((6, 4), (6, 0), (0, 4)),
    ],
)
def test_a_box_is_drawn_as_part_of_the_whole(shape, starts, local_shape):
    whole = mask.keep_mask(shape, seed=3, step=4, index=5, keep_prob=0.9)
    box = Placement(shape, starts, local_shape)

    group = {"mask_seed": 3, "mask_step": 4, "keep_prob": 0.9, "mask_granularity": "element"}
    item = MaskedTensor(5, group, new=torch.zeros(local_shape), placement=box)
    drawn = restore.draw_masks([item])[0]
    assert drawn.shape == local_shape
    assert torch.equal(drawn, box.box(whole))


def test_partial_sums_are_refused():
    class PartialSum:
        dim = None

        def is_replicate(self) -> bool:
            return False

        def is_partial(self) -> bool:
            return True

    with pytest.raises(ValueError, match="only Shard and Replicate"):
        placement._box((4,), FakeMesh((2,), (0,)), (PartialSum(),))


# Slow, because the tests above have the boxes, and tests/launchers/test_sharding.py has FSDP2.
@pytest.mark.slow
def test_sharded_steps_are_those_of_whole_parameters():
    result = launch(command(4, [SCRIPT, "masks"]))
    assert result.returncode == 0, result.stderr[-4000:]
    assert "all equal" in result.stdout


@pytest.mark.slow
def test_state_saved_on_four_shards_goes_on_on_two_and_one(tmp_path):
    for ranks, arguments in [(4, "save"), (2, "load"), (1, "load")]:
        result = launch(command(ranks, [SCRIPT, arguments, str(tmp_path)]))
        assert result.returncode == 0, result.stderr[-4000:]
