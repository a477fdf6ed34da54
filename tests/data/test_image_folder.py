"""A folder of images: what is read, when the cache is used, what is refused."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lrd import recipe as recipes
from lrd.data import datasets, image_folder
from lrd.errors import UserError

RED = (255, 0, 0)
GREEN = (0, 255, 0)
BLUE = (0, 0, 255)
GRAY = (90, 90, 90)


def save_image(
    path: Path, colour: tuple[int, int, int] = RED, size: tuple[int, int] = (4, 4)
) -> Path:
    """Save an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def read(folder: Path, size: int | None = None, skip_corrupt: bool = False):
    return image_folder.read_folder(folder, size, skip_corrupt)


def colours(pixels: torch.Tensor) -> list[tuple[int, ...]]:
    """The colour of each image; each must have only one."""
    assert torch.equal(pixels, pixels[:, :, :1, :1].expand_as(pixels))
    return [tuple(pixel) for pixel in pixels[:, :, 0, 0].tolist()]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of two classes that were not written in the order of their names."""
    train = tmp_path / "set" / "train"
    save_image(train / "dog" / "1.png", BLUE)
    save_image(train / "cat" / "b.png", GREEN)
    save_image(train / "cat" / "a.bmp", RED)
    return train


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """A list that grows by the name of each file that is decoded."""
    names: list[str] = []
    decode = image_folder._decode

    def record_and_decode(path, size, resize):
        names.append(path.name)
        return decode(path, size, resize)

    monkeypatch.setattr(image_folder, "_decode", record_and_decode)
    return names


def find_caches(folder: Path) -> list[Path]:
    """The cache files at any depth in a folder."""
    return sorted(path for path in folder.rglob("*.cache") if path.is_file())


def test_classes_and_files_are_sorted_by_name(folder):
    pixels, labels, classes = read(folder)

    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 3, 4, 4)
    assert colours(pixels) == [RED, GREEN, BLUE]
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 0, 1]
    assert classes == ("cat", "dog")


def test_a_photograph_keeps_its_rows_and_columns(tmp_path):
    picture = Image.new("RGB", (16, 16), GRAY)
    picture.paste(BLUE, (8, 0, 16, 8))  # upper right
    (tmp_path / "cat").mkdir()
    picture.save(tmp_path / "cat" / "corner.JPG", quality=95, subsampling=0)

    pixels, _, _ = read(tmp_path)
    corner = pixels[0, :, :8, 8:]
    rest = pixels[0, :, 8:, :]
    assert (corner.float().mean((1, 2)) - torch.tensor(BLUE)).abs().max() < 8
    assert (rest.float().mean((1, 2)) - torch.tensor(GRAY)).abs().max() < 8


def test_other_files_and_hidden_folders_are_ignored(folder):
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "readme.md").write_text("no class")
    (folder / ".hidden").mkdir()

    pixels, _, _ = read(folder)
    assert len(pixels) == 3


@pytest.mark.parametrize(
    ("mode", "suffix", "colour", "expected"),
    [
        ("1", "png", 1, (255, 255, 255)),
        ("L", "png", 90, GRAY),
        ("L", "jpg", 90, GRAY),
        ("LA", "png", (90, 255), GRAY),
        ("I;16", "png", 90 * 257, GRAY),
        ("P", "png", RED, RED),
        ("P", "gif", BLUE, BLUE),
        ("RGBA", "png", (*GREEN, 255), GREEN),
        ("CMYK", "tif", (0, 255, 255, 0), RED),
        ("CMYK", "jpg", (0, 0, 0, 255 - 90), GRAY),
    ],
)
def test_images_of_every_kind_become_rgb(tmp_path, mode, suffix, colour, expected):
    if mode == "P":
        image = Image.new("RGB", (8, 8), colour).quantize(4)
    else:
        image = Image.new(mode, (8, 8), colour)
    path = tmp_path / "cat" / f"x.{suffix}"
    path.parent.mkdir()
    image.save(path)
    with Image.open(path) as saved:
        assert saved.mode == mode

    pixels, _, _ = read(tmp_path)
    (seen,) = colours(pixels)
    assert max(abs(a - b) for a, b in zip(seen, expected, strict=True)) <= 2


@pytest.mark.parametrize(("size", "expected"), [(None, 6), (5, 5), (12, 12)])
def test_images_of_other_sizes_are_resized(tmp_path, size, expected):
    save_image(tmp_path / "cat" / "a.png", RED, size=(9, 6))
    save_image(tmp_path / "cat" / "b.png", BLUE, size=(3, 20))
    pixels, _, _ = read(tmp_path, size)
    assert pixels.shape == (2, 3, expected, expected)
    assert colours(pixels) == [RED, BLUE]


def test_the_second_read_comes_from_the_cache(folder, decoded):
    pixels, labels, classes = read(folder)
    assert sorted(decoded) == ["1.png", "a.bmp", "b.png"]

    cached_pixels, cached_labels, cached_classes = read(folder)
    assert len(decoded) == 3
    assert torch.equal(cached_pixels, pixels)
    assert torch.equal(cached_labels, labels)
    assert cached_classes == classes

    (cache,) = find_caches(folder.parent)
    assert {path.name for path in cache.parent.iterdir()} == {cache.name, ".lrd-lock"}
    assert cache.parent == folder.parent / ".lrd-cache"


def test_hosts_that_share_the_folder_decode_it_once(folder, decoded, monkeypatch):
    """Two threads stand for two hosts, because each opens the lock file itself."""
    decode_all = image_folder._decode_all

    def decode_slowly(*arguments):
        time.sleep(0.3)
        return decode_all(*arguments)

    monkeypatch.setattr(image_folder, "_decode_all", decode_slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: read(folder), range(2))
    assert sorted(decoded) == ["1.png", "a.bmp", "b.png"]
    assert torch.equal(first[0], second[0])


def test_another_size_is_another_cache(folder):
    for size in (4, 6, 4):
        pixels, _, _ = read(folder, size)
        assert pixels.shape[-1] == size


def replace(folder: Path) -> None:
    save_image(folder / "cat" / "b.png", GRAY)


def replace_with_same_size(folder: Path) -> None:
    path = folder / "cat" / "a.bmp"
    before = path.stat()
    save_image(path, GRAY)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    assert path.stat().st_size == before.st_size


def add(folder: Path) -> None:
    save_image(folder / "cat" / "c.png", GRAY)


def rename(folder: Path) -> None:
    (folder / "cat" / "a.bmp").rename(folder / "dog" / "a.bmp")


def remove(folder: Path) -> None:
    (folder / "cat" / "a.bmp").unlink()


@pytest.mark.parametrize(
    ("change_folder", "expected_colours", "expected_labels"),
    [
        (replace, [RED, GRAY, BLUE], [0, 0, 1]),
        (replace_with_same_size, [GRAY, GREEN, BLUE], [0, 0, 1]),
        (add, [RED, GREEN, GRAY, BLUE], [0, 0, 0, 1]),
        (rename, [GREEN, BLUE, RED], [0, 1, 1]),
        (remove, [GREEN, BLUE], [0, 1]),
    ],
)
def test_a_changed_folder_is_decoded_again(
    folder, change_folder, expected_colours, expected_labels
):
    read(folder)
    change_folder(folder)

    pixels, labels, _ = read(folder)
    assert colours(pixels) == expected_colours
    assert labels.tolist() == expected_labels


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:5],
        lambda content: b"",
        lambda content: b"not a cache" * 20,
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    ],
    ids=["last byte missing", "half", "five bytes", "empty", "other content", "one bit flipped"],
)
def test_a_damaged_cache_is_not_used(folder, decoded, damage):
    pixels, labels, _ = read(folder)
    (cache,) = find_caches(folder.parent)
    cache.write_bytes(damage(cache.read_bytes()))

    new_pixels, new_labels, _ = read(folder)
    assert torch.equal(new_pixels, pixels)
    assert torch.equal(new_labels, labels)
    assert len(decoded) == 6


def test_a_cache_without_read_permission_is_not_used(folder, decoded, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    pixels, _, _ = read(folder)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    new_pixels, _, _ = read(folder)
    assert torch.equal(new_pixels, pixels)
    assert len(decoded) == 6


def test_a_cache_that_cannot_be_written_is_reported(folder, monkeypatch, capsys):
    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    pixels, _, _ = read(folder)
    assert colours(pixels) == [RED, GREEN, BLUE]
    assert "No space left on device" in capsys.readouterr().out
    assert [path.name for path in (folder.parent / ".lrd-cache").iterdir()] == [".lrd-lock"]


@pytest.fixture
def user_cache_only(tmp_path, monkeypatch) -> Path:
    """Make all folders look read-only, except for the user's cache folder, which is returned."""
    user_cache = tmp_path / "xdg"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(user_cache))
    return user_cache


def test_the_cache_of_a_read_only_folder_is_in_the_users_cache(folder, decoded, user_cache_only):
    pixels, _, _ = read(folder)
    assert not (folder.parent / ".lrd-cache").exists()
    assert len(find_caches(user_cache_only / "lrd")) == 1

    cached_pixels, _, _ = read(folder)
    assert torch.equal(cached_pixels, pixels)
    assert len(decoded) == 3


def test_two_read_only_folders_share_no_cache(tmp_path, user_cache_only):
    first = save_image(tmp_path / "first" / "train" / "cat" / "x.bmp", RED)
    second = save_image(tmp_path / "second" / "train" / "cat" / "x.bmp", BLUE)
    for path in (first, second):
        os.utime(path, (0, 0))
    assert first.stat().st_size == second.stat().st_size

    for name, colour in (("first", RED), ("second", BLUE)):
        pixels, _, _ = read(tmp_path / name / "train")
        assert colours(pixels) == [colour]


def not_an_image(path: Path) -> None:
    path.write_text("not an image")


def half_of_an_image(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half_of_a_header(path: Path) -> None:
    path.write_bytes(b"P6\n4 ")


def empty_file(path: Path) -> None:
    path.touch()


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


PREFIX = {"first": "0", "later": "c"}  # of a file's name, for its place in the class
CORRUPT = [
    pytest.param("x.png", not_an_image, id="text"),
    pytest.param("x.jpg", half_of_an_image, id="truncated jpeg"),
    pytest.param("x.png", half_of_an_image, id="truncated png"),
    pytest.param("x.ppm", half_of_a_header, id="truncated ppm header"),
    pytest.param("x.png", empty_file, id="empty"),
    pytest.param("x.png", dangling_link, id="dangling link"),
]


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("place", ["first", "later"])
@pytest.mark.parametrize(("name", "make_corrupt"), CORRUPT)
def test_a_corrupt_image_is_named(folder, name, make_corrupt, place, size):
    path = folder / "cat" / f"{PREFIX[place]}{name}"
    make_corrupt(path)
    with pytest.raises(UserError) as caught:
        read(folder, size)

    (line,) = str(caught.value).splitlines()
    assert str(path) in line
    assert "data.skip_corrupt" in line


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("place", ["first", "later"])
@pytest.mark.parametrize(("name", "make_corrupt"), CORRUPT)
def test_a_corrupt_image_is_left_out_with_skip_corrupt(
    folder, name, make_corrupt, place, size, capsys
):
    path = folder / "cat" / f"{PREFIX[place]}{name}"
    make_corrupt(path)

    pixels, labels, classes = read(folder, size, skip_corrupt=True)
    assert colours(pixels[:, :, :4, :4]) == [RED, GREEN, BLUE]
    assert labels.tolist() == [0, 0, 1]
    assert classes == ("cat", "dog")
    assert path.name in capsys.readouterr().out


def test_a_cache_with_skip_corrupt_is_not_used_without_it(folder):
    not_an_image(folder / "cat" / "c.png")
    read(folder, skip_corrupt=True)

    with pytest.raises(UserError, match=r"c\.png"):
        read(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["FIFO", "folder"])
@pytest.mark.parametrize("place", ["first", "later"])
def test_what_is_no_file_is_named_and_not_opened(folder, make, place):
    path = folder / "cat" / f"{PREFIX[place]}x.png"
    make(path)
    with pytest.raises(UserError, match=rf"{path.name}: .*is not a file"):
        read(folder)


def test_a_class_whose_name_is_not_utf8_is_refused(folder):
    os.mkdir(os.fsencode(folder) + b"/\xff\xfe")
    with pytest.raises(UserError, match=r"^data\.root: .*\\xff\\xfe.*not UTF-8"):
        read(folder)


def test_a_file_whose_name_is_not_utf8_is_read_and_cached(folder, decoded):
    os.rename(folder / "cat" / "a.bmp", os.fsencode(folder) + b"/cat/\xff.bmp")
    first, _, _ = read(folder)
    second, _, _ = read(folder)
    assert torch.equal(first, second)
    assert len(decoded) == 3


def test_a_class_that_is_a_link_to_nothing_is_refused(folder):
    (folder / "cow").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"^data\.root: .*cow is a link to something"):
        read(folder)


# The eight ways in which a camera can be held, as transpositions of the upright image.
_HELD = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", _HELD)
def test_an_image_is_turned_upright(tmp_path, orientation):
    upright = Image.effect_noise((6, 4), 80).convert("RGB")
    held = upright
    if _HELD[orientation] is not None:
        held = upright.transpose(_HELD[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "train" / "cat").mkdir(parents=True)
    held.save(tmp_path / "train" / "cat" / "a.png", exif=exif)

    pixels, _, _ = read(tmp_path / "train")

    # The default size is the height of the upright image.
    expected = upright.crop((1, 0, 5, 4))
    assert torch.equal(pixels[0], torch.tensor(np.asarray(expected)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0, 0.25], [0, 128, 255, 64]), ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0])],
)
def test_floats_from_0_to_1_are_scaled(tmp_path, values, expected):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    image = Image.fromarray(np.array(values, dtype=np.float32).reshape(2, 2))
    image.save(tmp_path / "train" / "cat" / "a.tiff")
    pixels, _, _ = read(tmp_path / "train")
    assert pixels[0].tolist() == 3 * [[expected[:2], expected[2:]]]


@pytest.mark.parametrize("values", [[0.0, 255.0], [-0.1, 1.0], [np.nan, 0.5], [np.inf, 0.0]])
def test_floats_of_another_range_are_refused(tmp_path, values):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    image = Image.fromarray(np.array([values], dtype=np.float32))
    image.save(tmp_path / "train" / "cat" / "a.tiff")
    with pytest.raises(UserError, match=r"a\.tiff: .*its values are floats from .* from 0 to 1"):
        read(tmp_path / "train")


def test_integers_of_32_bits_are_refused(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    image = Image.fromarray(np.full((2, 2), 1 << 20, dtype=np.int32))
    image.save(tmp_path / "train" / "cat" / "a.tiff")
    with pytest.raises(UserError, match=r"a\.tiff: .*32-bit integers"):
        read(tmp_path / "train")


def test_what_is_odd_about_images_is_counted(folder, capsys):
    save_image(folder / "cat" / "wide.png", size=(8, 2))
    save_image(folder / "dog" / "high.png", size=(2, 8))
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    frames[0].save(folder / "dog" / "moving.gif", save_all=True, append_images=frames[1:])
    read(folder, 4)
    output = capsys.readouterr().out
    assert f"{folder}: 2 of 6 images are not square; their centre is taken" in output
    assert f"{folder}: 1 of 6 images have several frames; the first one is taken" in output


def test_images_that_need_too_much_memory_are_refused_before_they_are_decoded(folder, decoded):
    with pytest.raises(UserError, match=r"^data\.image_size: is 10000000: 3 images of"):
        read(folder, 10_000_000)
    assert decoded == []


def test_a_folder_without_a_readable_image_is_refused(folder):
    for path in folder.rglob("*.*"):
        not_an_image(path)
    with pytest.raises(UserError, match=r"^data\.root: "):
        read(folder, 4, skip_corrupt=True)


def imagefolder_section(root: Path) -> recipes.Data:
    return recipes.Data(dataset="imagefolder", root=str(root))


def test_a_file_in_the_way_of_the_cache_is_reported(folder, capsys):
    (folder.parent / ".lrd-cache").write_text("no folder")
    assert len(read(folder)[0]) == 3
    assert "the cache of decoded images could not be written" in capsys.readouterr().out


def test_a_data_set_is_a_train_and_a_test_folder(tmp_path):
    save_image(tmp_path / "train" / "a" / "x.png", (0, 0, 0), size=(6, 6))
    save_image(tmp_path / "train" / "b" / "x.png", (1, 1, 1), size=(6, 6))
    save_image(tmp_path / "test" / "a" / "x.png", (2, 2, 2), size=(9, 9))
    save_image(tmp_path / "test" / "b" / "x.png", (3, 3, 3), size=(9, 9))

    dataset = datasets.load_dataset(imagefolder_section(tmp_path), seed=0)
    assert colours(dataset.train.pixels) == [(0, 0, 0), (1, 1, 1)]
    assert colours(dataset.test.pixels) == [(2, 2, 2), (3, 3, 3)]
    assert dataset.test.pixels.shape == (2, 3, 6, 6)
    assert dataset.test.labels.tolist() == [0, 1]
    assert dataset.classes == ("a", "b")
    assert datasets.count_training_images(imagefolder_section(tmp_path), seed=0) == 2


@pytest.mark.parametrize(
    ("classes_with_image", "empty_folders", "expected"),
    [
        ([], [], "train"),
        (["train/a", "train/b"], [], "test"),
        (["test/a", "test/b"], [], "train"),
        (["train/a", "train/b", "test/a"], [], "b"),
        (["train/a", "test/a", "test/b"], [], "b"),
        (["train/a", "test/a"], ["train/b", "test/b"], "train/b"),
        (["train/a", "train/b", "test/a"], ["test/b"], "test/b"),
        ([], ["train", "test"], "train"),
    ],
)
def test_a_data_set_with_missing_parts_is_refused(
    tmp_path, classes_with_image, empty_folders, expected
):
    for name in classes_with_image:
        save_image(tmp_path / name / "x.png")
    for name in empty_folders:
        (tmp_path / name).mkdir(parents=True)

    with pytest.raises(UserError) as caught:
        datasets.load_dataset(imagefolder_section(tmp_path), seed=0)

    (line,) = str(caught.value).splitlines()
    assert line.startswith("data.root: ")
    assert expected in line.replace(str(tmp_path), "")
