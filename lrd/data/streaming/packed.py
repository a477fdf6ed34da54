"""Packed images: decoded and resized once by `lrd data pack`, then read from a few large files.

    <root>/.lrd-pack/<part>/
        shard-00000.bin    images one after the other, each uint8 (height, width, 3)
        shard-00000.json   which files these were, their shapes, SHA-256 of the .bin file
        offset.npy         where in its shard each image begins, int64 (N,)
        shard.npy          number of its shard, int32 (N,)
        height.npy, width.npy   uint16 (N,)
        label.npy          its class, int32 (N,)
        name.npy           the names of all files, one after the other, uint8 (bytes,)
        name_end.npy       where in them each name ends, int64 (N,)
        pack.json          size, classes, what was packed, SHA-256 of all shards and arrays

`pack.json` is written last: without it a pack is incomplete.

The arrays are mapped into memory, so the processes of a host share them. The pixels are not: where
a mapped file is truncated, or its disk fails, the kernel kills the process with SIGBUS, and
nobody can say which file it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lrd import console
from lrd.data.decoding import (
    ChooseRegion,
    Region,
    centre_region,
    resize_and_cut,
    size_before_cut,
)
from lrd.data.storage import PACK_FILE, PACK_FOLDER
from lrd.errors import UserError, first_line
from lrd.host import available_cores

PARTS = ("train", "test")
VERSION = 1
ARRAYS = ("offset", "shard", "height", "width", "label", "name", "name_end")

# A process may often open no more than 1,024 files.
_MOST_OPEN_SHARDS = 256


class PackedSource:
    """The images of a part of a data set, packed; a `lrd.data.streaming.sources.Source`.

    It may be forked and pickled: another process opens the files itself.

    Args:
        folder: `<root>/.lrd-pack/<part>`.

    Attributes:
        folder: the same.
        classes: names of the classes, sorted.
        size: pixels of an image's shorter side; smaller images were left as they are.
        source_digest: SHA-256 of the names and sizes of the packed files, see `FileIndex.digest`.
        digest: SHA-256 of all of the above, and of what is in the pack.
        num_left_out: number of files that could not be decoded.
        labels: class of each image, int32 (N,).

    Raises:
        UserError: the pack is incomplete or damaged.
    """

    def __init__(self, folder: Path) -> None:
        description = _read_description(folder)
        self.folder = folder
        self.classes: tuple[str, ...] = tuple(description["classes"])
        self.size: int = description["size"]
        self.source_digest: str = description["source_digest"]
        self.digest: str = description["digest"]
        self.num_left_out: int = description["left_out"]
        self.shard_bytes: list[int] = [shard["bytes"] for shard in description["shards"]]
        self.shard_digests: list[str] = [shard["sha256"] for shard in description["shards"]]

        self._check_files(description["arrays"])
        self._map_arrays()

    def __len__(self) -> int:
        return len(self.labels)

    def read_region(self, index: int, choose: ChooseRegion, size: int) -> Tensor:
        """Read a region of an image.

        Args:
            index: of the image, from 0.
            choose: gets the packed image's height and width, and returns the region.
            size: not used; a region is never at a reduced scale here.

        Returns:
            uint8 (3, height, width) of the region.

        Raises:
            UserError: the shard is gone, truncated or unreadable.
        """
        height, width = self._shape(index)
        return torch.from_numpy(self._read(index, choose(height, width))).permute(2, 0, 1)

    def read_centre(self, index: int, size: int, resize: int | None) -> Tensor:
        """Read an image as `lrd.data.decoding.to_pixels` makes it, from the packed one.

        With `resize` equal to the pack's size it is the same as from the file, bit for bit.

        Returns:
            uint8 (3, size, size).

        Raises:
            UserError: the shard is gone, truncated or unreadable.
        """
        height, width = self._shape(index)
        if size_before_cut(height, width, size, size, resize) == (width, height):
            pixels = self._read(index, centre_region(height, width, size, size))
            pixels = pixels.transpose(2, 0, 1)
        else:
            whole = Image.fromarray(self._read(index, Region(0, 0, height, width)))
            pixels = resize_and_cut(whole, size, size, resize)
        return torch.from_numpy(np.ascontiguousarray(pixels))

    def describe(self, index: int) -> str:
        """What messages call an image: the folder of the pack, its class, and its file's name."""
        start = self._name_ends[index - 1] if index else 0
        name = os.fsdecode(self._names[start : self._name_ends[index]].tobytes())
        return f"{self.folder}: {self.classes[self.labels[index]]}/{name}"

    def shard_path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{shard_name(number)}.bin"

    def _shape(self, index: int) -> tuple[int, int]:
        return int(self._heights[index]), int(self._widths[index])

    def _read(self, index: int, region: Region) -> NDArray[np.uint8]:
        """Read a region of an image, uint8 (height, width, 3)."""
        width = int(self._widths[index])
        rows = np.empty((region.height, width, 3), dtype=np.uint8)
        offset = int(self._offsets[index]) + 3 * width * region.top
        self._read_shard(int(self._shards[index]), offset, rows)
        return np.ascontiguousarray(rows[:, region.left : region.left + region.width])

    def _read_shard(self, number: int, offset: int, rows: NDArray[np.uint8]) -> None:
        """Fill `rows` with what is in a shard from a byte on."""
        path = self.shard_path(number)
        remaining = rows.reshape(-1).data
        try:
            shard = self._open_shard(number)
            while remaining:
                # Forked workers share the position of an open file, so it must not be used.
                num_read = os.preadv(shard.fileno(), [remaining], offset)
                if num_read == 0:
                    raise self._wrong_size_error(number, os.fstat(shard.fileno()).st_size)
                remaining = remaining[num_read:]
                offset += num_read
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {first_line(error)}") from None

    def _open_new_shard(self, number: int) -> FileIO:
        return FileIO(self.shard_path(number))

    def _wrong_size_error(self, number: int, num_bytes: int) -> UserError:
        what = f"has {num_bytes} bytes, should have {self.shard_bytes[number]}"
        return _damage_error(self.shard_path(number), what, self.size)

    def _check_files(self, array_digests: dict[str, str]) -> None:
        """Check the sizes of the shards, and the contents of the arrays."""
        for number, num_bytes in enumerate(self.shard_bytes):
            path = self.shard_path(number)
            try:
                found = path.stat().st_size
            except OSError as error:
                raise _damage_error(path, first_line(error), self.size) from None
            if found != num_bytes:
                raise self._wrong_size_error(number, found)

        for name in ARRAYS:
            path = self.folder / f"{name}.npy"
            try:
                is_whole = digest_file(path) == array_digests[name]
            except OSError as error:
                raise _damage_error(path, first_line(error), self.size) from None
            if not is_whole:
                raise _damage_error(path, "is damaged", self.size)

    def _map_arrays(self) -> None:
        arrays = {}
        for name in ARRAYS:
            # A plain view: elements of NumPy's own class for mapped arrays are slow to read.
            arrays[name] = np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))

        self.labels: NDArray[np.int32] = arrays["label"]
        self._offsets: NDArray[np.int64] = arrays["offset"]
        self._shards: NDArray[np.int32] = arrays["shard"]
        self._heights: NDArray[np.uint16] = arrays["height"]
        self._widths: NDArray[np.uint16] = arrays["width"]
        self._names: NDArray[np.uint8] = arrays["name"]
        self._name_ends: NDArray[np.int64] = arrays["name_end"]
        self._open_shard = lru_cache(maxsize=_MOST_OPEN_SHARDS)(self._open_new_shard)

    def __getstate__(self) -> dict[str, Any]:
        mapped = ("labels", "_offsets", "_shards", "_heights", "_widths", "_names", "_name_ends")
        left_behind = (*mapped, "_open_shard")
        return {name: value for name, value in vars(self).items() if name not in left_behind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map_arrays()


def open_pack(root: Path, part: str) -> PackedSource | None:
    """Open the packed images of a part.

    Sizes of all files and the contents of the arrays are checked, but not those of the shards.

    Args:
        root: the folder that contains the pack.
        part: `train` or `test`.

    Returns:
        The images; None if there is no complete pack.

    Raises:
        UserError: the pack is damaged.
    """
    folder = pack_folder_of(root, part)
    return PackedSource(folder) if (folder / PACK_FILE).exists() else None


@dataclass(frozen=True)
class PartCheck:
    """What `verify_pack` found of a part.

    Attributes:
        part: `train` or `test`.
        num_images: in the part; 0 if that is not known.
        num_bytes: of all their pixels.
        faults: a line for the user for each damaged file.
    """

    part: str
    num_images: int
    num_bytes: int
    faults: list[str]


def verify_pack(root: Path) -> list[PartCheck]:
    """Read a whole pack and compare it with its hashes.

    Args:
        root: the folder that contains the pack.

    Raises:
        UserError: there is no complete pack of any part.
    """
    if not any((pack_folder_of(root, part) / PACK_FILE).exists() for part in PARTS):
        raise UserError(f"{root}: has no complete pack; {_pack_command(root)} makes it")
    return [_verify_part(root, part) for part in PARTS]


def _verify_part(root: Path, part: str) -> PartCheck:
    try:
        pack = open_pack(root, part)
    except UserError as error:
        return PartCheck(part, 0, 0, [str(error)])
    if pack is None:
        folder = pack_folder_of(root, part)
        return PartCheck(part, 0, 0, [f"{folder}: is incomplete; {_pack_command(root)} goes on"])

    paths = [pack.shard_path(number) for number in range(len(pack.shard_bytes))]
    digests = digest_files(paths, f"verifying {pack.folder}")
    faults = []
    for path, found, recorded in zip(paths, digests, pack.shard_digests, strict=True):
        if found != recorded:
            command = _pack_command(root, pack.size)
            faults.append(f"{path}: is damaged; delete it, and {command} makes it anew")
    return PartCheck(part, len(pack), sum(pack.shard_bytes), faults)


def _read_description(folder: Path) -> dict[str, Any]:
    """Read `pack.json`.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / PACK_FILE
    try:
        return read_sealed(path)
    except (OSError, ValueError) as error:
        raise _damage_error(path, first_line(error)) from None


def seal(values: dict[str, Any]) -> bytes:
    """JSON of values, with the version of the format and a SHA-256 of all of it."""
    versioned = {"version": VERSION, **values}
    return json.dumps({**versioned, "digest": _digest_values(versioned)}).encode()


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `seal` made, with its `digest`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of another version.
    """
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"is damaged ({first_line(error)})") from None
    if not isinstance(values, dict) or "digest" not in values:
        raise ValueError("is damaged")
    if values.get("version") != VERSION:
        raise ValueError(f"is of version {values.get('version')!r}, this lrd reads {VERSION}")

    digest = values.pop("digest")
    if digest != _digest_values(values):
        raise ValueError("is damaged")
    return {**values, "digest": digest}


def _digest_values(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_files(paths: list[Path], description: str) -> Iterable[str | None]:
    """SHA-256 of each file, several at a time; None for a file that cannot be read."""

    def digest(path: Path) -> str | None:
        try:
            return digest_file(path)
        except OSError:
            return None

    with ThreadPoolExecutor(max_workers=max(1, int(available_cores()))) as pool:
        yield from console.track(pool.map(digest, paths), description, total=len(paths))


def pack_folder_of(root: Path, part: str) -> Path:
    """The folder of a part's pack."""
    return root / PACK_FOLDER / part


def shard_name(number: int) -> str:
    """The name of a shard's files, without their suffix."""
    return f"shard-{number:05d}"


def describe_bytes(num_bytes: float) -> str:
    """`1.2 GB` or `3.4 MB`."""
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:,.1f} MB"
    return f"{num_bytes / 1e9:,.1f} GB"


def _damage_error(path: Path, what: str, size: int | None = None) -> UserError:
    root = path.parent.parent.parent
    return UserError(f"{path}: {what}; {_pack_command(root, size)} makes it anew")


def _pack_command(root: Path, size: int | None = None) -> str:
    """The command that packs what is to be in a folder."""
    where = shlex.quote(str(root))
    command = f"lrd data pack {where}"
    if not (root / "train").is_dir():
        command = f"lrd data pack DIR --out {where}"
    return command if size is None else f"{command} --size {size}"
