"""A folder of images -> one uint8 tensor, decoded once into a cache beside the folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load, save
from torch import Tensor

from lrd import console
from lrd.errors import UserError, first_line

_DIGEST_BYTES = 32
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})


def read_folder(folder: Path, size: int | None, skip_corrupt: bool) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Read `folder/<class>/*`.

    Args:
        folder: has one folder a class.
        size: images are brought to size x size pixels; None: the first image's height is the size.
        skip_corrupt: leave out files that cannot be decoded, saying which, in place of stopping at them.

    Returns:
        pixels uint8 (N, 3, size, size), labels int64 (N,), the class names; classes and files in the order of names.

    Raises:
        UserError: the folder is missing or has no image; a file cannot be decoded.
    """
    files, classes = list_folder(folder)
    cache = _cache_path(folder, files, size, skip_corrupt)
    cached = _read_cache(cache)
    if cached is None:
        with in_turn(cache.parent):
            cached = _read_cache(cache)  # another host may have been faster
            if cached is None:
                cached = _decode_all(folder, files, classes, size or _own_size(files, skip_corrupt), skip_corrupt)
                _write_cache(cache, cached)
    return cached["pixels"], cached["labels"], classes


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """One process after the other, on all hosts that share the folder: the first makes what the others then find.

    Where the folder cannot be written or its file system knows no locks, nobody waits.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lrd-lock").open("a")
    except OSError:
        yield
        return
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def list_folder(folder: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Each image file in `folder/<class>/` with its label, and the class names; in the order of names.

    Raises:
        UserError: the folder is missing, or a class in it has no image.
    """
    if not folder.is_dir():
        raise UserError(
            f"data.root: {folder} is not a folder; imagefolder needs train/<class>/* and test/<class>/* there"
        )
    classes = tuple(
        sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    )
    files = [(path, label) for label, name in enumerate(classes) for path in _image_files(folder / name)]
    if not files:
        raise UserError(f"data.root: no image in {folder}/<class>/")
    for label, name in enumerate(classes):
        if not any(label == own for _, own in files):
            raise UserError(f"data.root: no image in {folder / name}")
    return files, classes


def _image_files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _own_size(files: list[tuple[Path, int]], skip_corrupt: bool) -> int:
    """The height of the first image that can be opened."""
    for path, _ in files:
        try:
            with Image.open(path) as image:
                return image.height
        except Exception as error:
            if not skip_corrupt:
                raise _corrupt(path, error) from None
    raise UserError(f"data.root: no readable image in {files[0][0].parent.parent}")


def _corrupt(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path}: not a readable image ({_reason(error)}); data.skip_corrupt=true leaves such files out")


def _reason(error: BaseException) -> str:
    return "cannot identify image file" if isinstance(error, UnidentifiedImageError) else first_line(error)


def _decode(path: Path, size: int) -> NDArray[np.uint8] | Exception:
    try:
        with Image.open(path) as image:
            rgb = _to_rgb(image)
        if rgb.size != (size, size):
            rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(rgb).transpose(2, 0, 1)
    except Exception as error:  # on a damaged file Pillow's decoders raise nearly anything
        return error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits of gray to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _decode_all(
    folder: Path, files: list[tuple[Path, int]], classes: tuple[str, ...], size: int, skip_corrupt: bool
) -> dict[str, Tensor]:
    pixels = np.empty((len(files), 3, size, size), dtype=np.uint8)
    labels: list[int] = []
    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        decoded = pool.map(lambda entry: _decode(entry[0], size), files)
        both = zip(files, decoded, strict=True)
        for (path, label), image in console.progress(both, f"decoding {folder}", len(files)):
            if isinstance(image, Exception):
                if not skip_corrupt:
                    pool.shutdown(cancel_futures=True)
                    raise _corrupt(path, image)
                console.say(f"{path}: not a readable image ({_reason(image)}); left out")
                continue
            pixels[len(labels)] = image
            labels.append(label)
    for label, name in enumerate(classes):
        if label not in set(labels):
            raise UserError(f"data.root: no readable image in {folder / name}")
    return {"pixels": torch.from_numpy(pixels[: len(labels)]), "labels": torch.tensor(labels)}


def _cache_path(folder: Path, files: list[tuple[Path, int]], size: int | None, skip_corrupt: bool) -> Path:
    """Named by what was read, so that a changed, added or removed file makes another cache."""
    digest = hashlib.sha256(f"{folder.resolve()} {size} {skip_corrupt}".encode())
    for path, _ in files:
        try:
            stat = path.stat()
        except OSError:  # a dangling link: an image that cannot be read
            continue
        digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    name = f"{folder.name}-{digest.hexdigest()[:16]}.cache"
    beside = folder.parent / ".lrd-cache"
    if os.access(folder.parent, os.W_OK):
        return beside / name
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lrd" / name


def _read_cache(path: Path) -> dict[str, Tensor] | None:
    """A SHA-256, then safetensors: one flipped bit would be trained on without a word."""
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return None
    digest, tensors = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return load(bytes(tensors)) if hashlib.sha256(tensors).digest() == digest else None


def _write_cache(path: Path, tensors: dict[str, Tensor]) -> None:
    beside = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    content = save(tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            stream.write(hashlib.sha256(content).digest())
            stream.write(content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        reason = first_line(error)
        console.say(f"{path}: the decoded images could not be kept ({reason}); the next start decodes them again")
