"""Types of a recipe's arguments for torch's optimizers, by the annotations of their classes.

torch itself checks few of them: `foreach: abc` counts as true, and `dampening: abc` fails in the
first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from lrd.errors import UserError
from lrd.recipe.loader import show_value

# Modes of torch's optimizers that need another training loop, and why.
_REFUSED_MODES = {
    "differentiable": "the training loop does not differentiate through steps",
    "capturable": "it is for CUDA graphs, which the training loop does not record",
}

_CONFIG = ConfigDict(strict=True, arbitrary_types_allowed=True)


def check_argument_types(key: str, cls: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Refuse arguments of a wrong type, with a line for each.

    Args:
        key: the section that contains them, for the message.
        cls: a class of torch.optim.
        arguments: name -> value.

    Raises:
        UserError: a value is not of its annotation's type, or is nan, or asks for a mode that needs
            another training loop.
    """
    hints = get_type_hints(cls.__init__)
    lines = []
    for name, value in arguments.items():
        problem = _find_problem(name, value, hints.get(name, Any))
        if problem:
            lines.append(f"{key}.{name}: is {show_value(value)}, {problem}")
    if lines:
        raise UserError("\n".join(lines))


def _find_problem(name: str, value: Any, hint: Any) -> str:
    # YAML has lists where torch has tuples.
    value = tuple(value) if isinstance(value, list) else value
    try:
        TypeAdapter(hint, config=_CONFIG).validate_python(value)
    except ValidationError as error:
        faults = [fault for fault in error.errors() if fault["type"] != "is_instance_of"]
        message = faults[0]["msg"] if faults else error.errors()[0]["msg"]
        return message.removeprefix("Input ")[:1].lower() + message.removeprefix("Input ")[1:]
    except PydanticUserError:  # an annotation that pydantic cannot check
        return ""

    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(number, float) and math.isnan(number) for number in numbers):
        return "should be a number"
    if value is True and name in _REFUSED_MODES:
        return f"must be false: {_REFUSED_MODES[name]}"
    return ""
