"""One image file: the same pixels with and without simplejpeg, and as torchvision makes them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from lrd.data import decoding
from lrd.data.decoding import (
    Region,
    UnreadableImageError,
    read_centre,
    read_region,
    read_shrunk,
    to_rgb,
    upright,
)

SIMPLEJPEG = decoding.simplejpeg
WAYS = ["simplejpeg", "pillow"]
SIZES = [(1, 1), (2, 3), (7, 9), (8, 8), (15, 17), (33, 64), (100, 37)]
ORIENTATION = ExifTags.Base.Orientation


@pytest.fixture(autouse=True)
def simplejpeg_comes_back() -> Iterator[None]:
    yield
    decoding.simplejpeg = SIMPLEJPEG


@pytest.fixture(params=WAYS)
def way(request) -> str:
    """Decode JPEGs in one way and in the other."""
    use(request.param)
    return request.param


def use(name: str) -> None:
    if name == "simplejpeg" and SIMPLEJPEG is None:
        pytest.skip("simplejpeg is not installed")
    decoding.simplejpeg = SIMPLEJPEG if name == "simplejpeg" else None


def in_both_ways(read: Callable[[], Tensor]) -> tuple[Tensor | str, Tensor | str]:
    """What reading returns, or why it fails, with simplejpeg and by Pillow alone."""
    results = []
    for name in WAYS:
        use(name)
        try:
            results.append(read())
        except UnreadableImageError as error:
            results.append(str(error))
    return results[0], results[1]


def is_same(first: Tensor | str, second: Tensor | str) -> bool:
    if isinstance(first, str) or isinstance(second, str):
        return first == second
    return first.shape == second.shape and torch.equal(first, second)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Soft shapes and noise, different in each channel and corner."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (-(-height // 5) + 1, -(-width // 5) + 1, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((soft + noise).clip(0, 255).astype(np.uint8))


def whole(height: int, width: int) -> Region:
    return Region(0, 0, height, width)


def pixels_of(image: Image.Image) -> Tensor:
    """uint8 (3, H, W), as torchvision's `pil_to_tensor` of the converted image."""
    return v2.functional.pil_to_tensor(image.convert("RGB"))


# The same bytes in both ways

JPEG_KINDS = [
    *[pytest.param("RGB", {"subsampling": s}, id=f"subsampling {s}") for s in (0, 1, 2)],
    pytest.param("RGB", {"subsampling": 2, "progressive": True}, id="progressive"),
    pytest.param("RGB", {"restart_marker_blocks": 3}, id="restart markers"),
    pytest.param("RGB", {"keep_rgb": True}, id="RGB inside"),
    pytest.param("L", {}, id="gray"),
    pytest.param("L", {"progressive": True}, id="gray progressive"),
    pytest.param("CMYK", {}, id="CMYK"),
]


@pytest.mark.skipif(SIMPLEJPEG is None, reason="simplejpeg is not installed")
@pytest.mark.parametrize(("mode", "options"), JPEG_KINDS)
def test_simplejpeg_and_pillow_give_the_same_bytes(tmp_path, mode, options):
    path = tmp_path / "a.jpg"
    for (height, width), quality in product(SIZES, (30, 75, 95)):
        picture(height, width).convert(mode).save(path, quality=quality, **options)

        expected = pixels_of(Image.open(path))
        for scale in (1, 2, 4, 8):
            size = min(height, width) // scale
            if size == 0:
                continue
            pair = in_both_ways(lambda size=size: read_region(path, whole, size))
            assert is_same(*pair), (height, width, quality, scale)
            if scale == 1:
                assert is_same(pair[0], expected)
            elif mode != "CMYK":
                assert pair[0].shape == (3, -(-height // scale), -(-width // scale))

        assert is_same(*in_both_ways(lambda: read_centre(path, 16)))
        assert is_same(*in_both_ways(lambda: torch.from_numpy(np.array(read_shrunk(path, 16)))))


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("kind", ["baseline", "progressive", "gray", "EXIF"])
def test_a_reduced_image_is_the_whole_one_reduced(tmp_path, way, scale, kind):
    image = picture(64, 96).convert("L" if kind == "gray" else "RGB")
    options = {"exif": exif_of(1)} if kind == "EXIF" else {}
    is_progressive = kind == "progressive"
    image.save(tmp_path / "a.jpg", quality=95, subsampling=0, progressive=is_progressive, **options)

    pixels = read_region(tmp_path / "a.jpg", whole, 64 // scale)
    full = pixels_of(Image.open(tmp_path / "a.jpg")).double()
    means = torch.nn.functional.avg_pool2d(full, scale)
    assert pixels.shape == means.shape
    assert (pixels - means).abs().mean() < 1.0


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_a_region_is_cut_out_of_the_reduced_image(tmp_path, way, scale):
    path = tmp_path / "a.jpg"
    picture(101, 203).save(path, quality=90)
    reduced = read_region(path, whole, 101 // scale)

    rng = random.Random(scale)
    for _ in range(50):
        size = rng.randint(1, 101 // scale)
        # The largest side that is not yet reduced further.
        side = rng.randint(scale * size, min(101, 2 * scale * size - 1 if scale < 8 else 101))
        longer = rng.randint(side, 203)
        top = rng.randint(0, 101 - side)
        left = rng.randint(0, 203 - longer)
        region = Region(top, left, side, longer)
        pixels = read_region(path, lambda height, width, region=region: region, size)

        bottom = -(-(top + side) // scale)
        right = -(-(left + longer) // scale)
        assert torch.equal(pixels, reduced[:, top // scale : bottom, left // scale : right])
        assert min(pixels.shape[1:]) >= size


def test_the_whole_region_is_asked_for_in_the_upright_image(tmp_path, way):
    picture(30, 50).save(tmp_path / "a.jpg", exif=exif_of(6))
    asked = []

    def choose(height: int, width: int) -> Region:
        asked.append((height, width))
        return Region(5, 2, 20, 10)

    pixels = read_region(tmp_path / "a.jpg", choose, size=4)
    image = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    assert asked == [(50, 30)]
    assert torch.equal(pixels, pixels_of(image)[:, 5:25, 2:12])


# Damaged files: simplejpeg fills up with gray where nobody stops it


def damage(good: bytes, rng: random.Random) -> bytes:
    """Flip some bits, or take bytes out, or put some in."""
    content = bytearray(good)
    for _ in range(rng.choice((1, 1, 2, 5))):
        position = rng.randrange(len(content))
        kind = rng.randrange(4)
        if kind == 0:
            del content[position : position + rng.randint(1, 8)]
        elif kind == 1:
            content[position:position] = rng.randbytes(rng.randint(1, 4))
        else:
            content[position] ^= 1 << rng.randrange(8)
    return bytes(content)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_refused_in_both_ways(tmp_path, way, mode, progressive):
    image = picture(64, 96).convert(mode)
    path = tmp_path / "a.jpg"
    image.save(path, quality=80, progressive=progressive)
    good = path.read_bytes()

    for part in (0.02, 0.2, 0.5, 0.9, 0.98):
        path.write_bytes(good[: int(part * len(good))])
        for read in (
            lambda: read_centre(path, 20),
            lambda: read_shrunk(path, 20),
            lambda: read_region(path, whole, 64),
            lambda: read_region(path, whole, 32),
            lambda: read_region(path, whole, 8),
        ):
            with pytest.raises(UnreadableImageError) as caught:
                read()
            (line,) = str(caught.value).splitlines()
            assert str(path) not in line


@pytest.mark.skipif(SIMPLEJPEG is None, reason="simplejpeg is not installed")
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_damaged_jpeg_has_the_same_fate_in_both_ways(tmp_path, mode, progressive):
    """Refused for the same reason, or decoded to the same bytes: hosts may differ in simplejpeg."""
    path = tmp_path / "a.jpg"
    picture(40, 57).convert(mode).save(path, quality=80, progressive=progressive)
    good = path.read_bytes()

    rng = random.Random(0)
    fates = set()
    for _ in range(50):
        path.write_bytes(damage(good, rng))
        for read in (
            lambda: read_centre(path, 20),
            lambda: read_region(path, whole, 20),
            lambda: read_region(path, whole, 5),
        ):
            pair = in_both_ways(read)
            assert is_same(*pair), pair
            fates.add(isinstance(pair[0], str))
    assert fates == {False, True}


@pytest.mark.skipif(SIMPLEJPEG is None, reason="simplejpeg is not installed")
def test_a_region_is_drawn_once_though_simplejpeg_gives_up(tmp_path):
    """A second draw would take another crop than on a host without simplejpeg."""
    path = tmp_path / "a.jpg"
    picture(64, 64).save(path, quality=80)
    content = bytearray(path.read_bytes())
    content[-2:-2] = b"\x00\x00\x00"  # between the image and its end: a warning of libjpeg
    path.write_bytes(content)
    with pytest.raises(ValueError, match="extraneous"):
        SIMPLEJPEG.decode_jpeg(bytes(content))

    drawn = []

    def choose(height: int, width: int) -> Region:
        drawn.append((height, width))
        return Region(1, 2, 60, 50)

    for size in (50, 25, 8):
        assert is_same(*in_both_ways(lambda size=size: read_region(path, choose, size)))
    assert len(drawn) == 6


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif"])
@pytest.mark.parametrize(
    "content",
    [b"", b"text\n", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\x00\x10JFIF", b"\x89PNG\r\n\x1a\n"],
)
def test_what_is_no_image_is_refused(tmp_path, way, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    for read in READS:
        with pytest.raises(UnreadableImageError):
            read(path)


READS = [
    lambda path: read_centre(path, 8),
    lambda path: read_shrunk(path, 8),
    lambda path: read_region(path, whole, 8),
]


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, way):
    folder = tmp_path / "folder.jpg"
    folder.mkdir()
    fifo = tmp_path / "fifo.jpg"
    os.mkfifo(fifo)
    link = tmp_path / "link.jpg"
    link.symlink_to(fifo)
    for path, read in product((folder, fifo, link), READS):
        with pytest.raises(UnreadableImageError, match=r"^is not a file$"):
            read(path)

    dangling = tmp_path / "dangling.jpg"
    dangling.symlink_to(tmp_path / "nothing.jpg")
    for path, read in product((dangling, tmp_path / "missing.jpg"), READS):
        with pytest.raises(UnreadableImageError, match=r"^No such file or directory$"):
            read(path)


def test_an_image_of_too_many_pixels_is_refused(tmp_path, way, monkeypatch):
    """A damaged header could ask for more memory than there is."""
    picture(64, 64).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    for read in READS:
        with pytest.raises(UnreadableImageError, match="decompression bomb"):
            read(tmp_path / "a.jpg")


def test_a_lack_of_memory_is_no_fault_of_the_file(tmp_path, way, monkeypatch):
    """`skip_corrupt` would otherwise take another image in its place, on this rank alone."""
    picture(16, 16).save(tmp_path / "a.jpg")

    def fail(*arguments, **keywords):
        raise MemoryError

    monkeypatch.setattr(decoding, "read_file", fail)
    for read in READS:
        with pytest.raises(MemoryError):
            read(tmp_path / "a.jpg")


# Modes and orientations


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_the_camera_was_held(tmp_path, way, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    picture(32, 48).save(path, exif=exif_of(orientation), **options)

    is_lossy = suffix == "jpg"
    stored = pixels_of(Image.open(path) if is_lossy else picture(32, 48))  # uint8 (3, H, W)
    expected = {
        1: stored,
        2: stored.flip(2),
        3: stored.flip(1, 2),
        4: stored.flip(1),
        5: stored.transpose(1, 2),
        6: stored.transpose(1, 2).flip(2),
        7: stored.transpose(1, 2).flip(1, 2),
        8: stored.transpose(1, 2).flip(1),
    }[orientation]
    assert torch.equal(read_region(path, whole, 32), expected)
    assert torch.equal(read_centre(path, 32), centre_by_torchvision(path, 32, 32))


@pytest.mark.parametrize("gap", [0, 5])
def test_exif_data_behind_other_data_are_found(tmp_path, way, gap):
    """A large colour profile may stand before them."""
    picture(24, 40).save(tmp_path / "plain.jpg", exif=exif_of(6))
    content = (tmp_path / "plain.jpg").read_bytes()
    segment = b"\xff\xe2" + (60_002).to_bytes(2) + b"ICC_PROFILE\x00" + bytes(59_988)
    path = tmp_path / "a.jpg"
    path.write_bytes(content[:2] + gap * segment + content[2:])
    assert read_region(path, whole, 24).shape == (3, 40, 24)


def test_an_orientation_in_xmp_data_counts_too(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    path = tmp_path / "a.jpg"
    picture(24, 40).save(path, xmp=xmp)
    pair = in_both_ways(lambda: read_region(path, whole, 24))
    assert is_same(*pair)
    assert pair[0].shape == (3, 40, 24)


def test_a_file_of_several_photographs_gives_the_first(tmp_path):
    path = tmp_path / "a.jpg"
    photographs = [picture(64, 96, seed) for seed in (0, 1)]
    photographs[0].save(path, format="MPO", save_all=True, append_images=photographs[1:])
    with Image.open(path) as image:
        assert image.format == "MPO"
    for size in (64, 32, 16, 8):
        pair = in_both_ways(lambda size=size: read_region(path, whole, size))
        assert is_same(*pair)
        assert pair[0].shape == (3, size, size * 96 // 64)


def test_damaged_exif_data_leave_an_image_as_it_is(tmp_path, way):
    path = tmp_path / "a.jpg"
    picture(24, 40).save(path, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff damaged")
    for size in (24, 12):
        assert read_region(path, whole, size).shape == (3, size, size * 40 // 24)


def test_a_16_bit_png_keeps_its_upper_bits(tmp_path, way):
    values = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) * 68
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = read_region(tmp_path / "a.png", whole, 24)
    assert np.array_equal(pixels.numpy(), np.broadcast_to(values >> 8, (3, 24, 40)))


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1", "CMYK"])
@pytest.mark.parametrize("suffix", ["png", "gif", "webp", "tiff"])
def test_every_mode_becomes_rgb_as_pillow_converts_it(tmp_path, way, mode, suffix):
    image = picture(24, 40)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize((40, 24)))
    path = tmp_path / f"a.{suffix}"
    try:
        image.convert(mode).save(path)
    except (OSError, ValueError):
        pytest.skip(f"{suffix} has no mode {mode}")
    assert torch.equal(read_region(path, whole, 24), pixels_of(Image.open(path)))
    assert torch.equal(read_centre(path, 24), centre_by_torchvision(path, 24, 24))


def test_a_transparent_colour_of_a_palette_keeps_its_colour(tmp_path, way):
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=1)
    assert read_centre(tmp_path / "a.png", 6)[:, 0, 0].tolist() == [10, 20, 30]


# Evaluation as torchvision's users know it


def centre_by_torchvision(path: Path, size: int, resize: int) -> Tensor:
    with Image.open(path) as image:
        rgb = to_rgb(ImageOps.exif_transpose(image))
    transform = v2.Compose([v2.Resize(resize), v2.CenterCrop(size)])
    return v2.functional.pil_to_tensor(transform(rgb))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_evaluation_is_torchvisions_resize_and_centre_crop(tmp_path, way, suffix):
    path = tmp_path / f"a.{suffix}"
    shapes = [(48, 48), (50, 67), (67, 50), (33, 201), (201, 33), (20, 31), (31, 20), (9, 9)]
    for (height, width), (size, resize) in product(shapes, [(32, 32), (32, 35), (31, 36), (5, 5)]):
        picture(height, width).save(path)
        expected = centre_by_torchvision(path, size, resize)
        assert torch.equal(read_centre(path, size, resize), expected), (height, width, size)
        if size == resize:
            assert torch.equal(read_centre(path, size), expected)


def test_an_image_of_the_right_size_is_taken_as_it_is(tmp_path, way):
    picture(32, 32).save(tmp_path / "a.jpg")
    assert torch.equal(
        read_centre(tmp_path / "a.jpg", 32), pixels_of(Image.open(tmp_path / "a.jpg"))
    )


@pytest.mark.parametrize("shape", [(50, 67), (67, 50), (20, 31), (32, 90)])
def test_a_shrunk_image_is_torchvisions_resize(tmp_path, way, shape):
    picture(*shape).save(tmp_path / "a.jpg")
    image = Image.open(tmp_path / "a.jpg")
    expected = v2.functional.pil_to_tensor(v2.Resize(32)(image) if min(shape) > 32 else image)
    shrunk = read_shrunk(tmp_path / "a.jpg", 32)
    assert np.array_equal(shrunk.transpose(2, 0, 1), expected.numpy())


def test_what_pillow_refuses_is_not_passed_on_half_decoded(tmp_path):
    """Pillow says only once that a part is missing; whoever asks again gets what there is."""
    path = tmp_path / "a.jpg"
    picture(40, 57).convert("L").save(path, quality=80, progressive=True)
    good = path.read_bytes()

    rng = random.Random(3)
    num_refused = 0
    for _ in range(200):
        path.write_bytes(damage(good, rng))
        try:
            Image.open(path).convert("RGB")
        except UnidentifiedImageError:
            continue
        except OSError:
            num_refused += 1
            with Image.open(path) as image, pytest.raises(OSError, match=r"data stream|truncated"):
                upright(image)
    assert num_refused > 5
