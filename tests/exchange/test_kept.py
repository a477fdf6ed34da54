"""The exchange of kept elements: that it is dense learning rate dropout, and what it refuses."""

from __future__ import annotations

import copy
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
from lrd.optim.dropout import get_lr_dropout
from tests.helpers.launching import ROOT, command, launch

CASES: list[dict[str, Any]] = [
    {"options": {"lr": 0.05}},
    {"options": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-3}},
    {"options": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-3, "nesterov": True}},
    {"options": {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "maximize": True}},
    {"options": {"lr": 0.05, "momentum": 0.9}, "micro_steps": 2},
    {"options": {"lr": 0.05, "momentum": 0.9}, "keep_probs": (0.2, 1.0)},
    {"options": {"lr": 0.05, "momentum": 0.9}, "mask": {"rescale": True}},
    {"options": {"lr": 0.05, "momentum": 0.9}, "mask": {"granularity": "row"}},
    {"options": {"lr": 0.05, "momentum": 0.9}, "ddp": {"gradient_as_bucket_view": True}},
    {"options": {"lr": 0.05, "momentum": 0.9}, "ddp": {"find_unused_parameters": True}},
]


@pytest.mark.parametrize(
    ("ranks", "steps"),
    [(2, 3), *(pytest.param(ranks, 8, marks=pytest.mark.slow) for ranks in (2, 3, 4))],
)
def test_the_training_is_that_of_dense_learning_rate_dropout(ranks: int, steps: int) -> None:
    """In float64 to 1e-12, in plain torch; in float32, by the kernels, to its own rounding."""
    cases = [
        {"keep_probs": (0.3, 0.3), "steps": steps, **case, "dtype": dtype}
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
        assert facts["refuses_other_masks"], case
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


def make(
    momentum: float = 0.9, **ddp_options: Any
) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    lrd.LRDropout(optimizer)
    return DistributedDataParallel(model, **ddp_options), optimizer


def backward(model: nn.Module) -> None:
    model(torch.ones(4, 3)).square().mean().backward()


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def assert_same_parameters(model: nn.Module, expected: nn.Module) -> None:
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other)


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


def no_sync(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    with model.no_sync():
        backward(model)


def clip(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    backward(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1e3)


def skip_and_compute_locally(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer
) -> None:
    backward(model)
    optimizer.zero_grad()
    no_sync(model, optimizer)


def accumulate_after(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    backward(model)
    no_sync(model, optimizer)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("is_view", [False, True])
@pytest.mark.parametrize("compute", [no_sync, clip, skip_and_compute_locally, accumulate_after])
def test_gradients_that_were_not_sent_are_refused_before_anything_moves(
    compute: Any, is_view: bool
) -> None:
    model, optimizer = make(gradient_as_bucket_view=is_view)
    lrd.exchange_kept(model, optimizer)
    optimizer.step()  # there are no gradients

    compute(model, optimizer)
    before = model.module.weight.detach().clone()
    with pytest.raises(RuntimeError, match="a gradient is not that of the last backward pass"):
        optimizer.step()
    assert torch.equal(model.module.weight, before)

    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert not torch.equal(model.module.weight, before)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "change",
    [
        {"keep_prob": 0.25},
        {"masks": "gradient"},
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"maximize": True},
    ],
)
def test_settings_that_change_between_backward_and_step_are_refused(
    change: dict[str, Any],
) -> None:
    model, optimizer = make()
    lrd.exchange_kept(model, optimizer)
    (group,) = optimizer.param_groups
    saved = dict(group)

    backward(model)
    before = model.module.weight.detach().clone()
    group.update(change)
    with pytest.raises(RuntimeError, match="settings or state of the optimizer have changed"):
        optimizer.step()
    assert torch.equal(model.module.weight, before)

    group.update(saved)
    optimizer.step()


@pytest.mark.usefixtures("alone")
def test_a_state_that_is_loaded_between_backward_and_step_is_refused() -> None:
    model, optimizer = make()
    exchange = lrd.exchange_kept(model, optimizer)
    backward(model)
    optimizer.step()
    exchange.average_momentum()
    state = optimizer.state_dict()

    backward(model)
    optimizer.load_state_dict(copy.deepcopy(state))
    with pytest.raises(RuntimeError, match="settings or state of the optimizer have changed"):
        optimizer.step()

    optimizer.zero_grad()
    backward(model)
    optimizer.step()


@pytest.mark.usefixtures("alone")
def test_what_is_no_longer_supported_is_refused_in_the_next_backward_pass() -> None:
    model, optimizer = make()
    lrd.exchange_kept(model, optimizer)
    optimizer.param_groups[0]["masks"] = "gradient"
    with pytest.raises(ValueError, match="not 'gradient'"):
        backward(model)

    model, optimizer = make()
    lrd.exchange_kept(model, optimizer)
    get_lr_dropout(optimizer).remove()
    lrd.LRDropout(optimizer)
    with pytest.raises(RuntimeError, match="its LRDropout was removed"):
        backward(model)


@pytest.mark.usefixtures("alone")
def test_a_closure_that_the_step_would_call_is_refused() -> None:
    """One that LRDropout calls before the step is as good as a backward pass before it."""
    model, optimizer = make()
    lrd.exchange_kept(model, optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    before = model.module.weight.detach().clone()
    optimizer.step(closure)
    assert not torch.equal(model.module.weight, before)

    optimizer.register_step_pre_hook(lambda *_: None)  # the closure is then left to the step
    with pytest.raises(RuntimeError, match="does not work with a step that calls a closure"):
        optimizer.step(closure)


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:two optimizers step in turn")
def test_a_step_that_failed_leaves_the_optimizers_settings_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After it there is a backward pass, which packs with them, and then a step.

    The step that fails is torch's own; the kernels would have moved the parameters before.
    """
    monkeypatch.setenv("LRD_FUSED", "0")
    (model, optimizer), (expected, expected_optimizer) = make(), make()
    expected.load_state_dict(model.state_dict())
    lrd.exchange_kept(model, optimizer)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the kernel has failed")

    backward(model)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["torch.optim.sgd"], "sgd", fail)
        with pytest.raises(RuntimeError, match="the kernel has failed"):
            optimizer.step()

    # The step that failed has updated the momentum; stock SGD's buffer after it is the gradient.
    backward(expected)
    for parameter in expected.parameters():
        expected_optimizer.state[parameter]["momentum_buffer"] = parameter.grad.clone()

    take_step(model, optimizer)
    take_step(expected, expected_optimizer)
    assert_same_parameters(model, expected)


class TwoDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(2, 2).double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(inputs).double())


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:two optimizers step in turn")
@pytest.mark.parametrize("options", [{"static_graph": True}, {"find_unused_parameters": True}])
def test_buckets_of_several_dtypes_are_sent_in_any_order(options: dict[str, bool]) -> None:
    networks = [TwoDtypes(), TwoDtypes()]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [
        torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9) for network in networks
    ]
    for optimizer in optimizers:
        lrd.LRDropout(optimizer)
    ddp_model = DistributedDataParallel(networks[0], **options)
    lrd.exchange_kept(ddp_model, optimizers[0])

    for _ in range(3):
        take_step(ddp_model, optimizers[0])
        take_step(networks[1], optimizers[1])
    assert_same_parameters(*networks)


@pytest.mark.usefixtures("alone")
def test_a_parameter_that_ddp_leaves_out_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.bias"])
    optimizer = with_lrd(torch.optim.SGD(model.parameters(), lr=0.1))
    ddp_model = DistributedDataParallel(model)
    lrd.exchange_kept(ddp_model, optimizer)
    backward(ddp_model)
    with pytest.raises(RuntimeError, match="a gradient is not that of the last backward pass"):
        optimizer.step()


@pytest.mark.usefixtures("alone")
def test_a_copy_of_an_optimizer_with_one_ranks_momentum_is_refused() -> None:
    model, optimizer = make()
    lrd.exchange_kept(model, optimizer)
    backward(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"call average_momentum\(\)"):
        copy.deepcopy(optimizer)


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
        take_step(model, optimizer)
        take_step(expected, expected_optimizer)
    assert_same_parameters(model, expected)
