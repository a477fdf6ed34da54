"""Folders of images: missing, damaged, and of kinds that a camera or a scanner makes."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from .cases import Expected, Input, accepted, refused, told, training

_OVERRIDES = (
    "data.dataset=imagefolder",
    "data.root=images",
    "data.batch_size=4",
    "data.image_size=8",
)
_FIRST = "images/train/a/0.png"  # the first file that is decoded


def make_images(folder: Path) -> Path:
    """Two classes with four training images and one test image each."""
    root = folder / "images"
    for part, count in (("train", 4), ("test", 1)):
        for label, name in enumerate("ab"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                colour = (200 * label, 30 * i, 90)
                Image.new("RGB", (8, 8), colour).save(root / part / name / f"{i}.png")
    return root


def _with(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """A preparation that makes the folder of images and then changes it."""

    def prepare(folder: Path) -> None:
        make_images(folder)
        change(folder)

    return prepare


def _replace_first(raw: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / _FIRST).write_bytes(raw)


def _save_first(image: Image.Image, name: str = "0.png", **options: object) -> Callable:
    """Put an image in place of the first one, under a name that still comes first."""

    def save(folder: Path) -> None:
        path = folder / _FIRST
        path.unlink()
        image.save(path.with_name(name), **options)

    return save


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size, whatever data follows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    return exif


def _save_animation(folder: Path) -> None:
    path = folder / _FIRST
    path.unlink()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])


def _as_fifo(folder: Path) -> None:
    (folder / _FIRST).unlink()
    os.mkfifo(folder / _FIRST)


def _as_link(target: str) -> Callable[[Path], None]:
    def link(folder: Path) -> None:
        (folder / _FIRST).unlink()
        (folder / _FIRST).symlink_to(target)

    return link


def _one_class(folder: Path) -> None:
    for part in ("train", "test"):
        shutil.rmtree(folder / "images" / part / "b")


def _not_utf8_class(folder: Path) -> None:
    for part in ("train", "test"):
        path = os.fsencode(folder / "images" / part)
        os.rename(path + b"/b", path + b"/\xff\xfe")


def _rename_class(name: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        for part in ("train", "test"):
            (folder / "images" / part / "b").rename(folder / "images" / part / name)

    return rename


def _truncated(folder: Path) -> None:
    raw = (folder / _FIRST).read_bytes()
    (folder / _FIRST).write_bytes(raw[: len(raw) // 2])


_RNG = np.random.default_rng(0)
_GRAY_16 = _RNG.integers(0, 1 << 16, (8, 8), dtype=np.uint16)
_FLOATS = _RNG.random((8, 8), dtype=np.float32)
_NEVER_DIR = "images/train/a"

FOLDERS: dict[str, tuple[Callable[[Path], object], Expected]] = {
    "valid": (lambda folder: None, accepted("valid")),
    # The folder
    "train/ is missing": (
        lambda folder: shutil.rmtree(folder / "images/train"),
        refused("data.root", "images/train"),
    ),
    "test/ is missing": (
        lambda folder: shutil.rmtree(folder / "images/test"),
        refused("data.root", "images/test"),
    ),
    "val/ in place of test/": (
        lambda folder: (folder / "images/test").rename(folder / "images/val"),
        refused("data.root", "images/test", "val"),
    ),
    "train/ is a file": (
        lambda folder: (
            shutil.rmtree(folder / "images/train"),
            (folder / "images/train").write_text(""),
        ),
        refused("images/train"),
    ),
    "train/ is empty": (
        lambda folder: (
            shutil.rmtree(folder / "images/train"),
            (folder / "images/train").mkdir(),
        ),
        refused("images/train"),
    ),
    "a class is empty": (
        lambda folder: (folder / "images/train/c").mkdir(),
        refused("images/train/c"),
    ),
    "a class has no images": (
        lambda folder: (
            (folder / "images/train/c").mkdir(),
            (folder / "images/train/c/a.txt").write_text(""),
        ),
        refused("images/train/c"),
    ),
    "a class in train/ alone": (
        lambda folder: shutil.copytree(folder / "images/train/a", folder / "images/train/c"),
        refused("images/test", "c"),
    ),
    "one class": (_one_class, refused("data.root", "class")),
    "a class folder that is not UTF-8": (_not_utf8_class, refused("data.root", "images/train")),
    "a class named [/x]": (_rename_class("[x"), accepted("a name like any other")),
    "a class with a space and an accent": (_rename_class("\u00e9 b"), accepted("a name")),
    "a class with a line break": (_rename_class("b\nc"), accepted("a name")),
    "a class of 250 characters": (_rename_class(250 * "x"), accepted("a name")),
    "images beside the classes": (
        lambda folder: shutil.copy(folder / _FIRST, folder / "images/train/0.png"),
        accepted("other files are ignored"),
    ),
    "a folder that links to itself": (
        lambda folder: (folder / "images/train/c").symlink_to("c"),
        refused("images/train/c"),
    ),
    "a class that links to its parent": (
        lambda folder: (folder / "images/train/c").symlink_to(".."),
        refused("images/train/c"),
    ),
    # Files that are no images
    "an empty file": (_replace_first(b""), refused("0.png", "skip_corrupt")),
    "text": (_replace_first(b"hello"), refused("0.png")),
    "random bytes": (_replace_first(_RNG.bytes(5000)), refused("0.png")),
    "half a PNG": (_truncated, refused("0.png")),
    "a PNG of no data": (_replace_first(_png(8, 8)), refused("0.png")),
    "a PNG of 0 x 0": (_replace_first(_png(0, 0)), refused("0.png")),
    "a PNG that claims 100,000 x 100,000": (
        _replace_first(_png(100_000, 100_000)),
        refused("0.png"),
    ),
    "a PNG that claims 2 billion x 2 billion": (
        _replace_first(_png(2_000_000_000, 2_000_000_000)),
        refused("0.png"),
    ),
    "a PNG of 12,000 x 12,000, well compressed": (
        _replace_first(_png(12_000, 12_000, 12_000 * (1 + 12_000) * b"\0")),
        accepted("large, and less than twice what Pillow warns of"),
    ),
    "a FIFO named .png": (_as_fifo, refused("0.png")),
    "a folder named .png": (
        lambda folder: ((folder / _FIRST).unlink(), (folder / _FIRST).mkdir()),
        refused("0.png"),
    ),
    "a link to nothing": (_as_link("nothing.png"), refused("0.png")),
    "a link to itself": (_as_link("0.png"), refused("0.png")),
    "a link to another image": (_as_link("1.png"), accepted("an image twice")),
    "a link to /dev/zero": (_as_link("/dev/zero"), refused("0.png")),
    "a link to /dev/null": (_as_link("/dev/null"), refused("0.png")),
    "a file name that is not UTF-8": (
        lambda folder: os.rename(
            os.fsencode(folder / _FIRST), os.fsencode(folder / _NEVER_DIR) + b"/\xff.png"
        ),
        accepted("file names are not recorded"),
    ),
    "a corrupt file whose name is not UTF-8": (
        lambda folder: Path(
            os.fsdecode(os.fsencode(folder / _NEVER_DIR) + b"/\xff.png")
        ).write_text(""),
        refused("images/train/a"),
    ),
    "an image without a suffix": (
        lambda folder: (folder / _FIRST).rename(folder / _NEVER_DIR / "0"),
        accepted("files with other suffixes are ignored"),
    ),
    # Images of every kind
    "16-bit gray": (_save_first(Image.fromarray(_GRAY_16)), accepted("scaled to 8 bits")),
    "float TIFF, 0 to 1": (
        _save_first(Image.fromarray(_FLOATS), "0.tiff"),
        accepted("scaled to 8 bits"),
    ),
    "float TIFF, any range": (
        _save_first(Image.fromarray(_FLOATS * 1e6 - 1e5), "0.tiff"),
        refused("0.tiff"),
    ),
    "float TIFF with nan": (
        _save_first(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "0.tiff"),
        refused("0.tiff"),
    ),
    "32-bit integers": (
        _save_first(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "0.tiff"),
        refused("0.tiff"),
    ),
    "CMYK": (_save_first(Image.new("CMYK", (8, 8)), "0.jpg"), accepted("converted")),
    "palette": (_save_first(Image.new("P", (8, 8), 3)), accepted("converted")),
    "palette with transparency": (
        _save_first(Image.new("P", (8, 8), 3), transparency=b"\0\xff"),
        accepted("converted"),
    ),
    "gray with transparency": (_save_first(Image.new("LA", (8, 8))), accepted("converted")),
    "one bit": (_save_first(Image.new("1", (8, 8))), accepted("converted")),
    "YCbCr": (_save_first(Image.new("YCbCr", (8, 8)), "0.jpg"), accepted("converted")),
    "Lab": (_save_first(Image.new("LAB", (8, 8)), "0.tiff"), accepted("converted")),
    "EXIF rotation": (
        _save_first(Image.new("RGB", (8, 4)), "0.jpg", exif=_rotated()),
        told("not square"),  # and turned upright: tests/data/test_image_folder.py
    ),
    "damaged EXIF": (
        _save_first(Image.new("RGB", (8, 8)), "0.jpg", exif=b"Exif\0\0garbage"),
        accepted("taken as it is"),
    ),
    "an animated GIF": (_save_animation, told("images/train: 1 of 8", "frames")),
    "1 x 1": (_save_first(Image.new("RGB", (1, 1))), accepted("resized")),
    "not square": (_save_first(Image.new("RGB", (64, 4))), told("square")),
    "100,000 x 1": (_save_first(Image.new("L", (100_000, 1))), told("square")),
}

_SETTINGS: dict[tuple[str, ...], Expected] = {
    ("data.image_size=1000000",): refused("data.image_size"),
    ("data.image_size=100000000",): refused("data.image_size"),
    ("data.image_size=1",): refused("image_size"),
    ("data.batch_size=9",): refused("data.batch_size"),
    ("data.root=nothing",): refused("data.root", "nothing/train"),
    ("data.root=images/train/a/0.png",): refused("data.root"),
    ("model.num_classes=1",): refused("model.num_classes"),
}


def inputs() -> list[Input]:
    group = "folders of images"
    found = [
        Input(group, name, expected, training(*_OVERRIDES), prepare=_with(change))
        for name, (change, expected) in FOLDERS.items()
    ]
    for overrides, expected in _SETTINGS.items():
        command = training(*_OVERRIDES, *overrides)
        found.append(Input(group, " ".join(overrides), expected, command, prepare=_make))

    skip = training(*_OVERRIDES, "data.skip_corrupt=true")
    for name in ("an empty file", "a FIFO named .png", "half a PNG", "a folder named .png"):
        change, _ = FOLDERS[name]
        expected = told("0.png", "left out")
        found.append(Input(group, f"{name}, skipped", expected, skip, prepare=_with(change)))
    return found


def _make(folder: Path) -> None:
    make_images(folder)
