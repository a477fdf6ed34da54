"""What LRDropout attaches to, what it refuses, and which indices its masks have."""

from __future__ import annotations

import copy
import hashlib
import pickle
import warnings
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

import lrd
from lrd.optim import mask, step_watch
from lrd.optim.dropout import get_lr_dropout

KEEP_PROB = 0.5


def make_param(size: int = 300) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size))


def step_once(optimizer: Optimizer) -> list[torch.Tensor]:
    """Take a step with gradients of one. Returns which elements moved, for each parameter."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)

    optimizer.step()
    return [param.detach() != old for param, old in zip(params, before, strict=True)]


def expected(index: int, step: int = 0, seed: int = 0, size: int = 300) -> torch.Tensor:
    return mask.draw(size, seed=seed, step=step, index=index, keep_prob=KEEP_PROB)


def snapshot(optimizer: Any) -> Any:
    """All that attaching could change."""
    groups = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    hooks = {
        name: list(value)
        for name, value in vars(optimizer).items()
        if name.startswith("_optimizer") and name.endswith("hooks")
    }
    return groups, dict(getattr(optimizer, "defaults", {})), hooks, sorted(vars(optimizer))


class NoHooks(Optimizer):
    """A wrapper that does not call Optimizer.__init__, as some Lookaheads are."""

    def __init__(self, base: Optimizer) -> None:
        self.base_optimizer = base
        self.param_groups = base.param_groups
        self.defaults = base.defaults
        self.state = base.state

    def step(self, closure=None):
        return self.base_optimizer.step(closure)


class Sam(Optimizer):
    """Sharpness-aware minimization as it is commonly written: two steps that are not step()."""

    def __init__(self, params, base_class, **options) -> None:
        super().__init__(params, options)
        self.base_optimizer = base_class(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["old"] = param.clone()
                param.add_(param.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.copy_(self.state[param]["old"])
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch):
    monkeypatch.setattr(step_watch, "_warnings_given", set())
    monkeypatch.setattr(step_watch, "_latest", None)


# Wrappers, and a failed attachment


def test_accelerated_optimizer_is_masked_inside():
    param = make_param()
    inner = torch.optim.SGD([param], lr=1.0)
    prepared = Accelerator(cpu=True).prepare(inner)

    with pytest.warns(UserWarning, match="attached to the SGD inside the AcceleratedOptimizer"):
        dropout = lrd.LRDropout(prepared, keep_prob=KEEP_PROB)
    assert dropout.optimizer is inner
    assert get_lr_dropout(prepared) is dropout

    assert torch.equal(step_once(prepared)[0], expected(0))
    with pytest.raises(ValueError, match="attached already"):
        lrd.LRDropout(prepared)


def test_a_wrapper_without_hooks_is_refused_and_the_optimizer_inside_works():
    inner = torch.optim.SGD([make_param()], lr=1.0)
    wrapper = NoHooks(inner)
    before = snapshot(wrapper)

    with pytest.raises(ValueError, match=r"NoHooks .*\.base_optimizer"):
        lrd.LRDropout(wrapper)
    assert snapshot(wrapper) == before

    lrd.LRDropout(wrapper.base_optimizer, keep_prob=KEEP_PROB)
    assert torch.equal(step_once(wrapper)[0], expected(0))


@pytest.mark.parametrize("thing", [None, 3, nn.Linear(2, 2), "SGD"])
def test_what_is_no_optimizer_is_refused(thing):
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
        lrd.LRDropout(thing)


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep_prob": 0.0},
        {"seed": -1},
        {"granularity": "block"},
        {"masks": "everything"},
        {"masks": "momentum_buffer"},
        {"first_index": -1},
        {"first_index": 1 << 63},
        {"first_index": True},
        {"index_by": "place"},
        {"index_by": "name"},
    ],
)
def test_a_failed_attachment_leaves_the_optimizer_as_it_was(arguments):
    optimizer = torch.optim.SGD([make_param()], lr=1.0)
    before = snapshot(optimizer)

    with pytest.raises(ValueError, match=r"must|needs"):
        lrd.LRDropout(optimizer, **arguments)

    assert snapshot(optimizer) == before
    assert bool(step_once(optimizer)[0].all())
    lrd.LRDropout(optimizer)


def test_a_groups_bad_keep_prob_is_found_before_anything_changes():
    groups = [{"params": [make_param()]}, {"params": [make_param()], "keep_prob": 2.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    before = snapshot(optimizer)

    with pytest.raises(ValueError, match="keep_prob"):
        lrd.LRDropout(optimizer)
    assert snapshot(optimizer) == before


def test_fsdp1_parameters_are_refused_at_attachment_and_at_the_first_step():
    # What FullyShardedDataParallel marks its parameters with; tests/clients has the real one.
    param = make_param()
    optimizer = torch.optim.SGD([param], lr=1.0)
    lrd.LRDropout(optimizer)
    param._fsdp_flattened = True

    with pytest.raises(ValueError, match="FSDP2"):
        step_once(optimizer)
    assert not param.detach().any()

    later = torch.optim.SGD([param], lr=1.0)
    with pytest.raises(ValueError, match="FSDP2"):
        lrd.LRDropout(later)


# Indices


def test_first_index_moves_all_indices():
    params = [make_param(), make_param()]
    groups = [{"params": [param]} for param in params]
    optimizer = lrd.optim.SGD(groups, lr=1.0, keep_prob=KEEP_PROB, first_index=7)

    moved = step_once(optimizer)
    assert torch.equal(moved[0], expected(7))
    assert torch.equal(moved[1], expected(8))


def test_optimizers_of_one_parameter_have_the_masks_of_one_optimizer():
    together = [make_param() for _ in range(3)]
    moved = step_once(lrd.optim.SGD(together, lr=1.0, keep_prob=KEEP_PROB))

    for index in range(3):
        alone = lrd.optim.SGD([make_param()], lr=1.0, keep_prob=KEEP_PROB, first_index=index)
        assert torch.equal(step_once(alone)[0], moved[index])


def named_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(30, 10, bias=False), nn.Linear(10, 30, bias=False))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[1].weight)
    return model


def test_index_by_name_depends_on_the_name_alone():
    index = int.from_bytes(hashlib.sha256(b"1.weight").digest()[:8], "little")

    all_named = list(named_model().named_parameters())
    options = {"lr": 1.0, "keep_prob": KEEP_PROB, "index_by": "name"}
    moved = step_once(lrd.optim.SGD(all_named, **options))[1]
    assert torch.equal(moved.view(-1), expected(index))

    # Without its neighbour, and as DDP and torch.compile name it.
    for prefix in ("", "module.", "_orig_mod.module.", "module._orig_mod."):
        _, param = list(named_model().named_parameters())[1]
        alone = lrd.optim.SGD([(f"{prefix}1.weight", param)], **options)
        assert torch.equal(step_once(alone)[0], moved)


def test_parameters_of_the_same_index_are_refused():
    params = [("a.weight", make_param()), ("module.a.weight", make_param())]
    optimizer = torch.optim.SGD(params, lr=1.0)
    with pytest.raises(ValueError, match="the same index"):
        lrd.LRDropout(optimizer, index_by="name")

    groups = [{"params": [make_param()], "mask_first_index": first} for first in (1, 0)]
    with pytest.raises(ValueError, match="the same index"):
        lrd.LRDropout(torch.optim.SGD(groups, lr=1.0))


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_index_settings_live_in_state_dict_copies_and_pickles(remake):
    options = {"lr": 1.0, "keep_prob": KEEP_PROB}
    optimizer = lrd.optim.SGD([make_param()], first_index=4, **options)
    step_once(optimizer)
    twin = remake(optimizer)

    loaded = lrd.optim.SGD([make_param()], **options)
    loaded.load_state_dict(optimizer.state_dict())

    for optimizer in (twin, loaded):
        assert torch.equal(step_once(optimizer)[0], expected(4, step=1))


def test_state_dicts_have_no_new_keys_unless_asked_for():
    keys = set(lrd.optim.SGD([make_param()], lr=1.0).param_groups[0])
    assert "mask_first_index" not in keys
    assert "mask_index_by" not in keys


# Closures


def test_a_closure_is_called_once_with_gradients_and_the_step_is_fused(monkeypatch):
    monkeypatch.setenv("LRD_FUSED", "1")
    calls = []

    def run(optimizer: Optimizer, param: nn.Parameter, as_keyword: bool) -> Any:
        def closure():
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = (param - 1).square().sum()
            loss.backward()
            return loss

        return optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)

    for cls in (torch.optim.SGD, torch.optim.AdamW):
        for as_keyword in (False, True):
            param, plain = make_param(), make_param()
            optimizer = cls([param], lr=0.1)
            dropout = lrd.LRDropout(optimizer, keep_prob=KEEP_PROB)
            reference = cls([plain], lr=0.1)

            calls.clear()
            loss = run(optimizer, param, as_keyword)
            assert calls == [True]
            assert dropout.is_fused
            assert loss.item() == 300.0

            run(reference, plain, as_keyword)
            assert torch.equal(param, torch.where(expected(0), plain, torch.zeros(300)))
            assert optimizer.param_groups[0]["mask_step"] == 1


def test_a_closure_may_fill_lazy_parameters_and_change_settings():
    model = nn.LazyLinear(10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    lrd.LRDropout(optimizer)

    def closure():
        optimizer.param_groups[0]["keep_prob"] = 0.25
        model(torch.ones(2, 30)).sum().backward()
        closure.before = model.weight.detach().clone()

    optimizer.step(closure)
    keep = mask.draw(300, seed=0, step=0, index=0, keep_prob=0.25).view(10, 30)
    assert torch.equal(model.weight.detach() != closure.before, keep)


def test_a_closure_that_fails_moves_and_counts_nothing():
    param = make_param()
    optimizer = lrd.optim.SGD([param], lr=0.1)

    def closure():
        raise KeyError("no batch")

    with pytest.raises(KeyError, match="no batch"):
        optimizer.step(closure)
    assert not param.detach().any()
    assert optimizer.param_groups[0]["mask_step"] == 0
    assert torch.equal(step_once(optimizer)[0], expected(0))


def test_an_optimizer_that_calls_its_closure_several_times_is_left_to_do_so():
    param = make_param()
    optimizer = Sam([param], torch.optim.SGD, lr=1.0)
    lrd.LRDropout(optimizer, keep_prob=KEEP_PROB)
    calls = []

    def closure():
        calls.append(1)
        param.grad = torch.ones_like(param)

    closure()
    optimizer.step(closure)
    assert len(calls) == 2
    assert torch.equal(param.detach() != 0, expected(0))


def test_a_closure_left_to_the_step_works_with_masked_gradients_where_it_is_called_before():
    param = make_param()
    optimizer = lrd.optim.SGD([param], lr=1.0, keep_prob=KEEP_PROB, masks="gradient")

    def closure():
        param.grad = torch.ones_like(param)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert torch.equal(param.detach() != 0, expected(0))


# Steps that draw masks which nobody would want, or none


def test_steps_around_the_hooks_are_warned_of_once():
    param = make_param()
    optimizer = Sam([param], torch.optim.SGD, lr=1.0)
    lrd.LRDropout(optimizer)
    param.grad = torch.ones_like(param)

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.first_step()
            optimizer.second_step()
    assert len(record) == 1
    assert "Sam were moved, but not by its step()" in str(record[0].message)


def test_the_optimizer_inside_sam_is_masked_in_both_ways():
    for uses_closure in (False, True):
        param = make_param()
        optimizer = Sam([param], torch.optim.SGD, lr=1.0)
        lrd.LRDropout(optimizer.base_optimizer, keep_prob=KEEP_PROB)
        param.grad = torch.ones_like(param)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if uses_closure:
                optimizer.step(lambda: None)
            else:
                optimizer.first_step()
                optimizer.second_step()
        assert torch.equal(param.detach() != 0, expected(0))


def test_updates_by_hand_are_warned_of_when_the_state_is_saved():
    param = make_param()
    optimizer = lrd.optim.SGD([param], lr=1.0)
    param.grad = torch.ones_like(param)
    for _ in range(3):
        with torch.no_grad():
            param.sub_(param.grad)

    with pytest.warns(UserWarning, match="not by its step"):
        optimizer.state_dict()


def test_loading_weights_is_no_step():
    model = nn.Linear(3, 3)
    optimizer = lrd.optim.SGD(model.parameters(), lr=1.0)
    model.load_state_dict(nn.Linear(3, 3).state_dict())
    model(torch.ones(1, 3)).sum().backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()


def test_equal_masks_of_optimizers_that_step_in_turn_are_warned_of_once():
    optimizers = [lrd.optim.SGD([make_param()], lr=1.0) for _ in range(2)]

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(4):
            for optimizer in optimizers:
                step_once(optimizer)
    assert len(record) == 1
    assert "draw the same masks" in str(record[0].message)


@pytest.mark.parametrize("option", [{"seed": 1}, {"first_index": 1}])
def test_other_masks_and_one_training_after_another_are_not_warned_of(option):
    first = lrd.optim.SGD([make_param()], lr=1.0)
    second = lrd.optim.SGD([make_param()], lr=1.0, **option)
    third = lrd.optim.SGD([make_param()], lr=1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step_once(first)
            step_once(second)
        for _ in range(3):
            step_once(third)


@pytest.mark.parametrize("value", ["abc", "2", "true"])
def test_lrd_fused_must_be_0_or_1(monkeypatch, value):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    monkeypatch.setenv("LRD_FUSED", value)
    with pytest.raises(ValueError, match=f"LRD_FUSED is '{value}' in the environment"):
        lrd.LRDropout(optimizer)
    assert "keep_prob" not in optimizer.param_groups[0]
