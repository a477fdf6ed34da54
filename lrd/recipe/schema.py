"""The sections of a recipe with their keys: types, defaults, ranges and descriptions.

A recipe describes what is trained, never where: it contains no world size and no host.
"""

from __future__ import annotations

import re
from inspect import isclass
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from lrd.optim.mask import Granularity

# What a key can be marked as, see `setting`.
Mark = Literal["affects_results", "shared_by_ranks"]

TORCH_DEFAULT = "torch's"


def setting(
    default: Any,
    description: str,
    *,
    affects_results: bool,
    shared_by_ranks: bool = True,
    default_means: str | None = None,
    **constraints: Any,
) -> Any:
    """Declare one key of a section: pydantic's `Field` with the marks that every key needs.

    Args:
        default: the value of a key that is not given; `...` if it must be given.
        description: what the key is, in a phrase for the table in docs/recipes.md.
        affects_results: whether another value changes what is computed, and not only its speed or
            its rounding. A resume compares these keys with those of the run that it continues.
        shared_by_ranks: whether the value must be the same on all ranks.
        default_means: the default in words, for the table, e.g. what None stands for.
        constraints: arguments of `Field`, such as `gt=0`.
    """
    marks: dict[str, Any] = {
        "affects_results": affects_results,
        "shared_by_ranks": shared_by_ranks,
        "default_means": default_means,
    }
    return Field(default, description=description, json_schema_extra=marks, **constraints)


def get_mark(field: FieldInfo, mark: str) -> Any:
    """The value of a mark that `setting` put on a field."""
    assert isinstance(field.json_schema_extra, dict), "declare keys of a recipe with setting()"
    return field.json_schema_extra[mark]


def section_types(field: FieldInfo) -> list[type[Section]]:
    """The sections that a field can hold: none, one, or one for each scheduler."""
    candidates = [field.annotation]
    for item in get_args(field.annotation):
        # A scheduler's section is annotated with its tag.
        candidates += [item, *get_args(item)]
    return [item for item in candidates if isclass(item) and issubclass(item, Section)]


def is_own(name: str) -> bool:
    """Whether a name has the form of an own part, `module:attribute`; see `lrd.recipe.named`."""
    return ":" in name


# Types of values


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _check_keep_prob(value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise ValueError(
            "must be greater than 0 and at most 1: it is the probability of keeping an element"
        )
    return value


def _parse_numbers(value: Any) -> Any:
    """Turn text such as `1e-3`, which PyYAML reads as a string, into a number, also within lists.

    Only for torch's arguments: the other keys have a type, and pydantic converts them.
    """
    if isinstance(value, list):
        return [_parse_numbers(item) for item in value]
    if not isinstance(value, str):
        return value

    try:
        return float(value)
    except ValueError:
        return value


_SCIENTIFIC_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _parse_scientific_numbers(value: Any) -> Any:
    """Turn text such as `1e-3` into a number, also within lists, and leave other text as it is."""
    if isinstance(value, list):
        return [_parse_scientific_numbers(item) for item in value]
    if isinstance(value, str) and _SCIENTIFIC_NUMBER.fullmatch(value):
        return float(value)
    return value


def _check_patterns(value: Any) -> Any:
    patterns = value if isinstance(value, list) else [value]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError("should be a pattern or a list of patterns")
    return value


def _require_epoch(value: Any) -> Any:
    if value != "epoch":
        raise ValueError("must be 'epoch': ReduceLROnPlateau steps after evaluations")
    return value


# Where a mirror may be.
_MIRROR_SCHEMES = ("s3", "gs", "az", "file")
_MIRROR_FORM = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///folder"
_MIRROR_PART = re.compile(r"[A-Za-z0-9._=+~,-]+")


def check_mirror(url: str) -> str:
    """Check the form of the address of a mirror. Nothing is connected to.

    Returns:
        The address without slashes at its end.

    Raises:
        PydanticCustomError: it may contain a password or a signature; its type is `secret`, so that
            no message repeats the value.
        ValueError: it has another form.
    """
    if any(character in url for character in "@?#"):
        raise PydanticCustomError(
            "secret",
            "must not contain a user, a password or a signature; credentials come from the "
            "environment",
        )

    scheme, _, rest = url.partition("://")
    path = rest.rstrip("/")
    if scheme not in _MIRROR_SCHEMES or (scheme == "file") != path.startswith("/"):
        raise ValueError(f"should be {_MIRROR_FORM}")
    parts = path.removeprefix("/").split("/")
    if not all(_MIRROR_PART.fullmatch(part) and part.strip(".") for part in parts):
        raise ValueError("between its slashes there should be letters, digits and . _ = + ~ , -")
    return f"{scheme}://{path}"


Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
Channels = Annotated[list[Float], Field(min_length=3, max_length=3)]  # a value for each
Patterns = Annotated[str | list[str], BeforeValidator(_check_patterns)]
KeepProb = Annotated[
    Float,
    AfterValidator(_check_keep_prob),
    "> 0 and <= 1",  # for the table in docs/recipes.md, which cannot read the validator
]


# Sections


class Section(BaseModel):
    """A section of a recipe; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    def marked_keys(self, mark: Mark) -> list[str]:
        """The keys of this section that have a mark; the arguments of an open section have all."""
        keys = [key for key, field in type(self).model_fields.items() if get_mark(field, mark)]
        return keys + list(self.model_extra or {})


class OpenSection(Section):
    """A section whose further keys are arguments of the class or function that it names.

    They are checked against its signature when it is built.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_validator(mode="after")
    def _parse_arguments(self) -> OpenSection:
        extra = self.model_extra or {}
        self.__pydantic_extra__ = {key: _parse_numbers(value) for key, value in extra.items()}
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})


class PartSection(Section):
    """A section whose further keys are arguments of the own part that it names, if it names one.

    With a built-in part an unknown key is an error.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @property
    def part(self) -> str:
        """The name of the part."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_further_keys(self) -> PartSection:
        extra = self.model_extra or {}
        if extra and not is_own(self.part):
            raise PydanticCustomError("unknown_key", "unknown key", {"key": next(iter(extra))})
        self.__pydantic_extra__ = {
            key: _parse_scientific_numbers(value) for key, value in extra.items()
        }
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})


def _check_choice(name: str, choices: tuple[str, ...]) -> str:
    """Refuse a name that is neither among the choices nor an own part.

    The error is pydantic's for a `Literal`, so that the message lists the choices.
    """
    if name not in choices and not is_own(name):
        expected = ", ".join(repr(choice) for choice in choices)
        raise PydanticCustomError(
            "literal_error",
            "Input should be {expected}, or an own part as module:attribute",
            {"expected": expected},
        )
    return name


DATASETS = ("digits", "cifar10", "cifar100", "imagefolder", "synthetic")
ARCHITECTURES = ("resnet18", "resnet34", "resnet50")
LOSSES = ("cross_entropy",)

DatasetName = Annotated[
    str,
    AfterValidator(lambda name: _check_choice(name, DATASETS)),
    "`digits`, `cifar10`, `cifar100`, `imagefolder`, `synthetic`, `module:function`",
]
ArchName = Annotated[
    str,
    AfterValidator(lambda name: _check_choice(name, ARCHITECTURES)),
    "`resnet18`, `resnet34`, `resnet50`, `torchvision:NAME`, `timm:NAME`, `module:function`",
]
LossName = Annotated[
    str,
    AfterValidator(lambda name: _check_choice(name, LOSSES)),
    "`cross_entropy`, `module:function`",
]


class Data(PartSection):
    dataset: DatasetName = setting(
        "digits",
        "the images: `digits` (scikit-learn's, 8x8, no download), `cifar10` and `cifar100` "
        "(downloaded into `root`), `imagefolder` (`root/train/<class>/*`, `root/test/<class>/*`), "
        "`synthetic` (noise, for speed tests), or a function or data set of your own, whose "
        "arguments are further keys of this section ([Data](data.md#your-own-data))",
        affects_results=True,
    )
    root: str = setting(
        "data",
        "folder of the data sets",
        affects_results=False,
        shared_by_ranks=False,
    )
    batch_size: Int = setting(
        128,
        "images of one step over all ranks together",
        affects_results=True,
        gt=0,
    )
    image_size: Int | None = setting(
        None,
        "width and height of an image in pixels; for `imagefolder` the default is the first "
        "image's height",
        affects_results=True,
        default_means="the data set's",
        gt=1,
    )
    augment: Literal["none", "crop", "crop_flip", "resized_crop"] = setting(
        "none",
        "random changes to training images: `crop` (zero padding, random crop), `crop_flip` (also "
        "horizontal flip), `resized_crop` (a random part of the image, resized, and flip; usual "
        "for large photographs)",
        affects_results=True,
    )
    padding: Int | None = setting(
        None,
        "zero padding of the crop in pixels",
        affects_results=True,
        default_means="`image_size / 8`",
        ge=0,
    )
    crop_scale: Float = setting(
        0.08,
        "`resized_crop`: the least part of an image's area that is cut out",
        affects_results=True,
        gt=0.0,
        le=1.0,
    )
    resize: Int | None = setting(
        None,
        "pixels of an image's shorter side, before its centre is cut out; with `resized_crop` this "
        "is for evaluated images alone",
        affects_results=True,
        default_means="`image_size`; with `resized_crop` `image_size / 0.875`",
        gt=1,
    )
    trivial_augment: bool = setting(
        False,
        "change colours or shape of each training image at random (TrivialAugment)",
        affects_results=True,
    )
    random_erasing: Float = setting(
        0.0,
        "probability of a rectangle in a training image being replaced by the mean colour",
        affects_results=True,
        ge=0.0,
        le=1.0,
    )
    mixup: Float = setting(
        0.0,
        "mix pairs of training images and their labels (mixup), by a part drawn from the "
        "Beta(`mixup`, `mixup`) distribution; 0: off",
        affects_results=True,
        ge=0.0,
    )
    cutmix: Float = setting(
        0.0,
        "replace a rectangle in each training image by that of another, and mix the labels "
        "(CutMix), by a part drawn from Beta(`cutmix`, `cutmix`); with `mixup` too, one of the two "
        "is drawn for each step; 0: off",
        affects_results=True,
        ge=0.0,
    )
    mean: Channels | None = setting(
        None,
        "mean of each channel, from 0 to 1, which is subtracted from an image",
        affects_results=True,
        default_means="that of the training images; without `memory`, of 1,024 of them",
    )
    std: Channels | None = setting(
        None,
        "standard deviation of each channel, from 0 to 1, by which an image is divided",
        affects_results=True,
        default_means="as for `mean`",
    )
    storage: Literal["auto", "memory", "files", "packed"] = setting(
        "auto",
        "where images are: `memory` (all of them, decoded), `files` (decoded whenever they are "
        "needed), `packed` (decoded and resized by `lrd data pack`); `auto` is `memory` if they "
        "fit, else `packed` if they are, else `files`",
        affects_results=False,
    )
    workers: Int | None = setting(
        None,
        "processes of each rank that load images; not used with `memory`",
        affects_results=False,
        shared_by_ranks=False,
        default_means="the rank's share of the cores",
        ge=0,
        le=256,
    )
    fingerprint: Literal["names", "contents"] = setting(
        "names",
        "`files`: what tells one data set from another: names and sizes of the files, or also all "
        "that is in them, which reads them all at each start",
        affects_results=False,
    )
    skip_corrupt: bool = setting(
        False,
        "`imagefolder`: go on without files that cannot be decoded, and name them, instead of "
        "stopping. `memory` leaves them out; otherwise the next readable image takes the place",
        affects_results=True,
    )
    num_samples: Int = setting(
        2048,
        "`synthetic`: number of training images",
        affects_results=True,
        gt=0,
    )
    validation: Float = setting(
        0.0,
        "part of the training images that is held out, drawn from `seed`; with it, `best` and "
        "ReduceLROnPlateau go by the held-out images, without it by the test images",
        affects_results=True,
        ge=0.0,
        lt=1.0,
    )

    @property
    def part(self) -> str:
        return self.dataset

    def evaluation_resize(self, image_size: int) -> int | None:
        """Pixels of an evaluated image's shorter side; None: `image_size`, and no more is cut."""
        if self.resize is None and self.augment == "resized_crop":
            return round(image_size / 0.875)
        return self.resize

    @field_validator("std")
    @classmethod
    def _require_positive_std(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and min(value) <= 0.0:
            raise ValueError("should be greater than 0")
        return value


class Model(PartSection):
    arch: ArchName = setting(
        "resnet34",
        "the network: a ResNet whose first layer is a 3x3 convolution, as is usual for small "
        "images (the CIFAR stem); or a network of torchvision, timm or your own, whose arguments "
        "are further keys of this section ([Your own parts](parts.md))",
        affects_results=True,
    )
    width: Int | None = setting(
        None,
        "channels of the first layer; narrow networks are for small machines",
        affects_results=True,
        default_means="64",
        gt=0,
    )
    num_classes: Int | None = setting(
        None,
        "size of the output",
        affects_results=True,
        default_means="the data set's",
        gt=0,
    )
    sync_batchnorm: bool = setting(
        False,
        "BatchNorm's statistics over all ranks: torch's implementation on GPUs, `lrd`'s on CPUs",
        affects_results=True,
    )
    weights: str | None = setting(
        None,
        "a `.safetensors` file with the weights to start from",
        affects_results=True,
        default_means="random weights, drawn from `seed`",
        min_length=1,
    )
    reset: Patterns = setting(
        [],
        "shell-style patterns of weights that are not taken from the file `weights`, e.g. `fc.*`",
        affects_results=True,
        default_means="none",
    )

    @property
    def part(self) -> str:
        return self.arch

    @property
    def reset_patterns(self) -> list[str]:
        return [self.reset] if isinstance(self.reset, str) else self.reset

    @model_validator(mode="after")
    def _fill_default_width(self) -> Model:
        if self.width is None and not is_own(self.arch):
            self.width = 64
        return self

    @model_validator(mode="after")
    def _require_weights_for_reset(self) -> Model:
        if self.reset and self.weights is None:
            raise PydanticCustomError("needs", "reset needs the key weights")
        return self


class OptimizerGroup(OpenSection):
    """The parameters whose names match a pattern, with settings that apply to them alone.

    A parameter belongs to the first group that matches.
    """

    match: Patterns = setting(
        ...,
        "shell-style patterns of parameter names, e.g. `fc.*`",
        affects_results=True,
    )
    name: str | None = setting(
        None,
        "name of the group in TensorBoard's tags",
        affects_results=True,
        default_means="`group<i>`",
    )
    lr: Float | None = setting(
        None,
        "learning rate",
        affects_results=True,
        default_means="`optimizer.lr`",
        ge=0.0,
    )
    weight_decay: Float | None = setting(
        None,
        "weight decay",
        affects_results=True,
        default_means="`optimizer.weight_decay`",
        ge=0.0,
    )
    keep_prob: KeepProb | None = setting(
        None,
        "probability that an element moves in a step; needs the section `lr_dropout`",
        affects_results=True,
        default_means="`lr_dropout.keep_prob`",
    )

    @property
    def patterns(self) -> list[str]:
        return [self.match] if isinstance(self.match, str) else self.match


class Optimizer(OpenSection):
    name: str = setting(
        "SGD",
        "class of `torch.optim`: `SGD`, `Adam`, `AdamW`, `Adamax`, `NAdam`, `RAdam`, `Adagrad`, "
        "`Adadelta`, `RMSprop`, `Rprop`, `ASGD`; or another one as `module:class`, e.g. "
        "`timm.optim:Lamb` ([Your own parts](parts.md))",
        affects_results=True,
    )
    lr: Float = setting(
        0.1,
        "learning rate",
        affects_results=True,
        ge=0.0,
    )
    momentum: Float | None = setting(
        None,
        "momentum",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
    )
    nesterov: bool | None = setting(
        None,
        "Nesterov's momentum",
        affects_results=True,
        default_means=TORCH_DEFAULT,
    )
    weight_decay: Float | None = setting(
        None,
        "weight decay",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
    )
    betas: list[Float] | None = setting(
        None,
        "decay rates of the moments",
        affects_results=True,
        default_means=TORCH_DEFAULT,
    )
    eps: Float | None = setting(
        None,
        "added to the denominator of an update",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
    )
    decay_norms_and_biases: bool = setting(
        True,
        "`false`: no weight decay for biases, normalization layers and all other parameters with "
        "fewer than two dimensions; they form groups named `..._no_decay`",
        affects_results=True,
    )
    groups: list[OptimizerGroup] = setting(
        [],
        "parameter groups, see below",
        affects_results=True,
        default_means="none",
    )

    @property
    def group_names(self) -> list[str]:
        """The names of `groups`; what is in none of them is `group0`."""
        return [group.name or f"group{i}" for i, group in enumerate(self.groups, start=1)]


# The keys that only one kind of `lr_dropout` has, with their defaults there.
_KEYS_BY_KIND: dict[str, dict[str, Any]] = {
    "dropout": {"granularity": "element", "rescale": False, "masks": "update"},
    "magma": {"tau": 2.0, "score_start": None},
}


class LRDropout(Section):
    kind: Literal["dropout", "magma"] = setting(
        "dropout",
        "`dropout` is learning rate dropout; `magma` draws one mask for each tensor and also "
        "scales its update, see [learning-rate-dropout.md](learning-rate-dropout.md#magma)",
        affects_results=True,
    )
    keep_prob: KeepProb = setting(
        0.5,
        "probability that an element (`magma`: a tensor) moves in a step",
        affects_results=True,
    )
    seed: Int | None = setting(
        None,
        "seed of the masks",
        affects_results=True,
        default_means="`seed`",
        ge=0,
        lt=1 << 64,
    )
    granularity: Granularity | None = setting(
        None,
        "`dropout`: which elements share one draw",
        affects_results=True,
        default_means="`element`",
    )
    rescale: bool | None = setting(
        None,
        "`dropout`: divide the update of a kept element by `keep_prob`",
        affects_results=True,
        default_means="`false`",
    )
    masks: Literal["update", "gradient", "momentum_buffer"] | None = setting(
        None,
        "`dropout`: what is masked; `gradient` and `momentum_buffer` are controls, see "
        "[learning-rate-dropout.md](learning-rate-dropout.md)",
        affects_results=True,
        default_means="`update`",
    )
    tau: Float | None = setting(
        None,
        "`magma`: temperature of the score",
        affects_results=True,
        default_means="2",
        gt=0.0,
    )
    score_start: Float | None = setting(
        None,
        "`magma`: the score before the first update",
        affects_results=True,
        default_means="none: the first update's own",
        ge=0.0,
        le=1.0,
    )

    # It runs for the keys that are given. `kind` comes before them, so it is known here.
    @field_validator("granularity", "rescale", "masks", "tau", "score_start")
    @classmethod
    def _refuse_key_of_other_kind(cls, value: Any, info: ValidationInfo) -> Any:
        kind = info.data.get("kind")
        if value is not None and kind is not None and info.field_name not in _KEYS_BY_KIND[kind]:
            has = ", ".join(_KEYS_BY_KIND[kind])
            raise ValueError(f"which lr_dropout.kind {kind} does not have; it has {has}")
        return value

    @field_validator("keep_prob")
    @classmethod
    def _refuse_magma_that_keeps_all(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("kind") == "magma" and value == 1.0:
            raise ValueError("must be less than 1 with lr_dropout.kind magma")
        return value

    @model_validator(mode="after")
    def _fill_defaults_of_kind(self) -> LRDropout:
        for key, default in _KEYS_BY_KIND[self.kind].items():
            if getattr(self, key) is None:
                setattr(self, key, default)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The keys that are arguments of `lrd.LRDropout` or `lrd.Magma`, if they have a value."""
        not_here = ("kind", "seed")
        return {key: value for key, value in self if key not in not_here and value is not None}


# Schedules: one section for each scheduler of torch, told apart by `name`. torch does not check
# most of their arguments before it computes an lr from them, so the ranges are here. An argument
# that is None is not passed on: torch's default applies.


class ScheduleSection(Section):
    """The keys that all schedules have."""

    name: str = setting("constant", "scheduler of `torch.optim.lr_scheduler`", affects_results=True)
    unit: Literal["step", "epoch"] = setting(
        "epoch",
        "what the schedule counts; ReduceLROnPlateau steps once per evaluation and needs `epoch`",
        affects_results=True,
    )
    warmup_steps: Int = setting(
        0,
        "optimizer steps of linear warm-up (always in steps); the warm-up factor multiplies the "
        "schedule's lr, milestones stay where they are",
        affects_results=True,
        ge=0,
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The keys that are arguments of the torch class, if they are given."""
        not_for_torch = ("name", "unit", "warmup_steps", "metric")
        return {key: value for key, value in self if key not in not_for_torch and value is not None}


def _scheduler(name: str) -> Any:
    return setting(name, "scheduler of `torch.optim.lr_scheduler`", affects_results=True)


def _gamma(default: Any = None) -> Any:
    return setting(
        default,
        "factor of the lr at each change",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
    )


def _total_iters() -> Any:
    return setting(
        None,
        "steps or epochs (see `unit`) until the last factor is reached",
        affects_results=True,
        default_means="the run's length",
        gt=0,
    )


class ConstantSchedule(ScheduleSection):
    name: Literal["constant"] = _scheduler("constant")


class StepLR(ScheduleSection):
    name: Literal["StepLR"] = _scheduler("StepLR")
    step_size: Int = setting(
        ...,
        "steps or epochs (see `unit`) from one change of the lr to the next",
        affects_results=True,
        gt=0,
    )
    gamma: Float | None = _gamma()


class MultiStepLR(ScheduleSection):
    name: Literal["MultiStepLR"] = _scheduler("MultiStepLR")
    milestones: list[Annotated[Int, Field(gt=0)]] = setting(
        ...,
        "steps or epochs (see `unit`) at which the lr changes",
        affects_results=True,
    )
    gamma: Float | None = _gamma()


class ExponentialLR(ScheduleSection):
    name: Literal["ExponentialLR"] = _scheduler("ExponentialLR")
    gamma: Float = _gamma(...)


class CosineAnnealingLR(ScheduleSection):
    name: Literal["CosineAnnealingLR"] = _scheduler("CosineAnnealingLR")
    T_max: Int | None = setting(
        None,
        "steps or epochs (see `unit`) until the lr reaches `eta_min`",
        affects_results=True,
        default_means="the run's length",
        gt=0,
    )
    eta_min: Float | None = setting(
        None,
        "lowest lr",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
    )


class ReduceLROnPlateau(ScheduleSection):
    name: Literal["ReduceLROnPlateau"] = _scheduler("ReduceLROnPlateau")
    unit: Annotated[Literal["epoch"], BeforeValidator(_require_epoch)] = setting(
        "epoch",
        "what the schedule counts",
        affects_results=True,
    )
    metric: (
        Literal["test_loss", "test_accuracy", "validation_loss", "validation_accuracy"] | None
    ) = setting(
        None,
        "the metric that decides about a reduction, after each evaluation",
        affects_results=True,
        default_means="`validation_loss` with `data.validation`, else `test_loss`",
    )
    mode: Literal["min", "max"] | None = setting(
        None,
        "whether a lower or a higher metric is better",
        affects_results=True,
        default_means="as `metric` needs it",
    )
    factor: Float | None = setting(
        None,
        "factor of the lr at a reduction",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        gt=0.0,
        lt=1.0,
    )
    patience: Int | None = setting(
        None,
        "evaluations without improvement before a reduction",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0,
    )
    threshold: Float | None = setting(
        None,
        "smallest change of the metric that counts as an improvement",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
    )
    threshold_mode: Literal["rel", "abs"] | None = setting(
        None,
        "whether `threshold` is relative or absolute",
        affects_results=True,
        default_means=TORCH_DEFAULT,
    )
    cooldown: Int | None = setting(
        None,
        "after a reduction, this many evaluations are ignored",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0,
    )
    min_lr: Float | None = setting(
        None,
        "lowest lr",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
    )
    eps: Float | None = setting(
        None,
        "a reduction that changes the lr by less than this is not made",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
    )


class LambdaLR(ScheduleSection):
    name: Literal["LambdaLR"] = _scheduler("LambdaLR")
    lr_lambda: str | Annotated[list[str], Field(min_length=1)] | None = setting(
        None,
        "factor of the lr as an arithmetic expression, see below; or a list of expressions, one "
        "for each parameter group",
        affects_results=True,
        default_means="1",
    )


class LinearLR(ScheduleSection):
    name: Literal["LinearLR"] = _scheduler("LinearLR")
    start_factor: Float | None = setting(
        None,
        "factor of the lr at the beginning",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        gt=0.0,
        le=1.0,
    )
    end_factor: Float | None = setting(
        None,
        "factor of the lr at the end",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
        le=1.0,
    )
    total_iters: Int | None = _total_iters()


class ConstantLR(ScheduleSection):
    name: Literal["ConstantLR"] = _scheduler("ConstantLR")
    factor: Float | None = setting(
        None,
        "factor of the lr until `total_iters`; after it the factor is 1",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
        le=1.0,
    )
    total_iters: Int | None = setting(
        None,
        "steps or epochs (see `unit`) with the factor",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        gt=0,
    )


class PolynomialLR(ScheduleSection):
    name: Literal["PolynomialLR"] = _scheduler("PolynomialLR")
    total_iters: Int | None = _total_iters()
    power: Float | None = setting(
        None,
        "exponent of the decay",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        gt=0.0,
    )


class CosineAnnealingWarmRestarts(ScheduleSection):
    name: Literal["CosineAnnealingWarmRestarts"] = _scheduler("CosineAnnealingWarmRestarts")
    T_0: Int = setting(
        ...,
        "steps or epochs (see `unit`) until the first restart",
        affects_results=True,
        gt=0,
    )
    T_mult: Int | None = setting(
        None,
        "each cycle is this many times as long as the one before",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        gt=0,
    )
    eta_min: Float | None = setting(
        None,
        "lowest lr",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
    )


class OneCycleLR(ScheduleSection):
    name: Literal["OneCycleLR"] = _scheduler("OneCycleLR")
    max_lr: Float | list[Float] = setting(
        ...,
        "highest lr, or a list with that of each parameter group; `optimizer.lr` is not used",
        affects_results=True,
    )
    total_steps: Int | None = setting(
        None,
        "steps or epochs (see `unit`) of the cycle",
        affects_results=True,
        default_means="the run's length",
        gt=0,
    )
    pct_start: Float | None = setting(
        None,
        "part of the cycle in which the lr rises",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
        le=1.0,
    )
    anneal_strategy: Literal["cos", "linear"] | None = setting(
        None,
        "shape of the curve",
        affects_results=True,
        default_means=TORCH_DEFAULT,
    )
    cycle_momentum: bool | None = setting(
        None,
        "whether the momentum falls while the lr rises, and the reverse",
        affects_results=True,
        default_means=TORCH_DEFAULT,
    )
    base_momentum: Float | None = setting(
        None,
        "lowest momentum",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
        lt=1.0,
    )
    max_momentum: Float | None = setting(
        None,
        "highest momentum",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        ge=0.0,
        lt=1.0,
    )
    div_factor: Float | None = setting(
        None,
        "the first lr is `max_lr / div_factor`",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        gt=0.0,
    )
    final_div_factor: Float | None = setting(
        None,
        "the last lr is the first one divided by this",
        affects_results=True,
        default_means=TORCH_DEFAULT,
        gt=0.0,
    )
    three_phase: bool | None = setting(
        None,
        "whether the lr returns to the first one before it falls to the last one",
        affects_results=True,
        default_means=TORCH_DEFAULT,
    )


class OwnSchedule(ScheduleSection):
    """A subclass of torch's `LRScheduler` of the user's own; further keys are its arguments."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    name: str = setting(
        ...,
        "a subclass of torch's `LRScheduler` as `module:class` ([Your own parts](parts.md))",
        affects_results=True,
    )

    @model_validator(mode="after")
    def _parse_arguments(self) -> OwnSchedule:
        extra = self.model_extra or {}
        self.__pydantic_extra__ = {
            key: _parse_scientific_numbers(value) for key, value in extra.items()
        }
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


# What stands in a recipe for `OwnSchedule`, where the other schedules have torch's name.
OWN_SCHEDULE = "module:class"


def _schedule_tag(value: Any) -> str:
    """By which `schedule.name` chooses among the sections."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    if isinstance(name, str) and is_own(name):
        return OWN_SCHEDULE
    return str(name)


InnerSchedule = Annotated[
    Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[StepLR, Tag("StepLR")]
    | Annotated[MultiStepLR, Tag("MultiStepLR")]
    | Annotated[ExponentialLR, Tag("ExponentialLR")]
    | Annotated[CosineAnnealingLR, Tag("CosineAnnealingLR")]
    | Annotated[CosineAnnealingWarmRestarts, Tag("CosineAnnealingWarmRestarts")]
    | Annotated[PolynomialLR, Tag("PolynomialLR")]
    | Annotated[LinearLR, Tag("LinearLR")]
    | Annotated[ConstantLR, Tag("ConstantLR")]
    | Annotated[LambdaLR, Tag("LambdaLR")]
    | Annotated[OwnSchedule, Tag(OWN_SCHEDULE)],
    Discriminator(_schedule_tag),
]


class SequentialLR(ScheduleSection):
    name: Literal["SequentialLR"] = _scheduler("SequentialLR")
    schedules: Annotated[list[InnerSchedule], Field(min_length=1)] = setting(
        ...,
        "schedules that follow each other, each with its `name` and arguments (not OneCycleLR, "
        "ReduceLROnPlateau or SequentialLR); `unit` and `warmup_steps` stand beside this key and "
        "not in them",
        affects_results=True,
    )
    milestones: list[Annotated[Int, Field(gt=0)]] = setting(
        ...,
        "steps or epochs (see `unit`) at which the next schedule begins",
        affects_results=True,
    )

    @field_validator("schedules", mode="before")
    @classmethod
    def _refuse_keys_of_the_whole(cls, value: Any) -> Any:
        for section in value if isinstance(value, list) else []:
            if not isinstance(section, dict):
                continue
            # A resolved recipe lists their defaults; None of them is a wish.
            for key, default in (("unit", "epoch"), ("warmup_steps", 0)):
                if section.get(key, default) != default:
                    raise ValueError(f"{key} stands beside schedules, not in one of them")
        return value

    @model_validator(mode="after")
    def _check_number_of_milestones(self) -> SequentialLR:
        if len(self.milestones) != len(self.schedules) - 1:
            raise PydanticCustomError(
                "needs",
                "{schedules} schedules need {needed} milestones, not {milestones}",
                {
                    "milestones": len(self.milestones),
                    "schedules": len(self.schedules),
                    "needed": len(self.schedules) - 1,
                },
            )
        return self


Schedule = Annotated[
    Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[StepLR, Tag("StepLR")]
    | Annotated[MultiStepLR, Tag("MultiStepLR")]
    | Annotated[ExponentialLR, Tag("ExponentialLR")]
    | Annotated[CosineAnnealingLR, Tag("CosineAnnealingLR")]
    | Annotated[CosineAnnealingWarmRestarts, Tag("CosineAnnealingWarmRestarts")]
    | Annotated[OneCycleLR, Tag("OneCycleLR")]
    | Annotated[PolynomialLR, Tag("PolynomialLR")]
    | Annotated[LinearLR, Tag("LinearLR")]
    | Annotated[ConstantLR, Tag("ConstantLR")]
    | Annotated[ReduceLROnPlateau, Tag("ReduceLROnPlateau")]
    | Annotated[LambdaLR, Tag("LambdaLR")]
    | Annotated[SequentialLR, Tag("SequentialLR")]
    | Annotated[OwnSchedule, Tag(OWN_SCHEDULE)],
    Discriminator(_schedule_tag),
]
SCHEDULES: dict[str, type[ScheduleSection]] = {
    "constant": ConstantSchedule,
    "StepLR": StepLR,
    "MultiStepLR": MultiStepLR,
    "ExponentialLR": ExponentialLR,
    "CosineAnnealingLR": CosineAnnealingLR,
    "CosineAnnealingWarmRestarts": CosineAnnealingWarmRestarts,
    "OneCycleLR": OneCycleLR,
    "PolynomialLR": PolynomialLR,
    "LinearLR": LinearLR,
    "ConstantLR": ConstantLR,
    "ReduceLROnPlateau": ReduceLROnPlateau,
    "LambdaLR": LambdaLR,
    "SequentialLR": SequentialLR,
}
# Those of `InnerSchedule`.
INNER_SCHEDULES = [
    name for name in SCHEDULES if name not in ("OneCycleLR", "ReduceLROnPlateau", "SequentialLR")
]


def is_schedule_key(key: str) -> bool:
    """Whether any scheduler has this key."""
    return any(key in section.model_fields for section in SCHEDULES.values())


class Trainer(Section):
    epochs: Int = setting(
        1,
        "epochs of the whole run; affects the results if the schedule depends on the run's length "
        "(LambdaLR, or `T_max`, `total_iters` or `total_steps` not given)",
        affects_results=False,
        gt=0,
    )
    max_steps: Int | None = setting(
        None,
        "stop after this many steps of the whole run",
        affects_results=False,
        default_means="no limit",
        gt=0,
    )
    precision: Literal["fp32", "bf16", "auto"] = setting(
        "fp32",
        "`bf16` is autocast; `auto` is `bf16` if the processor has AVX512-BF16 or AMX, or the GPU "
        "supports bfloat16, else `fp32`. `recipe.yaml` contains the precision that `auto` chose. "
        "It must be the same on all ranks and after a resume; otherwise one line reports the "
        "difference and the run does not start",
        affects_results=True,
    )
    loss: LossName = setting(
        "cross_entropy",
        "the loss that is minimized: `cross_entropy`, or a function of your own of logits and "
        "labels ([Your own parts](parts.md)); `test/loss` is always the cross-entropy",
        affects_results=True,
    )
    label_smoothing: Float = setting(
        0.0,
        "`cross_entropy`: part of the target that is spread evenly over all classes",
        affects_results=True,
        ge=0.0,
        lt=1.0,
    )
    ema_decay: Float | None = setting(
        None,
        "decay of a moving average of the weights after each step, e.g. `0.999`; the average is "
        "evaluated beside the network, and `best` goes by it",
        affects_results=True,
        default_means="no average",
        gt=0.0,
        lt=1.0,
    )
    accumulation_steps: Int = setting(
        1,
        "micro steps of one step",
        affects_results=True,
        gt=0,
    )
    clip_norm: Float | None = setting(
        None,
        "largest norm of the whole gradient",
        affects_results=True,
        default_means="no clipping",
        gt=0.0,
    )
    gradient_compression: Literal["none", "bf16"] = setting(
        "none",
        "`bf16`: the ranks send each other gradients in bfloat16, half the bytes; the mean is "
        "rounded to 8 bits of mantissa ([Scaling](scaling.md) shows what it gains)",
        affects_results=True,
    )
    gradient_exchange: Literal["all", "kept"] = setting(
        "all",
        "`kept`: the ranks send each other only the elements of an update that learning rate "
        "dropout keeps, `keep_prob` times the bytes; for SGD ([Exchange](exchange.md)); the "
        "training is the same but for rounding, and a run may change between the two",
        affects_results=False,
    )
    sharding: Literal["none", "full"] = setting(
        "none",
        "`full`: each rank holds a shard of the parameters, gradients and optimizer state (FSDP2) "
        "in place of a copy, and the ranks gather a block of the network when they compute it "
        "([Launching](launching.md#sharding)); the gradients' mean is rounded otherwise, and a run "
        "may change between the two",
        affects_results=False,
    )
    channels_last: Literal[True, False, "auto"] = setting(
        False,
        "use the channels_last memory layout; on a CPU, for the inputs only; `auto`: true on a "
        "GPU in `bf16`, false on a CPU, where it is faster on 32x32 images in batches of 128 and "
        "slower on 8x8 ones ([Results](results.md#one-training-step))",
        affects_results=False,
    )
    compile: bool = setting(
        False,
        "compile the network with `torch.compile`",
        affects_results=False,
    )
    deterministic: bool = setting(
        False,
        "use deterministic algorithms only, for exact resumes on CUDA; how much slower this is "
        "there has not been measured",
        affects_results=False,
    )
    eval_every: Int = setting(
        1,
        "epochs between evaluations",
        affects_results=False,
        gt=0,
    )
    fingerprint_every: Int = setting(
        100,
        "steps between comparisons of the replicas; 0: never",
        affects_results=False,
        ge=0,
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto",
        "`auto`: what the launch file asks for; without a launcher, a GPU if there is one",
        affects_results=False,
    )
    timeout_minutes: Float = setting(
        10.0,
        "minutes after which a missing rank is an error; also the time limit for the rank that "
        "reads or decodes the data while the others wait",
        affects_results=False,
        gt=0.0,
        le=1_000_000.0,
    )
    profile: Int | None = setting(
        None,
        "record this many steps with torch's profiler, after the first three steps of each start; "
        "the results of training do not change. Each rank writes "
        "`run_dir/profile/rank<r>.json.gz` on its host, a Chrome trace for "
        "[ui.perfetto.dev](https://ui.perfetto.dev)",
        affects_results=False,
        default_means="no trace",
        gt=0,
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "what to do if a rank's loss or the gradient's norm is not finite, checked before the "
        "optimizer's step (on a GPU with `stop`: every `tracking.every_steps` steps): `stop` ends "
        "the run; `skip` skips the step on all ranks and counts it, at most ten times in a row",
        affects_results=False,
    )


class Checkpoint(Section):
    every_steps: Int | None = setting(
        None,
        "steps between checkpoints; 0: only at the end",
        affects_results=False,
        default_means="the end of each epoch",
        ge=0,
    )
    # At least two, because one may be lost to a fault of the disk.
    keep_last: Int = setting(
        2,
        "how many of the newest checkpoints to keep; older ones are deleted only when two of "
        "those that stay have been read back and verified",
        affects_results=False,
        ge=2,
    )
    keep_best: bool = setting(
        True,
        "write a checkpoint at each new best accuracy, and keep it; the accuracy is that of the "
        "held-out images with `data.validation`, else of the test images",
        affects_results=False,
    )
    background: bool = setting(
        True,
        "a thread writes checkpoints from a copy while training goes on; `false`: training waits",
        affects_results=False,
    )
    on_error: Literal["continue", "stop"] = setting(
        "continue",
        "what to do if a checkpoint cannot be written: `continue` reports it and trains on, "
        "`stop` ends the run with status 2",
        affects_results=False,
    )
    allow_changed: bool = setting(
        False,
        "continue a run although settings that affect the results have changed",
        affects_results=False,
    )
    mirror: Annotated[str, AfterValidator(check_mirror)] | None = setting(
        None,
        "where checkpoints and records are copied in the background, off the machine: "
        "`s3://bucket/prefix`, `gs://...`, `az://...` or `file:///folder`; an empty or older "
        "`run_dir` goes on from there",
        affects_results=False,
        default_means="nowhere",
    )


class Tracking(Section):
    every_steps: Int = setting(
        1,
        "steps between records",
        affects_results=False,
        gt=0,
    )
    probes: Int = setting(
        4,
        "number of single elements whose lr is recorded at each step",
        affects_results=False,
        ge=0,
    )
    histograms_every: Int = setting(
        0,
        "steps between histograms of each parameter's update, for TensorBoard; 0: never",
        affects_results=False,
        ge=0,
    )


# Keys that earlier versions did not have, with the value that means what was done then. A
# checkpoint of theirs does not contain them, so they are left out of ours.
_ABSENT_DEFAULTS: dict[str, Any] = {
    "data.validation": 0.0,
    "data.crop_scale": 0.08,
    "data.resize": None,
    "data.trivial_augment": False,
    "data.random_erasing": 0.0,
    "data.mixup": 0.0,
    "data.cutmix": 0.0,
    "data.mean": None,
    "data.std": None,
    "model.weights": None,
    "model.reset": [],
    "optimizer.decay_norms_and_biases": True,
    "trainer.loss": "cross_entropy",
    "trainer.label_smoothing": 0.0,
    "trainer.ema_decay": None,
    "trainer.gradient_compression": "none",
}


class Recipe(Section):
    """A whole recipe."""

    # Each section has the marks on its own keys. A mark on the section itself is read only where
    # there is no section, which is possible for `lr_dropout` alone.
    data: Data = setting(Data(), "the images and their batches", affects_results=False)
    model: Model = setting(Model(), "the network", affects_results=False)
    optimizer: Optimizer = setting(
        Optimizer(),
        "torch's optimizer; further keys are arguments of its class",
        affects_results=False,
    )
    lr_dropout: LRDropout | None = setting(
        None,
        "learning rate dropout; leave this section out, or empty (`lr_dropout:`), to train "
        "without LRD; `lr_dropout: {}` turns LRD on with the defaults below",
        affects_results=False,
        default_means="no LRD",
    )
    schedule: Schedule = setting(
        ConstantSchedule(),
        "how the lr changes during the run; each scheduler has its own keys",
        affects_results=False,
    )
    trainer: Trainer = setting(Trainer(), "the training loop", affects_results=False)
    checkpoint: Checkpoint = setting(
        Checkpoint(),
        "saved training states; a checkpoint is always written at the end of the run and on a "
        "stop signal",
        affects_results=False,
    )
    tracking: Tracking = setting(Tracking(), "what TensorBoard records", affects_results=False)
    seed: Int = setting(
        0,
        "seed of the initial weights, the order of the samples, the augmentation and, unless "
        "`lr_dropout.seed` is given, the masks",
        affects_results=True,
        ge=0,
        lt=1 << 63,
    )
    run_dir: str = setting(
        "runs/default",
        "folder of checkpoints, TensorBoard's event files, `metrics.csv`, `train.log`, "
        "`recipe.yaml` and `status.json`",
        affects_results=False,
        shared_by_ranks=False,
        default_means="`runs/<name of the file>`",
        min_length=1,
    )

    @field_validator(
        "data",
        "model",
        "optimizer",
        "trainer",
        "checkpoint",
        "tracking",
        mode="before",
    )
    @classmethod
    def _fill_empty_section(cls, value: Any) -> Any:
        # `trainer:` with nothing below it is read as None.
        return {} if value is None else value

    @field_validator("schedule", mode="before")
    @classmethod
    def _complete_schedule(cls, value: Any) -> Any:
        """Add the name `constant` if there is none; drop keys of other schedulers with no value."""
        if value is None:
            return {"name": "constant"}
        if not isinstance(value, dict):
            return value

        value = {"name": "constant", **value}
        section = SCHEDULES.get(str(value["name"]))
        if section is None:  # an own schedule, or an unknown one
            return value

        # A recipe.yaml that an older lrd wrote lists the keys of every scheduler: null, and the
        # metric test_loss.
        unset = [
            key
            for key, item in value.items()
            if key not in section.model_fields
            and is_schedule_key(key)
            and (item is None or (key, item) == ("metric", "test_loss"))
        ]
        return {key: item for key, item in value.items() if key not in unset}

    @model_validator(mode="after")
    def _require_lr_dropout_for_groups(self) -> Recipe:
        if self.lr_dropout is None and any(
            group.keep_prob is not None for group in self.optimizer.groups
        ):
            raise ValueError("optimizer.groups: keep_prob of a group needs the section lr_dropout")
        return self

    @model_validator(mode="after")
    def _choose_metric(self) -> Recipe:
        if not isinstance(self.schedule, ReduceLROnPlateau):
            return self

        has_validation = self.data.validation > 0.0
        if self.schedule.metric is None:
            self.schedule.metric = "validation_loss" if has_validation else "test_loss"
        if self.schedule.metric.startswith("validation") and not has_validation:
            raise ValueError(
                f"schedule.metric: is {self.schedule.metric!r}, which needs data.validation"
            )
        return self

    @model_validator(mode="after")
    def _refuse_smoothing_of_own_loss(self) -> Recipe:
        if self.trainer.label_smoothing and self.trainer.loss != "cross_entropy":
            raise ValueError(
                f"trainer.label_smoothing: is {self.trainer.label_smoothing}, but trainer.loss is "
                f"{self.trainer.loss!r}; it is part of cross_entropy alone"
            )
        return self

    @model_validator(mode="after")
    def _refuse_average_of_shards(self) -> Recipe:
        if self.trainer.sharding == "full" and self.trainer.ema_decay is not None:
            raise ValueError(
                f"trainer.ema_decay: is {self.trainer.ema_decay}, must be null with "
                "trainer.sharding=full: each rank would need the whole network once more"
            )
        return self

    @model_validator(mode="after")
    def _refuse_histograms_of_shards(self) -> Recipe:
        if self.trainer.sharding == "full" and self.tracking.histograms_every:
            raise ValueError(
                f"tracking.histograms_every: is {self.tracking.histograms_every}, must be 0 with "
                "trainer.sharding=full: no rank has a whole parameter"
            )
        return self

    @model_validator(mode="after")
    def _refuse_compression_of_shards(self) -> Recipe:
        if self.trainer.sharding == "full" and self.trainer.gradient_compression != "none":
            raise ValueError(
                f"trainer.gradient_compression: is {self.trainer.gradient_compression!r}, "
                "must be 'none' with trainer.sharding=full: it is done in DDP's all-reduce"
            )
        return self

    @model_validator(mode="after")
    def _refuse_exchange_of_kept(self) -> Recipe:
        if self.trainer.gradient_exchange == "all":
            return self

        dropout = self.lr_dropout
        reason = ""
        if dropout is None:
            reason = "without lr_dropout: there is no mask"
        elif dropout.kind != "dropout":
            reason = f"with lr_dropout.kind={dropout.kind}: it needs the whole mean gradient"
        elif dropout.masks not in (None, "update"):
            reason = (
                f"with lr_dropout.masks={dropout.masks}: dropped elements need the mean gradient"
            )
        elif self.optimizer.name != "SGD":
            reason = (
                f"with optimizer.name={self.optimizer.name}: the mean of the ranks' own momentum "
                "is that of the mean gradient for SGD alone"
            )
        elif self.trainer.clip_norm is not None:
            reason = "with trainer.clip_norm: no rank has the whole mean gradient"
        elif self.trainer.sharding == "full":
            reason = "with trainer.sharding=full: it is done in DDP's all-reduce"
        if reason:
            raise ValueError(f"trainer.gradient_exchange: is 'kept', must be 'all' {reason}")
        return self

    @property
    def mask_seed(self) -> int:
        """The seed of the masks: `lr_dropout.seed`, or `seed` if that is not given."""
        if self.lr_dropout is None or self.lr_dropout.seed is None:
            return self.seed
        return self.lr_dropout.seed

    def dump(self) -> str:
        """The resolved recipe as YAML: every key with its value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def settings_shared_by_ranks(self) -> dict[str, Any]:
        """The settings that must be the same on all ranks, as `section.key` -> value.

        All but the folders, which may differ from host to host.
        """
        return self._marked_settings("shared_by_ranks")

    def result_settings(self) -> dict[str, Any]:
        """The settings that affect the results, as `section.key` -> value.

        They stay the same over an interruption. Folders, how long and how often, and what changes
        the speed but not the formula are not among them.
        """
        settings = self._marked_settings("affects_results")

        if self.data.dataset != "synthetic":
            del settings["data.num_samples"]

        if self.lr_dropout is not None:
            settings["lr_dropout.seed"] = self.mask_seed

        # The rest keeps the keys as they are in checkpoints of earlier versions, which a resume
        # compares: there was one kind of lr_dropout, without compression the key was left out, and
        # every schedule had a metric.
        if self.lr_dropout is not None and self.lr_dropout.kind == "dropout":
            del settings["lr_dropout.kind"]
        settings.setdefault("schedule.metric", "test_loss")
        for key, default in _ABSENT_DEFAULTS.items():
            if settings.get(key) == default:
                settings.pop(key, None)

        return settings

    def _marked_settings(self, mark: Mark) -> dict[str, Any]:
        values = self.model_dump(mode="json")
        settings: dict[str, Any] = {}
        for key, field in Recipe.model_fields.items():
            section = getattr(self, key)
            if isinstance(section, Section):
                for section_key in section.marked_keys(mark):
                    settings[f"{key}.{section_key}"] = values[key][section_key]
            elif get_mark(field, mark):
                settings[key] = values[key]
        return settings
