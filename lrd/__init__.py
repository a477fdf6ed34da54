"""lrd: learning rate dropout on many ranks, synchronized by construction and exactly resumable.

    import lrd
    lrd.LRDropout(optimizer, keep_prob=0.5, seed=0)

The import is cheap: nothing before one of its names is asked for, then torch and NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import lrd.signals  # noqa: F401  before all: it notes the parent, and a launcher may die while torch is imported

if TYPE_CHECKING:
    from lrd import mask, optim
    from lrd.dropout import LRDropout
    from lrd.magma import Magma

__all__ = ["LRDropout", "Magma", "__version__", "mask", "optim"]
__version__ = "0.1.0"
_HOMES = {"LRDropout": "lrd.dropout", "Magma": "lrd.magma", "mask": "lrd", "optim": "lrd"}


def __getattr__(name: str) -> Any:
    """Only now, for torch takes two seconds, and `lrd --help` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"lrd.{name}") if _HOMES[name] == "lrd" else getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
