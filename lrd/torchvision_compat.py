"""torchvision, importable beside any build of torch.

torchvision as published on PyPI is built for CUDA. Beside a CPU-only torch its compiled operators
do not load, and `import torchvision` fails with "operator torchvision::nms does not exist". With it
fail all packages that import torchvision, for example lightning and timm.

The import looks for two names only, so it is enough to declare these. `import torch` does that
wherever lrd is installed: torch calls :func:`declare_missing_operators` at the end of its own
import, through the entry point `torch.backends` in pyproject.toml. Where the operators load,
nothing is declared.

lrd itself imports torchvision from here. That also works with TORCH_DEVICE_BACKEND_AUTOLOAD=0,
with which torch calls no entry points.
"""

from __future__ import annotations

import functools
import importlib
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

# torch is imported in the functions: if this module imported it, torch would call a function of a
# module that is not complete yet.
if TYPE_CHECKING:
    from torch.library import Library

__all__ = ["declare_missing_operators", "torchvision"]  # noqa: F822, `__getattr__` has the latter


def declare_missing_operators() -> None:
    """Declare the operators that `import torchvision` looks for, if they cannot be loaded.

    Takes one or two milliseconds and does not import torchvision.
    """
    import torch  # noqa: F401, it may call this function: the operators are then declared

    _declare_once()


# To declare an operator again is an error. The cache also keeps the library, whose operators
# disappear when it is deleted.
@functools.cache
def _declare_once() -> Library | None:
    import torch

    if torch.version.cuda is not None or _can_load_operators():
        return None

    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(  # type: ignore[no-untyped-call]
            f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )

    return library


def _can_load_operators() -> bool:
    """Whether torchvision's compiled operators load. True also where there is no torchvision."""
    import torch

    package = PathFinder.find_spec("torchvision")
    if package is None:
        return True

    extension = PathFinder.find_spec("_C", package.submodule_search_locations)
    if extension is None or extension.origin is None:
        return False

    try:
        torch.ops.load_library(extension.origin)  # type: ignore[no-untyped-call]
    except OSError:
        return False

    return True


def __getattr__(name: str) -> Any:
    """Import torchvision when it is asked for: `import torch` loads this module, and not that."""
    if name != "torchvision":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    declare_missing_operators()
    return importlib.import_module("torchvision")
