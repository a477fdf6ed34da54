"""The classes of lrd.optim pass torch's own checks of optimizers, with torch's own inputs.

torch ships the inputs (`torch.testing._internal.common_optimizers`: an `OptimizerInfo` for each
optimizer, its arguments and its erroneous arguments), but not the checks (`TestOptimRenewed` of its
test/test_optim.py). They are written again here; "every input" is every class with each of its CPU
inputs.

    torch's check                                   here
    errors                                          every erroneous input
    forloop_goes_right_direction                    every input: the loss falls (`maximize`: rises)
    param_groups_lr, param_groups_weight_decay      every input, groups with separate settings
    tensor_lr                                       every input
    foreach_matches_forloop                         every input of the classes with `foreach`
    fused_matches_forloop                           every input of the classes fused on a CPU
    complex, complex_2d                             every input of the classes that support complex
    step_is_noop_when_params_have_no_grad           every input
    state_dict_deterministic                        every input
    can_load_older_state_dict, load_nontensor_step  every input
    save_load_equality_with_weights_only            every input
    non_empty_state                                 every input
    deepcopy_copies_all_public_attrs                every input; the copy continues as the original
                                                    does, and so does a pickle
    rosenbrock_sparse                               classes for sparse gradients: as dense ones
    step_pre_hook, step_post_hook, step_all_hooks   every class
    state_dict_*_hook, load_state_dict_*_hook       every class
    can_load_from_to_named_state_dict               every class
    mixed_device_dtype                              every class, dtypes only
    capturable inputs                               torch refuses them on a CPU; under torch.compile
                                                    they are in test_torch_features.py

Left out:

- step_is_noop_for_zero_grads, which follows from the comparison with the stock optimizer
- *_large_tensor and peak_memory_foreach, which need the memory of a GPU
- *_multigpu, state_dict_with_cuda_params, fused_cpu_matches_cuda and
  fused_does_not_step_if_foundinf, which need a GPU; test_dropout.py has the last for a CPU
- fused_error_on_params_on_meta, defaults_changed_to_foreach and
  set_default_dtype_works_with_foreach, which check how torch chooses its implementation
- *_with_lrsched, see test_references.py
- `differentiable`, which puts the step itself under autograd: restoring elements is not under it
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import lrd
import lrd.optim
from lrd.optim.dropout import get_lr_dropout
from lrd.parts.optimizers import NAMES
from tests.helpers.optimizers import (
    assert_same_bits,
    give_gradients,
    keep_masks,
    make_params,
    params_of,
    pickled,
    saved_and_loaded,
    values,
    values_of,
)

pytest.importorskip("expecttest", reason="torch's optimizer inputs need it")
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

INFOS = {info.name: info for info in optim_db if hasattr(lrd.optim, info.name)}
INPUTS = {
    f"{name} {config.desc}": (info, config.kwargs)
    for name, info in INFOS.items()
    for config in info.optim_inputs_func(device="cpu")
}
ERRORS = {
    f"{name} {error.optimizer_error_input.desc}": (name, error)
    for name, info in INFOS.items()
    for error in info.optim_error_inputs_func("cpu", torch.float32)
}
OWN_KEYS = {"keep_prob", "mask_seed", "mask_step", "mask_granularity", "mask_rescale", "masks"}
SEED = 8

every_class = pytest.mark.parametrize("name", INFOS)
every_input = pytest.mark.parametrize(("info", "arguments"), INPUTS.values(), ids=INPUTS)


def inputs_where(condition) -> pytest.MarkDecorator:
    chosen = {key: value for key, value in INPUTS.items() if condition(*value)}
    return pytest.mark.parametrize(("info", "arguments"), chosen.values(), ids=chosen)


def make(
    info: Any, params: list, arguments: dict[str, Any] | None = None, keep_prob: float = 0.5
) -> Optimizer:
    cls = getattr(lrd.optim, info.name)
    return cls(params, **copy.deepcopy(arguments or {}), keep_prob=keep_prob, seed=SEED)


def weight_and_bias(info: Any = None, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    takes_matrices_only = info is INFOS["Muon"]
    bias_shape = (8, 5) if takes_matrices_only else (40,)
    return make_params(dtype, shapes=((6, 5), bias_shape))


def train(info: Any, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(params_of(optimizer), step, sparse=info.only_supports_sparse_grads)
        optimizer.step()


def kept(optimizer: Optimizer, step: int) -> list[Tensor]:
    return keep_masks(params_of(optimizer), seed=SEED, step=step, keep_prob=0.5)


def stock_copy(optimizer: Optimizer, info: Any) -> Optimizer:
    """torch's own optimizer with copies of everything: parameters, gradients, arguments, state."""
    groups = []
    for group in optimizer.param_groups:
        settings = {
            key: copy.deepcopy(value)
            for key, value in group.items()
            if key not in OWN_KEYS | {"params"}
        }
        groups.append(
            {"params": [nn.Parameter(value) for value in values(group["params"])], **settings}
        )
    stock = info.optim_cls(groups)
    for param, twin in zip(params_of(optimizer), params_of(stock), strict=True):
        twin.grad = None if param.grad is None else param.grad.clone()
        if param in optimizer.state:  # load_state_dict would round it to the parameter's dtype
            stock.state[twin] = copy.deepcopy(optimizer.state[param])
    return stock


def assert_same_optimizers(some: Optimizer, others: Optimizer) -> None:
    assert_same_bits(values_of(some), values_of(others))
    assert_same_bits(some.state_dict()["state"], others.state_dict()["state"])


def assert_steps_are_stock_except_for_dropped(
    info: Any, optimizer: Optimizer, steps: range = range(3)
) -> None:
    for step in steps:
        give_gradients(params_of(optimizer), step, sparse=info.only_supports_sparse_grads)
        before, stock = values_of(optimizer), stock_copy(optimizer, info)
        optimizer.step()
        stock.step()
        expected = [
            torch.where(keep, new, old)
            for keep, new, old in zip(kept(optimizer, step), values_of(stock), before, strict=True)
        ]
        assert_same_bits(values_of(optimizer), expected)
        assert_same_bits(optimizer.state_dict()["state"], stock.state_dict()["state"])


# torch's checks of what is computed


def test_every_optimizer_of_torch_has_a_class_or_a_reason():
    assert {info.name for info in optim_db} - set(INFOS) == {"LBFGS"}
    assert set(NAMES) <= set(INFOS)


@pytest.mark.parametrize(("name", "error"), ERRORS.values(), ids=ERRORS)
def test_what_torch_refuses_is_refused_here_too(name, error):
    params, arguments = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
    cls = getattr(lrd.optim, name)
    if error.error_on == OptimizerErrorEnum.STEP_ERROR:
        optimizer = cls(params, **arguments)
        with pytest.raises(error.error_type, match=error.error_regex):
            optimizer.step()
    elif issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            cls(params, **arguments)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            cls(params, **arguments)


@every_input
def test_a_step_is_the_stock_step_except_for_dropped_elements(info, arguments):
    assert_steps_are_stock_except_for_dropped(info, make(info, weight_and_bias(info), arguments))


@every_input
def test_keep_prob_1_is_the_stock_optimizer(info, arguments):
    ours = make(info, weight_and_bias(info), arguments, keep_prob=1.0)
    stock = info.optim_cls(weight_and_bias(info), **copy.deepcopy(arguments))
    train(info, ours, range(10))
    train(info, stock, range(10))
    assert_same_optimizers(ours, stock)


@every_input
def test_each_group_has_its_own_lr_and_weight_decay(info, arguments):
    weight, bias = weight_and_bias(info)
    settings = {"lr": 0.02}
    if "weight_decay" in inspect.signature(info.optim_cls).parameters:
        settings["weight_decay"] = 0.3
    groups = [{"params": [weight], **settings}, {"params": [bias]}]
    optimizer = make(info, groups, arguments)
    without = make(info, weight_and_bias(info), arguments)
    assert_steps_are_stock_except_for_dropped(info, optimizer)
    train(info, without, range(3))
    assert not torch.equal(values_of(optimizer)[0], values_of(without)[0])
    assert_same_bits(values_of(optimizer)[1], values_of(without)[1])


# The step sizes of ASGD and Rprop are not lr.
@inputs_where(lambda info, _: info.name not in ("ASGD", "Rprop"))
def test_a_group_at_lr_0_does_not_move(info, arguments):
    weight, bias = weight_and_bias(info)
    optimizer = make(info, [{"params": [weight], "lr": 0.0}, {"params": [bias]}], arguments)
    before = values_of(optimizer)
    train(info, optimizer, range(3))
    assert_same_bits(values_of(optimizer)[0], before[0])
    assert not torch.equal(values_of(optimizer)[1], before[1])


@every_input
def test_a_tensor_lr_does_what_a_float_does(info, arguments):
    lr = 2.0**-9
    as_float = make(info, weight_and_bias(info), {**arguments, "lr": lr})
    as_tensor = make(info, weight_and_bias(info), {**arguments, "lr": torch.tensor(lr)})
    train(info, as_float, range(5))
    train(info, as_tensor, range(5))
    torch.testing.assert_close(values_of(as_tensor), values_of(as_float))


@every_input
def test_the_loss_goes_the_right_way(info, arguments):
    weight, bias, data = (
        torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((10, 5), 10, 5)
    )
    if info.name == "Muon":
        bias = bias.reshape(10, 1)  # it takes matrices only
    params = [nn.Parameter(weight), nn.Parameter(bias)]
    optimizer = make(info, params, arguments)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (params[0].mv(data) + params[1].flatten()).square().sum()
        loss.backward()
        if info.only_supports_sparse_grads:
            for param in params:
                param.grad = param.grad.to_sparse()
        return loss

    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    assert (closure().item() > first) if arguments.get("maximize") else (closure().item() < first)


def run_both(info: Any, arguments: dict[str, Any], flag: str) -> None:
    """The dropped elements rest whatever the implementation, and the others go the same way."""
    off, on = (
        make(info, weight_and_bias(info, torch.float64), {**arguments, flag: value})
        for value in (False, True)
    )
    for step in range(5):
        before = values_of(on)
        train(info, off, range(step, step + 1))
        train(info, on, range(step, step + 1))
        for old, new, keep in zip(before, values_of(on), kept(on, step), strict=True):
            assert_same_bits(new[~keep], old[~keep])
            assert (new != old)[keep].any()
        torch.testing.assert_close(values_of(on), values_of(off))


@inputs_where(lambda info, _: "foreach" in info.supported_impls)
def test_foreach_matches_the_for_loop(info, arguments):
    run_both(info, arguments, "foreach")


@inputs_where(lambda info, _: "cpu" in info.supports_fused_on)
def test_fused_matches_the_for_loop(info, arguments):
    run_both(info, arguments, "fused")


@pytest.mark.parametrize("name", [name for name, info in INFOS.items() if info.has_capturable_arg])
def test_capturable_is_refused_by_torch_on_a_cpu_before_anything_moves(name):
    optimizer = make(INFOS[name], weight_and_bias(INFOS[name]), {"capturable": True})
    before = values_of(optimizer)
    with pytest.raises(AssertionError, match="capturable=True"):
        train(INFOS[name], optimizer, range(1))
    assert_same_bits(values_of(optimizer), before)


@inputs_where(lambda info, _: info.supports_complex)
def test_a_complex_parameter_does_what_its_real_view_does(info, arguments):
    complex_params = weight_and_bias(info, torch.complex64)
    real_params = [
        nn.Parameter(torch.view_as_real(param.detach()).clone()) for param in complex_params
    ]
    optimizer, real = make(info, complex_params, arguments), make(info, real_params, arguments)
    for step in range(3):
        give_gradients(complex_params, step)
        for param, twin in zip(complex_params, real_params, strict=True):
            twin.grad = torch.view_as_real(param.grad).clone()
        optimizer.step()
        real.step()
        torch.testing.assert_close(
            [torch.view_as_real(value) for value in values_of(optimizer)], values_of(real)
        )


@every_class
def test_parameters_of_several_dtypes_step_together(name):
    params = [
        param
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
        for param in weight_and_bias(INFOS[name], dtype)
    ]
    assert_steps_are_stock_except_for_dropped(INFOS[name], make(INFOS[name], params, {"lr": 0.1}))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", [name for name, info in INFOS.items() if info.supports_sparse])
def test_sparse_gradients_do_what_dense_ones_do(name):
    arguments, _ = INFOS[name].metadata_for_sparse
    dense, sparse = (make(INFOS[name], weight_and_bias(INFOS[name]), arguments) for _ in range(2))
    for step in range(5):
        for optimizer in (dense, sparse):
            give_gradients(params_of(optimizer), step)
            for param in params_of(optimizer):
                param.grad[::2] = 0
                if optimizer is sparse:
                    param.grad = param.grad.to_sparse()
        dense.step()
        sparse.step()
        torch.testing.assert_close(values_of(sparse), values_of(dense))


def test_sparse_adam_moves_kept_elements_of_rows_with_gradient_alone():
    embedding = nn.Embedding(50, 8, sparse=True)
    optimizer = lrd.optim.SparseAdam(embedding.parameters(), lr=0.1, keep_prob=0.5, seed=SEED)
    rows = torch.tensor([3, 7, 7, 41])
    for step in range(3):
        before = values_of(optimizer)[0]
        optimizer.zero_grad()
        embedding(rows).square().sum().backward()
        optimizer.step()
        expected = torch.zeros(50, 8, dtype=torch.bool)
        expected[rows] = kept(optimizer, step)[0][rows]
        assert torch.equal(values_of(optimizer)[0] != before, expected)


@every_input
def test_without_gradients_a_step_does_nothing(info, arguments):
    optimizer = make(info, weight_and_bias(info), arguments)
    before, state = values_of(optimizer), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.step()
    assert_same_bits(values_of(optimizer), before)
    assert_same_bits(optimizer.state_dict()["state"], state)


@inputs_where(lambda info, arguments: info.name != "SGD" or arguments.get("momentum"))
def test_a_step_leaves_state_for_each_parameter(info, arguments):
    optimizer = make(info, weight_and_bias(info), arguments)
    train(info, optimizer, range(1))
    assert [len(optimizer.state[param]) > 0 for param in params_of(optimizer)] == [True, True]


# torch's checks of state_dict, copies and pickles


@every_input
def test_a_state_dict_continues_in_another_optimizer_and_is_deterministic(info, arguments):
    optimizer = make(info, weight_and_bias(info), arguments)
    train(info, optimizer, range(4))
    state = optimizer.state_dict()
    handed_over = saved_and_loaded(state)
    assert_same_bits(handed_over["state"], state["state"])
    assert handed_over["param_groups"] == state["param_groups"]
    other = make(info, [nn.Parameter(value) for value in values_of(optimizer)], arguments)
    other.load_state_dict(handed_over)
    assert handed_over["param_groups"] == state["param_groups"], "loading changes no state_dict"
    for step in range(4, 8):
        train(info, optimizer, range(step, step + 1))
        train(info, other, range(step, step + 1))
        assert_same_optimizers(optimizer, other)
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]


@every_input
def test_state_dicts_load_from_and_into_the_stock_optimizer(info, arguments):
    stock = info.optim_cls(weight_and_bias(info), **copy.deepcopy(arguments))
    train(info, stock, range(3))
    ours = make(info, [nn.Parameter(value) for value in values_of(stock)], arguments)
    ours.load_state_dict(saved_and_loaded(stock.state_dict()))
    assert_same_optimizers(ours, stock)
    assert_steps_are_stock_except_for_dropped(info, ours)
    back = info.optim_cls(
        [nn.Parameter(value) for value in values_of(ours)], **copy.deepcopy(arguments)
    )
    back.load_state_dict(saved_and_loaded(ours.state_dict()))
    before = values_of(back)
    train(info, back, range(3, 4))
    for new, old, keep in zip(values_of(back), before, kept(back, 3), strict=True):
        assert (new != old)[~keep].any(), "stock drops nothing"


@every_input
def test_an_older_state_dict_loads(info, arguments):
    """Without torch's newer flags, and with steps that are no tensors."""
    optimizer = make(info, weight_and_bias(info), arguments)
    twin = make(info, weight_and_bias(info), arguments)
    train(info, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for flag in info.not_og_supported_flags:
            group.pop(flag, None)
    for entries in state["state"].values():
        if isinstance(entries.get("step"), Tensor):
            entries["step"] = entries["step"].item()
    twin.load_state_dict(state)
    assert_steps_are_stock_except_for_dropped(info, twin, range(2, 4))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@every_input
def test_a_copy_is_complete_and_continues_as_the_original(info, arguments, copied):
    optimizer = make(info, weight_and_bias(info), arguments)
    train(info, optimizer, range(3))
    twin = copied(optimizer)
    assert type(twin) is type(optimizer)
    assert {key for key in vars(twin) if key[0] != "_"} == {
        key for key in vars(optimizer) if key[0] != "_"
    }
    assert not {id(param) for param in params_of(twin)} & {
        id(param) for param in params_of(optimizer)
    }
    train(info, optimizer, range(3, 6))
    train(info, twin, range(3, 6))
    assert_same_optimizers(twin, optimizer)
    assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@every_class
def test_named_parameters_keep_their_names_in_the_state_dict(name):
    info = INFOS[name]
    params = weight_and_bias(info)
    named = make(info, [("weight", params[0]), ("bias", params[1])])
    unnamed = make(info, weight_and_bias(info))
    train(info, named, range(3))
    assert named.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    unnamed.load_state_dict(named.state_dict())
    named.load_state_dict(make(info, weight_and_bias(info)).state_dict())
    assert named.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


# torch's checks of hooks


@every_class
def test_step_hooks_run_in_order_and_see_the_parameters_before_and_after_the_masked_step(name):
    info = INFOS[name]
    optimizer, alone = make(info, weight_and_bias(info)), make(info, weight_and_bias(info))
    seen: list[tuple[str, list[Tensor]]] = []

    def hook(word: str):
        return lambda *_: seen.append((word, values_of(optimizer)))

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
        optimizer.register_step_pre_hook(hook("pre 1")),
        optimizer.register_step_pre_hook(hook("pre 2")),
        optimizer.register_step_post_hook(hook("post 1")),
        optimizer.register_step_post_hook(hook("post 2")),
    ]
    before = values_of(optimizer)
    train(info, optimizer, range(1))
    for handle in handles:
        handle.remove()
    train(info, alone, range(1))
    assert [word for word, _ in seen] == [
        "global pre",
        "pre 1",
        "pre 2",
        "post 1",
        "post 2",
        "global post",
    ]
    for _, value in seen[:3]:
        assert_same_bits(value, before)
    for _, value in seen[3:]:
        assert_same_bits(value, values_of(alone))
    train(info, optimizer, range(1, 2))
    assert len(seen) == 6


@every_class
def test_a_pre_hook_may_change_the_gradients(name):
    info = INFOS[name]
    hooked, by_hand = make(info, weight_and_bias(info)), make(info, weight_and_bias(info))

    def negate(optimizer: Optimizer, *_: Any) -> None:
        for param in params_of(optimizer):
            param.grad = -param.grad

    hooked.register_step_pre_hook(negate)
    train(info, hooked, range(1))
    give_gradients(params_of(by_hand), 0, sparse=info.only_supports_sparse_grads)
    negate(by_hand)
    by_hand.step()
    assert_same_optimizers(hooked, by_hand)


@every_class
def test_state_dict_hooks_run_in_order_and_may_change_the_state_dict(name):
    optimizer = make(INFOS[name], weight_and_bias(INFOS[name]))
    train(INFOS[name], optimizer, range(1))
    order: list[str] = []

    def post(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        order.append("post")
        return {**state, "more": 1}

    optimizer.register_state_dict_pre_hook(lambda _: order.append("pre"))
    optimizer.register_state_dict_post_hook(post)
    optimizer.register_state_dict_pre_hook(lambda _: order.append("pre first"), prepend=True)
    state = optimizer.state_dict()
    assert order == ["pre first", "pre", "post"]
    assert state["more"] == 1
    assert state["param_groups"][0].keys() >= OWN_KEYS


@every_class
def test_load_state_dict_hooks_run_in_order_and_may_change_what_is_loaded(name):
    optimizer = make(INFOS[name], weight_and_bias(INFOS[name]))
    order: list[str] = []

    def with_keep_prob(keep_prob: float):
        def pre(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            order.append(f"pre {keep_prob}")
            return {
                **state,
                "param_groups": [
                    {**group, "keep_prob": keep_prob} for group in state["param_groups"]
                ],
            }

        return pre

    def post(optimizer: Optimizer) -> None:
        order.append(f"post {optimizer.param_groups[0]['mask_seed']}")

    optimizer.register_load_state_dict_pre_hook(with_keep_prob(0.25))
    optimizer.register_load_state_dict_pre_hook(with_keep_prob(0.75), prepend=True)
    optimizer.register_load_state_dict_post_hook(post)
    optimizer.load_state_dict(INFOS[name].optim_cls(weight_and_bias(INFOS[name])).state_dict())
    assert order == ["pre 0.75", "pre 0.25", f"post {SEED}"]
    assert optimizer.param_groups[0]["keep_prob"] == 0.25


# The classes


def arguments_of(cls: type) -> list[inspect.Parameter]:
    return [value for key, value in inspect.signature(cls).parameters.items() if key != "params"]


@every_class
def test_arguments_pass_through_by_position_and_by_keyword(name):
    stock = getattr(torch.optim, name)
    positional = [
        argument.default
        for argument in arguments_of(stock)
        if argument.kind is argument.POSITIONAL_OR_KEYWORD
    ]
    positional[0] = 0.125
    keywords = {argument.name: argument.default for argument in arguments_of(stock)}
    keywords["lr"] = 0.0625
    for args, kwargs in ((positional, {}), ([], keywords)):
        group = getattr(lrd.optim, name)(
            weight_and_bias(INFOS[name]), *args, **kwargs
        ).param_groups[0]
        stock_group = stock(weight_and_bias(INFOS[name]), *args, **kwargs).param_groups[0]
        assert {key: value for key, value in group.items() if key not in OWN_KEYS | {"params"}} == {
            key: value for key, value in stock_group.items() if key != "params"
        }
        assert group.keys() >= OWN_KEYS


@every_class
def test_a_class_is_torchs_class_with_lrdropout_attached(name):
    stock = getattr(torch.optim, name)
    first, second = weight_and_bias(INFOS[name])
    groups = [{"params": [first], "keep_prob": 0.25}, {"params": [second]}]
    optimizer = getattr(lrd.optim, name)(
        groups, keep_prob=0.75, seed=3, granularity="row", rescale=True
    )
    assert isinstance(optimizer, stock)
    assert isinstance(get_lr_dropout(optimizer), lrd.LRDropout)
    assert [group["keep_prob"] for group in optimizer.param_groups] == [0.25, 0.75]
    facts = {
        "mask_seed": 3,
        "mask_granularity": "row",
        "mask_rescale": True,
        "masks": "update",
        "mask_step": 0,
    }
    assert all(group.items() >= facts.items() for group in optimizer.param_groups)
    assert "keep_prob: 0.75" in repr(optimizer)


def test_a_users_class_may_derive_from_one():
    class Quiet(lrd.optim.SGD):
        """A user's class."""

    optimizer = Quiet(weight_and_bias(), lr=0.1, keep_prob=0.25)
    assert get_lr_dropout(optimizer) is not None
    assert optimizer.param_groups[0]["keep_prob"] == 0.25
    assert Quiet.__doc__ == "A user's class."
    assert "keep_prob" in inspect.signature(Quiet).parameters


@every_class
def test_the_docstring_names_keep_prob_and_torchs_class(name):
    doc = getattr(lrd.optim, name).__doc__
    assert doc.startswith(f"{name} with learning rate dropout.")
    assert "keep_prob (float, optional)" in doc
    assert f"torch.optim.{name}`" in doc
    assert "{name}" not in doc


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({"keep_prob": bad}, r"keep_prob must be in \(0, 1\]")
            for bad in (0, -0.1, 1.1, float("nan"), None, "half")
        ),
        *(
            ({"seed": bad}, r"seed must be an integer in \[0, 2\*\*64\)")
            for bad in (-1, 2**64, 0.5, None, True)
        ),
        ({"granularity": "rows"}, "granularity must be one of element, row, column, tensor"),
        ({"masks": "updates"}, "masks must be one of update, gradient, momentum_buffer"),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_by_name_and_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        lrd.optim.Adam(weight_and_bias(), **arguments)


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("keep_prob", 0.0),
        ("keep_prob", "0.5"),
        ("mask_seed", -1),
        ("mask_step", -1),
        ("mask_granularity", "rows"),
        ("masks", "updates"),
        ("masks", "momentum_buffer"),
    ],
    ids=str,
)
def test_a_bad_setting_of_one_group_is_refused_before_anything_moves(key, bad):
    param = nn.Parameter(torch.ones(20))
    param.grad = torch.ones(20)

    def make_and_step() -> None:
        lrd.optim.Adam([{"params": [param], key: bad}], lr=0.1).step()

    with pytest.raises(ValueError, match=key.removeprefix("mask_")):
        make_and_step()
    assert (param == 1).all()


@every_class
def test_an_unknown_argument_is_refused_by_name(name):
    with pytest.raises(TypeError, match="keep_probability"):
        getattr(lrd.optim, name)(weight_and_bias(INFOS[name]), keep_probability=0.5)


def test_lbfgs_is_refused_with_the_reason():
    optimizer = torch.optim.LBFGS(weight_and_bias())
    with pytest.raises(
        ValueError, match=r"LBFGS cannot take learning rate dropout.*several times along a line"
    ):
        lrd.LRDropout(optimizer)
    assert get_lr_dropout(optimizer) is None
    assert not hasattr(lrd.optim, "LBFGS")
