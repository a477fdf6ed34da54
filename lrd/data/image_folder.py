"""A folder of image files as one uint8 tensor, decoded once and then read from a cache."""

from __future__ import annotations

import hashlib
import os
import uuid
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from lrd import console
from lrd.data.decoding import describe_decode_error, open_image, to_pixels, upright
from lrd.data.folder_lock import one_process_at_a_time
from lrd.errors import UserError, first_line
from lrd.host import require_memory

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
)
_DIGEST_BYTES = 32
_DECODING_VERSION = 3  # goes up when the same file is decoded to other pixels


def read_folder(
    folder: Path, size: int | None, skip_corrupt: bool, resize: int | None = None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Read all images in `folder/<class>/`, from the cache if it is up to date.

    Args:
        folder: contains one folder for each class.
        size: images are made size x size pixels, see `to_pixels`; None: the height of the first.
        skip_corrupt: report a file that cannot be decoded and leave it out, instead of failing.
        resize: pixels of the shorter side before the centre is cut out; None: `size`.

    Returns:
        Pixels, uint8 (N, 3, size, size); labels, int64 (N,); and the names of the classes. Classes
        and files are sorted by name.

    Raises:
        UserError: the folder is missing, a class has no image, or a file cannot be decoded.
    """
    files, classes = list_folder(folder)
    cache = _cache_path(folder, files, size, skip_corrupt, resize)

    tensors = _read_cache(cache)
    if tensors is None:
        with one_process_at_a_time(cache.parent):
            tensors = _read_cache(cache)  # another host may have written it in the meantime
            if tensors is None:
                size = size or _first_image_height(files, skip_corrupt)
                tensors = _decode_all(folder, files, classes, size, skip_corrupt, resize)
                _write_cache(cache, tensors)

    return tensors["pixels"], tensors["labels"], classes


def list_folder(folder: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """List the image files in `folder/<class>/`.

    Returns:
        Each file with its label, and the names of the classes; both sorted by name.

    Raises:
        UserError: the folder is missing, or a class in it has no image.
    """
    classes = list_classes(folder)
    files_of_class = [_image_files(folder / name) for name in classes]
    if not any(files_of_class):
        raise UserError(f"data.root: no image in {folder}/<class>/")

    labelled_files = []
    for label, paths in enumerate(files_of_class):
        if not paths:
            raise UserError(f"data.root: no image in {folder / classes[label]}")
        for path in paths:
            labelled_files.append((path, label))
    return labelled_files, classes


def list_classes(folder: Path) -> tuple[str, ...]:
    """The names of the classes in `folder/<class>/`, sorted.

    Raises:
        UserError: the folder is missing, or a class has a name that cannot be recorded.
    """
    if not folder.is_dir():
        raise UserError(
            f"data.root: {folder} is not a folder; imagefolder needs images in <class>/* there"
        )

    names = []
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.name.startswith("."):
            _require_utf8(entry)
            names.append(entry.name)
        elif entry.is_symlink() and not entry.exists():
            raise UserError(f"data.root: {entry} is a link to something that does not exist")
    return tuple(sorted(names))


def _require_utf8(folder: Path) -> None:
    """Refuse a class that cannot be recorded: its name goes into checkpoints and tables."""
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        name = os.fsencode(folder.name)
        raise UserError(
            f"data.root: a class folder in {folder.parent} has the name {name!r}, "
            "which is not UTF-8; rename it"
        ) from None


def _image_files(folder: Path) -> list[Path]:
    """List the image files in one folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if is_image_name(path.name))


def is_image_name(name: str) -> bool:
    """Whether a file in the folder of a class is taken for an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _first_image_height(files: list[tuple[Path, int]], skip_corrupt: bool) -> int:
    """Height in pixels of the first image that can be opened."""
    for path, _ in files:
        try:
            with open_image(path) as image:
                return upright(image).height
        except Exception as error:
            if not skip_corrupt:
                raise _corrupt_file_error(path, error) from None

    first_path, _ = files[0]
    folder = first_path.parent.parent
    raise UserError(f"data.root: no readable image in {folder}")


def _decode_all(
    folder: Path,
    files: list[tuple[Path, int]],
    classes: tuple[str, ...],
    size: int,
    skip_corrupt: bool,
    resize: int | None,
) -> dict[str, Tensor]:
    """Decode all files, several at a time.

    Returns:
        `pixels`, uint8 (N, 3, size, size), and `labels`, int64 (N,).

    Raises:
        UserError: a file cannot be decoded, or no file of a class can.
    """
    require_memory(
        num_bytes=len(files) * 3 * size * size,
        key=f"data.image_size: is {size}",
        what=f"{len(files):,} images of {folder}",
    )
    pixels = np.empty((len(files), 3, size, size), dtype=np.uint8)
    labels: list[int] = []
    oddities: Counter[str] = Counter()

    # Pillow releases the interpreter's lock while it decodes. It warns of images that are large and
    # not too large, and refuses those of more than 179 million pixels.
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        images = pool.map(lambda file: _decode(file[0], size, resize), files)
        files_and_images = zip(files, images, strict=True)
        for (path, label), image in console.track(
            files_and_images, f"decoding {folder}", total=len(files)
        ):
            if isinstance(image, Exception):
                if not skip_corrupt:
                    pool.shutdown(cancel_futures=True)
                    raise _corrupt_file_error(path, image)
                reason = describe_decode_error(image)
                console.info(f"{path}: not a readable image ({reason}); left out")
                continue

            pixels[len(labels)] = image.pixels
            labels.append(label)
            oddities.update(image.oddities)

    for oddity, count in sorted(oddities.items()):
        console.info(f"{folder}: {count:,} of {len(labels):,} images {oddity}")

    decoded_labels = set(labels)
    for label, name in enumerate(classes):
        if label not in decoded_labels:
            raise UserError(f"data.root: no readable image in {folder / name}")
    return {"pixels": torch.from_numpy(pixels[: len(labels)]), "labels": torch.tensor(labels)}


@dataclass(frozen=True)
class _Decoded:
    """One image.

    Attributes:
        pixels: uint8 (3, size, size).
        oddities: what a user may want to know about it, to follow "12 of 100 images".
    """

    pixels: NDArray[np.uint8]
    oddities: list[str]


def _decode(path: Path, size: int, resize: int | None) -> _Decoded | Exception:
    """Decode one file.

    Returns:
        The image, or the error.
    """
    try:
        with open_image(path) as image:
            oddities = []
            if image.width != image.height:
                oddities.append("are not square; their centre is taken")
            if getattr(image, "is_animated", False):
                oddities.append("have several frames; the first one is taken")
            return _Decoded(to_pixels(image, size, size, resize), oddities)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        return error


def _corrupt_file_error(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"{path}: not a readable image ({describe_decode_error(error)}); "
        "data.skip_corrupt=true leaves such files out"
    )


def _cache_path(
    folder: Path,
    files: list[tuple[Path, int]],
    size: int | None,
    skip_corrupt: bool,
    resize: int | None,
) -> Path:
    """Path of the cache for a folder's present content.

    The name contains a digest of the files' paths, sizes and modification times, so that a changed,
    added or removed file leads to a new cache.
    """
    settings = f"{folder.resolve()} {size} {resize} {skip_corrupt} {_DECODING_VERSION}"
    digest = hashlib.sha256(settings.encode(errors="surrogateescape"))
    for path, _ in files:
        try:
            stat = path.stat()
        except OSError:  # a dangling link; decoding will find that it cannot be read
            continue
        line = f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    name = f"{folder.name}-{digest.hexdigest()[:16]}.cache"

    return cache_folder(folder) / name


def cache_folder(folder: Path) -> Path:
    """Where what is known of a folder is kept: beside it, or in the user's cache directory."""
    if os.access(folder.parent, os.W_OK):
        return folder.parent / ".lrd-cache"
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return user_cache / "lrd"


def _read_cache(path: Path) -> dict[str, Tensor] | None:
    """Read a cache: the SHA-256 of the rest of the file, then `safetensors`.

    The digest is checked, because a flipped bit in the pixels would otherwise go unnoticed.

    Returns:
        The tensors of `_decode_all`; None if the cache is missing or damaged.
    """
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return None

    digest = content[:_DIGEST_BYTES]
    tensors = content[_DIGEST_BYTES:]
    if hashlib.sha256(tensors).digest() != digest:
        return None
    return load(bytes(tensors))


def _write_cache(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a cache in one rename; if that fails, report it and go on without."""
    content = save(tensors)
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(hashlib.sha256(content).digest())
            stream.write(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        console.info(
            f"{path}: the cache of decoded images could not be written ({first_line(error)}); "
            "the next start decodes them again"
        )
