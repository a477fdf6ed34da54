"""Arguments of optimizers; schedules, their arguments and expressions."""

from __future__ import annotations

from pathlib import Path

from .cases import Expected, Input, accepted, refused, told, training

# Optimizer -> argument -> values that it must refuse.
_OPTIMIZERS: dict[str, dict[str, tuple[str, ...]]] = {
    "SGD": {
        "dampening": ("abc", "[1, 2]", "{a: 1}", ".nan", "null", "true"),
        "maximize": ("abc", "2", "[true]"),
        "foreach": ("abc", "2", "[true]"),
        "differentiable": ("true", "abc"),
        "fused": ("abc", "2"),
        "betas": ("[0.9, 0.99]",),
        "lr_decay": ("0.1",),
        "params": ("[]",),
    },
    "Adam": {
        "betas": ("[1.0, 0.9]", "[-0.1, 0.9]", "[0.9, 1e300]"),
        "amsgrad": ("abc", "2"),
        "capturable": ("abc", "true"),
        "momentum": ("0.9",),
    },
    "AdamW": {"weight_decay": ("-1",), "nesterov": ("true",)},
    "Adagrad": {
        "lr_decay": ("abc", "-1", "[1]"),
        "initial_accumulator_value": ("abc", "-1", ".nan"),
    },
    "Adadelta": {"rho": ("2", "-1", "abc", ".nan")},
    "RMSprop": {"alpha": ("abc", "-1", ".nan"), "centered": ("abc", "2")},
    "Rprop": {
        "etas": ("1", "[1]", "[0.5, 0.5]", "[a, b]"),
        "step_sizes": ("abc", "[1]", "[1, 2, 3]", "[a, b]"),
    },
    "ASGD": {"lambd": ("abc", "[1]"), "alpha": ("abc",), "t0": ("abc", "[1]")},
    "Adamax": {"betas": ("[2, 0.9]",)},
    "NAdam": {"momentum_decay": ("abc", "-1"), "decoupled_weight_decay": ("abc",)},
    "RAdam": {"betas": ("[0.9, -1]",), "decoupled_weight_decay": ("2",)},
}

_VALID_OPTIMIZERS: dict[tuple[str, ...], Expected] = {
    ("optimizer.name=Adam", "optimizer.momentum=null", "optimizer.fused=true"): accepted(
        "torch's own kernel"
    ),
    ("optimizer.maximize=true",): accepted("torch allows it"),
    ("optimizer.foreach=false",): accepted("torch's loop"),
    ("optimizer.dampening='1e-1'",): accepted("text that is a number"),
    ("optimizer.dampening=1e300",): refused("optimizer.dampening"),
    ("optimizer.fused=true", "optimizer.foreach=true"): refused("optimizer", "fused"),
    ("optimizer.fused=true", "optimizer.differentiable=true"): refused("optimizer"),
}

_STEP = "schedule.name=StepLR"
_MULTI = "schedule.name=MultiStepLR"
_EXPONENTIAL = "schedule.name=ExponentialLR"
_COSINE = "schedule.name=CosineAnnealingLR"
_PLATEAU = "schedule.name=ReduceLROnPlateau"
_LAMBDA = "schedule.name=LambdaLR"
_RESTARTS = "schedule.name=CosineAnnealingWarmRestarts"
_CYCLE = "schedule.name=OneCycleLR"
_SEQUENCE = "schedule.name=SequentialLR"
_TWO_SCHEDULES = "schedule.schedules=[{name: LinearLR}, {name: ExponentialLR, gamma: 0.5}]"
_IN_STEPS = "schedule.unit=step"

SCHEDULES: dict[tuple[str, ...], Expected] = {
    (_STEP,): refused("step_size"),
    (_STEP, "schedule.step_size=0"): refused("step_size"),
    (_STEP, "schedule.step_size=abc"): refused("step_size"),
    (_STEP, "schedule.step_size=[1]"): refused("step_size"),
    (_STEP, "schedule.step_size=1", "schedule.gamma=-1"): refused("gamma"),
    (_STEP, "schedule.step_size=1", "schedule.gamma=abc"): refused("gamma"),
    (_STEP, "schedule.step_size=1", "schedule.gamma=.nan"): refused("gamma"),
    (_STEP, "schedule.step_size=1", "schedule.gamma=1e200", _IN_STEPS): refused("lr", "step"),
    (_STEP, "schedule.step_size=1000000"): told("schedule.step_size"),
    (_STEP, "schedule.milestones=[1]"): refused("milestones"),
    (_MULTI,): refused("milestones"),
    (_MULTI, "schedule.milestones=1"): refused("milestones"),
    (_MULTI, "schedule.milestones=[a]"): refused("milestones"),
    (_MULTI, "schedule.milestones=[0]"): refused("milestones"),
    (_MULTI, "schedule.milestones=[-1]"): refused("milestones"),
    (_MULTI, "schedule.milestones=[1.5]"): refused("milestones"),
    (_MULTI, "schedule.milestones=[[1]]"): refused("milestones"),
    (_MULTI, "schedule.milestones=[]"): accepted("the lr does not change, as it says"),
    (_MULTI, "schedule.milestones=[2, 1]", _IN_STEPS): refused("milestones"),
    (_MULTI, "schedule.milestones=[1, 1]", _IN_STEPS): refused("milestones"),
    (_MULTI, "schedule.milestones=[1, 1000]", _IN_STEPS): told("schedule.milestones", "1000"),
    (_MULTI, "schedule.milestones=[99999999999999999999]"): told("schedule.milestones"),
    (_EXPONENTIAL,): refused("gamma"),
    (_EXPONENTIAL, "schedule.gamma=1e200", _IN_STEPS): refused("lr", "step"),
    (_EXPONENTIAL, "schedule.gamma=0"): accepted("torch allows it"),
    (_COSINE, "schedule.T_max=0"): refused("T_max"),
    (_COSINE, "schedule.T_max=-1"): refused("T_max"),
    (_COSINE, "schedule.T_max=abc"): refused("T_max"),
    (_COSINE, "schedule.eta_min=-1"): refused("eta_min"),
    (_COSINE, "schedule.eta_min=1e300", _IN_STEPS): refused("lr", "step"),
    (_COSINE, "schedule.T_max=1000000"): accepted("the lr stays"),
    (_PLATEAU, _IN_STEPS): refused("schedule.unit"),
    (_PLATEAU, "schedule.metric=loss"): refused("metric"),
    (_PLATEAU, "schedule.mode=most"): refused("mode"),
    (_PLATEAU, "schedule.factor=1"): refused("factor"),
    (_PLATEAU, "schedule.factor=0"): refused("factor"),
    (_PLATEAU, "schedule.patience=-1"): refused("patience"),
    (_PLATEAU, "schedule.threshold=-1"): refused("threshold"),
    (_PLATEAU, "schedule.threshold_mode=both"): refused("threshold_mode"),
    (_PLATEAU, "schedule.cooldown=-1"): refused("cooldown"),
    (_PLATEAU, "schedule.min_lr=-1"): refused("min_lr"),
    (_PLATEAU, "schedule.min_lr=[0.1, 0.2]"): refused("min_lr"),
    (_PLATEAU, "schedule.eps=.inf"): refused("eps"),
    (_RESTARTS,): refused("T_0"),
    (_RESTARTS, "schedule.T_0=0"): refused("T_0"),
    (_RESTARTS, "schedule.T_0=1", "schedule.T_mult=0"): refused("T_mult"),
    (_RESTARTS, "schedule.T_0=1", "schedule.T_mult=1.5"): refused("T_mult"),
    (_CYCLE,): refused("max_lr"),
    (_CYCLE, "schedule.max_lr=abc"): refused("max_lr"),
    (_CYCLE, "schedule.max_lr=-1"): refused("lr"),
    (_CYCLE, "schedule.max_lr=1e300"): refused("lr"),
    (_CYCLE, "schedule.max_lr=[0.1, 0.2]"): refused("max_lr"),
    (_CYCLE, "schedule.max_lr=0.1", "schedule.pct_start=2"): refused("pct_start"),
    (_CYCLE, "schedule.max_lr=0.1", "schedule.total_steps=1"): accepted("the run has one epoch"),
    (_CYCLE, "schedule.max_lr=0.1", "schedule.total_steps=1", _IN_STEPS): refused("total_steps"),
    (_CYCLE, "schedule.max_lr=0.1", "schedule.total_steps=0"): refused("total_steps"),
    (_CYCLE, "schedule.max_lr=0.1", "schedule.anneal_strategy=sin"): refused("anneal_strategy"),
    (_CYCLE, "schedule.max_lr=0.1", "schedule.cycle_momentum=abc"): refused("cycle_momentum"),
    (_CYCLE, "schedule.max_lr=0.1", "schedule.base_momentum=-1"): refused("base_momentum"),
    (_CYCLE, "schedule.max_lr=0.1", "schedule.max_momentum=2"): refused("max_momentum"),
    (_CYCLE, "schedule.max_lr=0.1", "schedule.div_factor=0"): refused("div_factor"),
    (_CYCLE, "schedule.max_lr=0.1", "schedule.final_div_factor=0"): refused("final_div_factor"),
    (_CYCLE, "schedule.max_lr=0.1", "schedule.three_phase=abc"): refused("three_phase"),
    (_CYCLE, "schedule.max_lr=0.1", "optimizer.momentum=0"): refused("momentum"),
    ("schedule.name=PolynomialLR", "schedule.power=-1"): refused("power"),
    ("schedule.name=PolynomialLR", "schedule.power=abc"): refused("power"),
    ("schedule.name=PolynomialLR", "schedule.total_iters=0"): refused("total_iters"),
    ("schedule.name=LinearLR", "schedule.start_factor=0"): refused("start_factor"),
    ("schedule.name=LinearLR", "schedule.end_factor=2"): refused("end_factor"),
    ("schedule.name=LinearLR", "schedule.end_factor=abc"): refused("end_factor"),
    ("schedule.name=ConstantLR", "schedule.factor=2"): refused("factor"),
    ("schedule.name=ConstantLR", "schedule.factor=.nan"): refused("factor"),
    (_SEQUENCE,): refused("schedules"),
    (_SEQUENCE, "schedule.schedules=[]", "schedule.milestones=[]"): refused("schedules"),
    (_SEQUENCE, "schedule.schedules=[1]", "schedule.milestones=[]"): refused("schedules"),
    (_SEQUENCE, "schedule.schedules=[{name: abc}]", "schedule.milestones=[]"): refused("name"),
    (_SEQUENCE, _TWO_SCHEDULES): refused("milestones"),
    (_SEQUENCE, _TWO_SCHEDULES, "schedule.milestones=[]"): refused("milestones"),
    (_SEQUENCE, _TWO_SCHEDULES, "schedule.milestones=[0]"): refused("milestones"),
    (_SEQUENCE, _TWO_SCHEDULES, "schedule.milestones=[1, 2]"): refused("milestones"),
    (_SEQUENCE, _TWO_SCHEDULES, "schedule.milestones=[1000]"): told("milestones", "1000"),
    ("schedule.step_size=1",): refused("step_size"),
    ("schedule.name=null",): refused("schedule.name"),
    ("schedule.name=[StepLR]",): refused("schedule.name"),
    ("schedule.name={a: 1}",): refused("schedule.name"),
    ("schedule.name=OneCycle",): refused("schedule.name"),
    ("schedule.name='[/x]'",): refused("[/x]"),
    ("schedule.warmup_steps=99999999999999999999",): told("schedule.warmup_steps"),
    ("schedule.warmup_steps=1000000",): told("schedule.warmup_steps"),
}

# `lr_lambda` -> what is expected.
EXPRESSIONS: dict[str, Expected] = {
    "''": refused("lr_lambda"),
    "'1 +'": refused("lr_lambda"),
    "'1 / 0'": refused("lr_lambda"),
    "'1 / t'": refused("lr_lambda", "t=0"),
    "'t - 1'": refused("lr_lambda"),
    "'-1'": refused("lr_lambda"),
    "'10 ** 10 ** 10'": refused("lr_lambda"),
    "'1e308 * 10'": refused("lr_lambda"),
    "'1e300'": refused("lr"),
    "'(-1) ** 0.5'": refused("lr_lambda"),
    "'sqrt(-1)'": refused("lr_lambda"),
    "'log(t)'": refused("lr_lambda"),
    "'exp(1000)'": refused("lr_lambda"),
    "'cos()'": refused("lr_lambda"),
    "'cos(1, 2)'": refused("lr_lambda"),
    "'min(5)'": refused("lr_lambda"),
    "'nothing'": refused("lr_lambda", "nothing"),
    "'True'": accepted("is 1"),
    "'None'": refused("lr_lambda"),
    "'\"a\"'": refused("lr_lambda"),
    "'\"a\" * 10 ** 9'": refused("lr_lambda"),
    "\"'%999999999d' % 1\"": refused("lr_lambda"),
    "\"'%99999d' % 1\"": refused("lr_lambda"),
    "'[1]'": refused("lr_lambda"),
    "'(1, 2)'": refused("lr_lambda"),
    "'{1: 2}'": refused("lr_lambda"),
    "'[x for x in range(10 ** 9)]'": refused("lr_lambda"),
    "'x := 1'": refused("lr_lambda"),
    "'x = 1'": refused("lr_lambda"),
    "'1; 2'": refused("lr_lambda"),
    "'lambda t: t'": refused("lr_lambda"),
    "'import os'": refused("lr_lambda"),
    '\'__import__("os").system("touch owned")\'': refused("lr_lambda"),
    '\'open("owned", "w")\'': refused("lr_lambda"),
    "'t.__class__'": refused("lr_lambda"),
    "'().__class__.__base__.__subclasses__()'": refused("lr_lambda"),
    "'f\"{t}\"'": refused("lr_lambda"),
    "'t if t else 1'": accepted("an expression"),
    "'1 if t < 1 else 1 / (t - 1)'": refused("lr_lambda", "t=1"),
    "1": refused("lr_lambda"),  # `"1"` is an expression
    "[1]": refused("lr_lambda"),
    "{a: 1}": refused("lr_lambda"),
    "'\u00e9'": refused("lr_lambda"),
    "'[/x]'": refused("lr_lambda"),
    "'" + 5000 * "(" + "1" + 5000 * ")" + "'": refused("lr_lambda"),
    "'" + "1 + " * 20_000 + "1'": refused("lr_lambda"),
    "'1 << 10 ** 10'": refused("lr_lambda"),
    "'2 ** 0.5 ** t'": accepted("an expression"),
}


# A module of the user's own, in the folder in which the command is started.
_OWN_MODULE = """
import torch

def build(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, num_classes))

def build_nothing(num_classes):
    return None

def build_wrong_size(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, num_classes + 1))

def build_wrong_input(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(7, num_classes))

def fail(*arguments, **more):
    raise KeyError("a fault of the user's own")

def leave(*arguments, **more):
    raise SystemExit(3)

def zero(logits, labels):
    return logits.sum() * 0.0

number = 7
"""

# Key -> names of own parts -> what is expected.
_OWN_PARTS: dict[str, dict[str, Expected]] = {
    key: {
        "':'": refused(key),
        "'own:'": refused(key),
        "':build'": refused(key),
        "'own:build:x'": refused(key),
        "'own.py:build'": refused(key),
        "'../own:build'": refused(key),
        "'https://localhost/own:build'": refused(key),
        "'nothing:build'": refused(key, "nothing"),
        "'own:buidl'": refused(key, "buidl"),
        "'own:number'": refused(key, "own:number"),
        "'own:fail'": refused(key, "own:fail"),
        "'own:leave'": refused(key, "own:leave"),
        "'broken:build'": refused(key, "broken"),
        "'os:system'": refused(key.partition(".")[0]),
        "'builtins:print'": refused(key.partition(".")[0]),
        "'[/x]:y'": refused(key, "[/x]"),
        "'\u00e9:y'": refused(key),
    }
    for key in ("model.arch", "data.dataset", "optimizer.name", "schedule.name", "trainer.loss")
}
_OWN_PARTS["model.arch"] |= {
    "'own:build'": accepted("a network"),
    "'own:build_nothing'": refused("model.arch"),
    "'own:build_wrong_size'": refused("model.arch"),
    "'own:build_wrong_input'": refused("model.arch"),
    "'torchvision:nothing'": refused("model.arch", "torchvision"),
    "'torchvision:resnet_18'": refused("model.arch", "resnet18"),
    "'timm:nothing'": refused("model.arch", "timm"),
}
_OWN_PARTS["trainer.loss"]["'own:zero'"] = refused("trainer.loss", "gradient")


def _write_own_parts(folder: Path) -> None:
    (folder / "own.py").write_text(_OWN_MODULE)
    (folder / "broken.py").write_text("def build(:\n")


def inputs() -> list[Input]:
    found = []
    for key, names in _OWN_PARTS.items():
        for part, expected in names.items():
            overrides = [f"{key}={part}"]
            if key == "model.arch":
                overrides.append("model.width=null")
            command = training(*overrides)
            found.append(Input("own parts", overrides[0], expected, command, _write_own_parts))

    for name, arguments in _OPTIMIZERS.items():
        overrides = [f"optimizer.name={name}"]
        if name not in ("SGD", "RMSprop"):
            overrides.append("optimizer.momentum=null")
        for argument, values in arguments.items():
            for value in values:
                override = f"optimizer.{argument}={value}"
                command = training(*overrides, override)
                # torch's own messages have a word in the singular, without the key.
                expected = refused("optimizer", argument.rstrip("s"))
                found.append(Input("optimizers", f"{name}: {override}", expected, command))
        command = training(*overrides, "optimizer.nothing=1")
        found.append(Input("optimizers", f"{name}: unknown", refused("nothing"), command))

    for overrides, expected in _VALID_OPTIMIZERS.items():
        found.append(Input("optimizers", " ".join(overrides), expected, training(*overrides)))
    for overrides, expected in SCHEDULES.items():
        found.append(Input("schedules", " ".join(overrides), expected, training(*overrides)))
    for expression, expected in EXPRESSIONS.items():
        override = f"schedule.lr_lambda={expression}"
        command = training(_LAMBDA, _IN_STEPS, override)
        found.append(Input("expressions", override[:80], expected, command))
    return found
