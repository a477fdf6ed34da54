"""Reading a recipe: defaults, then the YAML file, then `section.key=value` overrides; validation; errors by key.

Unknown keys, wrong types and values out of range raise `UserError` with one line each that names the key.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lrd.errors import UserError, first_line
from lrd.schema import (
    Checkpoint,
    Data,
    LRDropout,
    Model,
    Optimizer,
    OptimizerGroup,
    Recipe,
    Schedule,
    Section,
    Tracking,
    Trainer,
)

__all__ = [
    "Checkpoint",
    "Data",
    "LRDropout",
    "Model",
    "Optimizer",
    "OptimizerGroup",
    "Recipe",
    "Schedule",
    "Tracking",
    "Trainer",
    "load",
    "parse",
]


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file with overrides of the form `section.key=value` on top.

    Without a `run_dir` in either, the run directory is `runs/<the file's name>`.

    Raises:
        UserError: the file is missing or no YAML mapping, or a key is unknown, of a wrong type or out of range.
    """
    path = Path(path)
    values = {"run_dir": f"runs/{path.stem}", **_read(path)}
    for override in overrides or []:
        _override(values, override)
    return parse(values, str(path))


def parse(values: dict[str, Any], source: str) -> Recipe:
    """Validate; `source` begins each line of an error."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {line}" for line in _explain(error))) from None


class _Loader(yaml.SafeLoader):
    """Of two equal keys the second would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key_node.value} stands there twice", key_node.start_mark
                )
            seen.add(key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{path}: {where}not YAML: {getattr(error, 'problem', None) or first_line(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, not a {type(values).__name__}")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"{override}: an override is section.key=value, e.g. optimizer.lr=0.1")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{key}: {text!r} is not a YAML value") from None
    node = values
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"{key}: {part} is {child!r} in the file, which is no section to override a key of")
        node = child
    node[parts[-1]] = value


def _explain(error: ValidationError) -> list[str]:
    """One line a fault: the key, what it was, what it may be."""
    lines = []
    for fault in error.errors():
        location = [str(part) for part in fault["loc"]]
        key = ".".join(location)
        if fault["type"] == "extra_forbidden":
            known = _keys(location[:-1])
            near = difflib.get_close_matches(location[-1], known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            where = ".".join(location[:-1]) or "a recipe"
            lines.append(f"{key}: unknown key; {where} has {', '.join(known)}{hint}")
        elif fault["type"] == "value_error":
            message = str(fault["ctx"]["error"])
            lines.append(f"{key}: is {fault['input']!r}, {message}" if location else message)
        elif fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
            lines.append(f"{key}: is {fault['input']!r}, should be a section of keys and values")
        elif fault["type"] == "missing":
            lines.append(f"{key}: is missing")
        else:
            lines.append(f"{key}: is {fault['input']!r}, {fault['msg'][0].lower()}{fault['msg'][1:]}")
    return lines


def _keys(location: list[str]) -> list[str]:
    sections: dict[str, type[Section]] = {
        "data": Data, "model": Model, "lr_dropout": LRDropout, "schedule": Schedule, "trainer": Trainer,
        "checkpoint": Checkpoint, "tracking": Tracking,
    }  # fmt: skip
    return list(sections[location[0]].model_fields if location else Recipe.model_fields)
