"""Optimizers around other optimizers: Accelerate's, SAM, and those that must be refused."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.algorithms.model_averaging import averagers
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.optim import Optimizer

import lrd
from lrd import LRDropout
from lrd.optim.dropout import get_lr_dropout
from tests.clients.reference import assert_same_bits, masked_by_hand, step_by_hand, values
from tests.clients.small_training import loss_of, make_model, train

SGD = {"lr": 0.1, "momentum": 0.9}


def train_by_hand(steps, *, seed, keep_prob=0.5):
    model = make_model()
    cls = masked_by_hand(torch.optim.SGD, keep_prob=keep_prob, seed=seed)
    return train(model, cls(model.parameters(), **SGD), steps)


# Accelerate


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("attach_to", ["before prepare", "the wrapper", "the optimizer inside"])
def test_accelerate(attach_to, accelerator):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    if attach_to == "before prepare":
        LRDropout(optimizer, seed=4)

    prepared_model, prepared = accelerator.prepare(model, optimizer)
    if attach_to == "the optimizer inside":
        LRDropout(prepared.optimizer, seed=4)
    elif attach_to == "the wrapper":
        with pytest.warns(UserWarning, match="SGD inside the AcceleratedOptimizer"):
            dropout = LRDropout(prepared, seed=4)
        assert dropout.optimizer is optimizer

    for step in range(4):
        prepared.zero_grad()
        accelerator.backward(loss_of(prepared_model, step))
        accelerator.clip_grad_norm_(prepared_model.parameters(), 100.0)
        prepared.step()

    assert_same_bits(values(list(model.parameters())), train_by_hand(range(4), seed=4))


def test_accelerate_saves_and_loads_the_position_of_the_masks(accelerator, tmp_path):
    model = make_model()
    optimizer = lrd.optim.SGD(model.parameters(), **SGD, seed=4)
    prepared_model, prepared = accelerator.prepare(model, optimizer)
    train(prepared_model, prepared, range(3))
    accelerator.save_state(str(tmp_path))
    train(prepared_model, prepared, range(3, 5))

    accelerator.load_state(str(tmp_path))
    params = train(prepared_model, prepared, range(3, 6))
    assert_same_bits(params, train_by_hand(range(6), seed=4))


# SAM, as in the implementation that most projects copy (github.com/davda54/sam)


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al., arXiv 2010.01412)."""

    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


def train_by_closure(model, sam, steps, take_step=None):
    for step in steps:

        def closure(step=step):
            sam.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        closure()
        if take_step is None:
            sam.step(closure)
        else:
            take_step(step, closure)
    return values(list(model.parameters()))


def train_by_two_steps(model, sam, steps):
    for step in steps:
        sam.zero_grad()
        loss_of(model, step).backward()
        sam.first_step(zero_grad=True)
        loss_of(model, step).backward()
        sam.second_step(zero_grad=True)
    return values(list(model.parameters()))


def sam_by_hand(steps, *, seed):
    """The step of SAM as a whole, masked by hand."""
    model = make_model()
    sam = SAM(model.parameters(), torch.optim.SGD, **SGD)

    def take_step(step, closure):
        step_by_hand(sam, step=step, seed=seed, take_step=lambda: sam.step(closure))

    return train_by_closure(model, sam, steps, take_step)


@pytest.fixture
def no_warning_was_given(monkeypatch):
    """As in a new process: warnings are given once in each."""
    monkeypatch.setattr("lrd.optim.step_watch._warnings_given", set())


def test_sam_by_closure():
    model = make_model()
    sam = SAM(model.parameters(), torch.optim.SGD, **SGD)
    LRDropout(sam, seed=6)
    assert_same_bits(train_by_closure(model, sam, range(4)), sam_by_hand(range(4), seed=6))


@pytest.mark.parametrize("train_sam", [train_by_closure, train_by_two_steps])
def test_sam_with_lr_dropout_on_the_optimizer_inside(train_sam, recwarn):
    """Both ways to step are masked, and the masks are the same."""
    model = make_model()
    sam = SAM(model.parameters(), torch.optim.SGD, **SGD)
    LRDropout(sam.base_optimizer, seed=6)
    assert_same_bits(train_sam(model, sam, range(4)), sam_by_hand(range(4), seed=6))
    assert not [warning for warning in recwarn if "no mask was drawn" in str(warning.message)]


@pytest.mark.usefixtures("no_warning_was_given")
def test_steps_that_go_around_the_masks_are_warned_of_once(recwarn):
    model = make_model()
    sam = SAM(model.parameters(), torch.optim.SGD, **SGD)
    LRDropout(sam, seed=6)
    train_by_two_steps(model, sam, range(4))
    messages = [
        str(warning.message) for warning in recwarn if "no mask was drawn" in str(warning.message)
    ]
    assert len(messages) == 1
    assert "closure" in messages[0]
    assert "base_optimizer" in messages[0]


@pytest.mark.usefixtures("no_warning_was_given")
def test_a_step_by_hand_that_goes_around_an_optimizer_is_warned_of(recwarn):
    """No optimizer inside: the class moves the parameters itself."""

    class TwoSteps(torch.optim.SGD):
        @torch.no_grad()
        def first_step(self):
            for param in self.param_groups[0]["params"]:
                param.add_(param.grad, alpha=0.05)

        @torch.no_grad()
        def second_step(self):
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad, alpha=0.15)

    model = make_model()
    optimizer = TwoSteps(model.parameters(), lr=0.1)
    LRDropout(optimizer)
    for step in range(4):
        train_by_two_steps_without_arguments(model, optimizer, step)
        optimizer.state_dict()  # as a checkpoint of each epoch asks for it
    assert [w for w in recwarn if "no mask was drawn" in str(w.message)]


def train_by_two_steps_without_arguments(model, optimizer, step):
    for take_step in (optimizer.first_step, optimizer.second_step):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        take_step()


@pytest.mark.usefixtures("no_warning_was_given")
def test_weights_that_are_loaded_or_averaged_bring_no_warning(recwarn):
    model = make_model()
    weights = make_model().state_dict()
    optimizer = lrd.optim.SGD(model.parameters(), **SGD)
    model.load_state_dict(weights)
    for step in range(3):
        train(model, optimizer, [step])
        model.load_state_dict(weights)
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(model.parameters()) * 0.5, model.parameters()
        )
        optimizer.state_dict()
    assert not [warning for warning in recwarn if "no mask was drawn" in str(warning.message)]


# Wrappers that are refused


class SlowWeights(Optimizer):
    """As timm's Lookahead is made: without ``Optimizer.__init__``."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.defaults = optimizer.defaults
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Holder:
    """Not an optimizer at all, but with the methods of one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.defaults = optimizer.defaults

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        return self.optimizer.step()


def everything(optimizer):
    """What LRDropout may change in an optimizer."""
    return {
        "attributes": sorted(vars(optimizer)),
        "defaults": dict(optimizer.defaults),
        "groups": [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ],
        "hooks": [
            list(hooks)
            for name, hooks in sorted(vars(optimizer).items())
            if name.endswith("_hooks")
        ],
    }


@pytest.mark.parametrize(
    ("wrapper", "error"), [(SlowWeights, ValueError), (Holder, (TypeError, ValueError))]
)
def test_a_wrapper_whose_step_runs_no_hooks_is_refused_by_name_and_left_as_it_was(wrapper, error):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    wrapped = wrapper(optimizer)
    before = everything(optimizer)
    before_wrapped = sorted(vars(wrapped))

    with pytest.raises(error, match=wrapper.__name__):
        LRDropout(wrapped, seed=4)

    assert everything(optimizer) == before
    assert sorted(vars(wrapped)) == before_wrapped
    assert get_lr_dropout(optimizer) is None

    # The optimizer inside can still be masked, and the wrapper steps it.
    LRDropout(optimizer, seed=4)
    assert_same_bits(train(model, wrapped, range(4)), train_by_hand(range(4), seed=4))


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep_prob": 0.0},
        {"seed": -1},
        {"granularity": "block"},
        {"masks": "updates"},
        {"masks": "momentum_buffer"},
        {"first_index": -1},
        {"index_by": "hash"},
        {"index_by": "name"},
    ],
    ids=str,
)
def test_an_attachment_that_fails_leaves_nothing_behind(arguments):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"\w"):
        LRDropout(optimizer, **arguments)
    assert everything(optimizer) == before

    train(model, optimizer, range(2))
    stock_model = make_model()
    stock = torch.optim.SGD(stock_model.parameters(), lr=0.1)
    assert_same_bits(list(model.parameters()), train(stock_model, stock, range(2)))


# Shards, on one rank; test_ranks.py has two


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_parameters_of_fsdp1_are_refused_before_anything_moves(use_orig_params):
    model = FullyShardedDataParallel(
        make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    before = everything(optimizer)
    with pytest.raises(ValueError, match="FSDP2"):
        LRDropout(optimizer)
    assert everything(optimizer) == before


@pytest.mark.usefixtures("process_group")
def test_post_local_sgd_is_refused_by_name():
    """It averages the parameters of the ranks after the step of the optimizer inside."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    averager = averagers.PeriodicModelAverager(period=2, warmup_steps=0)
    wrapper = PostLocalSGDOptimizer(optimizer, averager)
    before = everything(optimizer)
    with pytest.raises(ValueError, match="PostLocalSGDOptimizer"):
        LRDropout(wrapper)
    assert everything(optimizer) == before


@pytest.mark.usefixtures("process_group")
def test_zero_with_optimizers_of_lrd_is_refused():
    """They would count only their own parameters."""
    with pytest.raises(ValueError, match=r"LRDropout\(ZeroRedundancyOptimizer\("):
        ZeroRedundancyOptimizer(make_model().parameters(), optimizer_class=lrd.optim.SGD, lr=0.1)

    optimizer = ZeroRedundancyOptimizer(
        make_model().parameters(), optimizer_class=torch.optim.SGD, lr=0.1
    )
    LRDropout(optimizer)
    assert optimizer.param_groups[0]["keep_prob"] == 0.5
