"""The exchange of kept elements: that it is dense learning rate dropout, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lrd
from tests.helpers.launching import ROOT, command, launch

CASES: list[dict[str, Any]] = [
    {"options": {"lr": 0.05}},
    {"options": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-3}},
    {"options": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-3, "nesterov": True}},
    {"options": {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "maximize": True}},
    {"options": {"lr": 0.05, "momentum": 0.9}, "micro_steps": 2},
    {"options": {"lr": 0.05, "momentum": 0.9}, "keep_probs": (0.2, 1.0)},
]


@pytest.mark.parametrize(
    "ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_the_training_is_that_of_dense_learning_rate_dropout(ranks: int) -> None:
    """In float64 to 1e-12, in plain torch; in float32, by the kernels, to its own rounding."""
    cases = [
        {"keep_probs": (0.3, 0.3), "steps": 8, **case, "dtype": dtype}
        for dtype in ("float64", "float32")
        for case in CASES
    ]
    program = str(ROOT / "tests" / "helpers" / "run_exchange.py")
    done = launch(command(ranks, [program, json.dumps(cases)]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does not work" not in done.stderr

    for case, facts in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        limit = 1e-12 if case["dtype"] == "float64" else 1e-5
        assert facts["difference"] < limit, (case, facts)
        assert facts["is_same_on_all_ranks"], case
        if case["options"].get("momentum"):
            assert facts["is_own"], case  # else nothing was saved by sending less
            assert facts["is_averaged_same"], case
            assert facts["momentum_difference"] < 10 * limit, (case, facts)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group with this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(momentum: float = 0.9) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    lrd.LRDropout(optimizer)
    return DistributedDataParallel(model), optimizer


def backward(model: nn.Module) -> None:
    model(torch.ones(4, 3)).square().mean().backward()


def with_lrd(optimizer: torch.optim.Optimizer, **settings: Any) -> torch.optim.Optimizer:
    lrd.LRDropout(optimizer, **settings)
    return optimizer


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "needs an optimizer with LRDropout"),
        (lambda p: with_lrd(torch.optim.Adam(p)), r"needs torch.optim.SGD, not Adam"),
        (lambda p: with_lrd(torch.optim.SGD(p, lr=0.1), masks="gradient"), "not 'gradient'"),
        (lambda p: with_lrd(torch.optim.SGD(list(p)[:1], lr=0.1)), "1 are not in the optimizer"),
        (
            lambda p: with_lrd(torch.optim.SGD([*p, nn.Parameter(torch.ones(1))], lr=0.1)),
            "1 of the optimizer are not in the model",
        ),
    ],
)
def test_what_cannot_be_exchanged_is_refused_with_the_reason(
    make_optimizer: Any, message: str
) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=message):
        lrd.exchange_kept(DistributedDataParallel(model), make_optimizer(model.parameters()))


def test_a_model_without_ddp_and_magma_are_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lrd.Magma(optimizer)
    with pytest.raises(ValueError, match="needs a DistributedDataParallel, not a Linear"):
        lrd.exchange_kept(model, optimizer)  # type: ignore[arg-type]


@pytest.mark.usefixtures("alone")
def test_one_ranks_momentum_is_not_handed_out_as_the_optimizers() -> None:
    model, optimizer = make()
    exchange = lrd.exchange_kept(model, optimizer)
    optimizer.state_dict()

    backward(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"call average_momentum\(\)"):
        optimizer.state_dict()
    exchange.average_momentum()
    state = optimizer.state_dict()
    assert state["param_groups"][0]["momentum"] == 0.9
    assert exchange.is_averaged

    model, optimizer = make(momentum=0.0)
    lrd.exchange_kept(model, optimizer)
    backward(model)
    optimizer.step()
    optimizer.state_dict()


@pytest.mark.usefixtures("alone")
def test_a_step_whose_gradients_were_not_exchanged_is_refused() -> None:
    model, optimizer = make()
    lrd.exchange_kept(model, optimizer)
    optimizer.step()  # there are no gradients

    with model.no_sync():
        backward(model)
    before = model.module.weight.detach().clone()
    with pytest.raises(RuntimeError, match="no backward pass through the DDP model"):
        optimizer.step()
    assert torch.equal(model.module.weight, before)


@pytest.mark.usefixtures("alone")
def test_masks_that_change_between_backward_and_step_are_refused() -> None:
    model, optimizer = make()
    lrd.exchange_kept(model, optimizer)
    backward(model)
    optimizer.param_groups[0]["keep_prob"] = 0.25
    with pytest.raises(RuntimeError, match="settings of masks have changed"):
        optimizer.step()

    optimizer.param_groups[0]["keep_prob"] = 0.5
    optimizer.step()


@pytest.mark.usefixtures("alone")
def test_settings_of_the_optimizer_outlive_a_step_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer = make()
    lrd.exchange_kept(model, optimizer)
    backward(model)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the kernel has failed")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["torch.optim.sgd"], "sgd", fail)
        with pytest.raises(RuntimeError, match="the kernel has failed"):
            optimizer.step()
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:two optimizers step in turn")
def test_alone_it_is_stock_learning_rate_dropout_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, optimizer = make()
    torch.manual_seed(0)
    expected = nn.Linear(3, 2)
    expected_optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    lrd.LRDropout(expected_optimizer)
    lrd.exchange_kept(model, optimizer)

    for _ in range(4):
        for network, stepping in ((model, optimizer), (expected, expected_optimizer)):
            stepping.zero_grad()
            backward(network)
            stepping.step()
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other)
