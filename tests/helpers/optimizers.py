"""Small parameters, gradients and stock optimizers, and comparisons bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrd.optim import mask

SHAPES = ((6, 5), (7,), (3, 2, 3, 3), ())

OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "SGD foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "SGD fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "SGD tensor lr": (
        torch.optim.SGD,
        {"lr": torch.tensor(0.1), "momentum": 0.9, "foreach": False},
    ),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "Adam fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01, "weight_decay": 0.01}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.01}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01, "weight_decay": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0, "weight_decay": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "weight_decay": 0.01}),
    "RMSprop momentum": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "RMSprop centered": (torch.optim.RMSprop, {"lr": 0.01, "centered": True}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1, "t0": 3, "weight_decay": 0.01}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make(name: str, params: list[Any]) -> Optimizer:
    """A stock optimizer by its name in OPTIMIZERS; `params` are parameters or groups of them."""
    cls, arguments = OPTIMIZERS[name]
    return cls(params, **copy.deepcopy(arguments))


# Parameters and gradients


def make_params(
    dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> list[nn.Parameter]:
    """Parameters with the same normal values at every call."""
    generator = torch.Generator().manual_seed(1)
    drawn_dtype = torch.complex64 if dtype.is_complex else torch.float32
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=drawn_dtype).to(dtype))
        for shape in shapes
    ]


def give_gradients(params: list[nn.Parameter], step: int, sparse: bool = False) -> None:
    """Set gradients with normal values, the same ones for the same step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        drawn_dtype = torch.complex128 if param.is_complex() else torch.float64
        grad = torch.randn(param.shape, generator=generator, dtype=drawn_dtype).to(param.dtype)
        param.grad = grad.to_sparse() if sparse else grad


def params_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def values(params: list[nn.Parameter]) -> list[Tensor]:
    """Copies of the parameters' values."""
    return [param.detach().clone() for param in params]


def values_of(optimizer: Optimizer) -> list[Tensor]:
    """Copies of the values of an optimizer's parameters."""
    return values(params_of(optimizer))


def train(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(params_of(optimizer), step)
        optimizer.step()


def keep_masks(
    params: list[nn.Parameter], *, seed: int, step: int, keep_prob: float
) -> list[Tensor]:
    """The masks of an optimizer's parameters at one update."""
    return [
        mask.keep_mask(param.shape, seed=seed, step=step, index=index, keep_prob=keep_prob)
        for index, param in enumerate(params)
    ]


# Files and pickles


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict that has been in a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


# Comparisons


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)

    same_size_int = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(same_size_int[tensor.element_size()])


def assert_same_bits(some: Any, others: Any) -> None:
    """Two tensors, or two nested dicts, lists and tuples of them, are the same bit for bit."""
    if isinstance(some, dict):
        assert some.keys() == others.keys()
        for key, value in some.items():
            assert_same_bits(value, others[key])

    elif isinstance(some, list | tuple):
        assert len(some) == len(others)
        for value, other in zip(some, others, strict=True):
            assert_same_bits(value, other)

    elif isinstance(some, Tensor):
        assert some.dtype == others.dtype
        assert torch.equal(bits(some), bits(others))

    else:
        assert some == others


def assert_same_state(optimizer: Optimizer, other: Optimizer) -> None:
    """Two optimizers hold the same state, their param_groups apart."""
    assert_same_bits(optimizer.state_dict()["state"], other.state_dict()["state"])
