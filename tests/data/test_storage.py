"""Where images are kept: what `auto` chooses, what is refused, and their mean and deviation."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lrd import recipe as recipes
from lrd.data import storage as storage_module
from lrd.data.datasets import count_training_images, load_dataset
from lrd.data.images import Images
from lrd.data.storage import PACK_FILE, PACK_FOLDER, choose_storage
from lrd.data.streaming import folders
from lrd.data.streaming.packed import PackedSource
from lrd.data.streaming.packing import pack_folder
from lrd.data.streaming.sources import FileSource
from lrd.data.streaming.streamed import StreamedImages
from lrd.errors import UserError
from tests.helpers.image_files import save_image_folder

NUM_IMAGES = 15
BYTES = NUM_IMAGES * 3 * 32 * 32  # of all images at 32 x 32 pixels


@pytest.fixture
def root(tmp_path) -> Path:
    """12 training images and 3 test images of 32 x 32 pixels."""
    return save_image_folder(tmp_path / "set", num_train=12, num_test=3)


@pytest.fixture
def memory(monkeypatch):
    """Set how much memory the host has, and how many ranks share it."""

    def set_memory(num_bytes: int, ranks: int = 1) -> None:
        monkeypatch.setattr(storage_module, "total_bytes", lambda: num_bytes)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))

    return set_memory


def section_of(root: Path, **values) -> recipes.Data:
    data = {"dataset": "imagefolder", "root": str(root), "workers": 0, **values}
    return recipes.parse({"data": data}, "r.yaml").data


def refusal(section: recipes.Data) -> str:
    """The one line with which a data set is refused."""
    with pytest.raises(UserError) as caught:
        load_dataset(section, seed=0)
    (line,) = str(caught.value).splitlines()
    return line


def pack(root: Path, size: int) -> None:
    pack_folder(root, root, size, skip_corrupt=False)


def pretend_pack(root: Path) -> None:
    for part in ("train", "test"):
        (root / PACK_FOLDER / part).mkdir(parents=True)
        (root / PACK_FOLDER / part / PACK_FILE).touch()


# What `auto` chooses


@pytest.mark.parametrize(
    ("num_bytes", "ranks", "expected"),
    [
        (2 * BYTES, 1, "memory"),
        (2 * BYTES - 2, 1, "files"),
        (4 * BYTES, 2, "memory"),
        (4 * BYTES - 2, 2, "files"),
        (2 * BYTES, 8, "files"),
    ],
)
def test_auto_goes_by_the_copies_of_all_ranks_of_the_host(
    root, memory, capsys, num_bytes, ranks, expected
):
    memory(num_bytes, ranks)
    assert choose_storage(section_of(root)) == expected
    noted = capsys.readouterr()
    assert ("data.storage: auto is files here" in noted.out + noted.err) == (expected == "files")

    pretend_pack(root)
    packed = {"memory": "memory", "files": "packed"}[expected]
    assert choose_storage(section_of(root)) == packed


def test_auto_goes_by_the_size_that_the_recipe_says(root, memory):
    memory(2 * BYTES)
    assert choose_storage(section_of(root, image_size=33)) == "files"
    memory(8 * BYTES)
    assert choose_storage(section_of(root, image_size=64)) == "memory"


def test_auto_finds_the_size_of_the_first_image_that_can_be_read(root, memory):
    memory(2 * BYTES)
    first = root / "train" / "a" / "0000.png"
    first.write_bytes(b"no image")
    assert choose_storage(section_of(root)) == "memory"
    Image.new("RGB", (7, 33)).save(first)
    assert choose_storage(section_of(root)) == "files"


def test_half_a_pack_is_none(root, memory):
    memory(1)
    pretend_pack(root)
    (root / PACK_FOLDER / "test" / PACK_FILE).unlink()
    assert choose_storage(section_of(root)) == "files"


@pytest.mark.parametrize("storage", ["memory", "files", "packed"])
def test_what_the_recipe_says_counts(root, memory, storage):
    memory(1)
    assert choose_storage(section_of(root, storage=storage)) == storage


@pytest.mark.parametrize(
    "values",
    [
        {"augment": "resized_crop", "image_size": 32},
        {"trivial_augment": True},
        {"random_erasing": 0.1},
    ],
)
def test_images_that_are_changed_one_by_one_are_not_in_memory(root, memory, values):
    memory(1 << 40)
    assert choose_storage(section_of(root, **values)) == "files"
    pretend_pack(root)
    assert choose_storage(section_of(root, **values)) == "packed"

    line = refusal(section_of(root, storage="memory", **values))
    assert line.startswith("data.storage: is 'memory'")
    assert next(iter(values.values())) == "resized_crop" or next(iter(values)) in line


@pytest.mark.parametrize("storage", ["auto", "memory", "files", "packed"])
def test_the_images_are_where_they_were_wanted(root, memory, storage):
    memory(1 << 40)
    pack(root, size=64)
    dataset = load_dataset(section_of(root, storage=storage), seed=0)
    expected = load_dataset(section_of(root, storage="memory"), seed=0).train
    train = dataset.train
    assert isinstance(train, Images) == (storage in ("auto", "memory"))
    if isinstance(train, StreamedImages):
        source = train.reader.source
        assert isinstance(source, {"files": FileSource, "packed": PackedSource}[storage])
    pixels, labels = next(train.read(0, 12, batch_size=12))
    assert torch.equal(pixels, expected.pixels)
    assert torch.equal(labels, expected.labels)
    assert count_training_images(section_of(root, storage=storage), seed=0) == 12


# What is refused


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"storage": "files"}, ["data.storage: is 'files'", "digits is in memory"]),
        ({"storage": "packed"}, ["data.storage: is 'packed'", "digits is in memory"]),
        ({"augment": "resized_crop", "image_size": 8}, ["data.augment: is 'resized_crop'"]),
        ({"trivial_augment": True}, ["data.trivial_augment: ", "digits"]),
        ({"random_erasing": 0.5}, ["data.random_erasing: ", "digits"]),
    ],
)
def test_images_in_memory_are_refused_what_they_cannot_have(values, expected):
    section = recipes.parse({"data": {"dataset": "digits", **values}}, "r.yaml").data
    line = refusal(section)
    for text in expected:
        assert text in line


@pytest.mark.parametrize("storage", ["auto", "files", "packed"])
def test_resized_crop_needs_a_size(root, storage):
    line = refusal(section_of(root, storage=storage, augment="resized_crop"))
    assert line.startswith("data.image_size: is missing")


@pytest.mark.parametrize("values", [{}, {"augment": "resized_crop", "image_size": 32}])
def test_packed_needs_a_pack(root, values):
    line = refusal(section_of(root, storage="packed", **values))
    assert line.startswith("data.storage: is 'packed', but")
    assert f"lrd data pack {root}" in line


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("change", ["added", "removed", "renamed", "longer"])
def test_a_pack_of_other_files_is_refused(root, part, change):
    pack(root, size=32)
    section = section_of(root, storage="packed", image_size=32)
    assert len(load_dataset(section, seed=0).train) == 12

    path = sorted((root / part / "b").iterdir())[0]
    if change == "added":
        shutil.copy(path, path.with_name("new.png"))
    elif change == "removed":
        shutil.copy(path, path.with_name("other.png"))
        path.unlink()
    elif change == "renamed":
        path.rename(path.with_name("other.png"))
    else:
        # The folder does not change; a host that lists its files anew notices it.
        path.write_bytes(path.read_bytes() + b"\0")
        shutil.rmtree(root / ".lrd-cache")

    line = refusal(section)
    assert str(root / part) in line
    assert f"pack them again: lrd data pack {root}" in line


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({"image_size": 24, "resize": 31}, 31),
        ({"image_size": 31}, 31),
        ({"image_size": 28, "augment": "resized_crop"}, 32),
    ],
)
def test_a_pack_that_is_too_small_is_refused(root, values, needed):
    pack(root, size=needed - 1)
    line = refusal(section_of(root, storage="packed", **values))
    assert line.startswith("data.storage: ")
    assert f"{needed} are needed: lrd data pack {root} --size {needed}" in line

    pack(root, size=needed)
    assert len(load_dataset(section_of(root, storage="packed", **values), seed=0).train) == 12


def test_the_size_of_packed_images_must_be_given_if_it_was_lost(root):
    pack(root, size=24)  # of 32
    line = refusal(section_of(root, storage="packed"))
    assert line.startswith("data.image_size: is missing")
    assert load_dataset(section_of(root, storage="packed", image_size=24), 0).train.image_shape == (
        3,
        24,
        24,
    )


def test_a_pack_alone_is_a_data_set(root, memory):
    """Hosts may have a copy of the pack and nothing else."""
    memory(1 << 40)
    pack(root, size=64)
    expected = load_dataset(section_of(root, storage="packed"), seed=0)
    for part in ("train", "test"):
        shutil.rmtree(root / part)

    for storage in ("auto", "packed"):
        section = section_of(root, storage=storage)
        dataset = load_dataset(section, seed=0)
        assert dataset.fingerprint() == expected.fingerprint()
        assert dataset.classes == ("a", "b", "c")
        assert count_training_images(section, seed=0) == 12


@pytest.mark.parametrize("storage", ["files", "packed"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: shutil.rmtree(root / "test"), "test"),
        (lambda root: shutil.rmtree(root / "test" / "b"), "only in one of them: b"),
        (lambda root: (root / "train" / "d").mkdir(), "only in one of them: d"),
        (lambda root: (root / "test").rename(root / "val"), "rename it to test"),
    ],
    ids=["no test", "no class", "other class", "val"],
)
def test_folders_that_are_no_data_set_are_refused(root, storage, change, expected):
    change(root)
    line = refusal(section_of(root, storage=storage))
    assert line.startswith("data.root: ")
    assert expected in line


def test_without_a_size_the_first_readable_image_decides(root):
    first = root / "train" / "a" / "0000.png"
    Image.new("RGB", (50, 20)).save(first)
    assert load_dataset(section_of(root, storage="files"), 0).train.image_shape == (3, 20, 20)

    first.write_bytes(b"no image")
    line = refusal(section_of(root, storage="files"))
    assert line.startswith(f"{first}: not a readable image (")
    section = section_of(root, storage="files", skip_corrupt=True)
    assert load_dataset(section, 0).train.image_shape == (3, 32, 32)


# Mean and standard deviation


def statistics_of(section: recipes.Data) -> tuple[Tensor, Tensor]:
    train = load_dataset(section, seed=0).train
    assert isinstance(train, StreamedImages)
    return train.mean.flatten(), train.std.flatten()


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """A list that grows by the number of images of each measurement."""
    counts: list[int] = []
    normalization = folders.normalization

    def record(section, pixels):
        counts.append(len(pixels))
        return normalization(section, pixels)

    monkeypatch.setattr(folders, "normalization", record)
    return counts


def test_mean_and_deviation_are_those_of_images_spread_over_the_part(root, monkeypatch, measured):
    monkeypatch.setattr(folders, "_IMAGES_FOR_STATISTICS", 5)
    mean, std = statistics_of(section_of(root, storage="files"))
    assert measured == [5]

    files = sorted((root / "train").glob("*/*.png"))
    chosen = [files[index] for index in (0, 2, 5, 8, 11)]
    pixels = np.stack([np.asarray(Image.open(path)) for path in chosen]).astype(float)
    assert mean.tolist() == pytest.approx(pixels.mean((0, 1, 2)).tolist(), rel=1e-6)
    assert std.tolist() == pytest.approx(pixels.std((0, 1, 2)).tolist(), rel=1e-6)


def test_mean_and_deviation_of_few_images_are_those_in_memory(root):
    in_memory = load_dataset(section_of(root, storage="memory"), seed=0).train
    pixels = in_memory.pixels.double()
    for storage in ("files", "packed"):
        pack(root, size=32)
        section = section_of(root, storage=storage, image_size=32)
        mean, std = statistics_of(section)
        assert mean.tolist() == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-6)
        deviation = pixels.std((0, 2, 3), correction=0)
        assert std.tolist() == pytest.approx(deviation.tolist(), rel=1e-6)


def test_mean_and_deviation_of_the_recipe_count(root, measured):
    both = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    mean, std = statistics_of(section_of(root, storage="files", **both))
    assert mean.tolist() == pytest.approx([25.5, 51.0, 76.5])
    assert std.tolist() == pytest.approx([102.0, 127.5, 153.0])
    assert measured == [1], "no image is read for them"

    own_mean, own_std = statistics_of(section_of(root, storage="files"))
    half_mean, half_std = statistics_of(section_of(root, storage="files", mean=both["mean"]))
    assert torch.equal(half_mean, mean)
    assert torch.equal(half_std, own_std)
    half_mean, half_std = statistics_of(section_of(root, storage="files", std=both["std"]))
    assert torch.equal(half_mean, own_mean)
    assert torch.equal(half_std, std)


def cache_of(root: Path) -> Path:
    (cache,) = (root / ".lrd-cache").glob("*.statistics")
    return cache


def test_a_second_start_measures_nothing(root, measured):
    first = statistics_of(section_of(root, storage="files"))
    second = statistics_of(section_of(root, storage="files"))
    assert measured == [12]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])

    statistics_of(section_of(root, storage="files", image_size=20))
    assert measured == [12, 12], "of other pixels"


@pytest.mark.parametrize("kind", ["empty", "short", "null", "flipped", "folder"])
def test_damaged_measurements_are_made_anew(root, measured, kind):
    good = statistics_of(section_of(root, storage="files"))
    cache = cache_of(root)
    content = cache.read_text()
    if kind == "flipped":
        position = content.index("mean") + 9  # a digit of the first mean
        flipped = chr(ord(content[position]) ^ 1)
        assert flipped.isdigit()
        cache.write_text(content[:position] + flipped + content[position + 1 :])
    elif kind == "folder":
        cache.unlink()
        cache.mkdir()
    else:
        cache.write_text({"empty": "", "short": content[:-5], "null": "null"}[kind])

    again = statistics_of(section_of(root, storage="files"))
    assert measured == [12, 12]
    assert torch.equal(again[0], good[0])
    assert torch.equal(again[1], good[1])
    assert not list(cache.parent.glob("*.tmp"))


def test_images_that_cannot_be_read_are_named_or_left_out(root, measured):
    path = root / "train" / "b" / "0001.png"
    path.write_bytes(path.read_bytes()[:200])
    values = {"storage": "files", "image_size": 32}
    line = refusal(section_of(root, **values))
    assert line.startswith(f"{path}: not a readable image (")
    assert "data.skip_corrupt=true" in line

    statistics_of(section_of(root, skip_corrupt=True, **values))
    assert measured == [11]
    for path in (root / "train").glob("*/*.png"):
        path.write_bytes(b"")
    shutil.rmtree(root / ".lrd-cache")
    assert "like 11 other images" in refusal(section_of(root, skip_corrupt=True, **values))
