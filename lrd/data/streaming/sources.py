"""Where the images of a part of a data set come from, when they are read one by one."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lrd.data.decoding import ChooseRegion, read_centre, read_region
from lrd.data.streaming.file_index import FileIndex


class Source(Protocol):
    """Labelled images that are read one by one, in worker processes.

    Attributes:
        labels: class of each image, int32 (N,); may be a view of a mapped file.
        digest: SHA-256 of what tells this part from others; hosts compare it, and a resume does.
    """

    labels: NDArray[np.int32]
    digest: str

    def read_region(self, index: int, choose: ChooseRegion, size: int) -> Tensor:
        """Read a region of an image, see `lrd.data.decoding.read_region`.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """

    def read_centre(self, index: int, size: int, resize: int | None) -> Tensor:
        """Read an image as `lrd.data.decoding.to_pixels` makes it, uint8 (3, size, size).

        Raises:
            UnreadableImageError: it cannot be decoded.
        """

    def describe(self, index: int) -> str:
        """What messages call an image: its file."""


class FileSource:
    """Images in files, decoded whenever they are read.

    Args:
        index: lists the files.
        digest: of the files; None: that of their names and sizes.
    """

    def __init__(self, index: FileIndex, digest: str | None = None) -> None:
        self.index = index
        self.labels = index.labels
        self.digest = digest or index.digest

    def read_region(self, index: int, choose: ChooseRegion, size: int) -> Tensor:
        """See `Source`."""
        return read_region(self.index.path(index), choose, size)

    def read_centre(self, index: int, size: int, resize: int | None) -> Tensor:
        """See `Source`."""
        return read_centre(self.index.path(index), size, resize)

    def describe(self, index: int) -> str:
        """See `Source`."""
        return str(self.index.path(index))
