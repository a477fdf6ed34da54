"""What a recipe may say: its sections, their keys, types, defaults and ranges.

A recipe says what is trained, never where: no world size and no host stands in one.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lrd.mask import Granularity


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _number(value: Any) -> Any:
    """PyYAML reads `1e-3` as a string; the arguments that go to torch by name have no field whose type would tell."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return [_number(item) for item in value] if isinstance(value, list) else value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


def _keep_prob(value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise ValueError("must be greater than 0 and at most 1: it is the probability of keeping an element")
    return value


KeepProb = Annotated[Float, AfterValidator(_keep_prob)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Open(Section):
    """A section whose further keys are arguments of the torch class it names, checked against its signature."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_validator(mode="after")
    def _read_numbers(self) -> Open:
        self.__pydantic_extra__ = {key: _number(value) for key, value in (self.model_extra or {}).items()}
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})


class Data(Section):
    dataset: Literal["digits", "cifar10", "cifar100", "imagefolder", "synthetic"] = "digits"
    root: str = "data"
    batch_size: Int = Field(128, gt=0, description="images of one step over all ranks")
    image_size: Int | None = Field(None, gt=0, description="pixels a side; default: the data set's own")
    augment: Literal["none", "crop", "crop_flip"] = "none"
    padding: Int | None = Field(None, ge=0, description="of the crop, pixels; default image_size / 8")
    skip_corrupt: bool = Field(False, description="imagefolder: leave out images that cannot be read")
    num_samples: Int = Field(2048, gt=0, description="synthetic: training images")


class Model(Section):
    arch: Literal["resnet18", "resnet34", "resnet50"] = "resnet34"
    width: Int = Field(64, gt=0, description="channels of the stem")
    num_classes: Int | None = Field(None, gt=0, description="default: the data set's")
    sync_batchnorm: bool = False


class OptimizerGroup(Open):
    """The parameters whose names match a pattern, with settings of their own. The first group that matches wins."""

    match: str | list[str] = Field(description="shell-style patterns of parameter names, e.g. `fc.*`")
    name: str | None = Field(None, description="for TensorBoard's tags; default `group<i>`")
    lr: Float | None = Field(None, ge=0.0)
    weight_decay: Float | None = Field(None, ge=0.0)
    keep_prob: KeepProb | None = None

    @property
    def patterns(self) -> list[str]:
        return [self.match] if isinstance(self.match, str) else self.match


class Optimizer(Open):
    name: str = "SGD"
    lr: Float = Field(0.1, ge=0.0)
    momentum: Float | None = Field(None, ge=0.0)
    nesterov: bool | None = None
    weight_decay: Float | None = Field(None, ge=0.0)
    betas: tuple[Float, Float] | None = None
    eps: Float | None = Field(None, ge=0.0)
    groups: list[OptimizerGroup] = []


class LRDropout(Section):
    keep_prob: KeepProb = 0.5
    seed: Int | None = Field(None, ge=0, lt=1 << 64, description="of the masks; default: the recipe's seed")
    granularity: Granularity = "element"
    rescale: bool = False
    masks: Literal["update", "gradient", "momentum_buffer"] = Field(
        "update", description="`update` is LRD, the others controls"
    )


class Schedule(Section):
    name: str = "constant"
    unit: Literal["step", "epoch"] = "epoch"
    warmup_steps: Int = Field(0, ge=0, description="optimizer steps of linear warm-up, whatever the unit")
    metric: Literal["test_loss", "test_accuracy"] = Field("test_loss", description="what ReduceLROnPlateau looks at")
    # Arguments of torch's schedulers, which do not look at them before they compute an lr; None: torch's default.
    step_size: Int | None = Field(None, gt=0)
    milestones: list[Annotated[Int, Field(gt=0)]] | None = None
    gamma: Float | None = Field(None, ge=0.0)
    T_max: Int | None = Field(None, gt=0)
    eta_min: Float | None = Field(None, ge=0.0)
    lr_lambda: str | None = Field(None, description="an expression, see lrd.schedules.expression")
    mode: Literal["min", "max"] | None = None
    factor: Float | None = Field(None, gt=0.0, lt=1.0)
    patience: Int | None = Field(None, ge=0)
    threshold: Float | None = Field(None, ge=0.0)
    threshold_mode: Literal["rel", "abs"] | None = None
    cooldown: Int | None = Field(None, ge=0)
    min_lr: Float | None = Field(None, ge=0.0)
    eps: Float | None = Field(None, ge=0.0)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keys that are arguments of the torch class, where they are given."""
        own = ("name", "unit", "warmup_steps", "metric")
        return {key: value for key, value in self if key not in own and value is not None}


class Trainer(Section):
    epochs: Int = Field(1, gt=0)
    max_steps: Int | None = Field(None, gt=0, description="stop after this many steps of the whole run")
    precision: Literal["fp32", "bf16", "auto"] = Field("fp32", description="auto: see `lrd.hardware.settle`")
    accumulation_steps: Int = Field(1, gt=0, description="micro steps of one step")
    clip_norm: Float | None = Field(None, gt=0.0)
    gradient_compression: Literal["none", "bf16"] = Field("none", description="of what the ranks send each other")
    channels_last: Literal[True, False, "auto"] = False
    compile: bool = False
    deterministic: bool = False
    eval_every: Int = Field(1, gt=0, description="epochs")
    fingerprint_every: Int = Field(100, ge=0, description="steps between comparisons of the replicas; 0: never")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: Float = Field(10.0, gt=0.0, description="until a missing rank is an error")
    profile: Int | None = Field(None, gt=0, description="steps to record with torch's profiler, after three others")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="where a loss or the gradient's norm is not finite, before the optimizer's step"
    )


class Checkpoint(Section):
    every_steps: Int | None = Field(None, ge=0, description="default: at the end of each epoch; 0: only at the end")
    keep_last: Int = Field(2, ge=2, description="one may be lost to the disk, so at least two")
    keep_best: bool = True
    background: bool = Field(True, description="write while training goes on; false: training waits")
    on_error: Literal["continue", "stop"] = Field("continue", description="where a checkpoint cannot be written")
    allow_changed: bool = Field(False, description="go on although the recipe changed what is computed")


class Tracking(Section):
    every_steps: Int = Field(1, gt=0)
    probes: Int = Field(4, ge=0, description="single elements whose own lr is recorded at each step")


class Recipe(Section):
    data: Data = Data()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    lr_dropout: LRDropout | None = None
    schedule: Schedule = Schedule()
    trainer: Trainer = Trainer()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    seed: Int = Field(0, ge=0, lt=1 << 63)
    run_dir: str = Field("runs/default", min_length=1)

    @field_validator("data", "model", "optimizer", "schedule", "trainer", "checkpoint", "tracking", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value  # `trainer:` with nothing below it

    @model_validator(mode="after")
    def _groups_need_dropout(self) -> Recipe:
        if self.lr_dropout is None and any(group.keep_prob is not None for group in self.optimizer.groups):
            raise ValueError("optimizer.groups: keep_prob of a group needs the section lr_dropout")
        return self

    @property
    def mask_seed(self) -> int:
        return self.seed if self.lr_dropout is None or self.lr_dropout.seed is None else self.lr_dropout.seed

    def dump(self) -> str:
        """The resolved recipe as YAML: every key with its value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def agreed(self) -> dict[str, Any]:
        """What must be the same on all ranks, as `section.key` -> value: all but where things lie."""
        everything: dict[str, Any] = {}
        for section, value in self.model_dump(mode="json").items():
            keys = {f"{section}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {}
            everything |= keys or {section: value}
        return {key: value for key, value in everything.items() if key not in ("data.root", "run_dir")}

    def mathematics(self) -> dict[str, Any]:
        """What decides about the numbers, as `section.key` -> value. The same before and after an interruption.

        Left out: where things lie, how long and how often, and what changes speed but not the formula.
        """
        everything = self.model_dump(mode="json")
        kept: dict[str, Any] = {"seed": everything["seed"]}
        for section in ("data", "model", "optimizer", "lr_dropout", "schedule"):
            for key, value in (everything[section] or {}).items():
                kept[f"{section}.{key}"] = value
        for key in ("precision", "accumulation_steps", "clip_norm"):
            kept[f"trainer.{key}"] = everything["trainer"][key]
        if self.trainer.gradient_compression != "none":
            kept["trainer.gradient_compression"] = self.trainer.gradient_compression
        for key in ("data.root", "data.num_samples" if self.data.dataset != "synthetic" else ""):
            kept.pop(key, None)
        if self.lr_dropout is not None:
            kept["lr_dropout.seed"] = self.mask_seed
        return kept

    def digest(self) -> str:
        """SHA-256 of `mathematics()`."""
        return hashlib.sha256(json.dumps(self.mathematics(), sort_keys=True).encode()).hexdigest()
