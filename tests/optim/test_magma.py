"""Magma equals its definition in NumPy, and continues the same after saving and copying."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from lrd import LRDropout, Magma
from lrd.optim import mask
from tests.helpers.optimizers import assert_same_bits, params_of, saved_and_loaded, values

SHAPES = [(3, 4), (5,), ()]
TAU, STEPS, LR, MOMENTUM = 2.0, 40, 0.1, 0.9


def gradients(step: int) -> list[np.ndarray]:
    random = np.random.default_rng(step)
    return [random.standard_normal(shape) for shape in SHAPES]


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for shape in SHAPES]


def step_with(optimizer: torch.optim.Optimizer, step: int) -> None:
    for param, gradient in zip(optimizer.param_groups[0]["params"], gradients(step), strict=True):
        param.grad = torch.as_tensor(gradient, dtype=param.dtype)
    optimizer.step()


def adam(m: np.ndarray, v: np.ndarray, g: np.ndarray, t: int) -> np.ndarray:
    m += (1 - 0.9) * (g - m)
    v += (1 - 0.999) * (g * g - v)
    return LR * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def sgd(m: np.ndarray, v: np.ndarray, g: np.ndarray, t: int) -> np.ndarray:
    m[...] = MOMENTUM * m + g
    return LR * m


@pytest.mark.parametrize(
    ("make", "update"),
    [
        (lambda params: torch.optim.Adam(params, lr=LR), adam),
        (lambda params: torch.optim.SGD(params, lr=LR, momentum=MOMENTUM), sgd),
    ],
    ids=["Adam", "SGD"],
)
def test_the_update_follows_the_definition(make, update):
    params = parameters()
    optimizer = make(params)
    Magma(optimizer, keep_prob=0.5, seed=11, tau=TAU)
    thetas = [param.detach().numpy().copy() for param in params]
    momenta, squares = ([np.zeros(shape) for shape in SHAPES] for _ in range(2))
    scores: list[float | None] = [None] * len(SHAPES)
    kept = 0
    for step in range(STEPS):
        step_with(optimizer, step)
        for i, g in enumerate(gradients(step)):
            g = np.asarray(g)
            delta = update(momenta[i], squares[i], g, step + 1)
            cosine = (momenta[i] * g).sum() / np.sqrt((momenta[i] ** 2).sum() * (g**2).sum())
            now = 1 / (1 + np.exp(-cosine / TAU))
            scores[i] = now if scores[i] is None else 0.9 * scores[i] + 0.1 * now
            keep = bool(mask.draw(1, seed=11, step=step, index=i, keep_prob=0.5))
            kept += keep
            thetas[i] = thetas[i] - keep * scores[i] * delta
            np.testing.assert_allclose(
                params[i].detach().numpy(), thetas[i], rtol=1e-12, atol=1e-12
            )
    assert 0.3 < kept / (STEPS * len(SHAPES)) < 0.7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_saved_and_loaded_optimizer_continues_with_the_same_bits(dtype):
    params = parameters(dtype)
    optimizer = torch.optim.Adam(params, lr=LR)
    Magma(optimizer, seed=3)
    for step in range(5):
        step_with(optimizer, step)
    others = [torch.nn.Parameter(value) for value in values(params)]
    loaded = torch.optim.Adam(others, lr=LR)
    Magma(loaded, seed=99)
    loaded.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for step in range(5, 12):
        step_with(optimizer, step)
        step_with(loaded, step)
    assert_same_bits(params, others)


def test_a_copy_has_magma_attached():
    optimizer = torch.optim.Adam(parameters(), lr=LR)
    Magma(optimizer, seed=3, tau=0.5)
    step_with(optimizer, 0)
    twin = copy.deepcopy(optimizer)
    for step in range(1, 8):
        step_with(optimizer, step)
        step_with(twin, step)
    assert_same_bits(params_of(twin), params_of(optimizer))


def test_at_keep_prob_1_every_block_moves_by_its_scaled_update():
    params = parameters()
    stock_params = parameters()
    optimizer = torch.optim.Adam(params, lr=LR)
    stock = torch.optim.Adam(stock_params, lr=LR)
    Magma(optimizer, tau=TAU)
    optimizer.param_groups[0]["keep_prob"] = 1.0  # as a schedule would

    before = values(params)
    step_with(optimizer, 0)
    step_with(stock, 0)
    for param, stock_param, old in zip(params, stock_params, before, strict=True):
        score = optimizer.state[param]["magma_score"]
        assert 0 < score < 1
        expected = old + score * (stock_param.detach() - old)
        torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-12)


def test_bad_arguments_and_unsuitable_optimizers_are_refused():
    def fresh() -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters(), lr=LR)

    for arguments, name in (
        ({"keep_prob": 1.0}, "keep_prob"),
        ({"keep_prob": "0.5"}, "keep_prob"),
        ({"tau": 0.0}, "tau"),
        ({"tau": "2"}, "tau"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=name):
            Magma(fresh(), **arguments)
    masked = fresh()
    LRDropout(masked)
    with pytest.raises(ValueError, match="attached already"):
        Magma(masked)
    without_momentum = fresh()
    Magma(without_momentum, keep_prob=0.999)
    with pytest.raises(RuntimeError, match="SGD keeps none"):
        step_with(without_momentum, 0)
