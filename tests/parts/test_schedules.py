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
from lrd.parts import schedules
from lrd.parts.schedules import Schedule
from tests.helpers.schedules import SCHEDULES, section

EPOCHS = 5
STEPS_PER_EPOCH = 4
TOTAL = EPOCHS * STEPS_PER_EPOCH
LRS = (0.8, 0.3)

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_unit = pytest.mark.parametrize("unit", ["step", "epoch"])
with_and_without_warmup = pytest.mark.parametrize("warmup", [0, 1, 6])


def make_optimizer() -> Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(()))], "lr": lr} for lr in LRS])


def make(name: str, unit: str, warmup: int) -> Schedule:
    settings = SCHEDULES[name][0] if name in SCHEDULES else {}
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
    scheduler = SCHEDULES[name][1](optimizer, TOTAL if unit == "step" else EPOCHS)
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


@pytest.mark.parametrize("name", [*SCHEDULES, "constant"])
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
    factor = schedules.parse_lambda(text, 10)
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
        schedules.parse_lambda(text, 10)
    assert str(error.value).startswith("schedule.lr_lambda: ")
    assert "\n" not in str(error.value)


def test_an_expression_that_fails_in_the_middle_is_reported_with_its_position():
    factor = schedules.parse_lambda("1 / (t - 5) + 1", 10)
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
        **SCHEDULES[name][0],
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
    ],
    ids=str,
)
def test_which_schedules_depend_on_the_length_of_the_run(values, expected):
    assert schedules.depends_on_length(section(**values)) == expected
