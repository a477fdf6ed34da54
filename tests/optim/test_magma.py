"""Magma equals its definition in NumPy, and continues the same after saving and copying."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lrd import LRDropout, Magma
from lrd.optim import mask
from lrd.optim.dropout import get_lr_dropout
from tests.helpers.optimizers import (
    assert_same_bits,
    params_of,
    pickled,
    saved_and_loaded,
    values,
)

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
@pytest.mark.parametrize("score_start", [None, 0.0, 0.5, 1])
def test_the_update_follows_the_definition(make, update, score_start):
    params = parameters()
    optimizer = make(params)
    Magma(optimizer, keep_prob=0.5, seed=11, tau=TAU, score_start=score_start)
    thetas = [param.detach().numpy().copy() for param in params]
    momenta, squares = ([np.zeros(shape) for shape in SHAPES] for _ in range(2))
    scores: list[float | None] = [score_start] * len(SHAPES)
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


# torch.distributed.checkpoint creates an optimizer's state by a step at lr 0, and then loads what
# that step has created.


def layers() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.5)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        random = np.random.default_rng(step)
        for param in model.parameters():
            param.grad = torch.as_tensor(random.standard_normal(param.shape))
        optimizer.step()
    optimizer.zero_grad()


def sgd_with_magma(model: nn.Module, score_start: float | None = None) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    Magma(optimizer, seed=3, score_start=score_start)
    return optimizer


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("score_start", [None, 0.5])
def test_a_distributed_checkpoint_continues_with_the_same_bits(tmp_path, flatten, score_start):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = layers()
    optimizer = sgd_with_magma(model, score_start)
    train(model, optimizer, range(5))
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    checkpoint.save({"optimizer": saved, "model": model.state_dict()}, checkpoint_id=tmp_path)

    resumed_model = layers()
    resumed = sgd_with_magma(resumed_model, score_start)
    state = get_optimizer_state_dict(resumed_model, resumed, options=options)
    contents = {"optimizer": state, "model": resumed_model.state_dict()}
    checkpoint.load(contents, checkpoint_id=tmp_path)
    resumed_model.load_state_dict(contents["model"])
    set_optimizer_state_dict(resumed_model, resumed, state, options=options)
    assert_same_bits(resumed.state_dict()["state"], optimizer.state_dict()["state"])

    train(model, optimizer, range(5, 12))
    train(resumed_model, resumed, range(5, 12))
    assert_same_bits(list(resumed_model.parameters()), list(model.parameters()))


@pytest.mark.parametrize(("score_start", "stored"), [(None, -1.0), (0.0, 0.0), (1.0, 1.0)])
def test_a_step_that_only_creates_the_state_begins_no_score(score_start, stored):
    model = layers()
    optimizer = sgd_with_magma(model, score_start)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert {float(entries["magma_score"]) for entries in state.values()} == {stored}
    assert optimizer.param_groups[0]["mask_step"] == 0

    undisturbed_model = layers()
    undisturbed = sgd_with_magma(undisturbed_model, score_start)
    train(model, optimizer, range(6))
    train(undisturbed_model, undisturbed, range(6))
    assert_same_bits(list(model.parameters()), list(undisturbed_model.parameters()))


def test_a_score_that_has_not_begun_begins_as_the_magma_that_loads_it_has_it():
    model = layers()
    saved = get_optimizer_state_dict(model, sgd_with_magma(model))
    optimizer = sgd_with_magma(model, score_start=0.25)
    set_optimizer_state_dict(model, optimizer, saved)

    other_model = layers()
    other = sgd_with_magma(other_model, score_start=0.25)
    train(model, optimizer, range(6))
    train(other_model, other, range(6))
    assert_same_bits(list(model.parameters()), list(other_model.parameters()))


def test_a_state_dict_without_scores_loads_and_they_begin():
    model, stock_model = layers(), layers()
    stock = torch.optim.SGD(stock_model.parameters(), lr=LR, momentum=MOMENTUM)
    train(stock_model, stock, range(3))
    optimizer = sgd_with_magma(model)
    optimizer.load_state_dict(saved_and_loaded(stock.state_dict()))
    train(model, optimizer, range(3, 4))

    param = next(model.parameters())
    momentum = optimizer.state[param]["momentum_buffer"].flatten()
    gradient = torch.as_tensor(np.random.default_rng(3).standard_normal(param.shape)).flatten()
    cosine = momentum @ gradient / (momentum.norm() * gradient.norm())
    expected = 1 / (1 + torch.exp(-cosine / TAU))
    torch.testing.assert_close(optimizer.state[param]["magma_score"], expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_has_magma_attached(copied):
    optimizer = torch.optim.Adam(parameters(), lr=LR)
    Magma(optimizer, seed=3, tau=0.5, score_start=0.25, first_index=7)
    twin = copied(optimizer)
    magma = get_lr_dropout(twin)
    assert isinstance(magma, Magma)
    assert (magma.tau, magma.score_start) == (0.5, 0.25)

    for step in range(8):
        step_with(optimizer, step)
    for step in range(8):
        step_with(twin, step)
    assert_same_bits(params_of(twin), params_of(optimizer))


def test_first_index_moves_the_masks_to_those_of_later_parameters():
    optimizer = torch.optim.Adam(parameters(), lr=LR)
    Magma(optimizer, seed=3, first_index=7)
    for step in range(10):
        before = values(params_of(optimizer))
        step_with(optimizer, step)
        moved = [
            not torch.equal(param, old)
            for param, old in zip(params_of(optimizer), before, strict=True)
        ]
        drawn = [mask.draw(1, seed=3, step=step, index=7 + i, keep_prob=0.5) for i in range(3)]
        assert moved == [bool(keep) for keep in drawn]


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
        ({"score_start": -0.1}, "score_start"),
        ({"score_start": 1.1}, "score_start"),
        ({"score_start": float("nan")}, "score_start"),
        ({"score_start": True}, "score_start"),
        ({"score_start": "1"}, "score_start"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=name):
            Magma(fresh(), **arguments)
    masked = fresh()
    LRDropout(masked)
    with pytest.raises(ValueError, match="attached already"):
        Magma(masked)


@pytest.mark.parametrize(
    "cls", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Rprop, torch.optim.ASGD]
)
def test_an_optimizer_without_a_momentum_is_refused_and_its_step_taken_back(cls):
    optimizer = cls(parameters(), lr=LR)
    Magma(optimizer, keep_prob=0.999)
    with pytest.raises(RuntimeError, match=f"{cls.__name__} keeps none"):
        step_with(optimizer, 0)
    assert_same_bits(params_of(optimizer), parameters())
    assert optimizer.param_groups[0]["mask_step"] == 0


def test_sparse_gradients_score_as_dense_ones():
    param = nn.Parameter(torch.full((6, 2), 0.5, dtype=torch.float64))
    optimizer = torch.optim.SparseAdam([param], lr=LR)
    Magma(optimizer, tau=TAU)
    gradient = torch.zeros(6, 2, dtype=torch.float64)
    gradient[[1, 4]] = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.float64)
    param.grad = gradient.to_sparse(1)
    optimizer.step()

    # After the first step the momentum is parallel to the gradient.
    expected = torch.tensor(1 / (1 + np.exp(-1 / TAU)), dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[param]["magma_score"], expected)


def test_sharded_parameters_are_refused_before_anything_moves():
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        param = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        optimizer = torch.optim.SGD([param], lr=LR, momentum=MOMENTUM)
        with pytest.raises(ValueError, match="Magma needs whole parameters"):
            Magma(optimizer)
        assert get_lr_dropout(optimizer) is None
        assert "keep_prob" not in optimizer.param_groups[0]
    finally:
        distributed.destroy_process_group()
