"""Arithmetic expressions in recipes: the factor of the lr as a function of the position."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable

import simpleeval

from lrd.errors import UserError, first_line

# The functions that an expression may call, see `parse_lambda`.
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "cos": math.cos,
    "sin": math.sin,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "floor": math.floor,
    "ceil": math.ceil,
}


def parse_lambda(text: str, total: int, key: str = "schedule.lr_lambda") -> Callable[[int], float]:
    """An arithmetic expression as a function from the schedule's position to a factor of the lr.

    An expression can use the names `t` (steps or epochs done, depending on `schedule.unit`),
    `total`, `pi` and `e`, and the functions min, max, abs, cos, sin, exp, log, sqrt, floor and
    ceil. simpleeval parses and evaluates it: attributes and calls of anything else are refused.

    Args:
        text: the expression, e.g. `(1 - t / total) ** 2`.
        total: length of the run in steps or epochs.
        key: the key of the recipe that has this value, for messages.

    Raises:
        UserError: if it is not such an expression, or its value at the first or last position is
            not a finite number >= 0. The function raises it for the other positions.
    """
    names = {"t": 0, "total": total, "pi": math.pi, "e": math.e}
    evaluator = simpleeval.SimpleEval(functions=_FUNCTIONS, names=names, allowed_attrs={})
    refusals_to_parse = (
        simpleeval.InvalidExpression,
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    )
    refusals_to_evaluate = (
        simpleeval.InvalidExpression,
        ArithmeticError,
        TypeError,
        ValueError,
        RecursionError,
    )

    try:
        # simpleeval alone would accept an assignment, a second statement, and text, whose
        # formatting can take all memory.
        tree = ast.parse(text.strip(), mode="eval")
        if any(_is_text(node) for node in ast.walk(tree)):
            raise ValueError("it contains text in quotes")
        parsed = evaluator.parse(text)
    except refusals_to_parse as error:
        raise UserError(f"{key}: {text!r} is not an expression: {first_line(error)}") from None

    def factor(t: int) -> float:
        evaluator.names["t"] = t
        try:
            value = float(evaluator.eval(text, previously_parsed=parsed))
        except refusals_to_evaluate as error:
            raise UserError(
                f"{key}: {text!r} cannot be evaluated at t={t}: {first_line(error)}"
            ) from None

        if not math.isfinite(value) or value < 0.0:
            raise UserError(
                f"{key}: {text!r} is {value} at t={t}; it must be finite and not negative"
            )
        return value

    # Most mistakes show at one of the two ends: report them before training starts.
    factor(0)
    factor(total)
    return factor


def _is_text(node: ast.AST) -> bool:
    is_constant = isinstance(node, ast.Constant) and not isinstance(node.value, int | float)
    return is_constant or isinstance(node, ast.JoinedStr)
