"""Training and test data.

| module | what it holds |
| --- | --- |
| `images` | labelled images in memory, and what all data sets have in common |
| `datasets` | how each data set is loaded |
| `own_data` | a data set of the user's own |
| `storage` | whether images are kept in memory, as files, or packed |
| `image_folder` | a folder of image files, decoded once and cached |
| `decoding` | one image file, decoded as a whole or in part |
| `folder_lock` | a lock that lets one process at a time download or decode |
| `positions` | the order of an epoch and what is random, as functions of a position |
| `batches` | training batches of images in memory |
| `mixing` | mixup and CutMix of a batch |
| `streaming` | images that worker processes read when they are needed |
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrd.data.images import Dataset, Images
    from lrd.data.positions import generator

__all__ = ["Dataset", "Images", "generator"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the module needs torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    if name == "generator":
        from lrd.data import positions

        return positions.generator

    from lrd.data import images

    return getattr(images, name)
