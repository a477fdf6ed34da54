"""A folder of images: what is read, what the cache may answer, what is refused."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from lrd import data, images
from lrd import recipe as recipes
from lrd.errors import UserError

RED, GREEN, BLUE, GRAY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)


def put(path: Path, colour: tuple[int, int, int] = RED, size: tuple[int, int] = (4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def read(folder: Path, size: int | None = None, skip_corrupt: bool = False):
    return images.read_folder(folder, size, skip_corrupt)


def colours(pixels: torch.Tensor) -> list[tuple[int, ...]]:
    """The colour of each image of one colour."""
    assert torch.equal(pixels, pixels[:, :, :1, :1].expand_as(pixels))
    return [tuple(pixel) for pixel in pixels[:, :, 0, 0].tolist()]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes, written in another order than that of their names."""
    train = tmp_path / "set" / "train"
    put(train / "dog" / "1.png", BLUE)
    put(train / "cat" / "b.png", GREEN)
    put(train / "cat" / "a.bmp", RED)
    return train


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the files that are decoded."""
    names: list[str] = []
    decode = images._decode

    def decode_and_note(path, size):
        names.append(path.name)
        return decode(path, size)

    monkeypatch.setattr(images, "_decode", decode_and_note)
    return names


def caches(below: Path) -> list[Path]:
    return sorted(path for path in below.rglob("*") if path.is_file() and path.suffix == ".cache")


def test_classes_and_files_come_in_the_order_of_names(folder):
    pixels, labels, classes = read(folder)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 3, 4, 4)
    assert colours(pixels) == [RED, GREEN, BLUE]
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 0, 1]
    assert classes == ("cat", "dog")


def test_a_photograph_keeps_its_rows_and_columns(tmp_path):
    picture = Image.new("RGB", (16, 16), GRAY)
    picture.paste(BLUE, (8, 0, 16, 8))
    (tmp_path / "one").mkdir()
    picture.save(tmp_path / "one" / "corner.JPG", quality=95, subsampling=0)
    pixels, _, _ = read(tmp_path)
    corner, rest = pixels[0, :, :8, 8:], pixels[0, :, 8:, :]
    assert (corner.float().mean((1, 2)) - torch.tensor(BLUE)).abs().max() < 8
    assert (rest.float().mean((1, 2)) - torch.tensor(GRAY)).abs().max() < 8


def test_what_is_no_image_or_hidden_is_left_alone(folder):
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "readme.md").write_text("no class")
    (folder / ".hidden").mkdir()
    assert len(read(folder)[0]) == 3


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
    image = Image.new("RGB", (8, 8), colour).quantize(4) if mode == "P" else Image.new(mode, (8, 8), colour)
    (tmp_path / "one").mkdir()
    image.save(tmp_path / "one" / f"x.{suffix}")
    with Image.open(tmp_path / "one" / f"x.{suffix}") as saved:
        assert saved.mode == mode
    (seen,) = colours(read(tmp_path)[0])
    assert max(abs(a - b) for a, b in zip(seen, expected, strict=True)) <= 2


@pytest.mark.parametrize(("size", "expected"), [(None, 6), (5, 5), (12, 12)])
def test_images_of_other_sizes_are_resized(tmp_path, size, expected):
    put(tmp_path / "one" / "a.png", RED, size=(9, 6))
    put(tmp_path / "one" / "b.png", BLUE, size=(3, 20))
    pixels, _, _ = read(tmp_path, size)
    assert pixels.shape == (2, 3, expected, expected)
    assert colours(pixels) == [RED, BLUE]


def test_the_second_read_comes_from_the_cache(folder, decoded):
    first = read(folder)
    assert sorted(decoded) == ["1.png", "a.bmp", "b.png"]
    second = read(folder)
    assert len(decoded) == 3
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]
    left = {path.name for path in (folder.parent / ".lrd-cache").iterdir()}
    assert left == {caches(folder.parent)[0].name, ".lrd-lock"}


def test_hosts_that_share_the_folder_decode_it_once(folder, decoded, monkeypatch):
    """Two threads stand for two hosts: each opens the lock's file for itself."""
    decode_all = images._decode_all

    def slowly(*arguments):
        time.sleep(0.3)
        return decode_all(*arguments)

    monkeypatch.setattr(images, "_decode_all", slowly)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: read(folder), range(2))
    assert sorted(decoded) == ["1.png", "a.bmp", "b.png"]
    assert torch.equal(one[0], other[0])


def test_another_size_is_another_cache(folder):
    assert [read(folder, size)[0].shape[-1] for size in (4, 6, 4)] == [4, 6, 4]


def change(folder: Path) -> None:
    put(folder / "cat" / "b.png", GRAY)


def repaint_in_the_same_size(folder: Path) -> None:
    path = folder / "cat" / "a.bmp"
    was = path.stat()
    put(path, GRAY)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns + 1000))
    assert path.stat().st_size == was.st_size


def add(folder: Path) -> None:
    put(folder / "cat" / "c.png", GRAY)


def rename(folder: Path) -> None:
    (folder / "cat" / "a.bmp").rename(folder / "dog" / "a.bmp")


def remove(folder: Path) -> None:
    (folder / "cat" / "a.bmp").unlink()


@pytest.mark.parametrize(
    ("act", "expected_colours", "expected_labels"),
    [
        (change, [RED, GRAY, BLUE], [0, 0, 1]),
        (repaint_in_the_same_size, [GRAY, GREEN, BLUE], [0, 0, 1]),
        (add, [RED, GREEN, GRAY, BLUE], [0, 0, 0, 1]),
        (rename, [GREEN, BLUE, RED], [0, 1, 1]),
        (remove, [GREEN, BLUE], [0, 1]),
    ],
)
def test_a_changed_folder_is_decoded_anew(folder, act, expected_colours, expected_labels):
    read(folder)
    act(folder)
    pixels, labels, _ = read(folder)
    assert colours(pixels) == expected_colours
    assert labels.tolist() == expected_labels


@pytest.mark.parametrize(
    "damaged",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:5],
        lambda whole: b"",
        lambda whole: b"not a cache" * 20,
        lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    ],
    ids=["last byte missing", "half", "five bytes", "empty", "other content", "one bit flipped"],
)
def test_a_damaged_cache_is_decoded_anew(folder, decoded, damaged):
    first = read(folder)
    (cache,) = caches(folder.parent)
    cache.write_bytes(damaged(cache.read_bytes()))
    second = read(folder)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert len(decoded) == 6


def test_a_cache_that_may_not_be_read_is_decoded_anew(folder, decoded, monkeypatch):
    def read_bytes(path):
        raise PermissionError(13, "Permission denied", str(path))

    first = read(folder)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert torch.equal(read(folder)[0], first[0])
    assert len(decoded) == 6


def test_a_cache_that_cannot_be_written_is_said_and_done_without(folder, monkeypatch, capsys):
    def replace(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    assert colours(read(folder)[0]) == [RED, GREEN, BLUE]
    assert "No space left on device" in capsys.readouterr().out
    assert [path.name for path in (folder.parent / ".lrd-cache").iterdir()] == [".lrd-lock"]


@pytest.fixture
def read_only(tmp_path, monkeypatch) -> Path:
    """No folder can be written to, but for the user's own cache, which is returned."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg"


def test_beside_a_read_only_folder_the_cache_is_the_users(folder, decoded, read_only):
    first = read(folder)
    assert not (folder.parent / ".lrd-cache").exists()
    assert len(caches(read_only / "lrd")) == 1
    assert torch.equal(read(folder)[0], first[0])
    assert len(decoded) == 3


def test_two_read_only_folders_share_no_cache(tmp_path, read_only):
    first = put(tmp_path / "first" / "train" / "one" / "x.bmp", RED)
    second = put(tmp_path / "second" / "train" / "one" / "x.bmp", BLUE)
    for path in (first, second):
        os.utime(path, (0, 0))
    assert first.stat().st_size == second.stat().st_size
    assert colours(read(tmp_path / "first" / "train")[0]) == [RED]
    assert colours(read(tmp_path / "second" / "train")[0]) == [BLUE]


def not_an_image(path: Path) -> None:
    path.write_text("not an image")


def half_of_an_image(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half_of_a_header(path: Path) -> None:
    path.write_bytes(b"P6\n4 ")


def nothing(path: Path) -> None:
    path.touch()


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


CORRUPT = [
    pytest.param("x.png", not_an_image, id="text"),
    pytest.param("x.jpg", half_of_an_image, id="truncated jpeg"),
    pytest.param("x.png", half_of_an_image, id="truncated png"),
    pytest.param("x.ppm", half_of_a_header, id="truncated ppm header"),
    pytest.param("x.png", nothing, id="empty"),
    pytest.param("x.png", dangling_link, id="dangling link"),
]


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("place", ["first", "later"])
@pytest.mark.parametrize(("name", "make"), CORRUPT)
def test_a_corrupt_image_is_named(folder, name, make, place, size):
    path = folder / "cat" / f"{'0' if place == 'first' else 'c'}{name}"
    make(path)
    with pytest.raises(UserError) as caught:
        read(folder, size)
    (line,) = str(caught.value).splitlines()
    assert str(path) in line
    assert "data.skip_corrupt" in line


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("place", ["first", "later"])
@pytest.mark.parametrize(("name", "make"), CORRUPT)
def test_a_corrupt_image_is_left_out_when_asked_for(folder, name, make, place, size, capsys):
    path = folder / "cat" / f"{'0' if place == 'first' else 'c'}{name}"
    make(path)
    pixels, labels, classes = read(folder, size, skip_corrupt=True)
    assert colours(pixels[:, :, :4, :4]) == [RED, GREEN, BLUE]
    assert labels.tolist() == [0, 0, 1]
    assert classes == ("cat", "dog")
    assert path.name in capsys.readouterr().out


def test_what_was_left_out_once_is_refused_when_no_longer_asked_for(folder):
    not_an_image(folder / "cat" / "c.png")
    read(folder, skip_corrupt=True)
    with pytest.raises(UserError, match=r"c\.png"):
        read(folder)


def test_nothing_but_corrupt_images_is_refused(folder):
    for path in folder.rglob("*.*"):
        not_an_image(path)
    with pytest.raises(UserError, match=r"^data\.root: "):
        read(folder, 4, skip_corrupt=True)


def imagefolder(root: Path) -> recipes.Data:
    return recipes.Data(dataset="imagefolder", root=str(root))


def test_a_data_set_is_a_train_and_a_test_folder(tmp_path):
    for i, (part, name) in enumerate([("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")]):
        put(tmp_path / part / name / "x.png", (i, i, i), size=(6, 6) if part == "train" else (9, 9))
    dataset = data.load(imagefolder(tmp_path), seed=0)
    assert colours(dataset.train.pixels) == [(0, 0, 0), (1, 1, 1)]
    assert colours(dataset.test.pixels) == [(2, 2, 2), (3, 3, 3)]
    assert dataset.test.pixels.shape == (2, 3, 6, 6)
    assert dataset.test.labels.tolist() == [0, 1]
    assert dataset.classes == ("a", "b")
    assert data.count_training_images(imagefolder(tmp_path)) == 2


@pytest.mark.parametrize(
    ("present", "empty", "said"),
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
def test_a_data_set_with_parts_missing_is_refused(tmp_path, present, empty, said):
    for name in present:
        put(tmp_path / name / "x.png")
    for name in empty:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        data.load(imagefolder(tmp_path), seed=0)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("data.root: ")
    assert said in line.replace(str(tmp_path), "")
