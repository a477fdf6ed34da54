"""No garbage collection while a rank's modules are imported: imported first, and called when done.

Python looks for garbage again and again while torch and its libraries make their million objects.
None of them is garbage, and without the search a rank starts in about seven eighths of the time.
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
    """Leave out all objects of now whenever garbage is collected.

    A full collection would go through all that was imported, for half a second in the middle of a
    step. Worker processes, which are forked, share more of their memory with the rank.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)  # else a library may report at the end what was not collected
