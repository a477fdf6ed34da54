"""The table of all keys of a recipe, generated from the schema, for docs/recipes.md.

    python -m lrd.recipe.reference docs/recipes.md

writes it between the two markers in that file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lrd.recipe.schema import (
    OWN_SCHEDULE,
    SCHEDULES,
    Optimizer,
    OptimizerGroup,
    Recipe,
    ScheduleSection,
    Section,
    get_mark,
    section_types,
)

BEGIN = "<!-- keys: begin -->"
END = "<!-- keys: end -->"

_HEADER = [
    "| key | values | default | affects the results | what it is |",
    "| --- | --- | --- | --- | --- |",
]
_TYPES = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def reference_table() -> str:
    """A Markdown table with a row for each key of a recipe."""
    sections = {key: field for key, field in Recipe.model_fields.items() if section_types(field)}
    rows = list(_HEADER)

    for key in Recipe.model_fields:
        if key not in sections:
            rows.append(_row(Recipe, key, key))

    for key, field in sections.items():
        default = get_mark(field, "default_means")
        rows.append(_cells(f"**`{key}`**", "", default, "", field.description))
        if key == "schedule":
            rows += _schedule_rows()
        else:
            (section,) = section_types(field)
            rows += _section_rows(section, key)

    return "\n".join(rows) + "\n"


def insert_table(text: str) -> str:
    """A document with the table between its markers replaced by the one of today's schema.

    Raises:
        ValueError: if a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there must be {BEGIN} and, after it, {END}")
    return f"{before}{BEGIN}\n{reference_table()}{END}{after}"


def _section_rows(section: type[Section], prefix: str) -> list[str]:
    rows = [_row(section, key, f"{prefix}.{key}") for key in section.model_fields]
    if section is Optimizer:
        rows += _section_rows(OptimizerGroup, f"{prefix}.groups[]")
    return rows


def _schedule_rows() -> list[str]:
    """The keys that all schedules have, then those of each scheduler."""
    names = ", ".join(f"`{name}`" for name in [*SCHEDULES, OWN_SCHEDULE])
    name_field = ScheduleSection.model_fields["name"]
    rows = [_cells("`schedule.name`", names, "`constant`", "•", name_field.description)]
    rows += [
        _row(ScheduleSection, key, f"schedule.{key}")
        for key in ScheduleSection.model_fields
        if key != "name"
    ]

    for name, section in SCHEDULES.items():
        keys = [key for key in section.model_fields if key not in ScheduleSection.model_fields]
        if keys:
            rows.append(_cells(f"`schedule`: **{name}**", "", "", "", ""))
        rows += [_row(section, key, f"schedule.{key}") for key in keys]
    return rows


def _row(section: type[Section], key: str, full_key: str) -> str:
    field = section.model_fields[key]
    values = _values(field.annotation, field.metadata)
    mark = "•" if get_mark(field, "affects_results") else ""
    return _cells(f"`{full_key}`", values, _default(field), mark, field.description)


def _cells(*cells: str | None) -> str:
    return f"| {' | '.join(cell or '' for cell in cells)} |".replace("  ", " ")


def _values(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values that a key may have, from its type and the constraints that come with it."""
    kind = get_origin(annotation)
    arguments = [argument for argument in get_args(annotation) if argument is not NoneType]

    if kind is Annotated:
        return _values(arguments[0], [*arguments[1:], *metadata])
    if kind in (Union, UnionType):
        # Once each: a list of schedules may contain the sections of many schedulers.
        return " or ".join(dict.fromkeys(_values(argument, metadata) for argument in arguments))
    if kind is Literal:
        return ", ".join(_code(argument) for argument in arguments)
    if kind is list:
        return f"list of {_values(arguments[0])}"
    if kind is tuple:
        return f"list of {len(arguments)}: {_values(arguments[0])}"
    if issubclass(annotation, Section):
        return "sections"

    described = [item for item in metadata if isinstance(item, str)]
    if annotation is str and described:  # the values themselves
        return described[0]
    return " ".join([_TYPES[annotation], *_bounds(metadata)])


def _bounds(metadata: Sequence[Any]) -> list[str]:
    """The range of a number, e.g. `> 0 and <= 1`, or nothing."""
    bounds = []
    for item in metadata:
        if isinstance(item, str):
            bounds.append(item)
        elif isinstance(item, FieldInfo):
            bounds += _bounds(item.metadata)
        else:
            for name, sign in _SIGNS.items():
                if hasattr(item, name):
                    bounds.append(f"{sign} {_number(getattr(item, name))}")
    return [" and ".join(bounds)] if bounds else []


def _number(value: float) -> str:
    if value in (1 << 63, 1 << 64):
        return f"2**{int(value).bit_length() - 1}"
    return f"{value:g}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    meaning = get_mark(field, "default_means")
    return _code(field.default) if meaning is None else str(meaning)


def _code(value: Any) -> str:
    """A value as YAML has it."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`"


def main() -> None:
    path = Path(sys.argv[1])
    path.write_text(insert_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
