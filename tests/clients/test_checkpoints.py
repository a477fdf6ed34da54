"""torch.distributed.checkpoint (DCP), in one process."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from lrd import LRDropout
from lrd.optim.dropout import get_lr_dropout
from tests.clients.reference import assert_same_bits, masked_by_hand
from tests.clients.small_training import make_model, train

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
flattened_or_not = pytest.mark.parametrize("is_flat", [False, True], ids=["nested", "flattened"])

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")


def make(name, *, n_groups=1, seed=None):
    """A model and its optimizer, with LRDropout if a seed is given."""
    cls, arguments = OPTIMIZERS[name]
    model = make_model()
    params = list(model.parameters())
    groups = (
        [{"params": params}] if n_groups == 1 else [{"params": params[:2]}, {"params": params[2:]}]
    )
    optimizer = cls(groups, **arguments)
    if seed is not None:
        LRDropout(optimizer, keep_prob=0.5, seed=seed)
    return model, optimizer


def train_by_hand(name, n_steps, *, seed, n_stock_steps=0):
    """Train without an interruption: first with the stock optimizer, then masked by hand."""
    cls, arguments = OPTIMIZERS[name]
    model = make_model()
    stock = cls(model.parameters(), **arguments)
    train(model, stock, range(n_stock_steps))

    by_hand = masked_by_hand(cls, seed=seed)(model.parameters(), **arguments)
    by_hand.load_state_dict(stock.state_dict())
    return train(model, by_hand, range(n_stock_steps, n_steps))


def save(folder, model, optimizer, options):
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(folder, model, optimizer, options, planner=None):
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder, planner=planner)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )


@pytest.mark.parametrize("n_groups", [1, 2])
@flattened_or_not
@every_optimizer
def test_a_run_continues_from_its_checkpoint(name, is_flat, n_groups, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    model, optimizer = make(name, n_groups=n_groups, seed=7)
    train(model, optimizer, range(3))
    save(tmp_path, model, optimizer, options)

    # The settings of the new optimizer do not count, those of the checkpoint do.
    fresh_model, fresh = make(name, n_groups=n_groups, seed=8)
    load(tmp_path, fresh_model, fresh, options)
    params = train(fresh_model, fresh, range(3, 6))
    assert_same_bits(params, train_by_hand(name, 6, seed=7))


@flattened_or_not
@every_optimizer
def test_a_stock_checkpoint_is_loaded_before_lr_dropout_is_attached(name, is_flat, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    save(tmp_path, model, optimizer, options)

    fresh_model, fresh = make(name)
    load(tmp_path, fresh_model, fresh, options)
    LRDropout(fresh, keep_prob=0.5, seed=7)
    params = train(fresh_model, fresh, range(3, 6))
    assert_same_bits(params, train_by_hand(name, 6, seed=7, n_stock_steps=3))


@flattened_or_not
@every_optimizer
def test_a_stock_checkpoint_is_loaded_in_part(name, is_flat, tmp_path):
    """What it lacks, the settings of the masks, stays as given."""
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    save(tmp_path, model, optimizer, options)

    fresh_model, fresh = make(name, seed=7)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    load(tmp_path, fresh_model, fresh, options, planner)
    params = train(fresh_model, fresh, range(3, 6))
    assert_same_bits(params, train_by_hand(name, 6, seed=7, n_stock_steps=3))


@every_optimizer
def test_a_stock_checkpoint_that_is_to_be_loaded_whole_names_what_it_lacks(name, tmp_path):
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    save(tmp_path, model, optimizer, StateDictOptions())

    fresh_model, fresh = make(name, seed=7)
    with pytest.raises(dcp.CheckpointException, match="keep_prob"):
        load(tmp_path, fresh_model, fresh, StateDictOptions())
    assert_same_bits(list(fresh_model.parameters()), list(make_model().parameters()))


@every_optimizer
def test_a_stock_state_dict_begins_with_the_settings_given(name):
    model, optimizer = make(name)
    train(model, optimizer, range(3))

    fresh_model, fresh = make(name, seed=7)
    fresh_model.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    params = train(fresh_model, fresh, range(3, 6))
    assert_same_bits(params, train_by_hand(name, 6, seed=7, n_stock_steps=3))


@every_optimizer
def test_a_checkpoint_with_masks_is_loaded_into_a_stock_optimizer(name, tmp_path):
    """To go on without learning rate dropout."""
    model, optimizer = make(name, seed=7)
    train(model, optimizer, range(3))
    save(tmp_path, model, optimizer, StateDictOptions())

    fresh_model, fresh = make(name)
    load(tmp_path, fresh_model, fresh, StateDictOptions())
    assert_same_bits(list(fresh_model.parameters()), list(model.parameters()))

    params = train(fresh_model, fresh, range(3, 5))
    get_lr_dropout(optimizer).remove()
    assert_same_bits(params, train(model, optimizer, range(3, 5)))
