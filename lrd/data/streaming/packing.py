"""Packs a folder of images: decodes and resizes them once, see `lrd.data.streaming.packed`.

It may be killed at any time. A shard counts once its .json file is there; the next start keeps
these and goes on after them.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lrd import console, files
from lrd.data.datasets import check_folders
from lrd.data.decoding import UnreadableImageError, open_image, read_shrunk, size_before_cut
from lrd.data.folder_lock import one_process_at_a_time
from lrd.data.storage import PACK_FILE, PACK_FOLDER
from lrd.data.streaming.file_index import FileIndex, index_folder
from lrd.data.streaming.packed import (
    ARRAYS,
    PARTS,
    PackedSource,
    describe_bytes,
    digest_file,
    digest_files,
    pack_folder_of,
    read_sealed,
    seal,
    shard_name,
)
from lrd.errors import UserError, describe_os_error, first_line
from lrd.host import available_cores

SHARD_BYTES = 1 << 30  # at which a shard is closed
_LONGEST_SIDE = 65_535  # pixels, in uint16
_IMAGES_AHEAD = 8  # for each thread: decoded, or being decoded, before they are written
_IMAGES_FOR_ESTIMATE = 256

_Decoded = NDArray[np.uint8] | UnreadableImageError  # pixels (height, width, 3), or why not


@dataclass(frozen=True)
class _Task:
    """A part that is to be packed.

    Attributes:
        index: its files.
        folder: of the pack.
        size: of the packed images' shorter side, in pixels.
        skip_corrupt: leave out what cannot be decoded.
    """

    index: FileIndex
    folder: Path
    size: int
    skip_corrupt: bool

    @property
    def settings(self) -> dict[str, Any]:
        """What must be equal for a shard to be kept."""
        return {"size": self.size, "source_digest": self.index.digest}


@dataclass(frozen=True)
class _Shard:
    """What the .json file of a shard says of it.

    Attributes:
        first: index of its first image among the files.
        stop: index after its last one.
        left_out: indices of files in between that could not be decoded.
        heights, widths: of its images, in pixels.
        bytes: of all of them.
        sha256: of all of them.
    """

    first: int
    stop: int
    left_out: list[int]
    heights: list[int]
    widths: list[int]
    bytes: int
    sha256: str


def pack_folder(root: Path, out: Path, size: int, skip_corrupt: bool) -> None:
    """Pack the images in `root/train/<class>/` and `root/test/<class>/`.

    The same call goes on where an earlier one was stopped. A pack of other settings or files is
    replaced.

    Args:
        root: the folder of images.
        out: the folder that gets the pack; may be `root`.
        size: images are resized so that their shorter side has this many pixels; smaller ones are
            left as they are.
        skip_corrupt: name files that cannot be decoded and leave them out, instead of failing.

    Raises:
        UserError: there is no such folder, its parts have different classes, a file cannot be
            decoded, or the disk has no room.
    """
    check_folders(root, "files")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is not a folder")

    tasks = []
    for part in PARTS:
        index = index_folder(root / part)
        tasks.append(_Task(index, pack_folder_of(out, part), size, skip_corrupt))
    _require_free_space(tasks, out)

    waiting = f"{out / PACK_FOLDER}: another process packs it; waiting for that to end"
    with one_process_at_a_time(out / PACK_FOLDER, waiting):
        for task in tasks:
            _pack_part(task)


def _pack_part(task: _Task) -> None:
    if _is_complete(task):
        pack = PackedSource(task.folder)
        num_bytes = describe_bytes(sum(pack.shard_bytes))
        console.info(f"{task.folder}: has all {len(pack):,} images already, {num_bytes}")
        return

    task.folder.mkdir(parents=True, exist_ok=True)
    found = _find_shards(task, is_told=True)
    _drop_damaged_end(task, found)
    _delete_all_but(task, found)

    shards = _write_missing(task, found)
    _require_readable_classes(task, shards)
    _verify(task, shards)
    num_images = _write_index(task, shards)

    num_left_out = sum(len(shard.left_out) for shard in shards)
    left_out = f"; {num_left_out:,} left out" if num_left_out else ""
    num_bytes = describe_bytes(sum(shard.bytes for shard in shards))
    console.info(f"{task.folder}: {num_images:,} images, {num_bytes}{left_out}")


# What is there already.


def _is_complete(task: _Task) -> bool:
    if not (task.folder / PACK_FILE).exists():
        return False
    try:
        pack = PackedSource(task.folder)
    except UserError:
        return False
    settings = {"size": pack.size, "source_digest": pack.source_digest}
    return settings == task.settings and (task.skip_corrupt or not pack.num_left_out)


def _find_shards(task: _Task, is_told: bool = False) -> dict[int, _Shard]:
    """Find the shards of earlier calls that can be kept, by their number.

    Args:
        is_told: print why others cannot.
    """
    found = {}
    unusable = []
    for path in sorted(task.folder.glob("shard-*.json")):
        content = path.with_suffix(".bin")
        try:
            number = int(path.stem.removeprefix("shard-"))
            values = read_sealed(path)
            num_bytes = content.stat().st_size
        except OSError as error:
            unusable.append(describe_os_error(error))
            continue
        except ValueError as error:
            unusable.append(f"{path}: {first_line(error)}")
            continue

        settings = {key: values.pop(key) for key in task.settings}
        if settings != task.settings:
            if is_told:
                _tell_change(task, settings)
            return {}

        del values["version"], values["digest"]
        shard = _Shard(**values)
        if num_bytes != shard.bytes:
            unusable.append(f"{content}: has {num_bytes} bytes, should have {shard.bytes}")
        elif task.skip_corrupt or not shard.left_out:  # else a file may be readable again
            found[number] = shard

    if unusable and is_told:
        others = f" (and {len(unusable) - 1} others)" if len(unusable) > 1 else ""
        console.info(f"{unusable[0]}{others}; made anew")
    return found


def _tell_change(task: _Task, settings: dict[str, Any]) -> None:
    if settings["size"] != task.size:
        change = f"what is there has {settings['size']} pixels, not {task.size}"
    else:
        change = f"the files in {task.index.folder} have changed since it was made"
    console.info(f"{task.folder}: {change}; all of it is made anew")


def _drop_damaged_end(task: _Task, found: dict[int, _Shard]) -> None:
    """Hash the last shard, which was written shortly before whatever stopped the earlier call."""
    if not found:
        return
    number = max(found)
    path = task.folder / f"{shard_name(number)}.bin"
    if digest_file(path) != found[number].sha256:
        console.info(f"{path}: is damaged; made anew")
        del found[number]


def _delete_all_but(task: _Task, found: dict[int, _Shard]) -> None:
    """Delete all files of a pack but those of some shards; `pack.json` first."""
    kept = {f"{shard_name(number)}{suffix}" for number in found for suffix in (".json", ".bin")}
    (task.folder / PACK_FILE).unlink(missing_ok=True)
    for path in _pack_files(task.folder):
        if path.name not in kept:
            path.unlink()


def _pack_files(folder: Path) -> list[Path]:
    """The files that a pack consists of, and what is left of files that were being written."""
    patterns = ("shard-*.bin", "shard-*.json", "*.npy", PACK_FILE, ".*.tmp")
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _require_free_space(tasks: list[_Task], out: Path) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        UserError: there is less room than the rest of the images will take.
    """
    needed = 0.0  # bytes
    for task in tasks:
        if _is_complete(task):
            continue
        found = _find_shards(task)
        num_missing = len(task.index) - sum(shard.stop - shard.first for shard in found.values())
        needed += num_missing * _estimate_image_bytes(task)

        kept = sum(shard.bytes for shard in found.values())
        needed -= sum(path.stat().st_size for path in _pack_files(task.folder)) - kept

    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{out}: the packed images will take about {describe_bytes(needed)} more, but only "
            f"{describe_bytes(free)} are free; --out names another folder"
        )


def _estimate_image_bytes(task: _Task) -> float:
    """Bytes of a packed image, on the average of some that are evenly spaced in the part."""
    num_images = min(len(task.index), _IMAGES_FOR_ESTIMATE)
    sizes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for i in np.linspace(0, len(task.index) - 1, num_images).astype(int):
            try:
                with open_image(task.index.path(int(i))) as image:
                    width, height = image.size
            except Exception:  # Pillow raises nearly anything; packing will report it
                continue
            if min(width, height) > task.size:
                width, height = size_before_cut(height, width, task.size, task.size, task.size)
            sizes.append(3 * width * height)
    return sum(sizes) / len(sizes) if sizes else 3.0 * task.size**2


# Decoding.


def _write_missing(task: _Task, found: dict[int, _Shard]) -> list[_Shard]:
    """Decode the images that are in no shard yet, and write their shards.

    Where a shard begins depends on those before it, so it does not matter which of them were there.

    Returns:
        All shards.
    """
    shards: list[_Shard] = []
    images: Iterator[tuple[int, _Decoded]] | None = None
    next_image = 0
    num_done = sum(shard.stop - shard.first for shard in found.values())

    # Pillow warns of images that are large, and refuses those of more than 179 million pixels.
    with warnings.catch_warnings(), ThreadPoolExecutor(_num_threads()) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with console.ProgressMeter(
            f"packing {task.index.folder}", total=len(task.index), start=num_done
        ) as meter:
            try:
                while next_image < len(task.index):
                    shard = found.get(len(shards))
                    if shard is None or shard.first != next_image:
                        images = images or _decode_ahead(pool, task, next_image)
                        shard = _write_shard(task, len(shards), next_image, images, meter)
                    else:
                        images = None
                    shards.append(shard)
                    next_image = shard.stop
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return shards


def _num_threads() -> int:
    return max(1, int(available_cores()))


def _decode_ahead(
    pool: ThreadPoolExecutor, task: _Task, first: int
) -> Iterator[tuple[int, _Decoded]]:
    """Decode images in order, from an index on, a few of them ahead of need."""
    most = _IMAGES_AHEAD * _num_threads()
    waiting: deque[tuple[int, Future[_Decoded]]] = deque()
    for i in range(first, len(task.index)):
        waiting.append((i, pool.submit(_decode, task.index.path(i), task.size)))
        if len(waiting) == most:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


def _decode(path: Path, size: int) -> _Decoded:
    # The decoders release the interpreter's lock.
    try:
        pixels = read_shrunk(path, size)
    except UnreadableImageError as error:
        return error
    if max(pixels.shape) > _LONGEST_SIDE:
        height, width, _ = pixels.shape
        return UnreadableImageError(f"has {height} x {width} pixels; {_LONGEST_SIDE} is the most")
    return pixels


def _write_shard(
    task: _Task,
    number: int,
    first: int,
    images: Iterator[tuple[int, _Decoded]],
    meter: console.ProgressMeter,
) -> _Shard:
    """Write the next images into a shard, until it is large enough.

    Raises:
        UserError: a file cannot be decoded, or the shard cannot be written.
    """
    path = task.folder / f"{shard_name(number)}.bin"
    digest = hashlib.sha256()
    stop = first
    left_out: list[int] = []
    heights: list[int] = []
    widths: list[int] = []
    num_bytes = 0

    with _whole_file(path) as stream:
        for i, pixels in images:
            stop = i + 1
            if isinstance(pixels, UnreadableImageError):
                _report_unreadable(task, i, pixels)
                left_out.append(i)
            else:
                content = pixels.reshape(-1).data
                stream.write(content)
                digest.update(content)
                heights.append(pixels.shape[0])
                widths.append(pixels.shape[1])
                num_bytes += pixels.size

            meter.update(stop)
            if num_bytes >= SHARD_BYTES:
                break

    shard = _Shard(first, stop, left_out, heights, widths, num_bytes, digest.hexdigest())
    with _whole_file(path.with_suffix(".json")) as stream:
        stream.write(seal({**task.settings, **asdict(shard)}))
    return shard


def _report_unreadable(task: _Task, i: int, error: UnreadableImageError) -> None:
    line = f"{task.index.path(i)}: not a readable image ({error})"
    if not task.skip_corrupt:
        raise UserError(f"{line}; --skip-corrupt leaves such files out")
    console.info(f"{line}; left out")


# The end.


def _kept_images(task: _Task, shards: list[_Shard]) -> NDArray[np.bool_]:
    """Which files are in the pack, bool (number of files,)."""
    kept = np.ones(len(task.index), dtype=bool)
    for shard in shards:
        kept[shard.left_out] = False
    return kept


def _require_readable_classes(task: _Task, shards: list[_Shard]) -> None:
    """Refuse a class that has no image in the pack."""
    labels = np.unique(task.index.labels[_kept_images(task, shards)])
    missing = set(range(len(task.index.classes))) - set(labels.tolist())
    if missing:
        name = task.index.classes[min(missing)]
        raise UserError(f"data.root: no readable image in {task.index.folder / name}")


def _verify(task: _Task, shards: list[_Shard]) -> None:
    """Read all shards back from the disk.

    Raises:
        UserError: one is not what was written; the next call will write it again.
    """
    paths = [task.folder / f"{shard_name(number)}.bin" for number in range(len(shards))]
    digests = digest_files(paths, f"verifying {task.folder}")

    damaged = []
    for path, shard, digest in zip(paths, shards, digests, strict=True):
        if digest != shard.sha256:
            path.with_suffix(".json").unlink(missing_ok=True)
            damaged.append(path)
    if damaged:
        lines = [
            f"{path}: what was read back is not what was written; the same command makes it anew"
            for path in damaged
        ]
        raise UserError("\n".join(lines))


def _write_index(task: _Task, shards: list[_Shard]) -> int:
    """Write the arrays, and at last `pack.json`.

    Returns:
        The number of images.
    """
    arrays = _make_arrays(task, shards)
    array_digests = {}
    for name in ARRAYS:
        path = task.folder / f"{name}.npy"
        with _whole_file(path) as stream:
            np.save(stream, arrays[name])
        array_digests[name] = digest_file(path)

    description = {
        **task.settings,
        "classes": list(task.index.classes),
        "images": len(arrays["label"]),
        "left_out": sum(len(shard.left_out) for shard in shards),
        "shards": [{"bytes": shard.bytes, "sha256": shard.sha256} for shard in shards],
        "arrays": array_digests,
    }
    with _whole_file(task.folder / PACK_FILE) as stream:
        stream.write(seal(description))
    return len(arrays["label"])


def _make_arrays(task: _Task, shards: list[_Shard]) -> dict[str, NDArray[Any]]:
    """Make what `lrd.data.streaming.packed` lists, by name."""
    offsets = []
    for shard in shards:
        num_bytes = 3 * np.array(shard.heights, np.int64) * np.array(shard.widths, np.int64)
        offsets.append(np.cumsum(num_bytes) - num_bytes)
    images_of_shard = [len(shard.heights) for shard in shards]

    kept = _kept_images(task, shards)
    name_lengths = np.diff(task.index.offsets)
    return {
        "offset": np.concatenate(offsets),
        "shard": np.repeat(np.arange(len(shards), dtype=np.int32), images_of_shard),
        "height": np.concatenate([np.array(shard.heights, np.uint16) for shard in shards]),
        "width": np.concatenate([np.array(shard.widths, np.uint16) for shard in shards]),
        "label": np.array(task.index.labels[kept]),
        "name": np.array(task.index.names[np.repeat(kept, name_lengths)]),
        "name_end": np.cumsum(name_lengths[kept]),
    }


@contextmanager
def _whole_file(path: Path) -> Iterator[BufferedWriter]:
    """A file that has its name only when all of it is on the disk.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
        files.sync(temporary, drop_cache=True)  # it is read back later
        temporary.replace(path)
        files.sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{path}: cannot be written: {first_line(error)}; the same command goes on there"
            ) from None
        raise
