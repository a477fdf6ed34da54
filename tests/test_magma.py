"""Magma against its definition written again in NumPy; what its score survives; what it refuses."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch

from lrd import LRDropout, Magma, mask

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
def test_the_update_is_the_definitions(make, update):
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
            np.testing.assert_allclose(params[i].detach().numpy(), thetas[i], rtol=1e-12, atol=1e-12)
    assert 0.3 < kept / (STEPS * len(SHAPES)) < 0.7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_goes_on_the_same(dtype):
    params = parameters(dtype)
    optimizer = torch.optim.Adam(params, lr=LR)
    Magma(optimizer, seed=3)
    for step in range(5):
        step_with(optimizer, step)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    loaded = torch.optim.Adam(others, lr=LR)
    Magma(loaded, seed=99)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(5, 12):
        step_with(optimizer, step)
        step_with(loaded, step)
    assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))


def test_a_copy_is_magma_too():
    optimizer = torch.optim.Adam(parameters(), lr=LR)
    Magma(optimizer, seed=3, tau=0.5)
    step_with(optimizer, 0)
    twin = copy.deepcopy(optimizer)
    for step in range(1, 8):
        step_with(optimizer, step)
        step_with(twin, step)
    pairs = zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_what_it_cannot_do_it_refuses():
    def fresh() -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters(), lr=LR)

    for arguments, name in (({"keep_prob": 1.0}, "keep_prob"), ({"tau": 0.0}, "tau"), ({"seed": -1}, "seed")):
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
