"""LRDropout masks what an optimizer does to the parameters, and nothing else."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrd import LRDropout
from lrd.optim import mask
from lrd.optim.dropout import get_lr_dropout
from tests.helpers.optimizers import (
    assert_same_bits,
    assert_same_state,
    bits,
    every_optimizer,
    give_gradients,
    make,
    make_params,
    saved_and_loaded,
    train,
    values,
)


def stock_twin(optimizer: Optimizer, name: str) -> tuple[Optimizer, list[nn.Parameter]]:
    """A stock optimizer with copies of the parameters, gradients and state."""
    groups, params = [], []
    for group in optimizer.param_groups:
        twins = []
        for param in group["params"]:
            twin = nn.Parameter(param.detach().clone(), requires_grad=param.requires_grad)
            twin.grad = None if param.grad is None else param.grad.clone()
            twins.append(twin)
        groups.append({"params": twins})
        params += twins
    twin_optimizer = make(name, groups)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin_optimizer, params


# Against the stock optimizers


@every_optimizer
def test_keep_prob_1_is_the_stock_optimizer_bit_for_bit(name):
    params, stock_params = make_params(), make_params()
    optimizer, stock = make(name, params), make(name, stock_params)
    LRDropout(optimizer, keep_prob=1.0, rescale=True)
    train(optimizer, range(20))
    train(stock, range(20))
    assert_same_bits(params, stock_params)
    assert_same_state(optimizer, stock)


@every_optimizer
def test_each_step_is_the_stock_step_with_the_dropped_elements_restored(name):
    params = make_params()
    optimizer = make(name, [{"params": params[:1]}, {"params": params[1:]}])
    LRDropout(optimizer, keep_prob=0.5, seed=9)
    for step in range(8):
        give_gradients(params, step)
        before = values(params)
        stock, stock_params = stock_twin(optimizer, name)
        # A step that the user has marked as fused is taken in one pass: it rounds as the for-loop.
        for group in stock.param_groups:
            if group.get("fused"):
                group.update(fused=False, foreach=False)

        optimizer.step()
        stock.step()
        for index, (param, old, new) in enumerate(zip(params, before, stock_params, strict=True)):
            keep = mask.keep_mask(param.shape, seed=9, step=step, index=index, keep_prob=0.5)
            assert torch.equal(bits(param)[~keep], bits(old)[~keep])
            assert torch.equal(bits(param)[keep], bits(new)[keep])
        assert_same_state(optimizer, stock)


@every_optimizer
def test_an_update_at_lr_0_moves_no_dropped_element(name):
    params = make_params()
    optimizer = make(name, params)
    LRDropout(optimizer, keep_prob=2**-16, seed=9)
    train(optimizer, range(3))
    before = values(params)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros(()) if isinstance(group["lr"], Tensor) else 0.0
    train(optimizer, range(3, 4))
    assert_same_bits(params, before)


# Kinds of parameters


def transposed(*shape: int) -> Tensor:
    return torch.randn(*reversed(shape)).permute(*reversed(range(len(shape))))


KINDS = {
    "contiguous": lambda: torch.randn(4, 3, 5),
    "vector": lambda: torch.randn(37),
    "scalar": lambda: torch.randn(()),
    "one element": lambda: torch.randn(1, 1),
    "empty": lambda: torch.randn(0, 3),
    "channels_last": lambda: torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: transposed(6, 7),
    "strided": lambda: torch.randn(6, 14)[:, ::2],
    "bfloat16": lambda: torch.randn(9, 7).to(torch.bfloat16),
    "float16": lambda: torch.randn(9, 7).to(torch.float16),
    "float64": lambda: torch.randn(9, 7).to(torch.float64),
    "complex64": lambda: torch.randn(9, 7, dtype=torch.complex64),
    "complex128": lambda: torch.randn((), dtype=torch.complex128),
    "several chunks": lambda: torch.randn(130_000, 3),
    "long rows": lambda: torch.randn(2, 300_000),
}


def expected_keep(shape: torch.Size, granularity: str, position: dict) -> Tensor:
    """The mask in full, from `draw` alone."""
    if granularity == "element":
        return mask.draw(math.prod(shape), **position).view(shape)
    full = torch.empty(shape, dtype=torch.bool)
    if granularity == "row" and len(shape) > 0:
        full[...] = mask.draw(shape[0], **position).view(shape[0], *[1] * (len(shape) - 1))
    elif granularity == "column" and len(shape) > 1:
        full[...] = mask.draw(shape[1], **position).view(shape[1], *[1] * (len(shape) - 2))
    else:
        full[...] = mask.draw(1, **position).item()
    return full


@pytest.mark.parametrize("granularity", mask.GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_parameter_gets_the_mask_of_its_position(kind, granularity):
    torch.manual_seed(2)
    param = nn.Parameter(KINDS[kind]())
    strides = param.stride()
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))
    optimizer = torch.optim.SGD([{"params": [first, second]}, {"params": [param]}], lr=0.5)
    dropout = LRDropout(optimizer, keep_prob=0.6, seed=4, granularity=granularity)
    for step in range(3):
        first.grad = torch.ones_like(first)
        second.grad = torch.ones_like(second)
        param.grad = torch.ones_like(param) * (1 + 1j if param.is_complex() else 1)
        before = param.detach().clone()
        stepped = before - 0.5 * param.grad
        optimizer.step()
        old, new, now = bits(before), bits(stepped), bits(param)
        position = {"seed": 4, "step": step, "index": 2, "keep_prob": 0.6}
        keep = expected_keep(now.shape, granularity, position)
        assert torch.equal(now, torch.where(keep, new, old))
        moved = (now != old).double().mean() if now.numel() else torch.zeros(())
        assert dropout.kept_fractions()[1] == pytest.approx(float(moved), abs=1e-12)
    assert param.stride() == strides


SPECIAL = {
    torch.float32: (
        torch.int32,
        [0x7FC01234, 0x7F800001, 0x7F800000, -0x00800000, -0x80000000, 0x00000001],
    ),
    torch.bfloat16: (torch.int16, [0x7FC1, 0x7F81, 0x7F80, -0x0080, -0x8000, 0x0001]),
    torch.float64: (
        torch.int64,
        [0x7FF8 << 48 | 5, 0x7FF0 << 48 | 1, 0x7FF0 << 48, -0x0010 << 48, -0x8000 << 48, 1],
    ),
}


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("granularity", mask.GRANULARITIES)
@pytest.mark.parametrize("dtype", SPECIAL, ids=str)
def test_nan_infinity_and_negative_zero_keep_their_bits_where_dropped(dtype, granularity, rescale):
    """NaN payloads, a signalling NaN, both infinities, -0.0 and the smallest subnormal."""
    as_int, patterns = SPECIAL[dtype]
    raw = torch.tensor(patterns, dtype=as_int).repeat(40, 3)
    param = nn.Parameter(raw.clone().view(dtype))
    optimizer = torch.optim.SGD([param], lr=0.5)
    LRDropout(optimizer, keep_prob=0.5, seed=3, granularity=granularity, rescale=rescale)
    gradients = (1.0, math.nan, math.inf)
    for step in range(4):
        before = bits(param).clone()
        param.grad = torch.full_like(param, gradients[step % 3])
        optimizer.step()
        keep = mask.keep_mask(
            param.shape, seed=3, step=step, index=0, keep_prob=0.5, granularity=granularity
        )
        dropped = ~keep.expand(param.shape)
        assert torch.equal(bits(param)[dropped], before[dropped])


def test_the_number_of_threads_does_not_matter():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            param = nn.Parameter(torch.ones(70, 5000))
            optimizer = torch.optim.SGD([param], lr=0.1)
            LRDropout(optimizer, keep_prob=0.3, seed=1)
            train(optimizer, range(2))
            results.append(param.detach())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("granularity", mask.GRANULARITIES)
def test_a_cuda_device_moves_the_elements_the_cpu_moves(granularity):
    moved = []
    for device in ("cpu", "cuda"):
        params = [
            nn.Parameter(torch.ones(9, 7, device=device)),
            nn.Parameter(torch.ones((), device=device)),
        ]
        optimizer = torch.optim.SGD(params, lr=0.5)
        LRDropout(optimizer, keep_prob=0.4, seed=1, granularity=granularity)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        moved.append([(param != 1).cpu() for param in params])
    assert all(torch.equal(*pair) for pair in zip(*moved, strict=True))


# Groups


def one_group_each(
    keep_probs: list[float | None], **arguments
) -> tuple[Optimizer, list[nn.Parameter]]:
    params = [nn.Parameter(torch.zeros(400)) for _ in keep_probs]
    groups = [
        {"params": [param], **({} if keep_prob is None else {"keep_prob": keep_prob})}
        for param, keep_prob in zip(params, keep_probs, strict=True)
    ]
    return torch.optim.SGD(groups, lr=1.0, **arguments), params


def moved_by_one_step(optimizer: Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    before = values(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return [param.detach() != old for param, old in zip(params, before, strict=True)]


def expected_moves(seed: int, step: int, *keep_probs: float) -> list[Tensor]:
    return [
        mask.draw(400, seed=seed, step=step, index=index, keep_prob=keep_prob)
        for index, keep_prob in enumerate(keep_probs)
    ]


def test_each_group_has_its_own_keep_prob_which_may_change_during_training():
    optimizer, params = one_group_each([1.0, 0.25, None])
    LRDropout(optimizer, keep_prob=0.5, seed=6)
    assert_same_bits(moved_by_one_step(optimizer, params), expected_moves(6, 0, 1.0, 0.25, 0.5))
    optimizer.param_groups[0]["keep_prob"] = 0.1
    optimizer.param_groups[1]["keep_prob"] = 1.0
    assert_same_bits(moved_by_one_step(optimizer, params), expected_moves(6, 1, 0.1, 1.0, 0.5))


def test_a_group_added_later_gets_the_arguments_and_the_next_indices_and_counts_its_own_updates():
    optimizer, params = one_group_each([None, None])
    LRDropout(optimizer, keep_prob=0.3, seed=6, rescale=False)
    moved_by_one_step(optimizer, params)
    late = nn.Parameter(torch.zeros(400))
    optimizer.add_param_group({"params": [late]})
    assert optimizer.param_groups[2]["keep_prob"] == 0.3
    moves = moved_by_one_step(optimizer, [*params, late])
    assert_same_bits(moves[:2], expected_moves(6, 1, 0.3, 0.3))
    assert_same_bits(moves[2:], expected_moves(6, 0, 0.3, 0.3, 0.3)[2:])


def test_a_parameter_without_gradient_does_not_move_and_keeps_its_index():
    optimizer, params = one_group_each([None, None, None])
    dropout = LRDropout(optimizer, seed=6)
    params[0].requires_grad_(False)
    params[2].grad = torch.ones_like(params[2])
    optimizer.step()
    assert not params[0].any()
    assert not params[1].any()
    assert torch.equal(params[2] != 0, expected_moves(6, 0, 0.5, 0.5, 0.5)[2])
    assert dropout.kept_fractions()[:2] == [0.0, 0.0]


def test_a_parameter_that_gets_its_first_gradient_late_takes_the_mask_of_the_present_update():
    optimizer, params = one_group_each([None, None])
    LRDropout(optimizer, seed=6)
    moved_by_one_step(optimizer, params[:1])
    assert_same_bits(moved_by_one_step(optimizer, params), expected_moves(6, 1, 0.5, 0.5))


def test_several_optimizers_in_one_program_do_not_disturb_each_other():
    first, first_params = one_group_each([None])
    second, second_params = one_group_each([None])
    stock, stock_params = one_group_each([None])
    LRDropout(first, seed=1)
    LRDropout(second, seed=2, keep_prob=0.2)
    for step in range(3):
        assert_same_bits(moved_by_one_step(first, first_params), expected_moves(1, step, 0.5))
        assert_same_bits(moved_by_one_step(second, second_params), expected_moves(2, step, 0.2))
        assert all(moves.all() for moves in moved_by_one_step(stock, stock_params))


def test_the_masks_neither_read_nor_move_the_global_generators():
    optimizer, params = one_group_each([None])
    LRDropout(optimizer, seed=1)
    torch.manual_seed(5)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert_same_bits(moved_by_one_step(optimizer, params), expected_moves(1, 0, 0.5))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


# What counts as an update


@pytest.mark.parametrize("zero", [0.0, 0, torch.zeros(())], ids=repr)
def test_an_update_at_lr_0_does_not_count(zero):
    optimizer, params = one_group_each([None])
    dropout = LRDropout(optimizer, seed=6)
    moved_by_one_step(optimizer, params)
    optimizer.param_groups[0]["lr"] = zero
    assert not moved_by_one_step(optimizer, params)[0].any()
    assert dropout.kept_fractions() == [0.0]
    assert not dropout.keeps(0, 0)
    optimizer.param_groups[0]["lr"] = 1.0
    assert_same_bits(moved_by_one_step(optimizer, params), expected_moves(6, 1, 0.5))


def test_a_step_counts_in_a_group_without_gradients_if_another_has_some():
    optimizer, params = one_group_each([None, None])
    LRDropout(optimizer, seed=6)
    optimizer.step()
    assert [group["mask_step"] for group in optimizer.param_groups] == [0, 0]

    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert [group["mask_step"] for group in optimizer.param_groups] == [1, 1]

    optimizer.param_groups[1]["lr"] = 0.0
    optimizer.step()
    assert [group["mask_step"] for group in optimizer.param_groups] == [2, 1]


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_a_gradient_scaler_skips_does_not_count(fused):
    optimizer, params = one_group_each([None], fused=fused)
    LRDropout(optimizer, seed=6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    params[0].grad = torch.full_like(params[0], math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert not params[0].any()
    assert_same_bits(moved_by_one_step(optimizer, params), expected_moves(6, 0, 0.5))


def test_the_state_dict_of_distributed_checkpoint_does_not_shift_the_masks():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    LRDropout(optimizer, seed=6)
    before = values(list(model.parameters()))
    get_optimizer_state_dict(model, optimizer)
    assert_same_bits(list(model.parameters()), before)
    moves = moved_by_one_step(optimizer, list(model.parameters()))
    assert torch.equal(moves[0], mask.keep_mask((20, 20), seed=6, step=0, index=0, keep_prob=0.5))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_may_bring_the_gradients(by_name):
    optimizer, params = one_group_each([None])
    LRDropout(optimizer, seed=6)

    def closure() -> float:
        optimizer.zero_grad()
        params[0].sum().backward()
        return 7.0

    for step in range(2):
        before = params[0].detach().clone()
        assert (optimizer.step(closure=closure) if by_name else optimizer.step(closure)) == 7.0
        assert_same_bits([params[0].detach() != before], expected_moves(6, step, 0.5))


@pytest.mark.parametrize("lr", [1.0, 0.0])
def test_a_gradient_that_a_later_step_hook_brings_is_refused(lr):
    optimizer, params = one_group_each([None])
    LRDropout(optimizer)
    optimizer.param_groups[0]["lr"] = lr

    def bring_gradient(*_) -> None:
        params[0].grad = torch.ones_like(params[0])

    optimizer.register_step_pre_hook(bring_gradient)
    with pytest.raises(RuntimeError, match="register that hook before LRDropout is attached"):
        optimizer.step()


# Rescaling


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("keep_prob", [0.5, 0.3])
def test_rescaled_elements_move_by_the_stock_update_over_keep_prob(name, keep_prob):
    params = make_params(torch.float64)
    optimizer = make(name, params)
    LRDropout(optimizer, keep_prob=keep_prob, seed=2, rescale=True)
    for step in range(5):
        give_gradients(params, step)
        before = values(params)
        stock, stock_params = stock_twin(optimizer, name)
        optimizer.step()
        stock.step()
        used = mask.effective_keep_prob(keep_prob)
        for index, (param, old, new) in enumerate(zip(params, before, stock_params, strict=True)):
            keep = mask.keep_mask(param.shape, seed=2, step=step, index=index, keep_prob=keep_prob)
            torch.testing.assert_close(
                (param.detach() - old)[keep],
                (new.detach() - old)[keep] / used,
                rtol=1e-12,
                atol=1e-14,
            )
            assert torch.equal(bits(param)[~keep], bits(old)[~keep])


# Saving and loading


@pytest.mark.parametrize("name", ["SGD", "SGD momentum", "Adam"])
def test_a_loaded_state_dict_continues_with_the_same_masks(name):
    arguments = {"keep_prob": 0.3, "seed": 2**64 - 1, "granularity": "row", "rescale": True}
    whole_params, params = make_params(), make_params()
    whole = make(name, whole_params)
    LRDropout(whole, **arguments)
    train(whole, range(10))

    first = make(name, params)
    LRDropout(first, **arguments)
    train(first, range(5))
    state = saved_and_loaded(first.state_dict())

    resumed_params = [nn.Parameter(value) for value in values(params)]
    resumed = make(name, resumed_params)
    LRDropout(resumed)
    resumed.load_state_dict(state)
    train(resumed, range(5, 10))
    assert_same_bits(resumed_params, whole_params)
    assert_same_state(resumed, whole)


def test_a_stock_state_dict_loads_and_the_count_begins_at_0():
    stock, stock_params = one_group_each([None], momentum=0.9)
    moved_by_one_step(stock, stock_params)
    optimizer, params = one_group_each([None], momentum=0.9)
    LRDropout(optimizer, keep_prob=0.3, seed=6)
    moved_by_one_step(optimizer, params)
    optimizer.load_state_dict(saved_and_loaded(stock.state_dict()))
    assert_same_state(optimizer, stock)
    assert_same_bits(moved_by_one_step(optimizer, params), expected_moves(6, 0, 0.3))


def test_a_stock_state_dict_leaves_each_group_its_own_keep_prob():
    stock, stock_params = one_group_each([None, None])
    moved_by_one_step(stock, stock_params)
    optimizer, params = one_group_each([1.0, 0.2])
    LRDropout(optimizer, keep_prob=0.5, seed=6)
    optimizer.load_state_dict(saved_and_loaded(stock.state_dict()))
    assert_same_bits(moved_by_one_step(optimizer, params), expected_moves(6, 0, 1.0, 0.2))


def test_our_state_dict_loads_into_a_stock_optimizer():
    params, stock_params = make_params(), make_params()
    optimizer, stock = make("Adam", params), make("Adam", stock_params)
    LRDropout(optimizer, keep_prob=0.3)
    train(optimizer, range(3))
    stock.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_same_state(stock, optimizer)
    before = values(stock_params)
    train(stock, range(3, 4))
    assert all((param != old).all() for param, old in zip(stock_params, before, strict=True))


# Looking at it, attaching and detaching


@pytest.mark.parametrize("keep_prob", [0.5, 0.2, 1.0])
@pytest.mark.parametrize("granularity", mask.GRANULARITIES)
def test_kept_fractions_and_keeps_report_what_moved(granularity, keep_prob):
    params = [
        nn.Parameter(torch.zeros(shape)) for shape in ((9, 5), (3, 4, 2), (), (11,), (0,), (2, 7))
    ]
    optimizer = torch.optim.SGD(
        [{"params": params[:2]}, {"params": params[2:5]}, {"params": params[5:]}], lr=1.0
    )
    dropout = LRDropout(optimizer, keep_prob=keep_prob, seed=5, granularity=granularity)
    for _ in range(3):
        optimizer.param_groups[2]["lr"] = 1.0 - optimizer.param_groups[2]["lr"]
        moves = moved_by_one_step(optimizer, params)
        by_group = [
            torch.cat([move.flatten() for move in part])
            for part in (moves[:2], moves[2:5], moves[5:])
        ]
        assert dropout.kept_fractions() == [
            pytest.approx(float(move.double().mean())) for move in by_group
        ]
        for index, move in enumerate(moves):
            assert [
                dropout.keeps(index, element) for element in range(move.numel())
            ] == move.flatten().tolist()


def test_before_the_first_update_nothing_was_kept():
    optimizer, _ = one_group_each([None, None])
    dropout = LRDropout(optimizer)
    assert dropout.kept_fractions() == [0.0, 0.0]
    assert not dropout.keeps(0, 0)


def test_attaching_twice_is_refused():
    optimizer, params = one_group_each([None])
    dropout = LRDropout(optimizer, seed=6)
    with pytest.raises(ValueError, match="already"):
        LRDropout(optimizer, seed=7)
    assert get_lr_dropout(optimizer) is dropout
    assert_same_bits(moved_by_one_step(optimizer, params), expected_moves(6, 0, 0.5))


@every_optimizer
def test_after_remove_the_optimizer_is_stock_again(name):
    params = make_params()
    optimizer = make(name, params)
    dropout = LRDropout(optimizer)
    train(optimizer, range(2))
    dropout.remove()
    assert get_lr_dropout(optimizer) is None
    stock, stock_params = stock_twin(optimizer, name)
    train(optimizer, range(2, 6))
    train(stock, range(2, 6))
    assert_same_bits(params, stock_params)
    assert_same_state(optimizer, stock)


def test_remove_takes_a_keep_prob_that_a_group_had_before_with_it():
    optimizer, _ = one_group_each([0.3])
    LRDropout(optimizer).remove()
    assert "keep_prob" not in optimizer.param_groups[0]


def test_after_remove_a_new_group_and_a_stock_state_dict_stay_stock():
    optimizer, _ = one_group_each([None])
    stock_state = copy.deepcopy(optimizer.state_dict())
    dropout = LRDropout(optimizer)
    dropout.remove()
    optimizer.load_state_dict(stock_state)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4))]})
    assert not {key for group in optimizer.param_groups for key in group} & {
        "keep_prob",
        "mask_seed",
        "mask_step",
    }


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"keep_prob": 0.0}, "keep_prob"),
        ({"keep_prob": 1.5}, "keep_prob"),
        ({"keep_prob": math.nan}, "keep_prob"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"granularity": "elements"}, "granularity"),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_by_name_and_nothing_is_attached(arguments, name):
    optimizer, params = one_group_each([None])
    keys = set(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=name):
        LRDropout(optimizer, **arguments)
    assert get_lr_dropout(optimizer) is None
    assert set(optimizer.param_groups[0]) == keys
    assert moved_by_one_step(optimizer, params)[0].all()


def test_a_bad_keep_prob_of_a_group_is_refused():
    optimizer, _ = one_group_each([0.5, 0.0])
    with pytest.raises(ValueError, match="keep_prob"):
        LRDropout(optimizer)
    assert get_lr_dropout(optimizer) is None


@pytest.mark.parametrize("keep_prob", [0.0, -0.5, 1.5, math.nan])
def test_a_keep_prob_that_turns_bad_during_training_is_refused_before_anything_moves(keep_prob):
    optimizer, params = one_group_each([None])
    LRDropout(optimizer)
    optimizer.param_groups[0]["keep_prob"] = keep_prob
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match="keep_prob"):
        optimizer.step()
    assert not params[0].any()


# From the formulas


def reference_sgd(x, grad, state, keep, t):
    state["v"] = 0.9 * state["v"] + grad + 0.01 * x
    return np.where(keep, x - 0.05 * state["v"], x)


def reference_adam(x, grad, state, keep, t):
    grad = grad + 0.01 * x
    state["m"] = 0.9 * state["m"] + 0.1 * grad
    state["v"] = 0.99 * state["v"] + 0.01 * grad**2
    m_hat, v_hat = state["m"] / (1 - 0.9**t), state["v"] / (1 - 0.99**t)
    return np.where(keep, x - 0.05 * m_hat / (np.sqrt(v_hat) + 1e-8), x)


@pytest.mark.parametrize(
    ("reference", "cls", "arguments"),
    [
        (reference_sgd, torch.optim.SGD, {"momentum": 0.9}),
        (reference_adam, torch.optim.Adam, {"betas": (0.9, 0.99)}),
    ],
    ids=["SGD", "Adam"],
)
def test_fifty_steps_agree_with_the_formulas(reference, cls, arguments):
    """On the quadratic sum(a * (x - b)**2) / 2, whose gradient follows where the parameter went."""
    a, b, x = np.random.default_rng(0).normal(size=(3, 200))
    a = np.abs(a)
    param = nn.Parameter(torch.from_numpy(x.copy()))
    optimizer = cls([param], lr=0.05, weight_decay=0.01, **arguments)
    LRDropout(optimizer, keep_prob=0.5, seed=3)
    state = {"m": np.zeros(200), "v": np.zeros(200)}
    for step in range(50):
        keep = mask.draw(200, seed=3, step=step, index=0, keep_prob=0.5).numpy()
        x = reference(x, a * (x - b), state, keep, step + 1)
        param.grad = torch.from_numpy(a) * (param.detach() - torch.from_numpy(b))
        optimizer.step()
        np.testing.assert_allclose(param.detach().numpy(), x, rtol=0, atol=1e-12)


def mean_step_under_a_constant_gradient(dropout: bool) -> float:
    """Momentum 0.9, lr 1, gradient 1: over 10,000 elements and the last 50 of 200 steps."""
    param = nn.Parameter(torch.zeros(10_000, dtype=torch.float64))
    optimizer = torch.optim.SGD([param], lr=1.0, momentum=0.9)
    if dropout:
        LRDropout(optimizer, keep_prob=0.5, seed=0)
    param.grad = torch.ones_like(param)
    for step in range(200):
        if step == 150:
            before = param.detach().clone()
        optimizer.step()
    return float((before - param.detach()).mean()) / 50


def test_momentum_keeps_accumulating_where_elements_are_dropped():
    """Masking the momentum buffer itself would give 0.5 / (1 - 0.5 * 0.9) = 0.91."""
    four_sigma = 4 * 5.0 / math.sqrt(50 * 10_000)
    assert mean_step_under_a_constant_gradient(dropout=True) == pytest.approx(5.0, abs=four_sigma)
    assert mean_step_under_a_constant_gradient(dropout=False) == pytest.approx(10.0, abs=1e-5)
