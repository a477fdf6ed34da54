"""Training and test data.

| module | what it holds |
| --- | --- |
| `images` | labelled images in memory |
| `datasets` | how each data set is loaded |
| `own_data` | a data set of the user's own |
| `image_folder` | a folder of image files, decoded once and cached |
| `folder_lock` | a lock that lets one process at a time download or decode |
| `batches` | training batches as functions of a position |
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrd.data.images import Dataset, Images

__all__ = ["Dataset", "Images"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the module needs torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    from lrd.data import images

    return getattr(images, name)
