"""What the masked optimizers compute, compared with independent references.

The references are NumPy formulas, stock optimizers, and hand-written loops for the controls.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import lrd.optim
from lrd import LRDropout
from lrd.optim import mask
from lrd.parts.schedules import Schedule
from tests.helpers.optimizers import (
    assert_same_bits,
    assert_same_state,
    every_optimizer,
    give_gradients,
    make,
    make_params,
    values,
)
from tests.helpers.schedules import SCHEDULES, section

# From the formulas: each returns what is to be subtracted from the parameter, and does not mask its
# state.


def sgd(x, grad, state, t, *, lr, momentum, dampening=0.0, nesterov=False, weight_decay):
    grad = grad + weight_decay * x
    state["v"] = grad if t == 1 else momentum * state["v"] + (1 - dampening) * grad
    return lr * (grad + momentum * state["v"] if nesterov else state["v"])


def adam(x, grad, state, t, *, lr, betas, eps, weight_decay, amsgrad=False, decoupled=False):
    if not decoupled:
        grad = grad + weight_decay * x
    b1, b2 = betas
    state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * grad
    state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * grad**2
    state["max"] = np.maximum(state.get("max", 0.0), state["v"])
    second = state["max"] if amsgrad else state["v"]
    step = lr * state["m"] / (1 - b1**t) / (np.sqrt(second / (1 - b2**t)) + eps)
    return step + lr * weight_decay * x if decoupled else step


def adamw(*args, **kwargs):
    return adam(*args, **kwargs, decoupled=True)


def rmsprop(x, grad, state, t, *, lr, alpha, eps, weight_decay, momentum=0.0, centered=False):
    grad = grad + weight_decay * x
    state["v"] = alpha * state.get("v", 0.0) + (1 - alpha) * grad**2
    state["mean"] = alpha * state.get("mean", 0.0) + (1 - alpha) * grad
    variance = state["v"] - state["mean"] ** 2 if centered else state["v"]
    state["buffer"] = momentum * state.get("buffer", 0.0) + grad / (np.sqrt(variance) + eps)
    return lr * state["buffer"]


MOMENTUM = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
ADAM = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}
RMSPROP = {"lr": 0.01, "alpha": 0.95, "eps": 1e-8, "weight_decay": 0.05}
FORMULAS = {
    "SGD": (sgd, lrd.optim.SGD, MOMENTUM),
    "SGD dampening": (sgd, lrd.optim.SGD, {**MOMENTUM, "dampening": 0.3}),
    "SGD nesterov": (sgd, lrd.optim.SGD, {**MOMENTUM, "nesterov": True}),
    "Adam": (adam, lrd.optim.Adam, ADAM),
    "Adam amsgrad": (adam, lrd.optim.Adam, {**ADAM, "amsgrad": True}),
    "AdamW": (adamw, lrd.optim.AdamW, ADAM),
    "AdamW amsgrad": (adamw, lrd.optim.AdamW, {**ADAM, "amsgrad": True}),
    "RMSprop": (rmsprop, lrd.optim.RMSprop, RMSPROP),
    "RMSprop momentum": (rmsprop, lrd.optim.RMSprop, {**RMSPROP, "momentum": 0.9}),
    "RMSprop centered": (rmsprop, lrd.optim.RMSprop, {**RMSPROP, "centered": True}),
    "RMSprop centered momentum": (
        rmsprop,
        lrd.optim.RMSprop,
        {**RMSPROP, "centered": True, "momentum": 0.9},
    ),
}


@pytest.mark.parametrize("keep_prob", [0.5, 0.8])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_hundred_steps_agree_with_the_formulas_to_1e_12(name, keep_prob):
    """On noisy quadratics sum(a * (x - b)**2) / 2, whose gradient depends on the parameter."""
    formula, cls, arguments = FORMULAS[name]
    random = np.random.default_rng(0)
    a = np.abs(random.normal(size=150))
    b = random.normal(size=150)
    x = random.normal(size=150)
    noise = random.normal(size=(100, 150))
    first = nn.Parameter(torch.zeros(3))
    param = nn.Parameter(torch.from_numpy(x.copy()).view(10, 15))
    optimizer = cls([first, param], **arguments, keep_prob=keep_prob, seed=3)
    state: dict = {}
    for step in range(100):
        keep = mask.draw(150, seed=3, step=step, index=1, keep_prob=keep_prob).numpy()
        x = x - keep * formula(x, a * (x - b) + noise[step], state, step + 1, **arguments)
        at = param.detach().numpy().reshape(-1)
        param.grad = torch.from_numpy(a * (at - b) + noise[step]).view(10, 15)
        optimizer.step()
        np.testing.assert_allclose(param.detach().numpy().reshape(-1), x, rtol=0, atol=1e-12)


# keep_prob 1, with every schedule

STEPS = 50
DRIVEN = [*SCHEDULES, "ReduceLROnPlateau"]


def train_under(name: str, schedule_name: str, with_dropout: bool):
    """Two groups, the lr driven by a recipe's schedule."""
    params = make_params()
    optimizer = make(name, [{"params": params[:1]}, {"params": params[1:]}])
    if with_dropout:
        LRDropout(optimizer, keep_prob=1.0, seed=5)
    if schedule_name == "ReduceLROnPlateau":
        schedule = Schedule(
            optimizer, section(schedule_name, unit="epoch", patience=1, factor=0.5), STEPS, 5
        )
    else:
        arguments = SCHEDULES[schedule_name][0]
        schedule = Schedule(
            optimizer, section(schedule_name, unit="step", warmup_steps=4, **arguments), STEPS, 5
        )
    lrs = set()
    for step in range(STEPS):
        lrs.add(float(optimizer.param_groups[1]["lr"]))
        give_gradients(params, step)
        optimizer.step()
        schedule.step()
        if step % 5 == 4:
            schedule.end_epoch()
            schedule.end_evaluation({"loss": 1.0 + (step % 3), "accuracy": 0.5})
    return optimizer, params, lrs


@pytest.mark.parametrize("schedule_name", DRIVEN)
@every_optimizer
def test_keep_prob_1_is_the_stock_optimizer_under_every_schedule(name, schedule_name):
    optimizer, params, lrs = train_under(name, schedule_name, with_dropout=True)
    stock, stock_params, stock_lrs = train_under(name, schedule_name, with_dropout=False)
    assert_same_bits(params, stock_params)
    assert_same_state(optimizer, stock)
    assert lrs == stock_lrs
    assert len(lrs) >= 3, "the schedule is to change the lr"


# The control that masks the gradient


def masked_gradient(param: nn.Parameter, step: int, index: int, rescale: bool) -> torch.Tensor:
    keep = mask.keep_mask(param.shape, seed=2, step=step, index=index, keep_prob=0.3)
    masked = torch.where(keep, param.grad, torch.zeros_like(param.grad))
    return masked / mask.effective_keep_prob(0.3) if rescale else masked


@pytest.mark.parametrize("rescale", [False, True])
@every_optimizer
def test_a_masked_gradient_is_the_stock_optimizer_fed_with_masked_gradients(name, rescale):
    params, stock_params = make_params(), make_params()
    optimizer, stock = make(name, params), make(name, stock_params)
    LRDropout(optimizer, keep_prob=0.3, seed=2, masks="gradient", rescale=rescale)
    for step in range(8):
        give_gradients(params, step)
        gradients = [(param.grad, param.grad.clone()) for param in params]
        optimizer.step()
        for index, (param, (gradient, content)) in enumerate(zip(params, gradients, strict=True)):
            assert param.grad is gradient, "the user's own gradient is back after the step"
            assert torch.equal(gradient, content)
            stock_params[index].grad = masked_gradient(param, step, index, rescale)
        stock.step()
        assert_same_bits(params, stock_params)
        assert_same_state(optimizer, stock)


def test_the_gradients_of_a_failed_step_do_not_come_back():
    param = nn.Parameter(torch.ones(50))
    optimizer = lrd.optim.SGD([param], lr=1.0, masks="gradient")

    def fail(*_):
        raise OSError("the step fails")

    handle = optimizer.register_step_pre_hook(fail)
    param.grad = torch.ones(50)
    with pytest.raises(OSError, match="the step fails"):
        optimizer.step()
    handle.remove()
    param.grad = None
    optimizer.step()
    assert param.grad is None, "no gradient of the failed step may come back"


# The control that masks the momentum buffer


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_a_masked_momentum_buffer_equals_the_first_implementations_loop(granularity, weight_decay):
    params, by_hand = make_params(torch.float64), make_params(torch.float64)
    buffers = [torch.zeros_like(param) for param in by_hand]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=weight_decay)
    with pytest.warns(UserWarning, match="momentum_buffer"):
        LRDropout(
            optimizer, keep_prob=0.6, seed=4, granularity=granularity, masks="momentum_buffer"
        )
    for step in range(30):
        give_gradients(params, step)
        with torch.no_grad():
            for index, (p, buf) in enumerate(zip(by_hand, buffers, strict=True)):
                keep = mask.keep_mask(
                    p.shape, seed=4, step=step, index=index, keep_prob=0.6, granularity=granularity
                )
                buf.mul_(0.9).add_(params[index].grad + weight_decay * p)
                buf.mul_(keep)
                p.sub_(0.1 * buf)
        optimizer.step()
        for param, p, buf in zip(params, by_hand, buffers, strict=True):
            torch.testing.assert_close(param, p, rtol=0, atol=1e-12)
            torch.testing.assert_close(
                optimizer.state[param]["momentum_buffer"], buf, rtol=0, atol=1e-12
            )


def mean_steps(masks: str | None, keep_prob: float) -> float:
    """Momentum 0.9, lr 1, gradient 1, 10,000 elements: the mean over the steps 150 ... 199."""
    param = nn.Parameter(torch.zeros(10_000, dtype=torch.float64))
    optimizer = torch.optim.SGD([param], lr=1.0, momentum=0.9)
    if masks is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LRDropout(optimizer, keep_prob=keep_prob, seed=0, masks=masks)
    param.grad = torch.ones_like(param)
    before = values([param])[0]
    for step in range(200):
        if step == 150:
            before = values([param])[0]
        optimizer.step()
    return float((before - param.detach()).mean()) / 50


@pytest.mark.parametrize(
    ("masks", "keep_prob", "mean"),
    [
        (None, 1.0, 10.0),
        ("update", 0.5, 5.0),
        ("update", 0.25, 2.5),
        ("gradient", 0.5, 5.0),
        ("momentum_buffer", 0.5, 0.5 / (1 - 0.5 * 0.9)),
        ("momentum_buffer", 0.25, 0.25 / (1 - 0.25 * 0.9)),
    ],
)
def test_the_mean_step_under_a_constant_gradient_agrees_with_theory(masks, keep_prob, mean):
    """SGD 10, learning rate dropout 5.0, and 0.91 for the masked momentum buffer.

    The last is keep_prob / (1 - keep_prob * momentum).
    """
    assert mean_steps(masks, keep_prob) == pytest.approx(mean, rel=0.01)


def one_parameter(cls: type[torch.optim.Optimizer], **arguments) -> torch.optim.Optimizer:
    return cls([nn.Parameter(torch.zeros(4))], lr=0.1, **arguments)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda: one_parameter(torch.optim.Adam),
        lambda: one_parameter(torch.optim.RMSprop, momentum=0.9),
        lambda: one_parameter(torch.optim.SGD),
        lambda: one_parameter(torch.optim.SGD, momentum=0.9, nesterov=True),
        lambda: torch.optim.SGD(
            [
                {"params": [nn.Parameter(torch.zeros(4))]},
                {"params": [nn.Parameter(torch.zeros(4))], "momentum": 0.0},
            ],
            lr=0.1,
            momentum=0.9,
        ),
    ],
    ids=["Adam", "RMSprop momentum", "SGD", "SGD nesterov", "a group without momentum"],
)
def test_a_masked_momentum_buffer_is_refused_with_the_reason_where_there_is_none(make_optimizer):
    optimizer = make_optimizer()
    keys = set(optimizer.param_groups[0])
    with pytest.raises(
        ValueError, match=r"forgets its history .*0\.91.*SGD with momentum and without Nesterov"
    ):
        LRDropout(optimizer, masks="momentum_buffer")
    assert set(optimizer.param_groups[0]) == keys


def test_a_later_group_without_momentum_is_refused_before_anything_moves():
    with pytest.warns(UserWarning, match="momentum_buffer"):
        optimizer = lrd.optim.SGD(
            [nn.Parameter(torch.zeros(4))], lr=0.1, momentum=0.9, masks="momentum_buffer"
        )
    late = nn.Parameter(torch.zeros(4))
    late.grad = torch.ones(4)

    def add_and_step():
        optimizer.add_param_group({"params": [late], "momentum": 0.0})
        optimizer.step()

    with pytest.raises(ValueError, match="momentum"):
        add_and_step()
    assert not late.any()


@pytest.mark.parametrize(
    "attach",
    [
        lambda params: lrd.optim.SGD(params, lr=0.1, momentum=0.9, masks="momentum_buffer"),
        lambda params: LRDropout(
            torch.optim.SGD(params, lr=0.1, momentum=0.9), masks="momentum_buffer"
        ),
    ],
    ids=["lrd.optim", "LRDropout"],
)
def test_a_masked_momentum_buffer_warns_at_the_users_line(attach):
    with pytest.warns(UserWarning, match="fault of the first public implementation") as caught:
        attach([nn.Parameter(torch.zeros(4))])
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("masks", ["update", "gradient"])
def test_the_other_masks_come_without_a_warning(masks):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LRDropout(one_parameter(torch.optim.SGD, momentum=0.9), masks=masks)


@pytest.mark.parametrize("masks", ["updates", "", "momentum", None])
def test_an_unknown_mask_is_refused_by_name(masks):
    with pytest.raises(ValueError, match="masks must be one of update, gradient, momentum_buffer"):
        LRDropout(one_parameter(torch.optim.SGD, momentum=0.9), masks=masks)


def test_a_rescaled_masked_gradient_has_the_mean_step_of_sgd():
    param = nn.Parameter(torch.zeros(20_000, dtype=torch.float64))
    optimizer = lrd.optim.SGD([param], lr=1.0, keep_prob=0.5, rescale=True, masks="gradient")
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert -float(param.detach().mean()) == pytest.approx(1.0, abs=4 / math.sqrt(20_000))
