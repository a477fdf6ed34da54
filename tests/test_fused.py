"""The masked step in one pass: the bits of the optimizer's own step with dropped elements put back."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrd import LRDropout, fused
from lrd import optim as masked

SIZES = [(1,), (31,), (255,), (257,), (4, 3, 3, 3), (), (70_000,)]  # the last is more than one thread's chunk
SGD = [
    {},
    {"momentum": 0.9, "weight_decay": 5e-4},
    {"momentum": 0.9, "dampening": 0.2, "maximize": True},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "foreach": True},
]
ADAM = [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95)}, {"maximize": True, "eps": 1e-3, "foreach": True}]
CASES = [
    *((torch.optim.SGD, {"lr": 0.1, **options}) for options in SGD),
    *((cls, {"lr": 0.01, **options}) for cls in (torch.optim.Adam, torch.optim.AdamW) for options in ADAM),
]


@pytest.fixture(autouse=True)
def small_groups_too(monkeypatch):
    monkeypatch.setenv("LRD_FUSED", "1")


def make(cls: Any, options: dict[str, Any], can_fuse: bool = True, **dropout: Any) -> tuple[Optimizer, LRDropout]:
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]
    optimizer = cls(params, **options)
    attached = LRDropout(optimizer, **dropout)
    attached._can_fuse = can_fuse
    return optimizer, attached


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def train(optimizer: Optimizer, steps: int = 3, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for param in params_of(optimizer):
            param.grad = torch.randn(param.shape, generator=generator) * scale
        optimizer.step()


def assert_same(one: Optimizer, other: Optimizer) -> None:
    for ours, theirs in zip(params_of(one), params_of(other), strict=True):
        assert torch.equal(ours.detach().view(torch.int32), theirs.detach().view(torch.int32))
        assert one.state.get(ours, {}).keys() == other.state.get(theirs, {}).keys()
        for key, value in one.state.get(ours, {}).items():
            assert torch.equal(value, other.state[theirs][key]), key
    assert str(one.state_dict()["param_groups"]) == str(other.state_dict()["param_groups"])


@pytest.mark.parametrize(("cls", "options"), CASES)
@pytest.mark.parametrize("dropout", [
    {"keep_prob": 0.5},
    {"keep_prob": 0.75, "seed": (1 << 64) - 1, "rescale": True},
    {"keep_prob": 0.9},
    {"keep_prob": 1e-5, "rescale": True},
    {"keep_prob": 1 - 2**-16},
])  # fmt: skip
def test_one_pass_gives_the_bits_of_a_step_and_putting_back(cls, options, dropout):
    ours, fast = make(cls, options, **dropout)
    theirs, slow = make(cls, options, can_fuse=False, **dropout)
    train(ours)
    train(theirs)
    assert (fast.is_fused, slow.is_fused) == (True, False)
    assert fast._before == {}
    assert_same(ours, theirs)
    assert fast.kept_fractions() == slow.kept_fractions()
    assert [fast.keeps(6, i) for i in range(99)] == [slow.keeps(6, i) for i in range(99)]


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("scale", [1e-42, 1e30, float("inf")])
def test_numbers_out_of_the_ordinary_come_out_the_same(cls, scale):
    options = {"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9} if cls is torch.optim.SGD else {})
    ours, _ = make(cls, options)
    theirs, _ = make(cls, options, can_fuse=False)
    train(ours, scale=scale)
    train(theirs, scale=scale)
    for one, other in zip(params_of(ours), params_of(theirs), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
        assert torch.equal(one.isnan(), other.isnan())


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_the_number_of_threads_does_not_matter(cls):
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        optimizer, dropout = make(cls, {"lr": 0.1}, keep_prob=0.9)
        train(optimizer)
        assert dropout.is_fused
        results.append(optimizer)
    torch.set_num_threads(before)
    assert_same(*results)


def test_a_step_far_on_and_a_large_index_draw_their_own_masks():
    moved = []
    for can_fuse in (True, False):
        optimizer, _ = make(torch.optim.SGD, {"lr": 0.1}, can_fuse=can_fuse)
        optimizer.param_groups[0]["mask_step"] = (1 << 33) + 5
        train(optimizer, steps=1)
        moved.append(optimizer)
    assert_same(*moved)


def test_the_classes_of_lrd_are_taken_over_too():
    params = [nn.Parameter(torch.ones(300))]
    optimizer = masked.AdamW(params, keep_prob=0.5)
    train(optimizer)
    assert optimizer._lr_dropout.is_fused


def several_groups(can_fuse: bool, **fourth: Any) -> tuple[Optimizer, LRDropout]:
    """One masked, one stock, one without gradients, one of its own."""
    params = [nn.Parameter(torch.linspace(-1, 1, 600).view(20, 30)) for _ in range(4)]
    groups: list[dict[str, Any]] = [{"params": [param]} for param in params]
    groups[1] |= {"keep_prob": 1.0}
    groups[3] |= {"lr": 0.3, **fourth}
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    dropout = LRDropout(optimizer, keep_prob=0.5, rescale=True)
    dropout._can_fuse = can_fuse
    for step in range(3):
        for i in (0, 1, 3):
            params[i].grad = torch.full((20, 30), 0.1 * (step + 1))
        optimizer.step()
    return optimizer, dropout


@pytest.mark.parametrize(
    ("fourth", "is_fused"), [({"keep_prob": 0.9}, True), ({"mask_granularity": "row"}, False), ({"lr": 0.0}, False)]
)
def test_groups_are_taken_over_together_or_not_at_all(fourth, is_fused):
    (ours, fast), (theirs, slow) = several_groups(True, **fourth), several_groups(False, **fourth)
    assert (fast.is_fused, slow.is_fused) == (is_fused, False)
    assert_same(ours, theirs)
    assert fast.kept_fractions() == slow.kept_fractions()


def test_a_step_that_torch_refuses_moves_nothing():
    params = [nn.Parameter(torch.ones(300)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "keep_prob": 1.0, "lr": 1e39}], lr=0.1)
    LRDropout(optimizer)
    own = [torch.ones(300) for _ in params]
    for param, grad in zip(params, own, strict=True):
        param.grad = grad
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params, own, strict=True))
    assert bool((params[1] == 1).all())


def test_a_few_elements_are_not_worth_a_compiler(monkeypatch):
    monkeypatch.delenv("LRD_FUSED")
    for count, expected in (((1 << 18) - 1, False), (1 << 18, True)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(count))], lr=0.1)
        dropout = LRDropout(optimizer)
        train(optimizer, steps=1)
        assert dropout.is_fused == expected


def test_gradients_are_there_again_after_the_step():
    optimizer, _ = make(torch.optim.SGD, {"lr": 0.1})
    for param in params_of(optimizer):
        param.grad = torch.ones_like(param)
    own = [param.grad for param in params_of(optimizer)]
    optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params_of(optimizer), own, strict=True))
    assert all(bool((grad == 1).all()) for grad in own)


def step_with(optimizer: Optimizer) -> LRDropout:
    train(optimizer, steps=1)
    return optimizer._lr_dropout


REFUSED = {
    "fused": (torch.optim.SGD, {"lr": 0.1, "fused": True}, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}, {}),
    "beta1": (torch.optim.Adam, {"betas": (0.3, 0.9)}, {}),
    "lr tensor": (torch.optim.SGD, {"lr": torch.tensor(0.1)}, {}),
    "lr 0": (torch.optim.SGD, {"lr": 0.0}, {}),
    "another optimizer": (torch.optim.RMSprop, {}, {}),
    "granularity": (torch.optim.SGD, {"lr": 0.1}, {"granularity": "row"}),
    "masked gradient": (torch.optim.SGD, {"lr": 0.1}, {"masks": "gradient"}),
    "no mask": (torch.optim.SGD, {"lr": 0.1}, {"keep_prob": 1.0}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_do_not_know_is_left_to_the_optimizer(name):
    cls, options, dropout = REFUSED[name]
    optimizer, attached = make(cls, options, **dropout)
    train(optimizer, steps=2)
    assert attached.is_fused is False


@pytest.mark.parametrize("param", [torch.ones(9, dtype=torch.float64), torch.ones(9, dtype=torch.complex64)])
def test_other_dtypes_are_left_to_the_optimizer(param):
    optimizer = torch.optim.SGD([nn.Parameter(param)], lr=0.1)
    dropout = LRDropout(optimizer)
    optimizer.param_groups[0]["params"][0].grad = torch.ones_like(param)
    optimizer.step()
    assert dropout.is_fused is False


def test_a_parameter_in_another_memory_order_is_left_to_the_optimizer():
    param = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([param], lr=0.1)
    dropout = LRDropout(optimizer)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert dropout.is_fused is False


def test_a_step_whose_subclass_is_somebody_elses_is_left_to_it():
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            for param in params_of(self):
                param.data.add_(1.0)

    optimizer, dropout = make(Own, {"lr": 0.1}, keep_prob=0.5)
    before = params_of(optimizer)[-1].detach().clone()
    train(optimizer, steps=1)
    difference = params_of(optimizer)[-1].detach() - before
    assert dropout.is_fused is False
    assert 0.4 < difference.mean().item() < 0.6


def test_a_closure_and_other_hooks_are_left_to_the_optimizer():
    optimizer, dropout = make(torch.optim.SGD, {"lr": 0.1})
    train(optimizer, steps=1)
    assert dropout.is_fused
    optimizer.step(lambda: torch.zeros(()))
    assert dropout.is_fused is False
    handle = optimizer.register_step_pre_hook(lambda *_: None)  # after ours: it may change the gradients
    train(optimizer, steps=1)
    assert dropout.is_fused is False
    handle.remove()
    train(optimizer, steps=1)
    assert dropout.is_fused


def test_a_hook_that_changes_gradients_before_ours_is_obeyed():
    def double(optimizer, *_):
        optimizer.param_groups[0]["params"][0].grad.mul_(2.0)

    results = []
    for can_fuse in (True, False):
        param = nn.Parameter(torch.zeros(500))
        optimizer = torch.optim.SGD([param], lr=1.0)
        optimizer.register_step_pre_hook(double)
        dropout = LRDropout(optimizer)
        dropout._can_fuse = can_fuse
        param.grad = torch.ones(500)
        optimizer.step()
        assert dropout.is_fused == can_fuse
        results.append(param)
    assert torch.equal(*results)
    assert set(results[0].tolist()) == {0.0, -2.0}


def test_kernels_that_are_wrong_are_not_trusted(monkeypatch):
    fused.is_trusted.cache_clear()
    right = fused._ROWS[torch.optim.SGD]
    monkeypatch.setitem(fused._ROWS, torch.optim.SGD, lambda *given: (*right(*given)[:2], -0.5, *right(*given)[3:]))
    assert not fused.is_trusted(torch.optim.SGD, torch.device("cpu"))
    fused.is_trusted.cache_clear()


def test_a_compiler_that_fails_is_said_once_and_training_goes_on(monkeypatch):
    fused.is_trusted.cache_clear()

    def fail(*_):
        raise RuntimeError("LLVM does not know this processor\nand more")

    monkeypatch.setattr(fused._module("cpu"), "step", fail)
    optimizer, dropout = make(torch.optim.SGD, {"lr": 0.1})
    with pytest.warns(UserWarning, match="LLVM does not know this processor") as said:
        train(optimizer)
    fused.is_trusted.cache_clear()
    assert (len(said), dropout.is_fused) == (1, False)
    monkeypatch.undo()
    theirs, _ = make(torch.optim.SGD, {"lr": 0.1})
    train(theirs)
    assert_same(optimizer, theirs)


def test_where_nothing_can_be_kept_on_disk_it_compiles_all_the_same(tmp_path):
    """A container whose folders are read-only: Numba finds no place for its cache."""
    code = (
        "import torch, lrd, numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "param = torch.nn.Parameter(torch.ones(300)); param.grad = torch.ones(300)\n"
        "optimizer = torch.optim.SGD([param], lr=0.1); dropout = lrd.LRDropout(optimizer)\n"
        "optimizer.step(); print(dropout.is_fused)"
    )
    ended = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.stdout.strip(), ended.returncode) == ("True", 0), ended.stderr


@pytest.mark.parametrize("how", ["switched off", "no Numba"])
def test_without_a_compiler_the_bits_are_the_same(how):
    code = (
        "import sys; sys.modules['numba'] = None if sys.argv[1] == 'no Numba' else sys\n"
        "import hashlib, torch, lrd\n"
        "param = torch.nn.Parameter(torch.linspace(-1, 1, 3000)); param.grad = torch.full((3000,), 0.1)\n"
        "optimizer = torch.optim.AdamW([param], lr=0.1); dropout = lrd.LRDropout(optimizer)\n"
        "for _ in range(3): optimizer.step()\n"
        "print(dropout.is_fused, hashlib.sha256(param.detach().numpy().tobytes()).hexdigest())"
    )
    environment = os.environ | {"LRD_FUSED": "0" if how == "switched off" else "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code, how], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    param = nn.Parameter(torch.linspace(-1, 1, 3000))
    param.grad = torch.full((3000,), 0.1)
    optimizer = torch.optim.AdamW([param], lr=0.1)
    dropout = LRDropout(optimizer)
    for _ in range(3):
        optimizer.step()
    assert dropout.is_fused
    assert ended.stdout.strip() == f"False {hashlib.sha256(param.detach().numpy().tobytes()).hexdigest()}"


def test_a_mask_step_on_the_device_counts_as_a_number_does():
    ours, _ = make(torch.optim.RMSprop, {"lr": 0.1})
    theirs, _ = make(torch.optim.RMSprop, {"lr": 0.1})
    ours.param_groups[0]["mask_step"] = torch.tensor(0)
    train(ours)
    train(theirs)
    for one, other in zip(params_of(ours), params_of(theirs), strict=True):
        assert torch.equal(one, other)
    assert int(ours.param_groups[0]["mask_step"]) == theirs.param_groups[0]["mask_step"] == 3


def test_autograd_notices_a_step_between_two_backward_passes():
    param = nn.Parameter(torch.ones(300))
    optimizer = torch.optim.SGD([param], lr=0.1)
    dropout = LRDropout(optimizer)
    loss = param.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    assert dropout.is_fused
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_state_of_another_shape_is_refused_as_torch_refuses_it():
    param = nn.Parameter(torch.ones(5000))
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    LRDropout(optimizer)
    optimizer.state[param]["momentum_buffer"] = torch.zeros(50)
    param.grad = torch.ones(5000)
    with pytest.raises(RuntimeError, match="must match the size"):
        optimizer.step()


def twice():
    param = nn.Parameter(torch.linspace(-1, 1, 300))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = torch.optim.SGD([param, param], lr=0.1)
    param.grad = torch.ones(300)
    return optimizer


def of_one_storage():
    flat = torch.linspace(-1, 1, 300)
    params = [nn.Parameter(flat), nn.Parameter(flat)]
    for param in params:
        param.grad = torch.ones(300)
    return torch.optim.SGD(params, lr=0.1)


def whose_gradient_is_a_parameter():
    param = nn.Parameter(torch.linspace(-1, 1, 300))
    param.grad = param.data
    return torch.optim.AdamW([param], lr=0.1)


def of_a_negated_gradient():
    param = nn.Parameter(torch.linspace(-1, 1, 300))
    param.grad = torch._neg_view(torch.ones(300))
    return torch.optim.SGD([param], lr=0.1)


def of_a_momentum_below_float32():
    param = nn.Parameter(torch.linspace(-1, 1, 300))
    param.grad = torch.ones(300)
    return torch.optim.SGD([param], lr=0.1, momentum=1e-50)


def of_a_beta_that_float32_rounds_to_a_half():
    param = nn.Parameter(torch.linspace(-1, 1, 300))
    param.grad = torch.linspace(-3, 1, 300)
    return torch.optim.Adam([param], lr=0.1, betas=(0.5 + 1e-10, 0.9))


@pytest.mark.parametrize("build", [
    twice, of_one_storage, whose_gradient_is_a_parameter, of_a_negated_gradient, of_a_momentum_below_float32,
    of_a_beta_that_float32_rounds_to_a_half,
])  # fmt: skip
def test_tensors_and_numbers_of_an_odd_kind_are_left_to_the_optimizer(build):
    results = []
    for can_fuse in (True, False):
        optimizer = build()
        dropout = LRDropout(optimizer)
        dropout._can_fuse = can_fuse
        for _ in range(3):
            optimizer.step()
        assert dropout.is_fused is False
        results.append(optimizer)
    assert_same(*results)


def test_a_step_count_is_of_the_default_dtype_as_torch_has_it():
    fused.is_trusted.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        param = nn.Parameter(torch.ones(9, dtype=torch.float32))
        optimizer = torch.optim.Adam([param])
        dropout = LRDropout(optimizer)
        param.grad = torch.ones(9, dtype=torch.float32)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert dropout.is_fused
    assert optimizer.state[param]["step"].dtype is torch.float64


def test_a_forked_child_does_not_wait_for_its_parents_threads():
    code = (
        "import os, torch, lrd\n"
        "def step():\n"
        "    params = [torch.nn.Parameter(torch.ones(20_000)) for _ in range(20)]\n"
        "    for param in params: param.grad = torch.ones(20_000)\n"
        "    optimizer = torch.optim.SGD(params, lr=0.1); dropout = lrd.LRDropout(optimizer)\n"
        "    optimizer.step(); assert dropout.is_fused\n"
        "torch.set_num_threads(2); step()\n"
        "pid = os.fork()\n"
        "if pid == 0: step(); os._exit(0)\n"
        "import signal; signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, 9)); signal.alarm(20)\n"
        "print(os.waitpid(pid, 0)[1])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() == "0", ended.stderr
