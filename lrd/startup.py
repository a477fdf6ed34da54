"""No garbage collection while a rank imports its modules.

A rank's program imports this module first, and calls `imports_are_done` after its last import.
Python would look for garbage again and again while torch and its libraries make their million
objects, none of which is garbage. Without the search the imports take about an eighth less time.
"""

import atexit
import gc

_was_enabled = gc.isenabled()
gc.disable()


def imports_are_done() -> None:
    """Collect garbage from now on, if this process did so before."""
    if _was_enabled:
        gc.enable()


def exempt_what_was_imported() -> None:
    """Exempt all objects that exist now from garbage collection.

    A full collection would go through all that was imported, which takes up to half a second in the
    middle of a step. Python's documentation of `gc.freeze` advises it before processes are forked,
    as data workers are: they share more of their memory then.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)  # else nanobind (Triton) reports at the end what is left
