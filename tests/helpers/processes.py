"""Forked processes that a test may limit, damage or kill."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import torch


def in_child(action: Callable[[], object]) -> int:
    """Call `action` in a forked child process. An exception in it fails the test.

    Returns:
        The signal that killed the child, or 0.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            action()
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(0)

    os.close(writer)
    with os.fdopen(reader) as stream:
        error = stream.read()
    _, status = os.waitpid(child, 0)

    assert error == ""
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
