"""A folder of images -> one uint8 tensor, decoded once into a cache beside the folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrd import console
from lrd.errors import UserError

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
        cached = _decode_all(folder, files, size or _own_size(files[0][0]), skip_corrupt)
        _write_cache(cache, cached)
    return cached["pixels"], cached["labels"], classes


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


def _own_size(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return image.height
    except (OSError, UnidentifiedImageError) as error:
        raise _corrupt(path, error) from None


def _corrupt(path: Path, error: BaseException) -> UserError:
    reason = "cannot identify image file" if isinstance(error, UnidentifiedImageError) else str(error)
    return UserError(f"{path}: not a readable image ({reason}); data.skip_corrupt=true leaves such files out")


def _decode(path: Path, size: int) -> NDArray[np.uint8] | Exception:
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        if rgb.size != (size, size):
            rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(rgb).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return error


def _decode_all(folder: Path, files: list[tuple[Path, int]], size: int, skip_corrupt: bool) -> dict[str, Tensor]:
    pixels = np.empty((len(files), 3, size, size), dtype=np.uint8)
    labels: list[int] = []
    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        decoded = pool.map(lambda entry: _decode(entry[0], size), files)
        for (path, label), image in console.progress(
            zip(files, decoded, strict=True), f"decoding {folder}", len(files)
        ):
            if isinstance(image, Exception):
                if not skip_corrupt:
                    pool.shutdown(cancel_futures=True)
                    raise _corrupt(path, image)
                console.say(f"{path}: not a readable image ({image}); left out")
                continue
            pixels[len(labels)] = image
            labels.append(label)
    if not labels:
        raise UserError(f"data.root: no readable image in {folder}")
    return {"pixels": torch.from_numpy(pixels[: len(labels)]), "labels": torch.tensor(labels)}


def _cache_path(folder: Path, files: list[tuple[Path, int]], size: int | None, skip_corrupt: bool) -> Path:
    """Named by what was read, so that a changed, added or removed file makes another cache."""
    digest = hashlib.sha256(f"{size} {skip_corrupt}".encode())
    for path, _ in files:
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    name = f"{folder.name}-{digest.hexdigest()[:16]}.safetensors"
    beside = folder.parent / ".lrd-cache"
    if os.access(folder.parent, os.W_OK):
        return beside / name
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lrd" / name


def _read_cache(path: Path) -> dict[str, Tensor] | None:
    try:
        cached = load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None
    whole = cached.keys() == {"pixels", "labels"} and len(cached["pixels"]) == len(cached["labels"])
    return cached if whole else None


def _write_cache(path: Path, tensors: dict[str, Tensor]) -> None:
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        console.say(f"{path}: the decoded images could not be kept ({error}); the next start decodes them again")
