"""Arguments of torch's optimizers have the types of torch's own annotations."""

import math

import pytest
import torch

from lrd.errors import UserError
from lrd.parts.argument_types import check_argument_types
from lrd.parts.optimizers import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_torchs_defaults_are_accepted(name):
    cls = getattr(torch.optim, name)
    defaults = cls([torch.nn.Parameter(torch.zeros(1))], lr=0.1).defaults
    check_argument_types("optimizer", cls, defaults)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("SGD", "dampening", 1),
        ("SGD", "foreach", None),
        ("SGD", "foreach", True),
        ("Adam", "betas", [0.9, 0.99]),
        ("Adam", "capturable", False),
        ("Rprop", "step_sizes", [1e-6, math.inf]),
        ("ASGD", "t0", 1_000_000),
    ],
)
def test_values_of_the_right_type_are_accepted(name, argument, value):
    check_argument_types("optimizer", getattr(torch.optim, name), {argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("SGD", "dampening", "abc"),
        ("SGD", "dampening", [1, 2]),
        ("SGD", "dampening", True),
        ("SGD", "dampening", math.nan),
        ("SGD", "dampening", None),
        ("SGD", "foreach", "abc"),
        ("SGD", "foreach", 2),
        ("SGD", "maximize", None),
        ("SGD", "differentiable", True),
        ("Adam", "capturable", True),
        ("Adam", "betas", [0.9]),
        ("Adam", "betas", [0.9, math.nan]),
        ("Adam", "betas", ["a", "b"]),
        ("Rprop", "etas", 1),
        ("Rprop", "step_sizes", [1, 2, 3]),
        ("ASGD", "t0", {"a": 1}),
        ("RMSprop", "centered", "abc"),
    ],
)
def test_others_are_refused_in_one_line_with_the_key(name, argument, value):
    with pytest.raises(UserError, match=f"^optimizer.groups.1.{argument}: is ") as raised:
        check_argument_types("optimizer.groups.1", getattr(torch.optim, name), {argument: value})
    assert len(str(raised.value).splitlines()) == 1


def test_each_fault_has_a_line():
    with pytest.raises(UserError) as raised:
        check_argument_types("optimizer", torch.optim.SGD, {"dampening": "a", "foreach": "b"})
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == [
        "optimizer.dampening",
        "optimizer.foreach",
    ]
