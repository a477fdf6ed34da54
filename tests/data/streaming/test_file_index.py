"""The list of a folder's files: its order, its cache, and the digest that hosts compare."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lrd import recipe as recipes
from lrd.data import image_folder
from lrd.data.datasets import load_dataset
from lrd.data.image_folder import list_folder
from lrd.data.streaming import file_index
from lrd.data.streaming.file_index import FileIndex, index_folder
from lrd.errors import UserError
from tests.helpers.image_files import save_image_folder

NAMES = {
    "dog": ["b.png", "a.JPG", "a.jpeg", "10.png", "9.png", "Ünï.png", "名.webp", "a b\nc.png"],
    "cat": [".hidden.png", "x.y.png", "z.tiff", "-.gif", "notes.txt", ".png", "noend", "a.png.bak"],
    "äpfel": ["1.bmp"],
}
NOT_UTF8 = [
    b"\xff.png",
    b"\xf0\x9f\x98\x80.png",
    b"\xee\x80\x80.png",
    b"a\xe4.jpg",
    b"\xc3\xa4.jpg",
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files of different sizes, which are no images: nothing reads them."""
    train = tmp_path / "set" / "train"
    for name, files in NAMES.items():
        (train / name).mkdir(parents=True)
        for number, file in enumerate(files):
            (train / name / file).write_bytes(bytes(number))
    return train


@pytest.fixture
def listed(monkeypatch) -> list[str]:
    """A list that grows by the name of each class folder whose files are listed."""
    names: list[str] = []
    image_files = file_index._image_files

    def record_and_list(class_folder):
        names.append(class_folder.name)
        return image_files(class_folder)

    monkeypatch.setattr(file_index, "_image_files", record_and_list)
    return names


def paths_of(index: FileIndex) -> list[tuple[Path, int]]:
    return [(index.path(i), int(index.labels[i])) for i in range(len(index))]


def cache_of(folder: Path) -> Path:
    (cache,) = (folder.parent / ".lrd-cache").glob("*.index")
    return cache


def test_the_order_is_that_of_images_in_memory(folder):
    files, classes = list_folder(folder)
    for _ in ("listed", "from the cache"):
        index = index_folder(folder)
        assert index.classes == classes == ("cat", "dog", "äpfel")
        assert paths_of(index) == files
    assert len(index) == 13


def test_names_that_are_not_utf8_are_listed_in_the_order_of_images_in_memory(folder):
    for name in NOT_UTF8:
        (folder / "dog" / os.fsdecode(name)).touch()
    files, _ = list_folder(folder)
    index = index_folder(folder)
    assert paths_of(index) == files
    assert {os.fsencode(path.name) for path, _ in files} >= set(NOT_UTF8)
    assert all(index.path(i).exists() for i in range(len(index)))


def test_a_second_start_lists_nothing(folder, listed):
    first = index_folder(folder)
    assert listed == ["cat", "dog", "äpfel"]
    second = index_folder(folder)
    assert listed == ["cat", "dog", "äpfel"]
    assert paths_of(second) == paths_of(first)
    assert second.digest == first.digest
    assert isinstance(second.names.base, np.memmap), "the processes of a host share it"


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "dog" / "new.png").touch(),
        lambda folder: (folder / "dog" / "b.png").unlink(),
        lambda folder: (folder / "dog" / "b.png").rename(folder / "dog" / "c.png"),
        lambda folder: (folder / "dog" / "b.png").rename(folder / "cat" / "b.png"),
        lambda folder: (folder / "dog").rename(folder / "wolf"),
        lambda folder: shutil.copytree(folder / "dog", folder / "wolf"),
        lambda folder: shutil.rmtree(folder / "dog"),
    ],
    ids=["added", "removed", "renamed", "moved", "class renamed", "class added", "class removed"],
)
def test_a_change_is_noticed(folder, change):
    before = index_folder(folder)
    change(folder)
    files, classes = list_folder(folder)
    after = index_folder(folder)
    assert after.classes == classes
    assert paths_of(after) == files
    assert after.digest != before.digest


def damage_each_file() -> list[tuple[str, str]]:
    files = ["index.json", "names.npy", "offsets.npy", "labels.npy"]
    return [(file, kind) for file in files for kind in ("flipped", "short", "empty", "missing")]


@pytest.mark.parametrize(("file", "kind"), damage_each_file())
def test_a_damaged_cache_is_made_anew(folder, listed, file, kind):
    good = index_folder(folder)
    path = cache_of(folder) / file
    content = path.read_bytes()
    path.unlink()
    if kind == "flipped":
        # In the middle of the digest of the files, or of the last number.
        position = content.index(b'"files"') + 20 if file == "index.json" else len(content) - 2
        flipped = bytes([content[position] ^ 1])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
    elif kind == "short":
        path.write_bytes(content[:-3])
    elif kind == "empty":
        path.touch()

    listed.clear()
    again = index_folder(folder)
    assert listed == ["cat", "dog", "äpfel"]
    assert paths_of(again) == paths_of(good)
    assert again.digest == good.digest
    index_folder(folder)
    assert len(listed) == 3, "the new cache is used"


@pytest.mark.parametrize(
    "content", ["null", "[]", "{}", "5", '{"digest": "0"}', "\ud800", "{" * 9999]
)
def test_a_cache_that_describes_nothing_is_made_anew(folder, listed, content):
    index_folder(folder)
    (cache_of(folder) / "index.json").write_bytes(content.encode(errors="surrogatepass"))
    assert len(index_folder(folder)) == 13
    assert len(listed) == 6


def test_a_list_that_cannot_be_kept_is_used_all_the_same(folder, capsys, monkeypatch):
    (folder.parent / ".lrd-cache").write_text("in the way")
    for _ in range(2):
        assert paths_of(index_folder(folder)) == list_folder(folder)[0]
    assert "the list of images could not be written" in capsys.readouterr().out


def test_a_read_only_folder_has_its_list_in_the_users_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder.os, "access", lambda path, mode: path != folder.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index_folder(folder)
    assert not (folder.parent / ".lrd-cache").exists()
    assert len(list((tmp_path / "cache" / "lrd").glob("train-*.index"))) == 1


# The digest


def test_the_digest_is_of_names_and_sizes_alone(folder, tmp_path):
    digest = index_folder(folder).digest
    copy = tmp_path / "elsewhere" / "other name"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    for path in (copy / "dog").iterdir():
        os.utime(path, (1, 1))
    assert index_folder(copy).digest == digest

    (copy / "dog" / "b.png").write_bytes(b"1")  # it was empty
    shutil.rmtree(copy.parent / ".lrd-cache")
    assert index_folder(copy).digest != digest


def test_digests_tell_file_names_and_classes_apart(tmp_path):
    """The same letters, cut differently."""
    digests = set()
    for number, files in enumerate((["a/ab.png"], ["aa/b.png"], ["a/b.png", "a/a.png"])):
        folder = tmp_path / f"{number}"
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        digests.add(index_folder(folder).digest)
    assert len(digests) == 3


def test_the_digest_of_the_contents_notices_a_change_of_the_same_size(folder):
    index = index_folder(folder)
    digest = index.content_digest()
    assert index.content_digest() == digest

    expected = hashlib.sha256()
    for path, _ in list_folder(folder)[0]:
        expected.update(os.fsencode(path.relative_to(folder)))
        expected.update(hashlib.sha256(path.read_bytes()).digest())
    assert digest == expected.hexdigest()

    path = folder / "dog" / "10.png"
    path.write_bytes(b"xyz")
    assert path.stat().st_size == 3, "as before"
    assert index_folder(folder).digest == index.digest
    assert index_folder(folder).content_digest() != digest


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["FIFO", "folder", "dangling link", "vanished"])
def test_contents_that_cannot_be_read_are_refused_in_one_line(folder, kind):
    path = folder / "dog" / "b.png"
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    else:
        path.touch()

    index = index_folder(folder)
    if kind == "vanished":
        path.unlink()
    with pytest.raises(UserError) as caught:
        index.content_digest()
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: cannot be read: ")


@pytest.mark.parametrize("fingerprint", ["names", "contents"])
def test_the_fingerprint_of_a_data_set_is_that_digest(tmp_path, fingerprint):
    root = save_image_folder(tmp_path / "set", num_train=9, num_test=3, size=8)
    section = recipes.Data(
        dataset="imagefolder", root=str(root), storage="files", fingerprint=fingerprint, workers=0
    )
    found = load_dataset(section, seed=0).fingerprint()
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".lrd-cache"))
    copied = section.model_copy(update={"root": str(copy)})
    assert load_dataset(copied, seed=0).fingerprint() == found

    path = copy / "test" / "a" / "0000.png"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    is_same = load_dataset(copied, seed=0).fingerprint() == found
    assert is_same == (fingerprint == "names")


# What is refused, and what it costs


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "notes.txt").touch()
    for folder, expected in (
        (tmp_path / "missing", "is not a folder"),
        (tmp_path / "empty", "no image in"),
        (tmp_path / "set", f"no image in {tmp_path / 'set' / 'cat'}"),
    ):
        with pytest.raises(UserError) as caught:
            index_folder(folder)
        (line,) = str(caught.value).splitlines()
        assert line.startswith("data.root: ")
        assert expected in line


def test_a_list_takes_few_bytes_of_memory_for_an_image(tmp_path, monkeypatch):
    """The arrays are a file that the processes of a host share; nothing else grows with it."""
    count = 10_000
    names = [f"n01440764_{number:08d}.JPEG" for number in range(count)]  # as long as ImageNet's
    monkeypatch.setattr(file_index, "_image_files", lambda folder: [(name, 1) for name in names])
    (tmp_path / "n01440764").mkdir()
    index_folder(tmp_path)

    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    index = index_folder(tmp_path)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == count
    assert after - before < 20_000  # bytes of the process itself

    num_bytes = sum(array.nbytes for array in (index.names, index.offsets, index.labels))
    assert num_bytes / count == pytest.approx(23 + 8 + 4, abs=0.1)


def test_an_index_may_be_sent_to_another_process(folder):
    index = index_folder(folder)
    copy = pickle.loads(pickle.dumps(index))
    assert paths_of(copy) == paths_of(index)
    assert json.dumps(copy.digest) == json.dumps(index.digest)
