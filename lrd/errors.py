"""Errors that a user can fix, the exit statuses of a run, and the line that a warning names."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from types import FrameType

EXIT_OK = 0
EXIT_RUN_ERROR = 1
EXIT_USER_ERROR = 2

# EX_TEMPFAIL of sysexits.h: a signal stopped the run and its state is saved, so that the same
# command resumes it.
EXIT_STOPPED = 75


class UserError(Exception):
    """An error that the user can fix; it is printed without a traceback, and the status is 2.

    Its message is one clear line that names the key, file or rank. If several faults are found at
    once, the message has one line for each.
    """

    status = EXIT_USER_ERROR


class RunError(UserError):
    """An error that ends a run after it has started; the exit status is 1.

    Examples are a loss that is not finite, and replicas that differ.
    """

    status = EXIT_RUN_ERROR


class RankError(UserError):
    """An error that this rank alone has, in the middle of a run: its worker process was killed.

    The others only see that this rank is gone. Its message is one line, without the rank's name.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its type if it has no text."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    if isinstance(error, SyntaxError):  # its text repeats file and line
        text = error.msg
    lines = text.strip().splitlines()
    return lines[0] if lines else type(error).__name__


def describe_error(error: BaseException) -> str:
    """An exception in one line, with its type: `ValueError: wrong shape`."""
    name = type(error).__name__
    text = describe_os_error(error) if isinstance(error, OSError) else first_line(error)
    return name if text == name else f"{name}: {text}"


def summarize(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many more there are: `a, b, c and 4 more`."""
    text = ", ".join(names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


def describe_os_error(error: OSError) -> str:
    """An error of the operating system in one line, with the file if the error names one."""
    reason = first_line(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A hint at the known word that is most like this one; empty if none is.

    Args:
        cutoff: likeness from 0 to 1 that a hint needs.
    """
    # Upper and lower case count for nothing: `sgd` means `SGD`.
    by_lower_case = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), list(by_lower_case), n=1, cutoff=cutoff)
    return f" (did you mean {by_lower_case[matches[0]]}?)" if matches else ""


def stacklevel_of_user() -> int:
    """The ``stacklevel`` with which the caller's warning names the user's line.

    It is the first line outside of lrd and torch: torch's code calls the step hooks.
    """
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and _top_package(frame) in ("lrd", "torch"):
        frame = frame.f_back
        level += 1

    return level


def _top_package(frame: FrameType) -> str:
    """The package of a frame's module: "torch" for torch.optim.sgd."""
    module_name: str = frame.f_globals.get("__name__", "")
    return module_name.partition(".")[0]
