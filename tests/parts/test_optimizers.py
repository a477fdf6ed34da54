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
from lrd.optim.dropout import get_lr_dropout
from lrd.parts import checks, optimizers
from tests.helpers.optimizers import assert_same_bits, saved_and_loaded, train, values_of

OWN = "tests.helpers.own_parts.optim"


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


# Weight decay for matrices alone


def weight_decays(optimizer: Optimizer) -> dict[str, float]:
    return {group["name"]: group["weight_decay"] for group in optimizer.param_groups}


def test_without_decay_of_norms_and_biases_each_group_is_split_by_dimensions():
    model = make_model()
    groups = [
        {"match": "bn.*", "name": "norm", "lr": 0.5, "keep_prob": 0.9},
        {"match": "fc.*", "name": "head", "lr": 0.2},
    ]
    section = {
        "name": "AdamW",
        "lr": 0.1,
        "weight_decay": 0.01,
        "decay_norms_and_biases": False,
        "groups": groups,
    }
    optimizer = build(model, optimizer=section, lr_dropout={"keep_prob": 0.4})
    assert names_by_group(optimizer, model) == {
        "group0": ["conv.weight"],
        "group0_no_decay": ["conv.bias"],
        "norm_no_decay": ["bn.weight", "bn.bias"],
        "head": ["fc.weight"],
        "head_no_decay": ["fc.bias"],
    }
    settings = [
        tuple(group[key] for key in ("lr", "weight_decay", "keep_prob"))
        for group in optimizer.param_groups
    ]
    assert settings == [
        (0.1, 0.01, 0.4),
        (0.1, 0.0, 0.4),
        (0.5, 0.0, 0.9),
        (0.2, 0.01, 0.4),
        (0.2, 0.0, 0.4),
    ]


def test_a_groups_own_weight_decay_holds_for_all_its_parameters():
    groups = [{"match": "fc.*", "name": "head", "weight_decay": 0.1}]
    section = {"weight_decay": 0.01, "decay_norms_and_biases": False, "groups": groups}
    assert weight_decays(build(optimizer=section)) == {
        "group0": 0.01,
        "group0_no_decay": 0.0,
        "head": 0.1,
    }


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"name": "AdamW"}, {"group0": 0.01, "group0_no_decay": 0.0}),  # torch's default decays
        ({"name": "Adam"}, {"group0": 0}),
        ({"name": "AdamW", "weight_decay": 0.0}, {"group0": 0.0}),
        ({"name": f"{OWN}:Lion", "weight_decay": 1}, {"group0": 1.0, "group0_no_decay": 0.0}),
    ],
    ids=str,
)
def test_groups_are_split_only_where_there_is_a_weight_decay(section, expected):
    assert weight_decays(build(optimizer={**section, "decay_norms_and_biases": False})) == expected


def test_training_without_decay_of_biases_is_torchs_with_such_groups():
    model = make_model()
    stock_model = copy.deepcopy(model)
    section = {"name": "AdamW", "lr": 0.1, "weight_decay": 0.5, "decay_norms_and_biases": False}
    optimizer = build(model, optimizer=section)

    matrices = [parameter for parameter in stock_model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in stock_model.parameters() if parameter.ndim == 1]
    stock = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.1, weight_decay=0.5
    )
    train(optimizer, range(4))
    train(stock, range(4))
    assert_same_bits(values_of(optimizer), values_of(stock))


# Own optimizers


def check(model: nn.Module | None = None, **sections) -> None:
    checks.check_optimizer(model or make_model(), recipe.parse(sections, "test"))


def test_an_own_class_gets_the_sections_keys_and_groups():
    groups = [{"match": "fc.*", "betas": [0.5, 0.5], "name": "head"}]
    section = {"lr": 0.25, "betas": [0.8, 0.95], "weight_decay": 0.1, "groups": groups}
    optimizer = build(optimizer={"name": f"{OWN}:Lion", **section}, lr_dropout={})
    assert type(optimizer).__name__ == "Lion"
    assert get_lr_dropout(optimizer) is not None
    settings = [(group["lr"], tuple(group["betas"])) for group in optimizer.param_groups]
    assert settings == [(0.25, (0.8, 0.95)), (0.25, (0.5, 0.5))]


def test_an_own_function_may_take_any_argument():
    optimizer = build(optimizer={"name": f"{OWN}:make_sgd", "momentum": 0.5, "dampening": "1e-1"})
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["dampening"]) == (0.5, 0.1)


@pytest.mark.parametrize("kind", [None, "dropout", "magma"])
@pytest.mark.parametrize(
    "section",
    [
        {"name": f"{OWN}:Lion", "weight_decay": 0.1},
        {"name": f"{OWN}:make_sgd", "momentum": 0.9},
        {"name": "torch.optim:NAdam"},
        {"name": "torch.optim:SGD", "momentum": 0.9, "groups": [{"match": "fc.*", "lr": 0.0}]},
        {"name": f"{OWN}:Lion", "lr": 0.0},
    ],
    ids=str,
)
def test_a_sound_own_optimizer_passes_the_check(section, kind):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    check(model, optimizer=section, lr_dropout=kind and {"kind": kind, "keep_prob": 0.3})
    assert_same_bits(dict(model.state_dict()), dict(before))
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ForgetfulSGD", ": its state_dict does not hold all of its state: after loading it"),
        ("RandomSGD", ": two runs of it with the same gradients differ"),
        ("FixedSGD", ": the lr of its parameter groups has no effect"),
        (
            "UnsavableSGD",
            ": a checkpoint cannot hold its state_dict: state.0.bookkeeper is a Bookkeeper; ",
        ),
        ("CountingSGD", ": its state has 'count', which belongs to no parameter"),
        ("LazySGD", ": 8 steps of it move no parameter"),
        ("ClosureSGD", r": its step\(closure\) failed: TypeError: "),
        ("LateSGD", ": learning rate dropout does not reach it: a dropped element has moved"),
        ("AveragingSGD", ": it has other weights for evaluations"),
    ],
)
def test_a_fault_of_an_own_optimizer_is_one_line(name, message):
    with pytest.raises(UserError) as error:
        check(optimizer={"name": f"{OWN}:{name}"}, lr_dropout={})
    assert re.match(f"optimizer.name: {OWN}:{name}{message}", str(error.value))
    assert "\n" not in str(error.value)


def test_an_optimizer_meets_parameters_without_a_gradient_if_the_network_has_them():
    model = make_model()
    check(model, optimizer={"name": f"{OWN}:CarelessSGD"})
    model.fc.bias.requires_grad_(False)
    check(model, optimizer={"name": f"{OWN}:Lion"})
    with pytest.raises(UserError, match=r"its step.* failed: TypeError.*\(optim.py, line \d+\)$"):
        check(model, optimizer={"name": f"{OWN}:CarelessSGD"})


def test_an_optimizer_that_runs_no_hooks_is_refused_with_lr_dropout_alone():
    section = {"name": f"{OWN}:WrappedSGD"}
    with pytest.raises(UserError, match=r"^lr_dropout: WrappedSGD runs not all of torch's hooks"):
        build(optimizer=section, lr_dropout={})
    build(optimizer=section)


@pytest.mark.parametrize("control", ["gradient", "momentum_buffer"])
@pytest.mark.filterwarnings("ignore")
def test_where_the_elements_themselves_are_not_masked_they_may_move(control):
    section = {"name": "torch.optim:SGD", "momentum": 0.9}
    check(optimizer=section, lr_dropout={"masks": control})


PACKAGED = [
    "timm.optim:Lion",
    "timm.optim:Lamb",
    "timm.optim:Adan",
    "timm.optim:AdaBelief",
    "pytorch_optimizer:Lion",
    "pytorch_optimizer:Lamb",
    "pytorch_optimizer:Adan",
    "pytorch_optimizer:AdaBelief",
    "pytorch_optimizer:SOAP",
]


@pytest.mark.parametrize("name", PACKAGED)
@pytest.mark.filterwarnings("ignore")
def test_optimizers_of_other_packages_pass_the_check(name):
    pytest.importorskip(name.partition(":")[0])
    check(optimizer={"name": name, "lr": 0.01, "weight_decay": 0.1}, lr_dropout={})


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
    ({"lr": 1e300}, "optimizer.lr: is 1e.300, but the largest number of float32 is 3.4e.38"),
    ({"momentum": 1e40}, "optimizer.momentum: is 1e.40, but the largest number of float32"),
    ({"groups": [{**GROUP, "lr": 1e300}]}, "optimizer.groups.0.lr: is 1e.300, but the largest"),
    ({"name": "Adam", "betas": [0.9, -1e39]}, "optimizer.betas: is .0.9, -1e.39., but the"),
    (
        {"name": "Adadelta", "momentum": 0.9},
        "optimizer.momentum: Adadelta has no such argument",
    ),
    ({"name": "torch.optim:LBFGS"}, "optimizer.name: LBFGS cannot be used here"),
    ({"name": "torch.optim:Muon"}, "optimizer.name: Muon cannot be used here"),
    ({"name": "no_such_module:Lion"}, "optimizer.name: no_such_module:Lion: there is no module"),
    ({"name": f"{OWN}:Loin"}, f"optimizer.name: {OWN}:Loin: .* has no Loin .did you mean Lion"),
    ({"name": f"{OWN}:NoOptimizer"}, f"optimizer.name: {OWN}:NoOptimizer is not a subclass of"),
    ({"name": f"{OWN}:make_nothing"}, f"optimizer.name: {OWN}:make_nothing returns a NoneType, "),
    ({"name": f"{OWN}:BareSGD"}, f"optimizer.name: {OWN}:BareSGD does not call super"),
    ({"name": f"{OWN}:Lion", "momentum": 0.9}, f"optimizer.momentum: {OWN}:Lion has no such"),
    ({"name": f"{OWN}:Lion", "params": []}, f"optimizer.params: {OWN}:Lion has no such"),
    (
        {"name": f"{OWN}:Lion", "betas": [2, 0.9]},
        rf"optimizer.name: {OWN}:Lion failed: ValueError: betas must be .* \(optim.py, line \d+\)",
    ),
    (
        {"name": f"{OWN}:Lion", "groups": [{**GROUP, "betas": [2, 0.9]}]},
        f"optimizer.groups.0: {OWN}:Lion failed: ValueError: betas must be",
    ),
    (
        {"name": f"{OWN}:FixedSGD", "decay_norms_and_biases": False, "weight_decay": 0.1},
        f"optimizer.weight_decay: {OWN}:FixedSGD has no such argument",
    ),
    (
        {"name": "Rprop", "decay_norms_and_biases": False},
        "optimizer.decay_norms_and_biases: is false, but Rprop has no weight_decay",
    ),
    (
        {
            "weight_decay": 0.1,
            "decay_norms_and_biases": False,
            "groups": [{**GROUP, "name": "group0_no_decay"}],
        },
        "optimizer.groups: two groups have the same name: .*group0_no_decay",
    ),
    ({"name": "SGD", "nesterov": True}, "optimizer: SGD refuses: Nesterov"),
    ({"name": "Adam", "betas": [0.9, 1.5]}, "optimizer: Adam refuses: .*beta"),
    ({"name": "Adagrad", "lr_decay": -1}, "optimizer: Adagrad refuses: .*lr_decay"),
    ({"name": "Adagrad", "lr_decay": "fast"}, "optimizer.lr_decay: is 'fast', should be a valid"),
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
