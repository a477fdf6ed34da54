"""A recipe's schedule is torch's scheduler times a warm-up, wherever it is begun."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from lrd import recipe
from lrd.errors import UserError
from lrd.optim import LRDropout
from lrd.parts import checks, schedules
from lrd.parts.optimizers import build_optimizer
from lrd.parts.schedules import Schedule
from lrd.recipe import expressions
from tests.helpers.optimizers import assert_same_bits, give_gradients, make_params, params_of
from tests.helpers.schedules import ALL_SCHEDULES, OWN, section

EPOCHS = 5
STEPS_PER_EPOCH = 4
TOTAL = EPOCHS * STEPS_PER_EPOCH
LRS = (0.8, 0.3)

every_schedule = pytest.mark.parametrize("name", ALL_SCHEDULES)
every_unit = pytest.mark.parametrize("unit", ["step", "epoch"])
with_and_without_warmup = pytest.mark.parametrize("warmup", [0, 1, 6])


def make_optimizer() -> Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(()))], "lr": lr} for lr in LRS])


def make(name: str, unit: str, warmup: int) -> Schedule:
    settings = ALL_SCHEDULES[name][0] if name in ALL_SCHEDULES else {}
    return Schedule(
        make_optimizer(),
        section(name, unit=unit, warmup_steps=warmup, **settings),
        steps_of_all_epochs=TOTAL,
        steps_per_epoch=STEPS_PER_EPOCH,
    )


def lrs(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def run(schedule: Schedule, steps: range = range(TOTAL)) -> list[list[float]]:
    """The lr of each step and group, in the order of calls of the training loop."""
    seen = []
    for step in steps:
        seen.append(lrs(schedule.optimizer))
        schedule.optimizer.step()
        schedule.step()
        if (step + 1) % STEPS_PER_EPOCH == 0:
            schedule.end_epoch()
    return seen


def torch_alone(name: str, unit: str, warmup: int) -> list[list[float]]:
    """The lr of each step and group, from torch's scheduler and a warm-up."""
    optimizer = make_optimizer()
    scheduler = ALL_SCHEDULES[name][1](optimizer, TOTAL if unit == "step" else EPOCHS)
    seen = []
    for step in range(TOTAL):
        warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
        seen.append([lr * warm for lr in lrs(optimizer)])
        optimizer.step()
        if unit == "step" or (step + 1) % STEPS_PER_EPOCH == 0:
            scheduler.step()
    return seen


# The trajectory


@every_schedule
@every_unit
@with_and_without_warmup
def test_each_schedule_is_torchs_times_the_warmup(name, unit, warmup):
    trajectory = run(make(name, unit, warmup))
    assert trajectory == torch_alone(name, unit, warmup)
    assert len({tuple(step) for step in trajectory}) > 1


@every_unit
def test_a_constant_schedule_is_the_warmup_alone(unit):
    schedule = Schedule(
        make_optimizer(), section("constant", unit=unit, warmup_steps=8), TOTAL, STEPS_PER_EPOCH
    )
    factors = [min(1.0, (step + 1) / 8) for step in range(TOTAL)]
    assert run(schedule) == [[lr * factor for lr in LRS] for factor in factors]


def test_a_last_epoch_that_is_not_full_counts_for_the_cosine():
    optimizer = make_optimizer()
    schedule = Schedule(
        optimizer,
        section("CosineAnnealingLR", unit="epoch"),
        steps_of_all_epochs=9,
        steps_per_epoch=4,
    )
    schedule.fast_forward(8, 4)

    factor = 0.5 * (1 + math.cos(math.pi * 2 / 3))
    assert lrs(optimizer) == pytest.approx([lr * factor for lr in LRS])


def test_an_lr_tensor_is_set_in_place():
    lr = torch.tensor(0.5, dtype=torch.float64)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr, foreach=False)
    schedule = Schedule(
        optimizer, section("ExponentialLR", unit="step", gamma=0.5, warmup_steps=2), 4, 2
    )
    held = optimizer.param_groups[0]["lr"]
    assert run(schedule, range(4)) == [[0.25], [0.25], [0.125], [0.0625]]
    assert optimizer.param_groups[0]["lr"] is held


# ReduceLROnPlateau

LOSSES = [1.0, 0.5, 0.6, 0.7, 0.8, 0.4, 0.4, 0.4, 0.4, 0.4]


@pytest.mark.parametrize("metric", ["test_loss", "test_accuracy"])
@with_and_without_warmup
def test_reduce_lr_on_plateau_follows_the_metric_as_torchs_does(metric, warmup):
    is_accuracy = metric == "test_accuracy"
    settings = {"factor": 0.5, "patience": 1, "threshold": 0.0, "cooldown": 1}
    schedule = Schedule(
        make_optimizer(),
        section("ReduceLROnPlateau", metric=metric, warmup_steps=warmup, **settings),
        steps_of_all_epochs=20,
        steps_per_epoch=2,
    )
    optimizer = make_optimizer()
    mode = "max" if is_accuracy else "min"
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, **settings)

    seen = []
    expected = []
    for epoch, loss in enumerate(LOSSES):
        for step in range(2 * epoch, 2 * epoch + 2):
            seen.append(lrs(schedule.optimizer))
            factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
            expected.append([lr * factor for lr in lrs(optimizer)])
            schedule.step()
        schedule.end_epoch()

        accuracy = 2.0 - loss
        schedule.end_evaluation({"loss": loss, "accuracy": accuracy})
        scheduler.step(accuracy if is_accuracy else loss)

    assert seen == expected
    assert seen[-1][0] < LRS[0] / 2


def test_reduce_lr_on_plateau_looks_only_at_its_metric():
    schedule = Schedule(
        make_optimizer(), section("ReduceLROnPlateau", metric="test_accuracy", patience=0), 20, 2
    )
    assert schedule.needs_metric
    for epoch in range(4):
        schedule.end_evaluation({"loss": 1.0, "accuracy": float(epoch)})
    assert lrs(schedule.optimizer) == list(LRS)
    schedule.end_evaluation({"loss": 0.0, "accuracy": 0.0})
    assert lrs(schedule.optimizer) == pytest.approx([lr / 10 for lr in LRS])


def test_reduce_lr_on_plateau_can_go_by_the_images_held_out():
    sections = {"schedule": {"name": "ReduceLROnPlateau", "patience": 0}}
    values = recipe.parse({**sections, "data": {"validation": 0.1}}, "test").schedule
    schedule = Schedule(make_optimizer(), values, 20, 2)
    for loss in (1.0, 2.0):
        schedule.end_evaluation({"loss": 1.0 - loss, "validation_loss": loss})
    assert lrs(schedule.optimizer) == pytest.approx([lr / 10 for lr in LRS])


@every_schedule
def test_the_other_schedules_do_not_look_at_evaluations(name):
    schedule = make(name, "epoch", 0)
    assert not schedule.needs_metric
    schedule.end_evaluation({"loss": 1.0, "accuracy": 0.0})
    assert run(schedule) == torch_alone(name, "epoch", 0)


# Saving, loading, replaying


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", [*ALL_SCHEDULES, "constant"])
@every_unit
@pytest.mark.parametrize("done", [0, 3, 4, 11])
def test_a_loaded_state_dict_continues_identically(name, unit, done):
    first = make(name, unit, warmup=6)
    fresh = make(name, unit, warmup=6)
    run(first, range(done))
    fresh.load_state_dict(through_a_file(first.state_dict()))
    rest = range(done, TOTAL)
    assert run(fresh, rest) == run(first, rest)
    assert fresh.state_dict() == first.state_dict()


def test_a_loaded_reduce_lr_on_plateau_continues_identically():
    values = section("ReduceLROnPlateau", patience=1, factor=0.5)
    first = Schedule(make_optimizer(), values, steps_of_all_epochs=20, steps_per_epoch=2)
    fresh = Schedule(make_optimizer(), values, steps_of_all_epochs=20, steps_per_epoch=2)
    for loss in LOSSES[:4]:
        first.end_evaluation({"loss": loss})
    fresh.load_state_dict(through_a_file(first.state_dict()))
    for loss in LOSSES[4:]:
        assert lrs(fresh.optimizer) == lrs(first.optimizer)
        for schedule in (first, fresh):
            schedule.end_evaluation({"loss": loss})
    assert fresh.state_dict() == first.state_dict()
    assert lrs(fresh.optimizer)[0] < LRS[0] / 2


@every_schedule
@every_unit
@pytest.mark.parametrize(("begun", "done"), [(0, 0), (0, 3), (0, 8), (5, 13), (4, TOTAL)])
def test_replay_goes_where_stepping_goes(name, unit, begun, done):
    stepped = make(name, unit, warmup=6)
    replayed = make(name, unit, warmup=6)
    run(stepped, range(done))
    run(replayed, range(begun))
    replayed.fast_forward(done, STEPS_PER_EPOCH)
    assert lrs(replayed.optimizer) == lrs(stepped.optimizer)
    assert replayed.steps == stepped.steps == done
    assert run(replayed, range(done, TOTAL)) == run(stepped, range(done, TOTAL))


# OneCycleLR and the momentum

MOMENTUM = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
}


def one_cycle(optimizer: Optimizer, warmup: int) -> Schedule:
    values = section("OneCycleLR", unit="step", max_lr=0.5, pct_start=0.4, warmup_steps=warmup)
    return Schedule(optimizer, values, TOTAL, STEPS_PER_EPOCH)


def train_one_cycle(optimizer: Optimizer, schedule: Schedule, steps: range) -> list[Any]:
    """Train, and return what the cycle changes at each step."""
    seen = []
    for step in steps:
        (group,) = optimizer.param_groups
        seen.append([group["lr"], group.get("betas", group.get("momentum"))])
        give_gradients(params_of(optimizer), step)
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("name", MOMENTUM)
@pytest.mark.parametrize("warmup", [0, 6])
def test_one_cycle_changes_lr_and_momentum_as_torchs_does(name, warmup):
    optimizer = MOMENTUM[name](make_params())
    LRDropout(optimizer, keep_prob=1.0, seed=3)
    seen = train_one_cycle(optimizer, one_cycle(optimizer, warmup), range(TOTAL))

    stock = MOMENTUM[name](make_params())
    scheduler = lr_scheduler.OneCycleLR(stock, 0.5, TOTAL, pct_start=0.4)
    expected = []
    for step in range(TOTAL):
        (group,) = stock.param_groups
        lr = group["lr"]
        group["lr"] = lr * (min(1.0, (step + 1) / warmup) if warmup else 1.0)
        expected.append([group["lr"], group.get("betas", group.get("momentum"))])
        give_gradients(params_of(stock), step)
        stock.step()
        group["lr"] = lr
        scheduler.step()

    assert seen == expected
    assert len({str(momentum) for _, momentum in seen}) > TOTAL // 2
    assert_same_bits(params_of(optimizer), params_of(stock))


@pytest.mark.parametrize("name", MOMENTUM)
@pytest.mark.parametrize("done", [0, 5, 13])
def test_a_resumed_one_cycle_continues_with_the_same_bits(name, done):
    first = MOMENTUM[name](make_params())
    LRDropout(first, keep_prob=0.5, seed=3)
    schedule = one_cycle(first, warmup=7)
    train_one_cycle(first, schedule, range(done))

    resumed = MOMENTUM[name]([nn.Parameter(param.detach().clone()) for param in params_of(first)])
    LRDropout(resumed, keep_prob=0.5, seed=3)
    resumed_schedule = one_cycle(resumed, warmup=7)
    state = through_a_file({"optimizer": first.state_dict(), "schedule": schedule.state_dict()})
    resumed.load_state_dict(state["optimizer"])
    resumed_schedule.load_state_dict(state["schedule"])

    rest = range(done, TOTAL)
    assert train_one_cycle(resumed, resumed_schedule, rest) == train_one_cycle(
        first, schedule, rest
    )
    assert_same_bits(params_of(resumed), params_of(first))


# A value for each group


def make_split_optimizer(schedule: dict[str, Any]) -> tuple[Optimizer, recipe.Recipe]:
    """Weights and biases of two groups are groups of their own."""
    sections = {
        "optimizer": {
            "name": "AdamW",
            "lr": 1.0,
            "decay_norms_and_biases": False,
            "groups": [{"match": "1.*", "name": "head", "lr": 0.5}],
        },
        "schedule": {"unit": "step", **schedule},
    }
    parsed = recipe.parse(sections, "test")
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return build_optimizer(model, parsed), parsed


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"name": "LambdaLR", "lr_lambda": ["1 / (t + 1)", "1"]},
            {"group0": 0.5, "group0_no_decay": 0.5, "head": 0.5, "head_no_decay": 0.5},
        ),
        (
            {"name": "OneCycleLR", "max_lr": [0.5, 0.25], "pct_start": 0.1, "total_steps": 20},
            {"group0": 0.5, "group0_no_decay": 0.5, "head": 0.25, "head_no_decay": 0.25},
        ),
        (
            {
                "name": "SequentialLR",
                "milestones": [1],
                "schedules": [
                    {"name": "constant"},
                    {"name": "LambdaLR", "lr_lambda": ["0.5", "0.1"]},
                ],
            },
            {"group0": 0.5, "group0_no_decay": 0.5, "head": 0.05, "head_no_decay": 0.05},
        ),
    ],
    ids=["LambdaLR", "OneCycleLR", "SequentialLR"],
)
def test_a_group_and_its_part_without_weight_decay_share_a_value(values, expected):
    optimizer, parsed = make_split_optimizer(values)
    Schedule(optimizer, parsed.schedule, TOTAL, STEPS_PER_EPOCH).fast_forward(1, STEPS_PER_EPOCH)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == expected

    lines = schedules.lr_trajectory(parsed, STEPS_PER_EPOCH)
    assert {name: line[1] for name, line in lines.items()} == {
        name: lr for name, lr in expected.items() if not name.endswith("_no_decay")
    }


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"name": "LambdaLR", "lr_lambda": ["1"] * 3}, "schedule.lr_lambda"),
        ({"name": "OneCycleLR", "max_lr": [0.1] * 3}, "schedule.max_lr"),
        (
            {
                "name": "SequentialLR",
                "milestones": [],
                "schedules": [{"name": "LambdaLR", "lr_lambda": ["1"] * 3}],
            },
            "schedule.schedules.0.lr_lambda",
        ),
    ],
    ids=str,
)
def test_a_wrong_number_of_values_names_the_groups(values, key):
    optimizer, parsed = make_split_optimizer(values)
    with pytest.raises(UserError) as error:
        Schedule(optimizer, parsed.schedule, TOTAL, STEPS_PER_EPOCH)
    assert str(error.value) == (
        f"{key}: has 3 values, must have one for each parameter group: group0, head"
    )


def test_if_the_groups_of_the_recipe_have_all_parameters_the_list_has_no_group0():
    groups = [{"match": "weight"}, {"match": "bias"}]
    values = {"name": "LambdaLR", "unit": "step", "lr_lambda": ["1", "1 / (t + 1)"]}
    parsed = recipe.parse({"optimizer": {"groups": groups}, "schedule": values}, "test")
    optimizer = build_optimizer(nn.Linear(2, 2), parsed)
    Schedule(optimizer, parsed.schedule, TOTAL, STEPS_PER_EPOCH).fast_forward(1, STEPS_PER_EPOCH)
    assert lrs(optimizer) == [0.1, 0.05]

    lines = schedules.lr_trajectory(parsed, STEPS_PER_EPOCH)
    assert {name: line[1] for name, line in lines.items()} == {"group1": 0.1, "group2": 0.05}


# Expressions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", lambda t: 1.0),
        ("t / total", lambda t: t / 10),
        ("0.5 * (1 + cos(pi * t / total))", lambda t: 0.5 * (1 + math.cos(math.pi * t / 10))),
        ("0.1 ** (t // 3)", lambda t: 0.1 ** (t // 3)),
        ("max(0, min(1, 1 - t / 8))", lambda t: max(0, min(1, 1 - t / 8))),
        ("exp(-t) + sqrt(abs(sin(t)))", lambda t: math.exp(-t) + math.sqrt(abs(math.sin(t)))),
        (
            "log(e * (1 + floor(t / 4))) + ceil(t / 4)",
            lambda t: math.log(math.e * (1 + t // 4)) + -(-t // 4),
        ),
        ("1 if t < 5 else 0.1", lambda t: 1 if t < 5 else 0.1),
    ],
)
def test_an_expression_is_evaluated_at_each_position(text, expected):
    factor = expressions.parse_lambda(text, 10)
    assert [factor(t) for t in range(11)] == [pytest.approx(expected(t)) for t in range(11)]


@pytest.mark.parametrize(
    "text",
    [
        "t.real",
        "t.bit_length()",
        "total.__class__",
        "().__class__.__bases__",
        "'{0.__class__}'.format(t)",
        "__import__('os').getpid()",
        "open('x')",
        "eval('1')",
        "lambda: 1",
        "[t][0]",
        "steps",
        "tan(t)",
        "cos",
        "t +",
        "",
        "'a'",
        "'1' * 10 ** 9",
        "'%999999999d' % 1",
        "f'{t:999999999}'",
        "9 ** 9 ** 9",
        "(-1) ** 0.5",
        "cos(1, 2)",
        "t - 5",
        "5 - t",
        "1 / t",
        "1 / (t - total)",
        "1e999",
        "1e999 - 1e999",
        "exp(1000)",
    ],
)
def test_an_unsafe_or_impossible_expression_is_refused_in_one_line(text):
    with pytest.raises(UserError) as error:
        expressions.parse_lambda(text, 10)
    assert str(error.value).startswith("schedule.lr_lambda: ")
    assert "\n" not in str(error.value)


def test_an_expression_that_fails_in_the_middle_is_reported_with_its_position():
    factor = expressions.parse_lambda("1 / (t - 5) + 1", 10)
    with pytest.raises(UserError, match=r"schedule\.lr_lambda: .* at t=5"):
        factor(5)


# What is refused

REFUSED = [
    ({"name": "StepRL", "step_size": 3}, r"schedule\.name: .*did you mean StepLR"),
    ({"name": "CyclicLR"}, r"schedule\.name: is 'CyclicLR', may be constant, StepLR"),
    (
        {"name": "StepLR", "step_size": 3, "step_sise": 3},
        r"schedule\.step_sise: unknown key; .*did you mean step_size",
    ),
    ({"name": "StepLR", "step_size": 3, "last_epoch": 4}, r"schedule\.last_epoch: "),
    ({"name": "StepLR", "step_size": 3, "optimizer": 4}, r"schedule\.optimizer: "),
    (
        {"name": "constant", "gamma": 0.5},
        r"schedule\.gamma: unknown key; constant has name, unit, warmup_steps ",
    ),
    ({"name": "StepLR"}, r"schedule\.step_size: is missing"),
    ({"name": "MultiStepLR"}, r"schedule\.milestones: is missing"),
    ({"name": "ExponentialLR"}, r"schedule\.gamma: is missing"),
    (
        {"name": "StepLR", "step_size": 3, "T_max": 4},
        r"schedule\.T_max: unknown key; StepLR has name, unit, warmup_steps, step_size, gamma ",
    ),
    ({"name": "MultiStepLR", "milestones": 100}, r"schedule\.milestones: is 100"),
    ({"name": "ReduceLROnPlateau", "factor": 2.0}, r"schedule\.factor: is 2.0"),
    ({"name": "ReduceLROnPlateau", "mode": "low"}, r"schedule\.mode: is .low."),
    ({"name": "ReduceLROnPlateau", "min_lr": [0.1, 0.1, 0.1]}, r"schedule\.min_lr: is "),
    ({"name": "ReduceLROnPlateau", "unit": "step"}, r"schedule\.unit: is 'step', must be 'epoch'"),
    ({"name": "ReduceLROnPlateau", "metric": "train_loss"}, r"schedule\.metric: is 'train_loss'"),
    ({"name": "MultiStepLR", "milestones": [3, 2]}, r"schedule\.milestones: has 2 after 3, must"),
    ({"name": "MultiStepLR", "milestones": [2, 2]}, r"schedule\.milestones: has 2 after 2, must"),
    (
        {"name": "SequentialLR", "milestones": [3, 1], "schedules": [{"name": "constant"}] * 3},
        r"schedule\.milestones: has 1 after 3, must be in increasing order",
    ),
    (
        {
            "name": "SequentialLR",
            "milestones": [1],
            "schedules": [{"name": "constant"}, {"name": "MultiStepLR", "milestones": [2, 1]}],
        },
        r"schedule\.schedules\.1\.milestones: has 1 after 2",
    ),
    (
        {
            "name": "SequentialLR",
            "milestones": [],
            "schedules": [{"name": "LambdaLR", "lr_lambda": "x"}],
        },
        r"schedule\.schedules\.0\.lr_lambda: 'x'",
    ),
    ({"name": "OneCycleLR", "max_lr": 0.1, "pct_start": 1}, r"schedule\.pct_start: is 1.0, with"),
    (
        {"name": "OneCycleLR", "max_lr": 0.1, "unit": "step", "pct_start": 0.25},
        r"schedule\.pct_start: is 0.25, with which a phase of the 4 positions",
    ),
    (
        {"name": "OneCycleLR", "max_lr": 0.1, "unit": "step", "total_steps": 3},
        r"schedule\.total_steps: is 3, but the run has 4 steps",
    ),
    (
        {"name": "StepLR", "unit": "step", "step_size": 1, "gamma": 1e200},
        r"schedule: StepLR sets the lr of group0 to 1e\+199 after 1 steps; it must be at least 0",
    ),
    ({"name": f"{OWN}:NoSchedule"}, rf"schedule\.name: {OWN}:NoSchedule is not a subclass of"),
    ({"name": f"{OWN}:Bare"}, rf"schedule\.name: {OWN}:Bare does not call super"),
    ({"name": f"{OWN}:Plateau"}, rf"schedule\.name: {OWN}:Plateau needs a metric"),
    ({"name": f"{OWN}:Halving", "gama": 1}, rf"schedule\.gama: {OWN}:Halving has no such argument"),
    ({"name": f"{OWN}:Missing"}, rf"schedule\.name: {OWN}:Missing: "),
    (
        {"name": "torch.optim.lr_scheduler:StepLR"},
        r"schedule\.step_size: is missing, torch.optim.lr_scheduler:StepLR needs it",
    ),
    (
        {"name": "torch.optim.lr_scheduler:LinearLR", "start_factor": 2},
        r"schedule\.name: torch.optim.lr_scheduler:LinearLR failed: ValueError: Starting",
    ),
    (
        {"name": f"{OWN}:Negative", "unit": "step"},
        rf"schedule: {OWN}:Negative sets the lr of group0 to -0.1 after 2 steps",
    ),
    (
        {"name": f"{OWN}:Breaking", "unit": "step"},
        rf"schedule: {OWN}:Breaking failed: KeyError: 2 \(schedule.py, line \d+\)",
    ),
    ({"name": "LambdaLR", "lr_lambda": "oops"}, r"schedule\.lr_lambda: 'oops'"),
    ({"unit": "steps"}, r"schedule\.unit: is 'steps'"),
    ({"warmup_steps": -1}, r"schedule\.warmup_steps: is -1"),
    ({"metric": "test_accuracy"}, r"schedule\.metric: unknown key; constant has "),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_wrong_is_refused_in_one_line_that_names_the_key(values, message):
    with pytest.raises(UserError, match="^(test: )?" + message) as error:
        schedules.lr_trajectory(recipe.parse({"schedule": values}, "test"), STEPS_PER_EPOCH)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "StepLR", "step_size": 0},
        {"name": "StepLR", "step_size": "often"},
        {"name": "StepLR", "step_size": 2, "gamma": "half"},
        {"name": "StepLR", "step_size": 2, "gamma": -1},
        {"name": "MultiStepLR", "milestones": ["late"]},
        {"name": "ExponentialLR", "gamma": "nan"},
        {"name": "CosineAnnealingLR", "T_max": 0},
        {"name": "CosineAnnealingLR", "eta_min": "low"},
        {"name": "ReduceLROnPlateau", "patience": "long"},
    ],
    ids=str,
)
def test_a_value_with_which_no_lr_can_be_computed_is_refused_though_torch_accepts_it(values):
    with pytest.raises(UserError, match=r"^test: schedule"):
        recipe.parse({"schedule": values}, "test")


# The trajectory without training


def trajectory_of(
    steps_per_epoch: int = STEPS_PER_EPOCH, **sections: Any
) -> dict[str, list[float]]:
    return schedules.lr_trajectory(recipe.parse(sections, "test"), steps_per_epoch)


def test_the_papers_milestones_drop_exactly_at_steps_39000_and_58500():
    lines = trajectory_of(
        390,
        optimizer={"name": "SGD", "lr": 0.1},
        schedule={"name": "MultiStepLR", "milestones": [100, 150], "gamma": 0.1},
        trainer={"epochs": 200},
    )
    (line,) = lines.values()
    assert len(line) == 78000

    drops = [step for step in range(1, len(line)) if line[step] != line[step - 1]]
    assert drops == [39000, 58500]
    assert [line[0], line[39000], line[58500]] == pytest.approx([0.1, 0.01, 0.001])


@every_schedule
@every_unit
def test_the_trajectory_is_what_training_does(name, unit):
    settings = {
        "name": name.partition(" ")[0],
        "unit": unit,
        "warmup_steps": 6,
        **ALL_SCHEDULES[name][0],
    }
    groups = [{"match": "fc.*", "lr": LRS[1], "name": "head", "keep_prob": 0.5}]
    lines = trajectory_of(
        optimizer={"name": "AdamW", "lr": LRS[0], "groups": groups},
        lr_dropout={},
        schedule=settings,
        trainer={"epochs": EPOCHS},
    )
    assert list(lines) == ["group0", "head"]
    assert [list(step) for step in zip(*lines.values(), strict=True)] == torch_alone(name, unit, 6)


@pytest.mark.parametrize(("max_steps", "length"), [(None, TOTAL), (7, 7), (1000, TOTAL)])
def test_the_trajectory_ends_with_the_run_and_max_steps_does_not_change_its_shape(
    max_steps, length
):
    sections = {
        "schedule": {"name": "CosineAnnealingLR", "unit": "step"},
        "trainer": {"epochs": EPOCHS},
    }
    whole = trajectory_of(**sections)["group0"]
    sections["trainer"]["max_steps"] = max_steps
    assert trajectory_of(**sections)["group0"] == whole[:length]


def test_the_trajectory_of_reduce_lr_on_plateau_is_the_warmup_alone():
    lines = trajectory_of(
        optimizer={"lr": 0.1},
        schedule={"name": "ReduceLROnPlateau", "warmup_steps": 2},
        trainer={"epochs": 2},
    )
    assert lines == {"group0": [0.05] + [0.1] * 7}


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ([{"match": "layer[12].*"}], ["group0", "group1"]),
        ([{"match": "*.bias"}, {"match": ["bn*.bias", "bn*"]}], ["group0", "group1", "group2"]),
        ([{"match": "conv*"}, {"match": "r*"}], ["group0", "group1", "group2"]),
    ],
    ids=str,
)
def test_the_trajectory_has_a_line_for_each_group_whatever_its_patterns(groups, names):
    assert list(trajectory_of(optimizer={"name": "SGD", "groups": groups})) == names


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"name": "constant"}, False),
        ({"name": "MultiStepLR", "milestones": [3]}, False),
        ({"name": "CosineAnnealingLR"}, True),
        ({"name": "CosineAnnealingLR", "T_max": 5}, False),
        ({"name": "LambdaLR", "lr_lambda": "1 - t / total"}, True),
        ({"name": "CosineAnnealingWarmRestarts", "T_0": 2}, False),
        ({"name": "OneCycleLR", "max_lr": 0.1}, True),
        ({"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 9}, False),
        ({"name": "PolynomialLR"}, True),
        ({"name": "LinearLR", "total_iters": 3}, False),
        ({"name": "ConstantLR"}, False),
        (
            {
                "name": "SequentialLR",
                "milestones": [2],
                "schedules": [{"name": "LinearLR"}, {"name": "constant"}],
            },
            False,
        ),
        (
            {
                "name": "SequentialLR",
                "milestones": [2],
                "schedules": [{"name": "constant"}, {"name": "CosineAnnealingLR"}],
            },
            True,
        ),
        ({"name": f"{OWN}:WarmupHoldDecay"}, True),
        ({"name": f"{OWN}:WarmupHoldDecay", "total": 7}, False),
        ({"name": f"{OWN}:Halving"}, False),
    ],
    ids=str,
)
def test_which_schedules_depend_on_the_length_of_the_run(values, expected):
    assert schedules.depends_on_length(section(**values)) == expected


# The check before training


def check(steps_per_epoch: int = STEPS_PER_EPOCH, **sections: Any) -> None:
    sections = {"optimizer": {"momentum": 0.9}, "trainer": {"epochs": EPOCHS}, **sections}
    checks.check_schedule(nn.Linear(2, 2), recipe.parse(sections, "test"), steps_per_epoch)


@every_schedule
@every_unit
def test_a_sound_schedule_passes_the_check_in_silence(name, unit, capsys):
    groups = [{"match": "bias", "lr": LRS[1]}]
    values = {"name": name.partition(" ")[0], "unit": unit, **ALL_SCHEDULES[name][0]}
    if values.get("milestones") == [2, 4, 13]:
        values["milestones"] = [2, 4]
    if values.get("total_steps"):
        values["total_steps"] = 25
    check(optimizer={"groups": groups}, schedule=values)
    assert capsys.readouterr().out == ""


def test_an_own_schedule_that_changes_the_momentum_passes_the_check():
    check(schedule={"name": f"{OWN}:Halving", "unit": "step", "warmup_steps": 3})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Dice", "two runs of it differ"),
        ("Forgetful", "its state_dict does not hold all of its state"),
        ("Unsavable", "a checkpoint cannot hold its state_dict: schedule.scheduler.shape is a "),
    ],
)
def test_a_fault_of_an_own_schedule_is_one_line(name, message):
    with pytest.raises(UserError) as error:
        check(schedule={"name": f"{OWN}:{name}", "unit": "step"})
    assert str(error.value).startswith(f"schedule.name: {OWN}:{name}: {message}")
    assert "\n" not in str(error.value)


def test_a_fault_of_an_own_schedule_within_another_names_its_key():
    inner = [{"name": "constant"}, {"name": f"{OWN}:Unsavable"}]
    with pytest.raises(
        UserError, match=r"^schedule\.schedules\.1\.name: SequentialLR: a checkpoint"
    ):
        check(schedule={"name": "SequentialLR", "milestones": [2], "schedules": inner})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"name": "MultiStepLR", "milestones": [4]}, ""),
        (
            {"name": "MultiStepLR", "milestones": [4, 5, 9]},
            "schedule.milestones: 5, 9: the run has 5 epochs, so nothing happens there\n",
        ),
        (
            {
                "name": "SequentialLR",
                "milestones": [3],
                "schedules": [
                    {"name": "MultiStepLR", "milestones": [1, 3]},
                    {"name": "MultiStepLR", "milestones": [1, 2]},
                ],
            },
            "schedule.schedules.0.milestones: 3: its part of the run has 3 epochs, so nothing "
            "happens there\n"
            "schedule.schedules.1.milestones: 2: its part of the run has 2 epochs, so nothing "
            "happens there\n",
        ),
    ],
    ids=str,
)
def test_milestones_beyond_the_end_get_a_line(values, expected, capsys):
    check(schedule=values)
    assert capsys.readouterr().out == expected


def test_one_cycle_may_end_with_the_run_that_max_steps_ends():
    values = {"name": "OneCycleLR", "unit": "step", "max_lr": 0.1, "total_steps": 7}
    check(schedule=values, trainer={"epochs": EPOCHS, "max_steps": 7})
    with pytest.raises(UserError, match=r"^schedule\.total_steps: is 7, but the run has 8 steps"):
        check(schedule=values, trainer={"epochs": EPOCHS, "max_steps": 8})


@pytest.mark.parametrize("optimizer", [{"name": "SGD"}, {"name": "Adagrad"}], ids=str)
def test_one_cycle_does_not_turn_a_momentum_on(optimizer):
    values = {"name": "OneCycleLR", "max_lr": 0.1}
    with pytest.raises(UserError, match=r"^schedule\.cycle_momentum: OneCycleLR changes the momen"):
        check(optimizer=optimizer, schedule=values)
    check(optimizer=optimizer, schedule={**values, "cycle_momentum": False})


def test_an_lr_that_overflows_late_stops_the_check_or_the_run():
    values = {"name": "ExponentialLR", "unit": "step", "gamma": 1.05}
    with pytest.raises(
        UserError, match=r"^schedule: ExponentialLR sets the lr of group0 to .*e\+38"
    ):
        check(steps_per_epoch=1000, schedule=values)

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    schedule = Schedule(optimizer, section(**values), 10_000, 10)
    with pytest.raises(
        UserError, match=r"^schedule: ExponentialLR sets the lr of group0 to .*e\+38"
    ):
        schedule.fast_forward(10_000, 10)


def test_the_lr_after_the_last_step_may_be_anything():
    sections = {"schedule": {"name": f"{OWN}:Negative"}, "trainer": {"epochs": 2}}
    check(**sections)  # lr, 0, and -lr after the end
    assert trajectory_of(**sections)["group0"] == [0.1] * STEPS_PER_EPOCH + [0.0] * STEPS_PER_EPOCH
    with pytest.raises(UserError, match=r"sets the lr of group0 to -0\.1 after 2 epochs"):
        check(**{**sections, "trainer": {"epochs": 3}})
