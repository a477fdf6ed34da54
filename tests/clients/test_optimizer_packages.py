"""Optimizers of timm, pytorch_optimizer, torchao and schedulefree: masked, or refused by name.

Each is compared bit for bit with itself, masked by hand. `make clients` installs the packages and
runs this.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lrd import LRDropout
from tests.clients.reference import (
    all_params,
    assert_same_bits,
    fraction_equal,
    keep_mask,
    step_by_hand,
    values,
)
from tests.clients.small_training import loss_of, make_model

NEEDED = "`make clients` installs it"
timm_optim = pytest.importorskip("timm.optim", reason=NEEDED)
pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason=NEEDED)
torchao_optim = pytest.importorskip("torchao.optim", reason=NEEDED)
schedulefree = pytest.importorskip("schedulefree", reason=NEEDED)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]

SEED = 3
STEPS = 12

MakeOptimizer = Callable[[nn.Module], Optimizer]


def train(
    make_optimizer: MakeOptimizer,
    *,
    is_by_hand: bool,
    loop: str = "step",
    make_net: Callable[[], nn.Module] = make_model,
) -> tuple[list[Tensor], Optimizer]:
    """Train with LRDropout, or with the stock optimizer and masks by hand.

    Args:
        make_optimizer: makes the stock optimizer of a model.
        is_by_hand: whether the masks are the reference's.
        loop: how the optimizer wants to be used. ``step``: after the backward pass; ``graph``: the
            same, with second derivatives; ``closure``: the step evaluates the gradients again;
            ``loss``: the step asks for the loss only.
        make_net: makes the model.

    Returns:
        The parameters' values after each step, and the optimizer.
    """
    model = make_net()
    optimizer = make_optimizer(model)
    if not is_by_hand:
        LRDropout(optimizer, keep_prob=0.5, seed=SEED)

    history: list[Tensor] = []
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward(create_graph=loop == "graph")
            return loss

        loss = closure()

        # Some optimizers draw random numbers themselves.
        torch.manual_seed(step)
        np.random.seed(step)
        random.seed(step)
        arguments = {"closure": (closure,), "loss": (loss.item,)}.get(loop, ())
        if is_by_hand:
            step_by_hand(
                optimizer,
                step=step,
                seed=SEED,
                take_step=lambda arguments=arguments: optimizer.step(*arguments),
            )
        else:
            optimizer.step(*arguments)
        history += values(list(model.parameters()))

    return history, optimizer


def check(make_optimizer: MakeOptimizer, **how: Any) -> None:
    """LRDropout moves exactly what the optimizer moves, where the reference keeps an element."""
    expected, _ = train(make_optimizer, is_by_hand=True, **how)
    got, optimizer = train(make_optimizer, is_by_hand=False, **how)
    assert_same_bits(got, expected)
    assert all(group["mask_step"] == STEPS for group in optimizer.param_groups)

    start = values(list(how.get("make_net", make_model)().parameters()))
    assert fraction_equal(got[-len(start) :], start) < 0.5, "most elements are to have moved"


# timm

# Not on a CPU: of bitsandbytes and apex, which need CUDA.
TIMM_NEEDS_CUDA = {
    name for name in timm_optim.list_optimizers() if name.startswith(("bnb", "fused"))
}
TIMM_LOOPS = {"adahessian": "graph"}


@pytest.mark.parametrize("name", sorted(set(timm_optim.list_optimizers()) - TIMM_NEEDS_CUDA))
def test_timm(name):
    check(
        lambda model: timm_optim.create_optimizer_v2(model, opt=name, lr=0.01),
        loop=TIMM_LOOPS.get(name, "step"),
    )


def test_what_is_left_out_of_timm_needs_cuda():
    for name in sorted(TIMM_NEEDS_CUDA):
        with pytest.raises(AssertionError, match="CUDA required"):
            timm_optim.create_optimizer_v2(make_model(), opt=name, lr=0.01)


# pytorch_optimizer


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices for Muon, vectors for the Adam beside it."""
    params = list(model.parameters())
    return [
        {"params": [param for param in params if param.dim() == 2], "use_muon": True},
        {"params": [param for param in params if param.dim() == 1], "use_muon": False},
    ]


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.dim() == 2]


# Name -> what the optimizer takes instead of the parameters, and further arguments.
SPECIAL_ARGUMENTS: dict[str, tuple[Callable[[nn.Module], Any], dict[str, Any]]] = {
    "adago": (muon_groups, {}),
    "adammini": (lambda model: model, {"num_embeds": 12, "num_heads": 2}),
    "adamuon": (muon_groups, {}),
    "alig": (lambda model: model.parameters(), {"max_lr": 0.1}),
    "bsam": (lambda model: model.parameters(), {"num_data": 8}),
    "dadaptsgd": (lambda model: model.parameters(), {"lr": 1e4}),
    "distributedmuon": (muon_groups, {}),
    "muon": (muon_groups, {}),
    "muonclip": (muon_groups, {}),
    "normuon": (muon_groups, {}),
    "ranger21": (lambda model: model.parameters(), {"num_iterations": 10}),
    "sara": (lambda model: model.parameters(), {"threshold": 1.0}),
    "spectralsphere": (matrices, {}),
}
LOOPS = {
    "adahessian": "graph",
    "alig": "loss",
    "bsam": "closure",
    "sophiah": "graph",
}
# Refused: name -> what the refusal has to contain.
REFUSED = {
    "adalomo": "AdaLOMO",
    "lbfgs": "LBFGS",
    "lomo": "LOMO",
    "magma": "Magma",
}
TAKES_A_MODEL = ("adalomo", "lomo")
# Tested by themselves, because more than the parameters is masked.
SCHEDULE_FREE = {"schedulefreeadamw", "schedulefreeradam", "schedulefreesgd"}
NOT_TRIED = {"demo": "needs einops and ranks"}


def make_of_pytorch_optimizer(name: str) -> MakeOptimizer:
    cls = pytorch_optimizer.load_optimizer(name)
    parameters, arguments = SPECIAL_ARGUMENTS.get(name, (lambda model: model.parameters(), {}))
    if "lr" not in arguments and name != "alig":
        arguments = {"lr": 0.01, **arguments}
    return lambda model: cls(parameters(model), **arguments)


@pytest.fixture
def process_group(tmp_path):
    """For an optimizer that shares its work with other ranks: of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "name",
    sorted(
        set(pytorch_optimizer.get_supported_optimizers())
        - REFUSED.keys()
        - SCHEDULE_FREE
        - NOT_TRIED.keys()
    ),
)
def test_pytorch_optimizer(name):
    check(make_of_pytorch_optimizer(name), loop=LOOPS.get(name, "step"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_of_pytorch_optimizer_is_named_and_left_as_it_was(name):
    model = make_model()
    cls = pytorch_optimizer.load_optimizer(name)
    optimizer = cls(model if name in TAKES_A_MODEL else model.parameters(), lr=0.01)
    keys = sorted(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=REFUSED[name]):
        LRDropout(optimizer)
    assert sorted(optimizer.param_groups[0]) == keys
    assert not hasattr(optimizer, "_lr_dropout")


# Wrappers around an optimizer


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


WRAPPERS: dict[str, MakeOptimizer] = {
    "pytorch_optimizer.Lookahead": lambda model: pytorch_optimizer.Lookahead(sgd(model)),
    "pytorch_optimizer.PCGrad": lambda model: pytorch_optimizer.PCGrad(sgd(model)),
    "pytorch_optimizer.ScheduleFreeWrapper": lambda model: pytorch_optimizer.ScheduleFreeWrapper(
        sgd(model)
    ),
    "pytorch_optimizer.TRAC": lambda model: pytorch_optimizer.TRAC(sgd(model)),
    "schedulefree.ScheduleFreeWrapper": lambda model: schedulefree.ScheduleFreeWrapper(sgd(model)),
    "timm.Lookahead": lambda model: timm_optim.Lookahead(sgd(model)),
}


@pytest.mark.parametrize("has_stepped", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_whose_step_runs_no_hooks_is_refused(name, has_stepped):
    """Also after steps, when torch may have made its `step` run the hooks that it has not."""
    model = make_model()
    wrapper = WRAPPERS[name](model)
    inner = next(value for value in vars(wrapper).values() if isinstance(value, Optimizer))
    if has_stepped:
        if hasattr(wrapper, "train"):
            wrapper.train()
        for step in range(2):
            wrapper.zero_grad()
            loss_of(model, step).backward()
            wrapper.step()

    before = values(list(model.parameters()))
    keys = sorted(wrapper.param_groups[0])
    attributes = sorted(vars(wrapper))
    with pytest.raises((TypeError, ValueError), match=name.partition(".")[2]):
        LRDropout(wrapper)
    assert_same_bits(list(model.parameters()), before)
    assert sorted(wrapper.param_groups[0]) == keys
    assert sorted(vars(wrapper)) == attributes

    # The optimizer inside can take it: a second try is not taken for one that succeeded.
    LRDropout(inner)
    wrapper.zero_grad()
    loss_of(model, 3).backward()
    inner.step()
    moved = 1 - fraction_equal(list(model.parameters()), before)
    assert 0.3 < moved < 0.7


def test_orthograd_is_masked_at_the_optimizer_inside():
    def make(model):
        return pytorch_optimizer.OrthoGrad(sgd(model))

    expected, _ = train(make, is_by_hand=True)
    model = make_model()
    wrapper = make(model)
    with pytest.warns(UserWarning, match="SGD inside the OrthoGrad"):
        LRDropout(wrapper, keep_prob=0.5, seed=SEED)
    for step in range(STEPS):
        wrapper.zero_grad()
        loss_of(model, step).backward()
        wrapper.step()
    assert_same_bits(list(model.parameters()), expected[-4:])


@pytest.mark.parametrize("name", ["timm.Lookahead", "pytorch_optimizer.Lookahead"])
def test_lookahead_around_a_masked_optimizer(name):
    """Its own moves, in every fifth or sixth step, are not masked: this is documented."""
    model = make_model()
    wrapper = WRAPPERS[name](model)
    inner = next(value for value in vars(wrapper).values() if isinstance(value, Optimizer))
    LRDropout(inner, keep_prob=0.5, seed=SEED)
    by_hand_model = make_model()
    by_hand = sgd(by_hand_model)
    for step in range(4):
        wrapper.zero_grad()
        loss_of(model, step).backward()
        wrapper.step()
        by_hand.zero_grad()
        loss_of(by_hand_model, step).backward()
        step_by_hand(by_hand, step=step, seed=SEED)
    assert_same_bits(list(model.parameters()), list(by_hand_model.parameters()))


SAM_CLASSES: dict[str, MakeOptimizer] = {
    "SAM": lambda model: pytorch_optimizer.SAM(model.parameters(), torch.optim.SGD, lr=0.1),
    "WSAM": lambda model: pytorch_optimizer.WSAM(
        model, model.parameters(), torch.optim.SGD, lr=0.1
    ),
    "LookSAM": lambda model: pytorch_optimizer.LookSAM(model.parameters(), torch.optim.SGD, lr=0.1),
    "FriendlySAM": lambda model: pytorch_optimizer.FriendlySAM(
        model.parameters(), torch.optim.SGD, lr=0.1
    ),
}


@pytest.mark.parametrize("name", SAM_CLASSES)
def test_sam_by_closure(name):
    check(SAM_CLASSES[name], loop="closure")


@pytest.mark.parametrize("name", ["SAM", "FriendlySAM"])
def test_sam_by_two_steps_with_lr_dropout_on_the_optimizer_inside(name):
    """The masks and moves are those of `step(closure)`."""
    model = make_model()
    sam = SAM_CLASSES[name](model)
    LRDropout(sam.base_optimizer, keep_prob=0.5, seed=SEED)
    history = []
    for step in range(STEPS):
        for take_step in (sam.first_step, sam.second_step):
            sam.zero_grad()
            loss_of(model, step).backward()
            take_step(zero_grad=True)
        history += values(list(model.parameters()))
    expected, _ = train(SAM_CLASSES[name], is_by_hand=True, loop="closure")
    assert_same_bits(history, expected)


# torchao's optimizers with quantized states

TORCHAO = ["Adam4bit", "Adam8bit", "AdamFp8", "AdamW4bit", "AdamW8bit", "AdamWFp8"]


def make_wide_model() -> nn.Module:
    """Large enough for states to be quantized: from 4,096 elements on."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 512), nn.ReLU(), nn.Linear(512, 4))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", TORCHAO)
def test_torchao(name, rounding):
    is_stochastic = rounding == "stochastic"

    def make(model):
        if is_stochastic:
            model.to(torch.bfloat16)
        cls = getattr(torchao_optim, name)
        return cls(model.parameters(), lr=0.01, bf16_stochastic_round=is_stochastic)

    def make_net():
        model = make_wide_model()
        if is_stochastic:
            model.register_forward_pre_hook(lambda _, inputs: inputs[0].to(torch.bfloat16))
        return model

    # torchao compiles its step; uncompiled it computes the same within a few seconds.
    with torch.compiler.set_stance("force_eager"):
        expected, stock = train(make, is_by_hand=True, make_net=make_net)
        got, _ = train(make, is_by_hand=False, make_net=make_net)
    assert_same_bits(got, expected)

    state = stock.state[all_params(stock)[0]]
    assert type(state["exp_avg"]) is not Tensor, "the states are to be quantized"


# Schedule-free optimizers (Defazio et al., arXiv 2405.15682)

SCHEDULE_FREE_CLASSES: dict[str, MakeOptimizer] = {
    name: (lambda model, cls=cls, more=more: cls(model.parameters(), lr=0.1, **more))
    for name, cls, more in [
        ("SGDScheduleFree", schedulefree.SGDScheduleFree, {"weight_decay": 0.01}),
        ("AdamWScheduleFree", schedulefree.AdamWScheduleFree, {}),
        ("RAdamScheduleFree", schedulefree.RAdamScheduleFree, {}),
        ("SGDScheduleFreeReference", schedulefree.SGDScheduleFreeReference, {}),
        ("AdamWScheduleFreeReference", schedulefree.AdamWScheduleFreeReference, {}),
        ("SGDScheduleFreeClosure", schedulefree.SGDScheduleFreeClosure, {}),
        ("AdamWScheduleFreeClosure", schedulefree.AdamWScheduleFreeClosure, {}),
        ("RAdamScheduleFreeClosure", schedulefree.RAdamScheduleFreeClosure, {}),
        ("ScheduleFreeSGD", pytorch_optimizer.ScheduleFreeSGD, {}),
        ("ScheduleFreeAdamW", pytorch_optimizer.ScheduleFreeAdamW, {}),
        ("ScheduleFreeRAdam", pytorch_optimizer.ScheduleFreeRAdam, {}),
    ]
}
COPIES_OF_PARAMETERS = ("z", "x", "y")


def copies(optimizer: Optimizer) -> list[Tensor]:
    """The parameters and the states that are copies of them; a copy begins as its parameter."""
    tensors = []
    for param in all_params(optimizer):
        state = optimizer.state.get(param, {})
        tensors += [param, *(state.get(key, param) for key in COPIES_OF_PARAMETERS)]
    return tensors


@torch.no_grad()
def schedule_free_step_by_hand(
    optimizer: Optimizer, step: int, take_step: Callable[[], Any], rescale: bool
) -> None:
    """In dropped elements everything stays: the parameter, z, and with them the average x."""
    old_values = values(copies(optimizer))
    n_copies = 1 + len(COPIES_OF_PARAMETERS)
    take_step()

    new_tensors = copies(optimizer)
    for number, (new, old) in enumerate(zip(new_tensors, old_values, strict=True)):
        index = number // n_copies
        param = new_tensors[index * n_copies]
        if number % n_copies and new is param:  # the optimizer has no such copy
            continue

        if rescale:
            new.sub_(old).div_(0.5).add_(old)
        keep = keep_mask(new, seed=SEED, step=step, index=index, keep_prob=0.5)
        new.copy_(torch.where(keep, new, old))


def train_schedule_free(
    name: str, *, is_by_hand: bool, rescale: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Train with an evaluation between the epochs.

    Returns:
        The parameters that were evaluated, x, and those that are trained, after each epoch.
    """
    model = make_model()
    optimizer = SCHEDULE_FREE_CLASSES[name](model)
    if not is_by_hand:
        LRDropout(optimizer, keep_prob=0.5, seed=SEED, rescale=rescale)

    has_modes = hasattr(optimizer, "train")
    evaluated: list[Tensor] = []
    trained: list[Tensor] = []
    for step in range(9):
        if has_modes:
            optimizer.train()

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        arguments = ()
        if "Closure" in name:
            arguments = (closure,)
        else:
            closure()

        if is_by_hand:
            schedule_free_step_by_hand(
                optimizer, step, lambda arguments=arguments: optimizer.step(*arguments), rescale
            )
        else:
            optimizer.step(*arguments)

        if step % 3 == 2:
            trained += values(list(model.parameters()))
            if has_modes:
                optimizer.eval()
            evaluated += values(list(model.parameters()))

    return evaluated, trained


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", SCHEDULE_FREE_CLASSES)
def test_schedule_free(name, rescale):
    evaluated, trained = train_schedule_free(name, is_by_hand=False, rescale=rescale)
    expected_evaluated, expected_trained = train_schedule_free(
        name, is_by_hand=True, rescale=rescale
    )
    assert_same_bits(trained, expected_trained)
    assert_same_bits(evaluated, expected_evaluated)


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "ScheduleFreeSGD"])
def test_what_is_evaluated_of_a_schedule_free_optimizer_stays_in_elements_never_kept(name):
    """Up to the rounding with which the optimizer changes between x and y."""
    evaluated, _ = train_schedule_free(name, is_by_hand=False)
    for index, (param, start) in enumerate(
        zip(evaluated[:4], values(list(make_model().parameters())), strict=True)
    ):
        never_kept = torch.ones(param.shape, dtype=torch.bool)
        for step in range(3):
            never_kept &= ~keep_mask(param, seed=SEED, step=step, index=index, keep_prob=0.5)
        torch.testing.assert_close(param[never_kept], start[never_kept], rtol=0, atol=1e-6)
        assert not torch.isclose(param[~never_kept], start[~never_kept], rtol=0, atol=1e-6).all()


@pytest.mark.parametrize("name", ["AdamWScheduleFreePaper"])
def test_a_schedule_free_optimizer_whose_copies_are_not_known_is_refused(name):
    optimizer = getattr(schedulefree, name)(make_model().parameters(), lr=0.1)
    with contextlib.suppress(AttributeError):
        optimizer.train()
    with pytest.raises(ValueError, match=name):
        LRDropout(optimizer)
