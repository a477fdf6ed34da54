"""All that a step changes, as named values: weights, buffers, averages, optimizer, schedule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrd.checkpoint.store import TrainState
from lrd.optim import tensor_bits

# Settings of a parameter group that name things and never change.
_NAMES_IN_GROUPS = {"params", "name", "split_from", "param_names"}
# What `trainer.json` says of the results so far.
_TRAINER_VALUES = ("skipped", "replaced", "evaluated", "best", "latest")


@dataclass(frozen=True)
class Difference:
    """The first value in which two states differ.

    Attributes:
        name: of the tensor or value, for example `conv1.weight (momentum_buffer)`.
        element: the index of the first element that differs; empty for what is no tensor, or whose
            shapes differ.
        values: both, in the order of the states.
        num_elements: how many elements of the tensor differ.
        num_values: how many named values differ in all.
    """

    name: str
    element: tuple[int, ...]
    values: tuple[Any, Any]
    num_elements: int
    num_values: int

    def describe(self) -> str:
        """In one line."""
        place = f"[{','.join(map(str, self.element))}]" if self.element else ""
        first, second = (_show(value) for value in self.values)
        text = f"{self.name}{place}: {first} and {second}"
        more = []
        if self.num_elements > 1:
            more.append(f"{self.num_elements:,} elements of it")
        if self.num_values > 1:
            more.append(f"{self.num_values:,} tensors and settings in all")
        return f"{text} ({'; '.join(more)})" if more else text

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "element": list(self.element),
            "values": [_show(value) for value in self.values],
            "elements": self.num_elements,
            "names": self.num_values,
        }


def _show(value: Any) -> str:
    """A float in hexadecimal too, where decimal digits hide that two differ in the last bit."""
    if isinstance(value, float):
        return f"{value:.9g} ({value.hex()})"
    return str(value)


def parameter_names(network: nn.Module, optimizer: Optimizer) -> list[str]:
    """The names of an optimizer's parameters, in the order in which its state_dict counts them."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [
        names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]
    ]


def name_values(state: TrainState, names: Sequence[str] = ()) -> dict[str, Any]:
    """Name all that a step changes.

    Args:
        state: of a job or of a checkpoint.
        names: of the parameters, see `parameter_names`; without them they are numbered.

    Returns:
        Tensors and JSON values by name: the network's first, in its own order.
    """
    values: dict[str, Any] = dict(state.model)

    optimizer = state.optimizer["optimizer"]
    for number, parameter_state in sorted(optimizer["state"].items()):
        name = names[number] if number < len(names) else f"parameter {number}"
        for key, value in parameter_state.items():
            values[f"{name} ({key})"] = value

    for number, group in enumerate(optimizer["param_groups"]):
        group_name = group.get("name", f"group{number}")
        for key, value in group.items():
            if key not in _NAMES_IN_GROUPS:
                values[f"{key} of {group_name}"] = _plain(value)

    for name, tensor in (state.ema or {}).items():
        values[f"{name} (average)"] = tensor
    values["schedule"] = _plain(state.optimizer["schedule"])
    for key in _TRAINER_VALUES:
        values[key] = state.trainer.get(key)
    return values


def _plain(value: Any) -> Any:
    """A value as JSON text with sorted keys; what JSON does not know as its own text."""
    if isinstance(value, bool | int | float | str | None):
        return value
    return json.dumps(value, sort_keys=True, default=_as_text)


def _as_text(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else repr(value)


def keep_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """What two runs with different settings may have in common: all but the settings."""
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def digest_tensors(values: Mapping[str, Any]) -> dict[str, str]:
    """A digest of each tensor's dtype, shape and bits, by its name."""
    return {name: _digest(tensor) for name, tensor in keep_tensors(values).items()}


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(_bits(tensor).numpy().data)
    return digest.hexdigest()[:16]


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers, on the host, in row-major order."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bool:
        return plain.view(torch.uint8)
    return tensor_bits.as_integers(plain)


def find_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference | None:
    """Compare two states bit for bit; what is NaN in both is equal.

    Args:
        first, second: as `name_values` returns them.
    """
    names = [*first, *(name for name in second if name not in first)]
    differing = [name for name in names if not _is_same(first.get(name), second.get(name))]
    if not differing:
        return None

    name = differing[0]
    return _describe(name, first.get(name), second.get(name), len(differing))


def _is_same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        has_same_kind = first.dtype == second.dtype and first.shape == second.shape
        return has_same_kind and torch.equal(_bits(first), _bits(second))
    return type(first) is type(second) and repr(first) == repr(second)


def _describe(name: str, first: Any, second: Any, num_values: int) -> Difference:
    are_tensors = isinstance(first, Tensor) and isinstance(second, Tensor)
    if not are_tensors or first.shape != second.shape or first.dtype != second.dtype:
        kinds = tuple(
            f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
            for value in (first, second)
        )
        return Difference(name, (), (kinds[0], kinds[1]), 1, num_values)

    differs = (_bits(first) != _bits(second)).reshape(-1, *_parts_of_element(first)).any(-1)
    flat_index = int(differs.nonzero()[0])
    element = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat_index), first.shape))
    values = (
        first.detach().cpu().flatten()[flat_index].item(),
        second.detach().cpu().flatten()[flat_index].item(),
    )
    return Difference(name, element, values, int(differs.sum()), num_values)


def _parts_of_element(tensor: Tensor) -> tuple[int, ...]:
    """A complex element has two parts."""
    return (2,) if tensor.is_complex() else (1,)
