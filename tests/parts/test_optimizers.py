"""A recipe becomes the torch optimizer that it names; what is wrong with it is reported by key."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import lrd
from lrd import recipe
from lrd.errors import UserError
from lrd.parts import optimizers
from lrd.optim.dropout import get_lr_dropout
from tests.helpers.optimizers import assert_same_bits, saved_and_loaded


def make_model() -> nn.Module:
    layers = {"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), "fc": nn.Linear(4, 2)}
    return nn.Sequential(OrderedDict(layers))


def build(model: nn.Module | None = None, **sections) -> Optimizer:
    return optimizers.build_optimizer(model or make_model(), recipe.parse(sections, "test"))


def names_by_group(optimizer: Optimizer, model: nn.Module) -> dict[str, list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        group["name"]: [names[parameter] for parameter in group["params"]]
        for group in optimizer.param_groups
    }


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", optimizers.NAMES)
def test_each_name_builds_with_dropout_only_where_the_recipe_has_it(name, dropout):
    model = make_model()
    optimizer = build(
        model, optimizer={"name": name, "lr": 0.25}, lr_dropout={} if dropout else None
    )
    assert type(optimizer) is getattr(torch.optim, name)
    assert (get_lr_dropout(optimizer) is not None) == dropout
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]
    assert names_by_group(optimizer, model) == {
        "group0": [name for name, _ in model.named_parameters()]
    }


@pytest.mark.parametrize(
    "section",
    [
        {"name": "SGD", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"name": "SGD", "momentum": 0.9, "dampening": 0.1},
        {"name": "AdamW", "betas": (0.8, 0.9), "eps": 0.001, "amsgrad": True},
        {"name": "RMSprop", "alpha": 0.5, "centered": True},
        {"name": "Rprop", "etas": [0.4, 1.3]},
    ],
    ids=str,
)
def test_arguments_reach_the_optimizer(section):
    (group,) = build(optimizer=section).param_groups
    expected = {key: value for key, value in section.items() if key != "name"}
    assert {key: group[key] for key in expected} == expected


def test_what_the_recipe_leaves_out_is_torchs_default():
    (group,) = build(optimizer={"name": "Adam"}).param_groups
    (stock,) = torch.optim.Adam(make_model().parameters(), lr=0.1).param_groups
    del group["params"], group["name"], stock["params"]
    assert group == stock


def test_the_section_lr_dropout_reaches_the_groups():
    section = {"keep_prob": 0.3, "seed": 2**64 - 1, "granularity": "row", "rescale": True}
    (group,) = build(optimizer={"name": "SGD"}, lr_dropout=section, seed=5).param_groups
    assert group["keep_prob"] == 0.3
    assert group["mask_seed"] == 2**64 - 1
    assert group["mask_granularity"] == "row"
    assert group["mask_rescale"] is True


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"])
def test_the_kind_magma_attaches_magma_and_steps(name):
    model = make_model()
    section = {"name": name, "groups": [{"match": "fc.*", "keep_prob": 1.0}]}
    if name in ("SGD", "RMSprop"):
        section["momentum"] = 0.9
    magma_section = {"kind": "magma", "keep_prob": 0.3, "tau": 0.5, "score_start": 1}
    optimizer = build(model, optimizer=section, lr_dropout=magma_section, seed=5)

    magma = get_lr_dropout(optimizer)
    assert isinstance(magma, lrd.Magma)
    assert (magma.tau, magma.score_start) == (0.5, 1.0)
    settings = [
        tuple(group[key] for key in ("keep_prob", "mask_seed", "mask_granularity"))
        for group in optimizer.param_groups
    ]
    assert settings == [(0.3, 5, "tensor"), (1.0, 5, "tensor")]

    before = [parameter.detach().clone() for parameter in model.fc.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, old in zip(model.fc.parameters(), before, strict=True):
        assert (parameter != old).all()


def test_a_resumed_magma_continues_with_the_same_bits():
    section = {"kind": "magma", "keep_prob": 0.5}
    arguments = {"name": "SGD", "momentum": 0.9}

    def make(model: nn.Module) -> Optimizer:
        return build(model, optimizer=arguments, lr_dropout=section)

    def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(4))

    resumed_model = copy.deepcopy(model)
    resumed = make(resumed_model)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(model, optimizer, range(4, 10))
    train(resumed_model, resumed, range(4, 10))
    assert_same_bits(list(resumed_model.parameters()), list(model.parameters()))
    assert_same_bits(resumed.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize(
    ("section", "group"),
    [
        ({"name": "SGD"}, "group0"),
        ({"name": "RMSprop"}, "group0"),
        ({"name": "Adagrad"}, "group0"),
        ({"name": "Adadelta"}, "group0"),
        ({"name": "Rprop"}, "group0"),
        ({"name": "ASGD"}, "group0"),
        (
            {"name": "SGD", "momentum": 0.9, "groups": [{"match": "fc.*", "momentum": 0}]},
            "group1",
        ),
    ],
    ids=str,
)
def test_magma_without_a_momentum_is_refused(section, group):
    with pytest.raises(UserError, match=rf"^lr_dropout\.kind: .*momentum.* group {group}$"):
        build(optimizer=section, lr_dropout={"kind": "magma"})


def test_the_masks_have_the_recipes_seed_unless_they_have_their_own():
    (group,) = build(lr_dropout={}, seed=5).param_groups
    assert group["mask_seed"] == 5


# Groups


def test_groups_have_their_own_settings_and_the_first_match_wins():
    model = make_model()
    groups = [
        {"match": ["*.bias", "bn.*"], "weight_decay": 0.0, "keep_prob": 1.0, "name": "no_decay"},
        {"match": "fc.*", "lr": 0.5, "momentum": 0.8},
    ]
    section = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "groups": groups}
    optimizer = build(model, optimizer=section, lr_dropout={"keep_prob": 0.4})
    assert names_by_group(optimizer, model) == {
        "group0": ["conv.weight"],
        "no_decay": ["conv.bias", "bn.weight", "bn.bias", "fc.bias"],
        "group2": ["fc.weight"],
    }
    settings = [
        tuple(group[key] for key in ("lr", "momentum", "weight_decay", "keep_prob"))
        for group in optimizer.param_groups
    ]
    assert settings == [(0.1, 0.9, 0.01, 0.4), (0.1, 0.9, 0.0, 1.0), (0.5, 0.8, 0.01, 0.4)]


def test_if_the_patterns_match_all_parameters_there_is_no_group0():
    model = make_model()
    optimizer = build(model, optimizer={"groups": [{"match": "conv.*"}, {"match": "*"}]})
    assert list(names_by_group(optimizer, model)) == ["group1", "group2"]


# What is refused


GROUP = {"match": "fc.*"}
REFUSED = [
    ({"name": "SDG"}, "optimizer.name: .*did you mean SGD"),
    ({"name": "Lion"}, "optimizer.name: is 'Lion', may be SGD, "),
    ({"name": "LBFGS"}, "optimizer.name: LBFGS cannot be used"),
    ({"name": "SparseAdam"}, "optimizer.name: SparseAdam cannot be used"),
    ({"name": "Muon"}, "optimizer.name: Muon cannot be used here: it takes matrices only"),
    (
        {"name": "SGD", "momentun": 0.9},
        "optimizer.momentun: SGD has no such argument .did you mean momentum..; it has .*momentum",
    ),
    ({"name": "SGD", "betas": [0.9, 0.99]}, "optimizer.betas: SGD"),
    ({"name": "Adam", "momentum": 0.9}, "optimizer.momentum: Adam"),
    ({"name": "SGD", "params": []}, "optimizer.params: SGD"),
    ({"name": "Adam", "groups": [{**GROUP, "momentum": 0.9}]}, "optimizer.groups.0.momentum: Adam"),
    (
        {"groups": [GROUP, {"match": "conv2.*"}]},
        "optimizer.groups.1.match: 'conv2.\\*' matches no parameter",
    ),
    (
        {"groups": [GROUP, {"match": "fc.bias"}]},
        "optimizer.groups.1.match: 'fc.bias' matches no parameter",
    ),
    ({"groups": [{"match": []}]}, "optimizer.groups.0.match"),
    (
        {"groups": [{**GROUP, "name": "a"}, {"match": "bn.*", "name": "a"}]},
        "optimizer.groups: .*\\ba\\b",
    ),
    ({"groups": [{**GROUP, "name": "group0"}]}, "optimizer.groups: .*group0"),
    ({"name": "SGD", "nesterov": True}, "optimizer: SGD refuses: Nesterov"),
    ({"name": "Adam", "betas": [0.9, 1.5]}, "optimizer: Adam refuses: .*beta"),
    ({"name": "Adagrad", "lr_decay": -1}, "optimizer: Adagrad refuses: .*lr_decay"),
    ({"name": "Adagrad", "lr_decay": "fast"}, "optimizer: Adagrad refuses"),
    ({"name": "Adam", "fused": True, "foreach": True}, "optimizer: Adam refuses: .*fused"),
]


@pytest.mark.parametrize(("section", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_wrong_is_refused_in_one_line_that_names_the_key(section, message):
    with pytest.raises(UserError) as error:
        build(optimizer={"name": "SGD", **section})
    assert re.match(message, str(error.value))
    assert "\n" not in str(error.value)


def test_several_unknown_arguments_get_a_line_each():
    with pytest.raises(UserError) as error:
        build(optimizer={"name": "SGD", "alpha": 1, "rho": 2})
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == [
        "optimizer.alpha",
        "optimizer.rho",
    ]


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [("SGD", "momentum", -1), ("SGD", "momentum", "fast"), ("Adam", "betas", [0.9])],
)
def test_a_bad_value_of_a_groups_argument_is_refused_too(name, argument, value):
    """torch checks only what is given for all groups; a group's values fail later, or never."""
    with pytest.raises(UserError, match=r"optimizer\.groups\.0"):
        build(optimizer={"name": name, "groups": [{**GROUP, argument: value}]})
