"""Reading a recipe: defaults, then the YAML file, then `section.key=value` overrides.

Unknown keys, wrong types and values out of range raise a `UserError` with one line for each fault,
which names the key.
"""

from __future__ import annotations

import copy
import errno
import re
import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lrd.errors import UserError, did_you_mean, first_line
from lrd.recipe.schema import (
    INNER_SCHEDULES,
    SCHEDULES,
    Recipe,
    is_schedule_key,
    section_types,
)


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file, with overrides of the form `section.key=value` on top.

    If neither gives a `run_dir`, the run directory is `runs/<name of the file>`.

    Raises:
        UserError: if the file is missing or not a YAML mapping, or a key is unknown, of a wrong
            type or out of range.
    """
    path = Path(path)
    values = {"run_dir": f"runs/{path.stem}", **read_yaml(path, "recipe")}
    file_keys = _list_keys(values)
    for override in overrides or []:
        _apply_override(values, override)

    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise _describe_faults(error, str(path), file_keys, overrides or []) from None
    return _expand_homes(recipe)


def parse(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with these values, validated.

    Args:
        values: section -> key -> value, as YAML has them.
        source: where they come from; each line of an error begins with it.
        overrides: settings to change, each as `section.key=value`.

    Raises:
        UserError: if a key is unknown, of a wrong type or out of range.
    """
    values = copy.deepcopy(values)
    file_keys = _list_keys(values)
    for override in overrides:
        _apply_override(values, override)

    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise _describe_faults(error, source, file_keys, list(overrides)) from None
    return _expand_homes(recipe)


def _list_keys(values: dict[str, Any]) -> set[str]:
    """The sections of a recipe's file and their keys, as `section` and `section.key`."""
    keys = set()
    for section, content in values.items():
        keys.add(str(section))
        if isinstance(content, dict):
            keys |= {f"{section}.{key}" for key in content}
    return keys


def _describe_faults(
    error: ValidationError, source: str, file_keys: set[str], overrides: list[str]
) -> UserError:
    """A line for each fault, which begins with the override or the file that contains it."""
    lines = []
    for fault in error.errors():
        key = ".".join(_location(fault))
        override = _find_override(key, file_keys, overrides)
        if override is not None and fault["type"] == "secret":
            override = f"{override.partition('=')[0]}=..."
        lines.append(f"{source if override is None else override}: {_explain(fault)}")
    if len(lines) > _MAX_FAULTS:
        lines[_MAX_FAULTS:] = [f"{source}: and {len(lines) - _MAX_FAULTS:,} more faults"]
    return UserError("\n".join(lines))


def _find_override(key: str, file_keys: set[str], overrides: list[str]) -> str | None:
    """The last override that gave a key its value, or that made the section it names."""
    for override in reversed(overrides):
        name, _, _ = override.partition("=")
        is_from_it = key == name or key.startswith(f"{name}.")
        is_made_by_it = name.startswith(f"{key}.") and key not in file_keys
        if is_from_it or is_made_by_it:
            return override if len(override) <= _MAX_SHOWN else f"{name}=..."
    return None


def _expand_homes(recipe: Recipe) -> Recipe:
    """Replace `~` in the folders: the shell expands it only at the beginning of an argument."""
    recipe.run_dir = _expand_home(recipe.run_dir, "run_dir")
    recipe.data.root = _expand_home(recipe.data.root, "data.root")
    if recipe.model.weights is not None:
        recipe.model.weights = _expand_home(recipe.model.weights, "model.weights")
        _require_path(recipe.model.weights, "model.weights")
    _require_path(recipe.run_dir, "run_dir")
    _require_path(recipe.data.root, "data.root")
    return recipe


def _require_path(path: str, key: str) -> None:
    """Refuse text that cannot be the name of a file or folder here."""
    if "\0" in path:
        raise UserError(f"{key}: is {show_value(path)}, a path cannot contain a NUL")
    try:
        Path(path).lstat()
    except UnicodeEncodeError:
        raise UserError(f"{key}: is {path!a}, {_describe_encoding_problem()}") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{key}: is {show_value(path)}: {first_line(error)}") from None


def _describe_encoding_problem() -> str:
    """Why text and the bytes of a command line or a path cannot be turned into each other."""
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8":
        return "which is not valid UTF-8"
    return f"which has no meaning in the encoding of this locale, {encoding}; set PYTHONUTF8=1"


def _expand_home(path: str, key: str) -> str:
    """Replace `~` and `~user` at the beginning of a path.

    Raises:
        UserError: there is no such user, or no home.
    """
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise UserError(f"{key}: is {path!r}: {first_line(error)}") from None


_MAX_SHOWN = 100  # characters of a value or an override in a message

_MAX_VALUES = 100_000  # in a recipe
_MAX_FILE_BYTES = 10_000_000
_MAX_FAULTS = 8  # that are listed

_reprs = reprlib.Repr()
_reprs.maxstring = _reprs.maxother = _MAX_SHOWN
_reprs.maxlevel = 2


def show_value(value: Any) -> str:
    """A value for a message, shortened: a list may contain itself, or be of any length."""
    return _reprs.repr(value)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses a key that appears twice.

    By default the second value would silently replace the first.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key_node.value} appears twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, kind: str) -> dict[str, Any]:
    """Read a mapping of sections from a YAML file; empty if the file is.

    Args:
        path: the file.
        kind: what it is, for messages, such as `recipe`.

    Raises:
        UserError: it is missing, no YAML or no mapping, has a key twice, or is too large.
    """
    try:
        if not path.is_file() and path.exists():  # to open a FIFO would wait for a writer
            raise UserError(f"{path}: is not a file")
        if path.is_file() and path.stat().st_size > _MAX_FILE_BYTES:
            raise UserError(f"{path}: has more than {_MAX_FILE_BYTES:,} bytes, no {kind} has")
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such {kind}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: cannot be read as YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{path}: {line}cannot be read as YAML: {problem}") from None

    if values is None:
        return {}
    if _is_too_large(values):
        raise UserError(f"{path}: has more than {_MAX_VALUES:,} values, or contains itself")
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: a {kind} must be a mapping of sections, not a {type(values).__name__}"
        )
    return values


def _is_too_large(values: Any) -> bool:
    """Whether there are very many values: YAML's aliases can make millions of a few lines."""
    num_values = 0
    unseen = [values]
    while unseen and num_values <= _MAX_VALUES:
        value = unseen.pop()
        num_values += 1
        if isinstance(value, dict):
            unseen += value.values()
        elif isinstance(value, list):
            unseen += value
    return num_values > _MAX_VALUES


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one key in `values`; sections that are not there are added."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(
            f"{override}: an override has the form section.key=value, e.g. optimizer.lr=0.1"
        )

    try:
        text.encode()
    except UnicodeEncodeError:  # Python could not decode the command line
        raise UserError(f"{key}: is {text!a}, {_describe_encoding_problem()}") from None
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{key}: {show_value(text)} is not a YAML value") from None

    if _is_too_large(value):
        raise UserError(f"{key}: has more than {_MAX_VALUES:,} values, or contains itself")

    section = values
    for part in parts[:-1]:
        if section.get(part) is None:
            section[part] = {}
        if not isinstance(section[part], dict):
            raise UserError(
                f"{key}: cannot be overridden, because {part} is {show_value(section[part])} "
                "in the file, not a section of keys and values"
            )
        section = section[part]
    section[parts[-1]] = value


def _location(fault: ErrorDetails) -> list[str]:
    """The parts of the key that a fault is about; empty if it is about the whole recipe."""
    location = [str(part) for part in fault["loc"]]

    # In a schedule pydantic puts the scheduler's name between the section and the key.
    if len(location) > 4 and location[:1] + location[2:3] == ["schedule", "schedules"]:
        location.pop(4)
    if len(location) > 1 and location[0] == "schedule":
        location.pop(1)
    if fault["type"] == "unknown_key":
        location.append(str(fault["ctx"]["key"]))
    return location


def _scheduler_of(fault: ErrorDetails) -> str | None:
    """The scheduler whose arguments a fault is about."""
    location = [str(part) for part in fault["loc"]]
    if len(location) > 4 and location[:1] + location[2:3] == ["schedule", "schedules"]:
        return location[4]
    if len(location) > 1 and location[0] == "schedule":
        return location[1]
    return None


def _explain(fault: ErrorDetails) -> str:
    """One fault in one line: the key, its value, and what it may be."""
    location = _location(fault)
    key = ".".join(location)
    value = fault["input"]

    if fault["type"] in ("extra_forbidden", "unknown_key"):
        return _explain_unknown_key(location, _scheduler_of(fault))
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _explain_unknown_scheduler(key, value, is_inner="schedules" in location)
    if fault["type"] in ("needs", "secret"):
        return f"{key}: {fault['msg']}"
    if fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
        return f"{key}: is {show_value(value)}, {message}" if location else message
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}: is {show_value(value)}, should be a section of keys and values"
    if fault["type"] == "missing":
        return f"{key}: is missing"

    message = fault["msg"].removeprefix("Input ")
    hint = ""
    if fault["type"] == "literal_error":
        names = re.findall(r"'([^']*)'", str(fault["ctx"]["expected"]))
        hint = did_you_mean(str(value), names, cutoff=0.5)
    return f"{key}: is {show_value(value)}, {message[0].lower()}{message[1:]}{hint}"


def _explain_unknown_key(location: list[str], scheduler: str | None) -> str:
    key = ".".join(location)
    section = ".".join(location[:-1])
    if scheduler is not None:
        known = list(SCHEDULES[scheduler].model_fields)
        owner = scheduler
    elif section:
        (section_type,) = section_types(Recipe.model_fields[section])
        known = list(section_type.model_fields)
        owner = section
    else:
        known = list(Recipe.model_fields)
        owner = "a recipe"

    hint = did_you_mean(location[-1], known, cutoff=0.6)
    if scheduler is not None and is_schedule_key(location[-1]):
        # Usually left over in the file after an override of schedule.name.
        hint = f" ({key}=null leaves it out)"
    return f"{key}: unknown key; {owner} has {', '.join(known)}{hint}"


def _explain_unknown_scheduler(key: str, value: Any, is_inner: bool) -> str:
    """A line about `schedule.name`, or about that of one of SequentialLR's `schedules`."""
    if not isinstance(value, dict):
        return f"{key}: is {show_value(value)}, should be a section of keys and values"

    name = value.get("name")
    known = INNER_SCHEDULES if is_inner else list(SCHEDULES)
    if is_inner and name in SCHEDULES:
        return f"{key}.name: is {name!r}, which cannot be a part of SequentialLR"

    hint = did_you_mean(str(name), known, cutoff=0.5)
    names = ", ".join(known)
    return f"{key}.name: is {show_value(name)}, may be {names}, or an own one as module:class{hint}"
