"""The masked step in one pass: the bits of the optimizer's own step and of restoring afterwards."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import lrd.optim
from lrd import LRDropout
from lrd.optim import mask
from lrd.optim.fused import cpu_step, dispatch, loading
from lrd.optim.placement import Placement
from tests.helpers.optimizers import assert_same_bits, make_params, params_of

# The last is more than one thread's chunk.
SHAPES: tuple[tuple[int, ...], ...] = (
    (1,),
    (31,),
    (255,),
    (257,),
    (4, 3, 3, 3),
    (),
    (70_000,),
)

SGD_OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "maximize": True},
    {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "foreach": True},
]
ADAM_OPTIONS = [
    {"lr": 0.01},
    {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)},
    {"lr": 0.01, "maximize": True, "eps": 1e-3, "foreach": True},
]
CASES = [
    *((torch.optim.SGD, options) for options in SGD_OPTIONS),
    *((torch.optim.Adam, options) for options in ADAM_OPTIONS),
    *((torch.optim.AdamW, options) for options in ADAM_OPTIONS),
]


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch):
    monkeypatch.setenv("LRD_FUSED", "1")


def make(
    optimizer_class: Any, options: dict[str, Any], can_fuse: bool = True, **dropout_options: Any
) -> tuple[Optimizer, LRDropout]:
    optimizer = optimizer_class(make_params(shapes=SHAPES), **options)
    dropout = LRDropout(optimizer, **dropout_options)
    dropout._can_fuse = can_fuse
    return optimizer, dropout


def train(optimizer: Optimizer, steps: int = 3, scale: float = 1.0) -> None:
    """Take steps. The reference, which cannot fuse, draws its masks by NumPy."""
    generator = torch.Generator().manual_seed(2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not optimizer._lr_dropout._can_fuse:
            monkeypatch.setenv("LRD_FUSED", "0")

        for _ in range(steps):
            for param in params_of(optimizer):
                param.grad = torch.randn(param.shape, generator=generator) * scale
            optimizer.step()


def assert_same(optimizer: Optimizer, other: Optimizer) -> None:
    """Two optimizers have the same parameters, state and settings."""
    for param, other_param in zip(params_of(optimizer), params_of(other), strict=True):
        assert_same_bits(param, other_param)
        assert_same_bits(optimizer.state.get(param, {}), other.state.get(other_param, {}))

    settings = str(optimizer.state_dict()["param_groups"])
    other_settings = str(other.state_dict()["param_groups"])
    assert settings == other_settings


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# The same bits


@pytest.mark.parametrize(("optimizer_class", "options"), CASES)
@pytest.mark.parametrize(
    "dropout_options",
    [
        {"keep_prob": 0.5},
        {"keep_prob": 0.75, "seed": (1 << 64) - 1, "rescale": True},
        {"keep_prob": 0.9},
        {"keep_prob": 1e-5, "rescale": True},
        {"keep_prob": 1 - 2**-16},
    ],
)
def test_one_pass_gives_the_bits_of_a_step_and_restoring(optimizer_class, options, dropout_options):
    one_pass, one_pass_dropout = make(optimizer_class, options, **dropout_options)
    generic, generic_dropout = make(optimizer_class, options, can_fuse=False, **dropout_options)
    train(one_pass)
    train(generic)

    assert one_pass_dropout.is_fused
    assert not generic_dropout.is_fused
    assert one_pass_dropout._old_values == {}
    assert_same(one_pass, generic)

    assert one_pass_dropout.kept_fractions() == generic_dropout.kept_fractions()
    for element in range(99):
        is_kept = one_pass_dropout.keeps(6, element)
        assert is_kept == generic_dropout.keeps(6, element)


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}),
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    ],
)
@pytest.mark.parametrize("scale", [1e-42, 1e30, float("inf")])
def test_extreme_gradients_come_out_the_same(optimizer_class, options, scale):
    one_pass, _ = make(optimizer_class, options)
    generic, _ = make(optimizer_class, options, can_fuse=False)
    train(one_pass, scale=scale)
    train(generic, scale=scale)

    # NaN may have any bits.
    for param, generic_param in zip(params_of(one_pass), params_of(generic), strict=True):
        assert torch.equal(param.nan_to_num(), generic_param.nan_to_num())
        assert torch.equal(param.isnan(), generic_param.isnan())


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_the_number_of_threads_does_not_matter(optimizer_class):
    threads_before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        optimizer, dropout = make(optimizer_class, {"lr": 0.1}, keep_prob=0.9)
        train(optimizer)
        assert dropout.is_fused
        results.append(optimizer)
    torch.set_num_threads(threads_before)

    assert_same(*results)


def test_a_large_mask_step_gives_the_same_bits():
    results = []
    for can_fuse in (True, False):
        optimizer, _ = make(torch.optim.SGD, {"lr": 0.1}, can_fuse=can_fuse)
        optimizer.param_groups[0]["mask_step"] = (1 << 33) + 5
        train(optimizer, steps=1)
        results.append(optimizer)
    assert_same(*results)


def test_the_classes_of_lrd_are_taken_over_too():
    optimizer = lrd.optim.AdamW([nn.Parameter(torch.ones(300))], keep_prob=0.5)
    train(optimizer)
    assert optimizer._lr_dropout.is_fused


def train_four_groups(can_fuse: bool, **fourth_group: Any) -> tuple[Optimizer, LRDropout]:
    """The first group is masked, the second stock, the third without gradients."""
    params = [nn.Parameter(torch.linspace(-1, 1, 600).view(20, 30)) for _ in range(4)]
    groups: list[dict[str, Any]] = [
        {"params": [params[0]]},
        {"params": [params[1]], "keep_prob": 1.0},
        {"params": [params[2]]},
        {"params": [params[3]], "lr": 0.3, **fourth_group},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    dropout = LRDropout(optimizer, keep_prob=0.5, rescale=True)
    dropout._can_fuse = can_fuse

    for step in range(3):
        for i in (0, 1, 3):
            params[i].grad = torch.full((20, 30), 0.1 * (step + 1))
        optimizer.step()
    return optimizer, dropout


@pytest.mark.parametrize(
    ("fourth_group", "is_fused"),
    [
        ({"keep_prob": 0.9}, True),
        ({"keep_prob": 0.9, "mask_seed": (1 << 64) - 1}, True),
        ({"mask_granularity": "row"}, False),
        ({"lr": 0.0}, False),
    ],
)
def test_groups_are_taken_over_together_or_not_at_all(fourth_group, is_fused):
    one_pass, one_pass_dropout = train_four_groups(can_fuse=True, **fourth_group)
    generic, generic_dropout = train_four_groups(can_fuse=False, **fourth_group)

    assert one_pass_dropout.is_fused == is_fused
    assert not generic_dropout.is_fused
    assert_same(one_pass, generic)
    assert one_pass_dropout.kept_fractions() == generic_dropout.kept_fractions()


def test_a_step_that_torch_refuses_moves_nothing():
    params = [nn.Parameter(torch.ones(300)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "keep_prob": 1.0, "lr": 1e39}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    LRDropout(optimizer)

    grads = [torch.ones(300) for _ in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad

    with pytest.raises(RuntimeError):
        optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert bool((params[1] == 1).all())


@pytest.fixture
def nothing_loaded(monkeypatch):
    """As in a new process, whose user has chosen nothing."""
    monkeypatch.delenv("LRD_FUSED")
    monkeypatch.delitem(sys.modules, "lrd.optim.fused.cpu_step")
    monkeypatch.setattr(loading._SpentCost, "elements", 0)


def test_a_large_step_is_worth_loading_the_kernels(nothing_loaded):
    for numel, is_fused in (((1 << 18) - 1, False), (1 << 18, True)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(numel))], lr=0.1)
        dropout = LRDropout(optimizer)
        train(optimizer, steps=1)
        assert dropout.is_fused == is_fused


@pytest.mark.parametrize(
    ("n_tensors", "numel", "first_fused_step"), [(10, 1000, 53), (100, 100, 10)]
)
def test_small_steps_are_worth_it_together(nothing_loaded, n_tensors, numel, first_fused_step):
    params = [nn.Parameter(torch.ones(numel)) for _ in range(n_tensors)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    dropout = LRDropout(optimizer)

    for step in range(1, first_fused_step + 2):
        train(optimizer, steps=1)
        assert dropout.is_fused == (step > first_fused_step)


def test_kernels_that_are_loaded_are_used_at_once(nothing_loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "lrd.optim.fused.cpu_step", cpu_step)
    optimizer, dropout = make(torch.optim.SGD, {"lr": 0.1})
    train(optimizer, steps=1)
    assert dropout.is_fused


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})],
)
def test_what_the_user_calls_fused_is_taken_over_whatever_its_size(
    optimizer_class, options, nothing_loaded, monkeypatch
):
    fused, dropout = make(optimizer_class, {**options, "fused": True}, keep_prob=0.5)
    train(fused)
    assert dropout.is_fused

    # Without a compiler torch's own fused step is taken, and dropped elements are restored.
    torchs, torchs_dropout = make(optimizer_class, {**options, "fused": True}, can_fuse=False)
    train(torchs)
    assert not torchs_dropout.is_fused

    for param, torchs_param in zip(params_of(fused), params_of(torchs), strict=True):
        torch.testing.assert_close(param, torchs_param, rtol=1e-5, atol=1e-6)
        state, torchs_state = fused.state[param], torchs.state[torchs_param]
        assert state.keys() == torchs_state.keys()
        for key, value in state.items():
            assert value.dtype is torchs_state[key].dtype
            torch.testing.assert_close(value, torchs_state[key], rtol=1e-5, atol=1e-6)

    # Its state_dict is one of torch's.
    stock = optimizer_class(make_params(shapes=SHAPES), **options, fused=True)
    stock.load_state_dict(fused.state_dict())
    for param in params_of(stock):
        param.grad = torch.ones_like(param)
    stock.step()


def test_gradients_are_there_again_after_the_step():
    optimizer, _ = make(torch.optim.SGD, {"lr": 0.1})
    for param in params_of(optimizer):
        param.grad = torch.ones_like(param)
    grads = [param.grad for param in params_of(optimizer)]

    optimizer.step()
    for param, grad in zip(params_of(optimizer), grads, strict=True):
        assert param.grad is grad
        assert bool((grad == 1).all())


# What is left to the optimizer


UNSUPPORTED = {
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}, {}),
    "beta1": (torch.optim.Adam, {"betas": (0.3, 0.9)}, {}),
    "lr tensor": (torch.optim.SGD, {"lr": torch.tensor(0.1)}, {}),
    "lr 0": (torch.optim.SGD, {"lr": 0.0}, {}),
    "another optimizer": (torch.optim.RMSprop, {}, {}),
    "granularity": (torch.optim.SGD, {"lr": 0.1}, {"granularity": "row"}),
    "masked gradient": (torch.optim.SGD, {"lr": 0.1}, {"masks": "gradient"}),
    "no mask": (torch.optim.SGD, {"lr": 0.1}, {"keep_prob": 1.0}),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_the_kernels_do_not_support_is_left_to_the_optimizer(name):
    optimizer_class, options, dropout_options = UNSUPPORTED[name]
    optimizer, dropout = make(optimizer_class, options, **dropout_options)
    train(optimizer, steps=2)
    assert dropout.is_fused is False


@pytest.mark.parametrize(
    "values",
    [
        torch.ones(9, dtype=torch.float64),
        torch.ones(9, dtype=torch.complex64),
        torch.ones(8, 4, 3, 3).to(memory_format=torch.channels_last),
    ],
)
def test_other_dtypes_and_memory_orders_are_left_to_the_optimizer(values):
    param = nn.Parameter(values)
    optimizer = torch.optim.SGD([param], lr=0.1)
    dropout = LRDropout(optimizer)
    param.grad = torch.ones_like(values)
    optimizer.step()
    assert dropout.is_fused is False


def test_a_compiled_network_in_the_process_changes_nothing():
    """torch.compile wraps a method of each optimizer class: AdamW's is then no longer Adam's."""
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.zeros(1, 2))
    optimizer, dropout = make(torch.optim.AdamW, {"lr": 0.01})
    train(optimizer, steps=1)
    assert dropout.is_fused


def test_a_subclass_with_its_own_step_is_left_to_it():
    class AddOne(torch.optim.SGD):
        def step(self, closure=None):
            for param in params_of(self):
                param.data.add_(1.0)

    optimizer, dropout = make(AddOne, {"lr": 0.1}, keep_prob=0.5)
    before = params_of(optimizer)[-1].detach().clone()
    train(optimizer, steps=1)

    difference = params_of(optimizer)[-1].detach() - before
    assert dropout.is_fused is False
    assert 0.4 < difference.mean().item() < 0.6


def test_a_step_with_other_hooks_is_left_to_the_optimizer():
    optimizer, dropout = make(torch.optim.SGD, {"lr": 0.1})
    train(optimizer, steps=1)
    assert dropout.is_fused

    # After LRDropout's hook: it may change the gradients.
    handle = optimizer.register_step_pre_hook(lambda *_: None)
    train(optimizer, steps=1)
    assert dropout.is_fused is False

    handle.remove()
    train(optimizer, steps=1)
    assert dropout.is_fused


def test_a_hook_that_changes_gradients_before_lrdropouts_takes_effect():
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


# The kernels


def change_numbers(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    """Give the kernels other numbers than those of the groups."""
    set_numbers = cpu_step.Table.set_group_numbers

    def set_wrong_numbers(table, group_number, numbers, mask_step):
        mask_step = change.get("mask_step", mask_step)
        wrong = {name: change.get(name, number) for name, number in numbers.items()}
        set_numbers(table, group_number, wrong, mask_step)

    monkeypatch.setattr(cpu_step.Table, "set_group_numbers", set_wrong_numbers)


def test_wrong_kernels_are_not_used(monkeypatch):
    dispatch.matches_torch.cache_clear()
    assert dispatch.matches_torch(torch.optim.SGD, torch.device("cpu"))

    dispatch.matches_torch.cache_clear()
    change_numbers(monkeypatch, {"minus_lr": -0.5})
    optimizer, dropout = make(torch.optim.SGD, {"lr": 0.1})
    with pytest.warns(UserWarning, match=r"not those of torch\.optim\.SGD") as warned:
        train(optimizer)
    dispatch.matches_torch.cache_clear()

    assert dropout.is_fused is False
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"mask_step": 9}, {"threshold": 1 << 16}, {"update_divisor": 0.0}],
    ids=str,
)
def test_kernels_that_draw_a_wrong_mask_are_not_used(optimizer_class, change, monkeypatch):
    change_numbers(monkeypatch, change)
    dispatch.matches_torch.cache_clear()
    with pytest.warns(UserWarning, match="results are not those of torch"):
        assert not dispatch.matches_torch(optimizer_class, torch.device("cpu"))
    dispatch.matches_torch.cache_clear()


def test_kernels_that_leave_out_a_state_are_not_used(monkeypatch):
    def step_without_state(optimizer, updates):
        dispatch._sgd_on_cpu(optimizer, updates)
        optimizer.state.clear()

    one_step = dispatch.selftest._Step(1.0)
    monkeypatch.setattr(dispatch.selftest, "_STOCK_STEPS", (one_step,))
    monkeypatch.setitem(dispatch._STEPS, (torch.optim.SGD, "cpu"), step_without_state)

    dispatch.matches_torch.cache_clear()
    with pytest.warns(UserWarning, match="results are not those of torch"):
        assert not dispatch.matches_torch(torch.optim.SGD, torch.device("cpu"))
    dispatch.matches_torch.cache_clear()


def test_a_compiler_whose_library_cannot_be_loaded_is_reported(monkeypatch):
    def fail(_):
        raise OSError("Could not find/load shared object file 'libllvmlite.so'")

    dispatch.matches_torch.cache_clear()
    monkeypatch.setattr(dispatch, "_load_kernels", fail)
    optimizer, dropout = make(torch.optim.SGD, {"lr": 0.1})
    with pytest.warns(UserWarning, match=r"libllvmlite\.so") as warned:
        train(optimizer)
    dispatch.matches_torch.cache_clear()

    assert dropout.is_fused is False
    assert [warning.filename for warning in warned] == [__file__]


def test_the_switch_is_read_at_each_step(monkeypatch):
    optimizer, dropout = make(torch.optim.SGD, {"lr": 0.1})
    for value, is_fused in (("1", True), ("0", False), ("1", True)):
        monkeypatch.setenv("LRD_FUSED", value)
        train(optimizer, steps=1)
        assert dropout.is_fused == is_fused


def test_a_step_without_gradients_has_no_updates():
    optimizer, _ = make(torch.optim.SGD, {"lr": 0.1})
    assert dispatch.find_updates(optimizer) == []


def make_restore_table() -> cpu_step.Table:
    return cpu_step.Table(cpu_step.RESTORE, [(0, 8, None), (1, 8, None)], [(0, 2)])


def test_a_table_with_a_field_that_was_never_set_is_refused():
    table = make_restore_table()
    table.set_group_numbers(0, {"seed": 1, "threshold": 1}, 3)
    with pytest.raises(ValueError, match=r"not set.*element_size"):
        table.run([(1, 2), (3, 4)])


def test_a_table_has_no_other_fields_and_tensors_than_its_own():
    table = make_restore_table()
    with pytest.raises(ValueError, match="no field plus_lr"):
        table.set_group_numbers(0, {"plus_lr": 0.1}, 3)

    table.set_group_numbers(0, {"seed": 1, "threshold": 1, "element_size": 4}, 3)
    with pytest.raises(ValueError, match="1 tensors for a table of 2"):
        table.run([(1, 2)])


def test_a_compiler_that_fails_is_reported_once_and_training_goes_on(monkeypatch):
    dispatch.matches_torch.cache_clear()

    def fail(*_):
        raise RuntimeError("LLVM does not know this processor\nand more")

    monkeypatch.setattr(cpu_step, "Table", fail)
    failing, dropout = make(torch.optim.SGD, {"lr": 0.1})
    with pytest.warns(UserWarning, match="LLVM does not know this processor") as warned:
        train(failing)
    dispatch.matches_torch.cache_clear()
    assert len(warned) == 1
    assert dropout.is_fused is False

    monkeypatch.undo()
    monkeypatch.setenv("LRD_FUSED", "1")
    working, _ = make(torch.optim.SGD, {"lr": 0.1})
    train(working)
    assert_same(failing, working)


@pytest.mark.slow
def test_the_kernels_compile_where_nothing_can_be_stored_on_disk():
    """A container whose folders are read-only: Numba finds no place for its cache."""
    code = (
        "import torch, lrd, numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "param = torch.nn.Parameter(torch.ones(300))\n"
        "param.grad = torch.ones(300)\n"
        "optimizer = torch.optim.SGD([param], lr=0.1)\n"
        "dropout = lrd.LRDropout(optimizer)\n"
        "optimizer.step()\n"
        "print(dropout.is_fused)"
    )
    process = run_python(code, "-W", "error")
    assert process.stdout.strip() == "True", process.stderr
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("first_line", "environment"),
    [
        pytest.param("", {"LRD_FUSED": "0"}, marks=pytest.mark.slow),
        ("import sys; sys.modules['numba'] = None\n", {}),
    ],
    ids=["switched off", "no Numba"],
)
def test_without_a_compiler_the_bits_are_the_same(first_line, environment):
    code = first_line + (
        "import hashlib, torch, lrd\n"
        "param = torch.nn.Parameter(torch.linspace(-1, 1, 3000))\n"
        "param.grad = torch.full((3000,), 0.1)\n"
        "optimizer = torch.optim.AdamW([param], lr=0.1)\n"
        "dropout = lrd.LRDropout(optimizer)\n"
        "for _ in range(3): optimizer.step()\n"
        "print(dropout.is_fused)\n"
        "print(hashlib.sha256(param.detach().numpy().tobytes()).hexdigest())"
    )
    process = run_python(code, **environment)
    assert process.returncode == 0, process.stderr
    is_fused, digest = process.stdout.split()

    param = nn.Parameter(torch.linspace(-1, 1, 3000))
    param.grad = torch.full((3000,), 0.1)
    optimizer = torch.optim.AdamW([param], lr=0.1)
    dropout = LRDropout(optimizer)
    for _ in range(3):
        optimizer.step()

    assert is_fused == "False"
    assert dropout.is_fused
    assert digest == hashlib.sha256(param.detach().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("optimizer_class", [torch.optim.RMSprop, torch.optim.SGD])
def test_a_mask_step_tensor_counts_as_a_number_does(optimizer_class):
    with_tensor, _ = make(optimizer_class, {"lr": 0.1})
    with_number, _ = make(optimizer_class, {"lr": 0.1})
    with_tensor.param_groups[0]["mask_step"] = torch.tensor(0)
    train(with_tensor)
    train(with_number)

    for param, other_param in zip(params_of(with_tensor), params_of(with_number), strict=True):
        assert torch.equal(param, other_param)
    assert int(with_tensor.param_groups[0]["mask_step"]) == 3
    assert with_number.param_groups[0]["mask_step"] == 3


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


# What is kept from step to step


def test_tensors_that_move_between_steps_are_found():
    """Every address is looked up at each step: whatever moves, its new memory is updated."""
    results = []
    for can_fuse in (True, False):
        optimizer, dropout = make(
            torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, can_fuse=can_fuse, keep_prob=0.75
        )
        params = params_of(optimizer)
        train(optimizer)

        moved = params[-1].detach().clone()
        params[-1].data = moved
        train(optimizer)
        assert dropout.is_fused == can_fuse
        assert params[-1].data_ptr() == moved.data_ptr()

        # Another shape of as many elements, and another state
        params[4].data = params[4].data.clone().view(4, 27)
        optimizer.state[params[4]]["momentum_buffer"] = torch.ones(4, 27)
        train(optimizer)

        # Groups of another size, and other numbers
        first_group = optimizer.param_groups[0]
        second_group = dict(first_group, params=first_group["params"][3:], lr=0.2, keep_prob=0.5)
        first_group["params"] = first_group["params"][:3]
        optimizer.param_groups.append(second_group)
        train(optimizer)
        optimizer.param_groups[1]["weight_decay"] = 0.1
        train(optimizer)

        # The first parameters get no gradient any more.
        for param in params[:2]:
            param.requires_grad_(False)
            param.grad = None
        params[5].grad = torch.ones(())
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("LRD_FUSED", str(int(can_fuse)))
            optimizer.step()

        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer)
        assert dropout.is_fused == can_fuse
        results.append(optimizer)

    assert_same(*results)


def test_groups_of_other_sizes_do_not_take_over_old_numbers():
    """The first sizes come back: what was set for them in between is not what they had."""
    results = []
    for can_fuse in (True, False):
        optimizer, _ = make(torch.optim.SGD, {"lr": 0.1}, can_fuse=can_fuse)
        group = optimizer.param_groups[0]
        params = group["params"]
        for n_first in (4, 7, 4):
            optimizer.param_groups[:] = [{**group, "params": params[:n_first]}]
            if n_first < len(params):
                optimizer.param_groups.append({**group, "params": params[n_first:], "lr": 0.3})
            train(optimizer, steps=1)
        results.append(optimizer)

    assert_same(*results)


# Parts of a parameter


BOXES = [
    ((1000,), (300,), (457,)),
    ((1000,), (255,), (258,)),
    ((40, 30), (10, 0), (7, 30)),
    ((40, 30), (0, 10), (40, 7)),
    ((9, 256), (0, 31), (9, 33)),
    ((9, 257), (1, 224), (8, 33)),
    ((5, 60, 6), (1, 25, 2), (3, 30, 3)),
    ((5, 60, 6), (0, 20, 0), (5, 20, 6)),
    ((3, 100_000), (1, 100), (2, 70_000)),
]


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("keep_prob", [0.5, 0.9])
def test_a_box_of_a_parameter_moves_as_it_does_in_the_whole(optimizer_class, keep_prob):
    """All shapes in one optimizer, whose tables then have several records for some tensors."""
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    if optimizer_class is torch.optim.SGD:
        options["momentum"] = 0.9

    boxes = [Placement(*box) for box in BOXES]
    wholes = [nn.Parameter(torch.randn(box.shape, generator=generator)) for box in boxes]
    parts = [
        nn.Parameter(box.box(whole.detach()).clone())
        for box, whole in zip(boxes, wholes, strict=True)
    ]
    whole_optimizer = optimizer_class(wholes, **options)
    LRDropout(whole_optimizer, keep_prob=keep_prob, seed=5)._can_fuse = False
    part_optimizer = optimizer_class(parts, **options)
    LRDropout(part_optimizer, keep_prob=keep_prob, seed=5)

    items = [
        SimpleNamespace(group_number=0, mask_index=index, param=part, placement=box)
        for index, (part, box) in enumerate(zip(parts, boxes, strict=True))
    ]
    for _ in range(2):
        train(whole_optimizer, steps=1)
        for part, whole, box in zip(parts, wholes, boxes, strict=True):
            part.grad = box.box(whole.grad).clone()

        with torch.no_grad():
            updates = dispatch.find_updates(part_optimizer, items)
            assert len(updates) == len(boxes)
            dispatch.step_in_one_pass(part_optimizer, updates)
        part_optimizer.param_groups[0]["mask_step"] += 1

    for part, whole, box in zip(parts, wholes, boxes, strict=True):
        assert_same_bits(part, box.box(whole.detach()))
        for key, value in part_optimizer.state[part].items():
            whole_value = whole_optimizer.state[whole][key]
            assert_same_bits(value, whole_value if value.dim() == 0 else box.box(whole_value))


def test_an_index_that_is_a_hash_needs_all_64_bits():
    param = nn.Parameter(torch.zeros(500))
    optimizer = torch.optim.SGD([param], lr=1.0)
    LRDropout(optimizer, seed=5)
    param.grad = torch.ones(500)
    index = (1 << 64) - 2

    item = SimpleNamespace(group_number=0, mask_index=index, param=param, placement=None)
    with torch.no_grad():
        updates = dispatch.find_updates(optimizer, [item])
        dispatch.step_in_one_pass(optimizer, updates)

    expected = mask.draw(500, seed=5, step=0, index=index, keep_prob=0.5)
    assert torch.equal(param != 0, expected)


# Tensors and numbers of an odd kind


def with_a_parameter_twice():
    param = nn.Parameter(torch.linspace(-1, 1, 300))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = torch.optim.SGD([param, param], lr=0.1)
    param.grad = torch.ones(300)
    return optimizer


def with_two_parameters_in_one_storage():
    flat = torch.linspace(-1, 1, 300)
    params = [nn.Parameter(flat), nn.Parameter(flat)]
    for param in params:
        param.grad = torch.ones(300)
    return torch.optim.SGD(params, lr=0.1)


def with_a_gradient_that_is_the_parameter():
    param = nn.Parameter(torch.linspace(-1, 1, 300))
    param.grad = param.data
    return torch.optim.AdamW([param], lr=0.1)


def with_a_negated_gradient():
    param = nn.Parameter(torch.linspace(-1, 1, 300))
    param.grad = torch._neg_view(torch.ones(300))
    return torch.optim.SGD([param], lr=0.1)


def with_a_momentum_that_is_zero_in_float32():
    param = nn.Parameter(torch.linspace(-1, 1, 300))
    param.grad = torch.ones(300)
    return torch.optim.SGD([param], lr=0.1, momentum=1e-50)


def with_a_beta_that_float32_rounds_to_a_half():
    param = nn.Parameter(torch.linspace(-1, 1, 300))
    param.grad = torch.linspace(-3, 1, 300)
    return torch.optim.Adam([param], lr=0.1, betas=(0.5 + 1e-10, 0.9))


@pytest.mark.parametrize(
    "build",
    [
        with_a_parameter_twice,
        with_two_parameters_in_one_storage,
        with_a_gradient_that_is_the_parameter,
        with_a_negated_gradient,
        with_a_momentum_that_is_zero_in_float32,
        with_a_beta_that_float32_rounds_to_a_half,
    ],
)
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


def test_a_step_count_has_the_default_dtype_as_in_torch():
    dispatch.matches_torch.cache_clear()
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
        "import os, signal, torch, lrd\n"
        "def step():\n"
        "    params = [torch.nn.Parameter(torch.ones(20_000)) for _ in range(20)]\n"
        "    for param in params: param.grad = torch.ones(20_000)\n"
        "    optimizer = torch.optim.SGD(params, lr=0.1)\n"
        "    dropout = lrd.LRDropout(optimizer)\n"
        "    optimizer.step()\n"
        "    assert dropout.is_fused\n"
        "torch.set_num_threads(2)\n"
        "step()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    step()\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, 9))\n"
        "signal.alarm(20)\n"
        "print(os.waitpid(pid, 0)[1])"
    )
    process = run_python(code)
    assert process.stdout.strip() == "0", process.stderr
