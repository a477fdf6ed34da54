"""Where the elements of a shard lie in the whole parameter.

A mask is a function of an element's position in the whole parameter. A rank that holds only a part
of a parameter, a DTensor's local tensor, therefore draws exactly its part of the mask, with no
communication: the bits are those that one process would draw.

DTensors are made by ``fully_shard`` (FSDP2), by tensor parallelism and by ``distribute_tensor``.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Where a local tensor's elements lie in the whole parameter: in a box.

    Attributes:
        shape: of the whole parameter, as the real view has it.
        starts: the box's first index in each dimension.
        local_shape: of the box, which is the local tensor's.
    """

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    local_shape: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the local tensor is the whole parameter."""
        return self.local_shape == self.shape

    def runs(self) -> tuple[NDArray[np.int64], int]:
        """The pieces of the local tensor that are contiguous in the flattened whole parameter.

        Returns:
            For each run, in the order in which the runs lie in the (row-major) local tensor, the
            index of its first element in the whole: int64 (n_runs,). And the length of every run.
        """
        if 0 in self.local_shape:
            return np.zeros(0, np.int64), 0

        # From the last dimension on, runs grow as long as whole dimensions are in the box.
        run_dim = len(self.shape)
        run_length = 1
        while run_dim > 0:
            run_dim -= 1
            run_length *= self.local_shape[run_dim]
            if self.local_shape[run_dim] != self.shape[run_dim]:
                break

        # The flat index of the first element of each run: a sum over the dimensions.
        first_elements = np.zeros((1,) * len(self.shape), np.int64)
        for dim, start in enumerate(self.starts):
            stride = math.prod(self.shape[dim + 1 :])
            n_indices = self.local_shape[dim] if dim < run_dim else 1
            indices = np.arange(start, start + n_indices, dtype=np.int64) * stride
            position = [-1 if d == dim else 1 for d in range(len(self.shape))]
            first_elements = first_elements + indices.reshape(position)

        return first_elements.reshape(-1), run_length

    def box(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that belongs to the box.

        Args:
            tensor: of the whole parameter's shape; dimensions of size 1 may stand for any size, as
                in broadcasting.
        """
        for dim, (start, size) in enumerate(zip(self.starts, self.local_shape, strict=True)):
            if tensor.shape[dim] == self.shape[dim]:
                tensor = tensor.narrow(dim, start, size)
        return tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, whose memory is elsewhere: in its local tensor."""
    # Nobody can have a DTensor who has not imported it, and the import takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, which shares its memory. Any other tensor is returned.

    Call it without autograd.
    """
    if not is_dtensor(tensor):
        return tensor

    local_tensor: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local_tensor


def is_placed_alike(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are DTensors of which each rank holds the same elements."""
    if not is_dtensor(tensor) or not is_dtensor(other):
        return False

    first: Any = tensor
    second: Any = other
    is_same_mesh = first.device_mesh == second.device_mesh
    return bool(is_same_mesh and first.placements == second.placements)


def of_parameter(param: Tensor) -> Placement | None:
    """Where a parameter's local elements lie in the whole of it.

    Args:
        param: a parameter.

    Returns:
        None for a parameter that is whole: not a DTensor, or one that is replicated.

    Raises:
        ValueError: this rank's elements are not a box, or they are partial sums.
    """
    if not is_dtensor(param):
        return None

    sharded: Any = param
    box = _box(tuple(param.shape), sharded.device_mesh, tuple(sharded.placements))
    local_shape = tuple(local(param).shape)
    if box.local_shape != local_shape:
        raise ValueError(
            f"a sharded parameter of shape {tuple(param.shape)} should have a local shape of "
            f"{box.local_shape} under {sharded.placements}, but has {local_shape}: "
            "the positions of its elements are not known"
        )

    if param.is_complex():
        box = Placement((*box.shape, 2), (*box.starts, 0), (*box.local_shape, 2))
    return None if box.is_whole else box


@lru_cache(maxsize=4096)
def _box(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> Placement:
    """This rank's box of a DTensor.

    Args:
        shape: of the whole tensor.
        mesh: its DeviceMesh.
        placements: what it is along each dimension of the mesh.

    Raises:
        ValueError: as for `of_parameter`.
    """
    coordinates = mesh.get_coordinate()
    if coordinates is None:  # this rank is not in the mesh: it has no element
        return Placement(shape, (0,) * len(shape), (0,) * len(shape))

    # Split the indices of each dimension as DTensor splits the tensor: from the first dimension of
    # the mesh to the last.
    indices_by_dim = [torch.arange(size, device="cpu") for size in shape]
    for mesh_dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue

        # Shard, or the _StridedShard that FSDP2 makes of a dimension that is sharded already.
        dim = getattr(placement, "dim", None)
        if dim is None or placement.is_partial() or not hasattr(placement, "_split_tensor"):
            raise ValueError(
                f"a parameter with the placement {placement} cannot be masked: "
                "only Shard and Replicate can"
            )
        indices = indices_by_dim[dim].reshape([-1 if d == dim else 1 for d in range(len(shape))])
        parts, _ = placement._split_tensor(
            indices, mesh.size(mesh_dim), with_padding=False, contiguous=True
        )
        indices_by_dim[dim] = parts[coordinates[mesh_dim]].reshape(-1)

    starts = []
    for dim, indices in enumerate(indices_by_dim):
        start = int(indices[0]) if len(indices) else 0
        if not torch.equal(indices, torch.arange(start, start + len(indices), device="cpu")):
            raise ValueError(
                f"a parameter with the placements {placements} cannot be masked: the elements of "
                f"one rank are not contiguous in dimension {dim}"
            )
        starts.append(start)

    return Placement(shape, tuple(starts), tuple(len(indices) for indices in indices_by_dim))
