"""The study file: its keys, and how it is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from lrd.errors import UserError, did_you_mean
from lrd.recipe.loader import read_yaml, show_value
from lrd.recipe.schema import Float

_MAX_SEEDS = 10_000
_OF_THE_STUDY = {
    "seed": "the key seeds chooses the seeds",
    "run_dir": "each run has a folder of its own in the folder of the study",
}


def _list_seeds(value: Any) -> Any:
    """Turn a number n into the seeds 0 to n - 1, and check a list of seeds."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 < value <= _MAX_SEEDS:
            raise ValueError(f"should be from 1 to {_MAX_SEEDS:,} seeds")
        return list(range(value))

    is_list = isinstance(value, list) and 0 < len(value) <= _MAX_SEEDS
    if not is_list or not all(type(seed) is int and seed >= 0 for seed in value):
        raise ValueError("should be a number of seeds, or a list of seeds, integers from 0")
    if len(set(value)) < len(value):
        raise ValueError("names a seed twice")
    return value


def _check_settings(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("should be keys of a recipe with their values")
    for key in value:
        if not isinstance(key, str):
            raise ValueError("should be keys of a recipe with their values")
        if key in _OF_THE_STUDY:
            raise ValueError(f"must not have the key {key}: {_OF_THE_STUDY[key]}")
    return value


def _name_number(value: Any) -> Any:
    """An arm may be called `0.5`, which YAML reads as a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


ArmName = Annotated[str, BeforeValidator(_name_number)]
Seeds = Annotated[list[int], BeforeValidator(_list_seeds)]
Settings = Annotated[dict[str, Any], BeforeValidator(_check_settings)]


class Arm(BaseModel):
    """One way of training that a study compares with the others.

    Attributes:
        settings: `section.key` -> value, changed in the base recipe. The key is `set`.
        seeds: None for those of the study.
        baseline: the arm that this one is compared with; None for that of the study.
    """

    model_config = ConfigDict(extra="forbid")

    settings: Settings = Field({}, alias="set")
    seeds: Seeds | None = None
    baseline: ArmName | None = None


class StudyFile(BaseModel):
    """What a study file says.

    Attributes:
        title: the heading of the report.
        base: the recipe that the arms change, relative to the study file.
        settings: `section.key` -> value, changed for all arms. The key is `set`.
        seeds: of each arm that has no list of its own.
        baseline: the arm that the others are compared with, unless they name one of their own;
            None: there is no other comparison.
        accuracy_goal: the report counts the epochs until the test accuracy reaches it.
        published: name -> JSON file with results of somebody else, relative to the study file.
        arms: by name.
    """

    model_config = ConfigDict(extra="forbid")

    title: str = ""
    base: str
    settings: Settings = Field({}, alias="set")
    seeds: Seeds = Field(default_factory=lambda: [0, 1, 2])
    baseline: ArmName | None = None
    accuracy_goal: Annotated[Float, Field(gt=0.0, le=1.0)] | None = None
    published: dict[str, str] = {}
    arms: dict[str, Arm] = Field(min_length=1)

    @field_validator("arms", mode="before")
    @classmethod
    def _complete_arms(cls, value: Any) -> Any:
        """Let an arm be empty (`SGD:`), and a number be a name (`0.5:`)."""
        if not isinstance(value, dict):
            return value
        return {str(name): {} if arm is None else arm for name, arm in value.items()}

    @model_validator(mode="after")
    def _check_names(self) -> StudyFile:
        names: dict[str, str] = {}  # by folder
        for name in self.arms:
            folder = slugify(name)
            if not folder:
                raise ValueError(f"arms.{name}: a name needs a letter or a digit")
            if folder in names:
                raise ValueError(
                    f"arms: {names[folder]!r} and {name!r} would have the same folder, {folder}; "
                    "rename one of them"
                )
            names[folder] = name

        baselines = {"baseline": self.baseline}
        baselines |= {f"arms.{name}.baseline": arm.baseline for name, arm in self.arms.items()}
        for key, baseline in baselines.items():
            if baseline is not None and baseline not in self.arms:
                hint = did_you_mean(baseline, self.arms, cutoff=0.5)
                raise ValueError(f"{key}: is {baseline!r}, may be {', '.join(self.arms)}{hint}")
        return self

    def baseline_of(self, name: str) -> str | None:
        """The arm that an arm is compared with; None if it is compared with none."""
        baseline = self.arms[name].baseline or self.baseline
        return None if baseline == name else baseline


def slugify(name: str) -> str:
    """The name of an arm's folder: `LRD 0.5, rescaled` -> `lrd-0.5-rescaled`."""
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-._")


def read_study_file(path: Path) -> StudyFile:
    """Read and check a study file. The recipe that it names is not read.

    Raises:
        UserError: it is missing or no YAML, or a key is unknown, missing or has a wrong value.
            There is a line for each fault, which begins with the file and the key.
    """
    values = read_yaml(path, "study")
    try:
        study = StudyFile.model_validate(values)
    except ValidationError as error:
        lines = [f"{path}: {_explain(fault)}" for fault in error.errors()]
        raise UserError("\n".join(lines)) from None

    study.title = study.title or path.stem
    return study


def _explain(fault: ErrorDetails) -> str:
    """One fault in one line: the key, its value, and what it may be."""
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location)
    value = show_value(fault["input"])

    if fault["type"] == "extra_forbidden":
        section, owner = (StudyFile, "a study") if len(location) == 1 else (Arm, "an arm")
        known = [field.alias or name for name, field in section.model_fields.items()]
        hint = did_you_mean(location[-1], known, cutoff=0.6)
        return f"{key}: unknown key; {owner} has {', '.join(known)}{hint}"
    if fault["type"] == "missing":
        return f"{key}: is missing"
    if fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
        return f"{key}: is {value}, {message}" if location else message
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}: is {value}, should be keys with their values"
    if fault["type"] == "too_short":
        return f"{key}: there is none"

    message = fault["msg"].removeprefix("Input ")
    return f"{key}: is {value}, {message[0].lower()}{message[1:]}"
