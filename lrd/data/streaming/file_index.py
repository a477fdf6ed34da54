"""The files of `folder/<class>/`, listed once: of each file 12 bytes and its name.

The lists are arrays in a cache beside the folder. They are mapped into memory, so the ranks and
workers of a host share them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrd import console
from lrd.data.decoding import read_file
from lrd.data.folder_lock import one_process_at_a_time
from lrd.data.image_folder import cache_folder, is_image_name, list_classes
from lrd.data.streaming.packed import digest_file, read_sealed, seal
from lrd.errors import UserError, first_line

_VERSION = 1
_ARRAYS = ("names", "offsets", "labels")
_UNKNOWN_SIZE = -1  # of a link to something that does not exist


@dataclass(frozen=True)
class FileIndex:
    """The image files in `folder/<class>/`, sorted by class and name.

    Attributes:
        folder: contains one folder for each class.
        classes: names of the classes, sorted.
        names: names of all files, one after the other, uint8 (bytes,).
        offsets: where each name begins, and where the last one ends, int64 (N + 1,).
        labels: class of each file, int32 (N,).
        digest: SHA-256 of the names and sizes of all files.
    """

    folder: Path
    classes: tuple[str, ...]
    names: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int32]
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file with an index from 0 to N - 1."""
        name = self.names[self.offsets[index] : self.offsets[index + 1]].tobytes()
        folder: Path = self.folder / self.classes[self.labels[index]]
        return folder / os.fsdecode(name)

    def content_digest(self) -> str:
        """SHA-256 of the names and contents of all files. It reads all of them.

        Raises:
            UserError: a file cannot be read.
        """
        digest = hashlib.sha256()
        indices = range(len(self))
        for index in console.track(indices, f"reading {self.folder}", total=len(self)):
            path = self.path(index)
            digest.update(os.fsencode(path.relative_to(self.folder)))
            try:
                digest.update(hashlib.sha256(read_file(path)).digest())
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
        return digest.hexdigest()


def index_folder(folder: Path) -> FileIndex:
    """List the image files in `folder/<class>/`, from the cache if no class folder has changed.

    A folder changes when a file is added, removed or renamed in it. What is inside the files is
    not looked at.

    Raises:
        UserError: the folder is missing, or a class in it has no image.
    """
    classes = list_classes(folder)
    cache = _cache_path(folder, classes)
    index = _read_cache(cache, folder, classes)
    if index is not None:
        return index

    with one_process_at_a_time(cache.parent):
        index = _read_cache(cache, folder, classes)  # another host may have written it meanwhile
        if index is None:
            index = _list_files(folder, classes)
            _write_cache(cache, index)
            # What is mapped from the file is shared by the processes of a host.
            index = _read_cache(cache, folder, classes) or index
    return index


def _list_files(folder: Path, classes: tuple[str, ...]) -> FileIndex:
    digest = hashlib.sha256()
    all_names = bytearray()
    offsets = [0]
    labels: list[NDArray[np.int32]] = []
    if not classes:
        raise UserError(f"data.root: no image in {folder}/<class>/")

    entries = enumerate(classes)
    for label, name in console.track(entries, f"listing {folder}", total=len(classes)):
        files = sorted(_image_files(folder / name))
        if not files:
            raise UserError(f"data.root: no image in {folder / name}")

        digest.update(f"{name}\0{len(files)}\n".encode())
        for text, size in files:
            file_name = os.fsencode(text)
            all_names += file_name
            offsets.append(len(all_names))
            digest.update(file_name)
            digest.update(f"\0{size}\n".encode())
        labels.append(np.full(len(files), label, dtype=np.int32))

    return FileIndex(
        folder,
        classes,
        names=np.frombuffer(bytes(all_names), dtype=np.uint8),
        offsets=np.array(offsets, dtype=np.int64),
        labels=np.concatenate(labels),
        digest=digest.hexdigest(),
    )


def _image_files(class_folder: Path) -> Iterator[tuple[str, int]]:
    """Name and size in bytes of each image file in a folder."""
    with os.scandir(class_folder) as entries:
        for entry in entries:
            if not is_image_name(entry.name):
                continue
            try:
                size = entry.stat().st_size
            except OSError:  # a link that leads nowhere; decoding will find that out
                size = _UNKNOWN_SIZE
            yield entry.name, size


def _cache_path(folder: Path, classes: tuple[str, ...]) -> Path:
    """Folder of the cached list; its name has a digest of the class folders' times of change."""
    digest = hashlib.sha256(f"{folder.resolve()} {_VERSION}\n".encode(errors="surrogateescape"))
    for name in classes:
        modified = (folder / name).stat().st_mtime_ns
        digest.update(f"{name} {modified}\n".encode())
    return cache_folder(folder) / f"{folder.name}-{digest.hexdigest()[:16]}.index"


def _read_cache(cache: Path, folder: Path, classes: tuple[str, ...]) -> FileIndex | None:
    """Map a cached list into memory. None if it is missing or damaged."""
    arrays = {}
    try:
        description = read_sealed(cache / "index.json")
        for name in _ARRAYS:
            path = cache / f"{name}.npy"
            if digest_file(path) != description["arrays"][name]:
                return None
            # A plain view: elements of NumPy's own class for mapped arrays are slow to read.
            arrays[name] = np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError):
        return None
    return FileIndex(folder, classes, **arrays, digest=description["files"])


def _write_cache(cache: Path, index: FileIndex) -> None:
    """Write a list in one rename; if that fails, report it and go on without."""
    temporary = cache.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(index, name))
        arrays = {name: digest_file(temporary / f"{name}.npy") for name in _ARRAYS}
        (temporary / "index.json").write_bytes(seal({"files": index.digest, "arrays": arrays}))

        shutil.rmtree(cache, ignore_errors=True)  # it is damaged
        os.replace(temporary, cache)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        console.info(
            f"{cache}: the list of images could not be written ({first_line(error)}); "
            "the next start lists them again"
        )
