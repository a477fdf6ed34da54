"""The masks are the same on every path.

The paths are torch's implementations, threads, compiled steps, copies, checkpoints and ranks.
"""

from __future__ import annotations

import copy
import datetime
import io
import os
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import lrd.optim
from lrd import LRDropout
from lrd.optim.dropout import get_lr_dropout
from tests.helpers.optimizers import (
    SHAPES,
    assert_same_bits,
    give_gradients,
    keep_masks,
    make_params,
    params_of,
    pickled,
    train,
    values,
    values_of,
)

SEED, KEEP_PROB = 7, 0.5
LARGE = ((200, 350), (33_000,))  # so many elements that torch divides them among threads


def kept(params: list[nn.Parameter], step: int) -> list[Tensor]:
    return keep_masks(params, seed=SEED, step=step, keep_prob=KEEP_PROB)


Step = Callable[[], Any]


def as_it_is(optimizer: Optimizer) -> Step:
    return optimizer.step


def compiled(backend: str) -> Callable[[Optimizer], Step]:
    def step_of(optimizer: Optimizer) -> Step:
        torch.compiler.reset()
        return torch.compile(optimizer.step, backend=backend)

    return step_of


def with_dropout(
    cls: type[Optimizer], arguments: dict[str, Any], step_of=as_it_is, steps=4, shapes=SHAPES
):
    """The parameters after each step."""
    params = make_params(shapes=shapes)
    optimizer = cls(params, **arguments)
    LRDropout(optimizer, keep_prob=KEEP_PROB, seed=SEED)
    step_it = step_of(optimizer)
    after = []
    for step in range(steps):
        give_gradients(params, step)
        step_it()
        after.append(values(params))
    assert optimizer.param_groups[0]["mask_step"] == steps
    return after


def by_hand(
    cls: type[Optimizer], arguments: dict[str, Any], step_of=as_it_is, steps=4, shapes=SHAPES
):
    """The same with a stock optimizer, whose dropped elements are restored here after each step."""
    params = make_params(shapes=shapes)
    step_it = step_of(cls(params, **arguments))
    after = []
    for step in range(steps):
        give_gradients(params, step)
        before = values(params)
        step_it()
        for param, old, keep in zip(params, before, kept(params, step), strict=True):
            param.data.copy_(torch.where(keep, param.detach(), old))
        after.append(values(params))
    return after


def dropped(after: list[list[Tensor]], shapes=SHAPES) -> list[list[Tensor]]:
    """Where each step left the old value."""
    points = [values(make_params(shapes=shapes)), *after]
    return [
        [new == old for new, old in zip(new_values, old_values, strict=True)]
        for old_values, new_values in pairwise(points)
    ]


# Implementations, threads, compiled steps

SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
ADAM = (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1})
ADAMW = (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True})
ADAGRAD = (torch.optim.Adagrad, {"lr": 0.1})
IMPLEMENTATIONS = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]
optimizers = pytest.mark.parametrize(
    ("cls", "arguments"), [SGD, ADAM, ADAMW, ADAGRAD], ids=["SGD", "Adam", "AdamW", "Adagrad"]
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@optimizers
def test_every_implementation_equals_the_stock_one_except_for_dropped_elements(
    cls, arguments, implementation
):
    arguments = {**arguments, **implementation}
    ours = with_dropout(cls, arguments, shapes=LARGE, steps=2)
    # What the user has marked as fused is taken in one pass where the kernels can do it, and they
    # round as torch's for-loop does.
    if arguments.get("fused") and cls is not torch.optim.Adagrad and "amsgrad" not in arguments:
        arguments |= {"fused": False, "foreach": False}
    stock = by_hand(cls, arguments, shapes=LARGE, steps=2)
    for ours_now, stock_now in zip(ours, stock, strict=True):
        assert_same_bits(ours_now, stock_now)
    for step, rests in enumerate(dropped(ours, LARGE)):
        for rest, keep in zip(rests, kept(make_params(shapes=LARGE), step), strict=True):
            assert rest[~keep].all()
            assert rest[keep].double().mean() < 0.001, (
                "a kept element rests where its update is rounded away alone"
            )


@optimizers
def test_one_thread_and_two_give_the_same_bits_where_stock_does(cls, arguments):
    before = torch.get_num_threads()
    ours, stock = [], []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours.append(with_dropout(cls, arguments, shapes=LARGE, steps=2)[-1])
            stock.append(by_hand(cls, arguments, shapes=LARGE, steps=2)[-1])
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*stock)
    assert_same_bits(*ours)


ignore_torchs_own_deprecations = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script:DeprecationWarning"
)


def assert_compiled_equals_by_hand(
    backend: str, cls: type[Optimizer], arguments: dict[str, Any]
) -> None:
    ours = with_dropout(cls, arguments, compiled(backend))
    stock = by_hand(cls, arguments, compiled(backend))
    for step, (ours_now, stock_now) in enumerate(zip(ours, stock, strict=True)):
        assert_same_bits(ours_now, stock_now)
        for rest, keep in zip(dropped(ours)[step], kept(make_params(), step), strict=True):
            assert rest[~keep].all()

    # torch refuses `capturable` on a CPU where the step is not compiled.
    on_a_cpu = {key: value for key, value in arguments.items() if key != "capturable"}
    torch.testing.assert_close(with_dropout(cls, on_a_cpu), ours, rtol=1e-4, atol=1e-6)


@ignore_torchs_own_deprecations
def test_a_compiled_step_is_the_compiled_stock_step_except_for_dropped_elements():
    assert_compiled_equals_by_hand("eager", *SGD)


COMPILED = {
    "SGD": SGD,
    "SGD foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "Adam": ADAM,
    "Adam foreach": (torch.optim.Adam, {"lr": 0.01, "foreach": True}),
    "Adam capturable": (torch.optim.Adam, {"lr": 0.01, "capturable": True}),
    "Adam fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
}


@pytest.mark.slow
@ignore_torchs_own_deprecations
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", COMPILED)
def test_every_compiled_step_is_the_compiled_stock_step_except_for_dropped_elements(name, backend):
    assert_compiled_equals_by_hand(backend, *COMPILED[name])


# torch.compile(fullgraph=True): the loss and its gradients may be one graph, the step may not.

INPUTS = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 1, 0, 1, 0, 0])


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return model


def loss_in_eager_mode(model: nn.Module) -> Step:
    def compute_gradients() -> None:
        nn.functional.cross_entropy(model(INPUTS), TARGETS).backward()

    return compute_gradients


def loss_in_one_graph(model: nn.Module) -> Step:
    @torch.compile(fullgraph=True, backend="eager")
    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(INPUTS), TARGETS)

    return lambda: loss().backward()


def gradients_in_one_graph(model: nn.Module) -> Step:
    def loss(params: dict[str, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(model, params, (INPUTS,))
        return nn.functional.cross_entropy(outputs, TARGETS)

    compiled_gradients = torch.compile(torch.func.grad(loss), fullgraph=True, backend="eager")

    def compute_gradients() -> None:
        params = dict(model.named_parameters())
        for name, gradient in compiled_gradients(params).items():
            params[name].grad = gradient.detach()

    return compute_gradients


@ignore_torchs_own_deprecations
@pytest.mark.parametrize("gradients_of", [loss_in_one_graph, gradients_in_one_graph])
def test_a_loss_and_its_gradients_may_be_one_graph(gradients_of):
    torch.compiler.reset()
    model, stock_model = small_model(), small_model()
    params, stock_params = list(model.parameters()), list(stock_model.parameters())
    optimizer, stock = SGD[0](params, **SGD[1]), SGD[0](stock_params, **SGD[1])
    LRDropout(optimizer, keep_prob=KEEP_PROB, seed=SEED)

    compute_gradients = gradients_of(model)
    compute_stock_gradients = loss_in_eager_mode(stock_model)
    for step in range(4):
        masks = kept(params, step)
        before, stock_before = values(params), values(stock_params)

        optimizer.zero_grad()
        compute_gradients()
        optimizer.step()

        stock.zero_grad()
        compute_stock_gradients()
        stock.step()
        for param, old, keep in zip(stock_params, stock_before, masks, strict=True):
            param.data.copy_(torch.where(keep, param.detach(), old))

        # A compiler may round otherwise, but what is dropped stays.
        torch.testing.assert_close(params, stock_params)
        for param, old, keep in zip(params, before, masks, strict=True):
            assert_same_bits(param[~keep], old[~keep])


# torch does not compile SGD's own step with fullgraph=True; it does compile Muon's.
@ignore_torchs_own_deprecations
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Muon])
def test_a_step_in_one_graph_is_refused_before_anything_moves(cls):
    params = make_params(shapes=((6, 5), (4, 3)))
    optimizer = cls(params, lr=0.1)
    LRDropout(optimizer, keep_prob=KEEP_PROB, seed=SEED)
    give_gradients(params, 0)

    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"LRDropout\._before_step"):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    assert_same_bits(params, make_params(shapes=((6, 5), (4, 3))))
    assert optimizer.param_groups[0]["mask_step"] == 0

    expected = by_hand(cls, {"lr": 0.1}, steps=1, shapes=((6, 5), (4, 3)))
    optimizer.step()
    assert_same_bits(params, expected[0])


def test_several_optimizers_in_one_program_do_what_each_does_alone():
    """Taking turns, with a removed one, a stock one and copies between them."""
    kinds = [
        SGD,
        ADAM,
        (torch.optim.AdamW, {"lr": 0.01, "foreach": True}),
        (torch.optim.SGD, {"lr": 0.1, "fused": True}),
    ]
    alone = [with_dropout(*kind) for kind in kinds]
    together = []
    for cls, arguments in kinds:
        params = make_params()
        together.append((cls(params, **arguments), params))
    for optimizer, _ in together:
        LRDropout(optimizer, keep_prob=KEEP_PROB, seed=SEED)
    stock_params = make_params()
    stock = torch.optim.SGD(stock_params, lr=0.1)
    for step in range(4):
        LRDropout(torch.optim.SGD(make_params(), lr=0.1)).remove()
        for (optimizer, params), expected in zip(together, alone, strict=True):
            give_gradients(params, step)
            give_gradients(params_of(copy.deepcopy(optimizer)), step)
            optimizer.step()
            assert_same_bits(values(params), expected[step])
        give_gradients(stock_params, step)
        before = values(stock_params)
        stock.step()
        assert all((param != old).all() for param, old in zip(stock_params, before, strict=True))


# Copies


def deep_copied(optimizer: Optimizer) -> Optimizer:
    return copy.deepcopy(optimizer)


def pickled_in_python(optimizer: Optimizer) -> Optimizer:
    buffer = io.BytesIO()
    pickle._Pickler(buffer, protocol=2).dump(optimizer)
    return pickle.loads(buffer.getvalue())


def through_torch_save(optimizer: Optimizer) -> Optimizer:
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def with_its_dropout(optimizer: Optimizer) -> Optimizer:
    dropout = copy.deepcopy(get_lr_dropout(optimizer))
    assert get_lr_dropout(dropout.optimizer) is dropout
    return dropout.optimizer


def twice(optimizer: Optimizer) -> Optimizer:
    return pickled(copy.deepcopy(optimizer))


every_copy = pytest.mark.parametrize(
    "copied", [deep_copied, pickled, pickled_in_python, through_torch_save, with_its_dropout, twice]
)
KINDS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "LRDropout on SGD": (torch.optim.SGD, {"lr": 0.1}),
    "LRDropout on Adam": (torch.optim.Adam, {"lr": 0.01}),
    "lrd.optim.SGD": (lrd.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "lrd.optim.AdamW": (lrd.optim.AdamW, {"lr": 0.01, "foreach": True}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
OWN = {"keep_prob": 0.25, "seed": 11, "granularity": "row", "rescale": True}


def make(kind: str, **dropout_arguments: Any) -> Optimizer:
    """Two groups, the second with another keep_prob."""
    cls, arguments = KINDS[kind]
    first, *rest = make_params()
    groups = [{"params": [first]}, {"params": rest, "keep_prob": 0.75}]
    if cls in (lrd.optim.SGD, lrd.optim.AdamW):
        return cls(groups, **arguments, **dropout_arguments)
    optimizer = cls(groups, **arguments)
    LRDropout(optimizer, **dropout_arguments)
    return optimizer


@every_copy
@every_kind
def test_a_copy_continues_with_the_same_masks_and_does_not_change_the_original(kind, copied):
    original, whole = make(kind, **OWN), make(kind, **OWN)
    train(whole, range(6))
    train(original, range(3))
    at_copy = values_of(original)
    steps = [group["mask_step"] for group in original.param_groups]
    twin = copied(original)
    assert get_lr_dropout(twin) is not get_lr_dropout(original)
    train(twin, range(3, 6))
    assert_same_bits(values_of(twin), values_of(whole))
    assert_same_bits(values_of(original), at_copy)
    assert [group["mask_step"] for group in original.param_groups] == steps == [3, 3]
    train(original, range(3, 6))
    assert_same_bits(values_of(original), values_of(whole))
    assert get_lr_dropout(twin).kept_fractions() == get_lr_dropout(original).kept_fractions()


@every_copy
@every_kind
def test_a_group_added_to_a_copy_gets_the_first_arguments(kind, copied):
    twin = copied(make(kind, **OWN))
    twin.add_param_group({"params": [nn.Parameter(torch.zeros(4))]})
    facts = {
        "keep_prob": 0.25,
        "mask_seed": 11,
        "mask_granularity": "row",
        "mask_rescale": True,
        "mask_step": 0,
    }
    assert twin.param_groups[2].items() >= facts.items()
    assert len(twin.state_dict()["param_groups"]) == 3


@every_copy
def test_remove_on_the_copy_leaves_the_original_attached(copied):
    original, whole = make("lrd.optim.SGD", **OWN), make("lrd.optim.SGD", **OWN)
    twin = copied(original)
    get_lr_dropout(twin).remove()
    assert get_lr_dropout(twin) is None
    assert "keep_prob" not in twin.param_groups[0]
    before = values_of(twin)
    train(twin, range(1))
    assert all((now != old).all() for now, old in zip(values_of(twin), before, strict=True))
    train(original, range(2))
    train(whole, range(2))
    assert_same_bits(values_of(original), values_of(whole))


def test_remove_on_the_original_leaves_the_copy_attached():
    original, whole = make("lrd.optim.SGD", **OWN), make("lrd.optim.SGD", **OWN)
    twin = copy.deepcopy(original)
    get_lr_dropout(original).remove()
    train(twin, range(2))
    train(whole, range(2))
    assert_same_bits(values_of(twin), values_of(whole))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_made_after_remove_is_a_stock_optimizer(copied):
    optimizer = make("lrd.optim.SGD", **OWN)
    get_lr_dropout(optimizer).remove()
    assert get_lr_dropout(copied(optimizer)) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, through_torch_save])
def test_a_model_and_its_optimizer_copied_together_still_share_their_parameters(copied):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = lrd.optim.Adam(model.parameters(), keep_prob=KEEP_PROB, seed=SEED)
    train(optimizer, range(2))
    before = values(list(model.parameters()))
    twin, dropout, twin_optimizer = copied([model, get_lr_dropout(optimizer), optimizer])
    assert get_lr_dropout(twin_optimizer) is dropout
    shared = zip(twin.parameters(), params_of(twin_optimizer), strict=True)
    assert all(twin_param is param for twin_param, param in shared)
    train(twin_optimizer, range(2, 4))
    assert_same_bits(values(list(model.parameters())), before)
    train(optimizer, range(2, 4))
    assert_same_bits(values(list(model.parameters())), values(list(twin.parameters())))


def test_a_deep_copy_of_a_masked_momentum_buffer_is_the_same_control():
    with pytest.warns(UserWarning, match="momentum_buffer"):
        optimizer = lrd.optim.SGD(
            make_params(), lr=0.1, momentum=0.9, masks="momentum_buffer", seed=SEED
        )
    train(optimizer, range(2))
    twin = copy.deepcopy(optimizer)
    train(optimizer, range(2, 4))
    train(twin, range(2, 4))
    assert_same_bits(values_of(twin), values_of(optimizer))
    for param, keep in zip(params_of(twin), kept(params_of(twin), 3), strict=True):
        assert not twin.state[param]["momentum_buffer"][~keep].any()


# torch.distributed.checkpoint, in one process

CHECKPOINTED = {
    "SGD": lambda params: lrd.optim.SGD(params, lr=0.1, keep_prob=KEEP_PROB, seed=SEED),
    "SGD momentum": lambda params: lrd.optim.SGD(
        params, lr=0.1, momentum=0.9, keep_prob=KEEP_PROB, seed=SEED
    ),
    "Adam": lambda params: lrd.optim.Adam(params, lr=0.01, keep_prob=KEEP_PROB, seed=SEED),
}


def model_and_optimizer(name: str) -> tuple[nn.Module, Optimizer]:
    model = nn.Linear(9, 7)
    with torch.no_grad():
        model.weight.copy_(torch.arange(63).view(7, 9) / 50)
        model.bias.fill_(1.0)
    return model, CHECKPOINTED[name](model.parameters())


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_distributed_checkpoint_continues_with_the_same_masks(name, asked_before):
    """torch.distributed.checkpoint takes a step at lr 0 wherever it finds no state.

    That is the first time it is asked here, and each time for plain SGD.
    """
    whole_model, whole = model_and_optimizer(name)
    train(whole, range(6))
    model, optimizer = model_and_optimizer(name)
    if asked_before:
        untouched = values(list(model.parameters()))
        get_optimizer_state_dict(model, optimizer)
        assert_same_bits(values(list(model.parameters())), untouched)
        assert optimizer.param_groups[0]["mask_step"] == 0
    train(optimizer, range(3))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    weights = copy.deepcopy(model.state_dict())

    resumed_model, resumed = model_and_optimizer(name)
    resumed_model.load_state_dict(weights)
    set_optimizer_state_dict(resumed_model, resumed, state)
    assert resumed.param_groups[0]["mask_step"] == 3
    for trained in (optimizer, resumed):
        params = params_of(trained)
        before = values(params)
        train(trained, range(3, 4))
        for old, param, keep in zip(before, params, kept(params, 3), strict=True):
            assert torch.equal(param != old, keep)
        train(trained, range(4, 6))

    # The step at lr 0 counts in Adam's bias correction, in the stock optimizer as well.
    if not asked_before:
        assert_same_bits(
            values(list(resumed_model.parameters())), values(list(whole_model.parameters()))
        )
        assert_same_bits(values(list(model.parameters())), values(list(whole_model.parameters())))


# Ranks

STEPS = 10
WORLDS = (1, 2, 3, 4)
LIMIT = datetime.timedelta(seconds=60)


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))


def train_a_rank(
    rank: int, folder: Path, group: distributed.ProcessGroup | None = None
) -> nn.Module:
    """Train one rank of a group, with data that no other rank has.

    What each step moved and the weights are left in a file. Without a group there is no DDP.
    """
    model = (
        tiny_model()
        if group is None
        else DistributedDataParallel(tiny_model(), process_group=group)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    LRDropout(optimizer, keep_prob=KEEP_PROB, seed=SEED)
    params, data = params_of(optimizer), torch.Generator().manual_seed(1000 + rank)
    moved = []
    for _ in range(STEPS):
        before = values(params)
        optimizer.zero_grad()
        model(torch.randn(8, 12, generator=data)).square().mean().backward()
        optimizer.step()
        moved.append([param.detach() != old for param, old in zip(params, before, strict=True)])
    torch.save({"moved": moved, "weights": values(params)}, folder / f"rank{rank}.pt")
    return model


def train_in_every_world(rank: int, folder: Path, port: int) -> None:
    """One process takes part in each group that has its rank: torch is imported 4 times, not 10."""
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=LIMIT)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=max(WORLDS), timeout=LIMIT
    )
    groups = {ranks: distributed.new_group(list(range(ranks)), timeout=LIMIT) for ranks in WORLDS}
    kept_alive = [
        train_a_rank(rank, folder / str(ranks), groups[ranks]) for ranks in WORLDS if rank < ranks
    ]
    distributed.barrier()
    assert kept_alive

    # DDP's destructor may hang: it joins gloo's threads while it holds the interpreter's lock.
    os._exit(0)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """Number of ranks -> what each rank left; 0: a single process without process group."""
    folder = tmp_path_factory.mktemp("worlds")
    for ranks in (0, *WORLDS):
        (folder / str(ranks)).mkdir()
    train_a_rank(0, folder / "0")
    # Port 0 is any free port.
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(train_in_every_world, args=(folder, store.port), nprocs=max(WORLDS))
    return {
        ranks: [torch.load(folder / str(ranks) / f"rank{rank}.pt") for rank in range(max(ranks, 1))]
        for ranks in (0, *WORLDS)
    }


@pytest.mark.parametrize("ranks", WORLDS)
def test_all_ranks_have_the_masks_of_a_single_process_and_the_same_weights(ranks, worlds):
    (single,) = worlds[0]
    for rank in worlds[ranks]:
        assert_same_bits(rank["weights"], worlds[ranks][0]["weights"])
        for step in range(STEPS):
            assert_same_bits(rank["moved"][step], single["moved"][step])
    same_data = torch.equal(worlds[ranks][0]["weights"][0], single["weights"][0])
    assert same_data == (ranks == 1), "each rank is to have other data"


def test_a_single_process_moves_the_elements_that_the_masks_keep(worlds):
    (single,) = worlds[0]
    for step in range(STEPS):
        assert_same_bits(single["moved"][step], kept(list(tiny_model().parameters()), step))
