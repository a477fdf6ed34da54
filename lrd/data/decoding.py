"""One image file -> upright RGB pixels, whole or a region of it.

JPEG files are most of what there is, so they have a way of their own: `simplejpeg`, where it is
installed, decodes them in two thirds of Pillow's time to the same bytes.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lrd.errors import UserError, first_line

try:
    import simplejpeg
except ImportError:  # an extra of the package
    simplejpeg = None

_JPEG_START = b"\xff\xd8\xff"
_ORIENTATION_MARKS = (b"Exif\x00\x00", b"tiff:Orientation")  # in EXIF data, and in XMP data
_FOR_PILLOW_ALONE = ("CMYK", "YCCK")
_JPEG_FORMATS = ("JPEG", "MPO")  # MPO: with further images in the same file
_SCALES = (8, 4, 2)  # by which a JPEG can be reduced while it is decoded


@dataclass(frozen=True)
class Region:
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


# Height and width of an image -> the region of it that is wanted.
ChooseRegion = Callable[[int, int], Region]


class UnreadableImageError(Exception):
    """A file cannot be decoded; the text says why, without the file's name."""


def read_region(path: Path, choose: ChooseRegion, size: int) -> Tensor:
    """Decode a region of an image file.

    A region with at least twice the pixels that are wanted on both sides is decoded at a half, a
    quarter or an eighth of its size, where the format allows it.

    Args:
        path: the file.
        choose: gets the upright image's height and width, and returns the region.
        size: the region will be resized to size x size pixels.

    Returns:
        uint8 (3, height, width) of the region, or of it at a reduced scale; perhaps a view.

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    with _decoding():
        content = read_file(path)
        shape = _plain_jpeg_shape(content)
        if shape is None:
            with _open_content(content) as image:
                return _read_any_region(image, choose, size)

        region = choose(*shape)
        scale = _choose_scale(region, size)
        return _cut(_decode_plain_jpeg(content, shape, scale), region, scale)


def read_centre(path: Path, size: int, resize: int | None = None) -> Tensor:
    """Read an image file as `to_pixels` makes it.

    Returns:
        uint8 (3, size, size).

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    with _decoding():
        pixels = resize_and_cut(_read_rgb(path), size, size, resize)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def read_shrunk(path: Path, size: int) -> NDArray[np.uint8]:
    """Read a whole image file, and make its shorter side `size` pixels long if it is longer.

    It is the image that `to_pixels` with `resize=size` cuts the centre out of; only an image that
    is smaller is left so.

    Returns:
        uint8 (height, width, 3).

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    with _decoding():
        rgb = _read_rgb(path)
        if min(rgb.size) > size:
            new_size = size_before_cut(rgb.height, rgb.width, size, size, resize=size)
            rgb = rgb.resize(new_size, Image.Resampling.BILINEAR)
        return np.asarray(rgb)


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn whatever decoders raise on a damaged file into an `UnreadableImageError`.

    A lack of memory is no fault of the file: it is raised as it is.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImageError(describe_decode_error(error)) from None


def _read_rgb(path: Path) -> Image.Image:
    """Read a whole image file as upright RGB.

    Raises:
        Exception: it cannot be decoded.
    """
    content = read_file(path)
    shape = _plain_jpeg_shape(content)
    if shape is not None:
        return Image.fromarray(_decode_plain_jpeg(content, shape, scale=1))
    with _open_content(content) as image:
        return to_rgb(upright(image))


def read_file(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        OSError, ValueError: it cannot be read, or is no file: to open a FIFO would wait.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("is not a file")
    return path.read_bytes()


def _open_content(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def _plain_jpeg_shape(content: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that `simplejpeg` is there for, and that need not be turned.

    Returns:
        None: Pillow is to decode it, or to say what is wrong with it.
    """
    if simplejpeg is None or not content.startswith(_JPEG_START):
        return None
    if any(mark in content for mark in _ORIENTATION_MARKS):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    # Pillow refuses images with too many pixels: a damaged header could ask for any memory.
    is_too_large = height * width > (Image.MAX_IMAGE_PIXELS or height * width)
    return None if colorspace in _FOR_PILLOW_ALONE or is_too_large else (height, width)


def _decode_plain_jpeg(content: bytes, shape: tuple[int, int], scale: int) -> NDArray[np.uint8]:
    """Decode a JPEG at a reduced scale, uint8 (H, W, 3)."""
    height, width = shape
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            content,
            "RGB",
            min_height=-(-height // scale),
            min_width=-(-width // scale),
            min_factor=scale,
        )
        return pixels
    except ValueError:  # Pillow is the judge: it lets small faults pass, which are often met
        with _open_content(content) as image:
            _reduce(image, scale)
            return np.array(to_rgb(image))


def _read_any_region(image: Image.Image, choose: ChooseRegion, size: int) -> Tensor:
    if image.format not in _JPEG_FORMATS or _is_turned(image):
        image = upright(image)
        region = choose(image.height, image.width)
        scale = 1
    else:
        region = choose(image.height, image.width)
        scale = _choose_scale(region, size) if image.mode in ("RGB", "L") else 1
        _reduce(image, scale)
    return _cut(np.array(to_rgb(image)), region, scale)


def _reduce(image: Image.Image, scale: int) -> None:
    """Let a JPEG that is not yet decoded be decoded at a reduced scale."""
    if scale > 1:
        image.draft(image.mode, (image.width // scale, image.height // scale))


def _is_turned(image: Image.Image) -> bool:
    """Whether EXIF data say that an image is not upright; it is not decoded for that."""
    with suppress(Exception):  # damaged EXIF data: Pillow raises nearly anything
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    return False


def _choose_scale(region: Region, size: int) -> int:
    """The largest reduction that leaves a region at least `size` pixels on both sides."""
    shorter = min(region.height, region.width)
    return next((scale for scale in _SCALES if shorter >= scale * size), 1)


def _cut(pixels: NDArray[np.uint8], region: Region, scale: int) -> Tensor:
    """Cut a region out of pixels, uint8 (H, W, 3), that are at a reduced scale."""
    top = region.top // scale
    left = region.left // scale
    bottom = -(-(region.top + region.height) // scale)
    right = -(-(region.left + region.width) // scale)
    cut = torch.from_numpy(pixels[top:bottom, left:right])  # uint8 (h, w, 3)
    return cut.permute(2, 0, 1)


def open_image(path: Path) -> Image.Image:
    """Open an image file with Pillow.

    Raises:
        Exception: it cannot be opened, or is no file: to open a FIFO would wait for a writer.
    """
    if path.exists() and not path.is_file():
        raise ValueError("is not a file")
    return Image.open(path)


def read_image(path: Path, height: int, width: int, resize: int | None = None) -> NDArray[np.uint8]:
    """Read one image file as `to_pixels` makes it.

    Returns:
        uint8 (3, height, width).

    Raises:
        UserError: there is no such file, or it is no image.
    """
    if not path.exists():
        raise UserError(f"{path}: no such image file")
    try:
        with open_image(path) as image:
            return to_pixels(image, height, width, resize)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = describe_decode_error(error)
        raise UserError(f"{path}: not a readable image ({reason})") from None


def to_pixels(
    image: Image.Image, height: int, width: int, resize: int | None = None
) -> NDArray[np.uint8]:
    """Convert an image of any mode to upright RGB of a size, and keep its aspect ratio.

    The image is resized so that its shorter side has `resize` pixels, and the centre is cut out.

    Args:
        image: of any size and mode.
        height: of the result, in pixels.
        width: of the result.
        resize: pixels of the shorter side before the centre is cut out. None: as few as fill
            `height` and `width`; an image that has this size already is taken as it is.

    Returns:
        uint8 (3, height, width).

    Raises:
        ValueError: its values have no range that lrd knows.
    """
    return resize_and_cut(to_rgb(upright(image)), height, width, resize)


def resize_and_cut(
    rgb: Image.Image, height: int, width: int, resize: int | None
) -> NDArray[np.uint8]:
    """Do to an upright RGB image what `to_pixels` does to any image."""
    new_size = size_before_cut(rgb.height, rgb.width, height, width, resize)
    if rgb.size != new_size:
        rgb = rgb.resize(new_size, Image.Resampling.BILINEAR)
    centre = centre_region(rgb.height, rgb.width, height, width)
    pixels = np.asarray(rgb)[centre.top : centre.top + height, centre.left : centre.left + width]
    return pixels.transpose(2, 0, 1)


def centre_region(image_height: int, image_width: int, height: int, width: int) -> Region:
    """The centre of an image."""
    top = round((image_height - height) / 2)
    left = round((image_width - width) / 2)
    return Region(top, left, height, width)


def size_before_cut(
    image_height: int, image_width: int, height: int, width: int, resize: int | None
) -> tuple[int, int]:
    """Width and height to which an image is resized before height x width pixels are cut out.

    As in torchvision's Resize, the longer side is rounded down.
    """
    if resize is None and height == width:
        resize = height
    if resize is not None:
        shorter = min(image_height, image_width)
        return int(resize * image_width / shorter), int(resize * image_height / shorter)

    scale = max(height / image_height, width / image_width)
    return max(width, round(scale * image_width)), max(height, round(scale * image_height))


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF data say that the camera was held.

    Raises:
        Exception: it cannot be decoded.
    """
    image.load()  # Pillow would not say a second time that a part of the image is missing
    with suppress(Exception):  # damaged EXIF data: Pillow raises nearly anything
        return ImageOps.exif_transpose(image)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB with 8 bits a channel.

    Pillow would clip 16-bit gray values and floats at 255.

    Raises:
        ValueError: floats beyond [0, 1], or integers of more than 16 bits.
    """
    is_16_bit_png = image.mode == "I" and image.format == "PNG"  # of an older Pillow
    if image.mode.startswith("I;16") or is_16_bit_png:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0.0 and values.max() <= 1.0):
            raise ValueError(
                f"its values are floats from {values.min():g} to {values.max():g}, "
                "should be from 0 to 1; or save it with 8 or 16 bits"
            )
        image = Image.fromarray(np.rint(values * 255.0).astype(np.uint8))
    elif image.mode == "I":
        raise ValueError("its values are 32-bit integers; save it with 8 or 16 bits")
    return image.convert("RGB")


def describe_decode_error(error: BaseException) -> str:
    """Why a file cannot be decoded, in a few words."""
    if isinstance(error, UnidentifiedImageError):  # its own text repeats the path
        return "cannot identify image file"
    return first_line(error)
