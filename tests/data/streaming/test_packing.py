"""Packed images: the pixels of the files, kills, faults of files and disks, the command."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from typer.testing import CliRunner

from lrd import console
from lrd.cli.app import app
from lrd.data.decoding import Region, read_centre, read_region
from lrd.data.folder_lock import one_process_at_a_time
from lrd.data.streaming import packed, packing
from lrd.data.streaming.file_index import index_folder
from lrd.data.streaming.packed import PackedSource, open_pack, verify_pack
from lrd.errors import UserError
from tests.helpers.processes import in_child

SIZE = 32
EXIF_ORIENTATION = 0x0112
# A shard for two or three images of the `folder` below, four shards in all.
SHARD_BYTES = 10_000


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Image.Image:
    values = np.random.default_rng([seed, height, width]).integers(
        0, 256, (height, width, channels), dtype=np.uint8
    )
    return Image.fromarray(values[:, :, 0] if channels == 1 else values)


def save_kinds(folder: Path) -> None:
    """Save an image of each kind that is decoded in its own way."""
    folder.mkdir(parents=True)
    turned = Image.Exif()
    turned[EXIF_ORIENTATION] = 6  # a quarter turn

    noise(48, 70).save(folder / "a_wide.jpg")
    noise(90, 33).save(folder / "b_tall.jpg")
    noise(50, 75).save(folder / "c_turned.jpg", exif=turned)
    noise(41, 60, channels=1).save(folder / "d_gray.png")
    noise(60, 40, channels=4).save(folder / "e_alpha.png")
    noise(20, 27).save(folder / "f_smaller.png")
    noise(SIZE, SIZE).save(folder / "g_equal.png")
    noise(20, 50).save(folder / "h_smaller_on_one_side.jpg")
    noise(97, 101).quantize(16).save(folder / "i_palette.png")
    noise(64, 64).convert("CMYK").save(folder / "j_cmyk.jpg")


@pytest.fixture
def kinds(tmp_path) -> Path:
    """A data set that has an image of each kind as `train/cat`."""
    root = tmp_path / "kinds"
    save_kinds(root / "train" / "cat")
    for name in ("train/dog", "test/cat", "test/dog"):
        (root / name).mkdir(parents=True)
        noise(40, 40).save(root / name / "1.png")
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A data set with eight training images, which four shards have room for."""
    root = tmp_path / "set"
    for part, count in (("train", 4), ("test", 1)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                noise(34 + i, 50, seed=i).save(root / part / name / f"{i}.jpg")
    monkeypatch.setattr(packing, "SHARD_BYTES", SHARD_BYTES)
    return root


def pack(root: Path, size: int = SIZE, skip_corrupt: bool = False, out: Path | None = None) -> None:
    packing.pack_folder(root, out or root, size, skip_corrupt)


def open_part(root: Path, part: str = "train") -> PackedSource:
    source = open_pack(root, part)
    assert source is not None
    return source


def read_files(root: Path) -> dict[str, bytes]:
    """The content of each file of a pack, but for its lock."""
    folder = root / ".lrd-pack"
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lrd-lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def reference(path: Path) -> Image.Image:
    """What the pack should contain of a file, by Pillow alone."""
    with Image.open(path) as image:
        rgb = ImageOps.exif_transpose(image).convert("RGB")
    shorter = min(rgb.size)
    if shorter <= SIZE:
        return rgb
    width, height = (SIZE * side // shorter for side in rgb.size)
    return rgb.resize((width, height), Image.Resampling.BILINEAR)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# Pixels.


def test_a_region_is_cut_out_of_the_resized_image(kinds):
    pack(kinds)
    source = open_part(kinds)
    paths = sorted((kinds / "train" / "cat").iterdir())

    for index, path in enumerate(paths):
        image = reference(path)
        shapes = []

        def whole(height: int, width: int, shapes=shapes) -> Region:
            shapes.append((height, width))
            return Region(0, 0, height, width)

        assert torch.equal(source.read_region(index, whole, SIZE), to_tensor(image)), path
        assert shapes == [(image.height, image.width)], path

        def part(height: int, width: int) -> Region:
            return Region(top=3, left=5, height=height - 4, width=width - 9)

        cut = image.crop((5, 3, image.width - 4, image.height - 1))
        region = source.read_region(index, part, SIZE)
        assert region.dtype == torch.uint8
        assert torch.equal(region, to_tensor(cut)), path


@pytest.mark.parametrize("size", [SIZE, 28])
def test_the_centre_is_that_of_the_file_bit_for_bit(kinds, size):
    pack(kinds)
    source = open_part(kinds)
    index = index_folder(kinds / "train")
    assert len(source) == len(index)

    for i in range(len(index)):
        from_pack = source.read_centre(i, size, resize=SIZE)
        from_file = read_centre(index.path(i), size, resize=SIZE)
        assert from_pack.shape == (3, size, size)
        assert torch.equal(from_pack, from_file), index.path(i)


def test_an_image_that_was_not_resized_is_read_as_from_its_file(kinds):
    pack(kinds)
    source = open_part(kinds)
    path = kinds / "train" / "cat" / "f_smaller.png"

    def part(height: int, width: int) -> Region:
        return Region(1, 2, height - 3, width - 4)

    assert torch.equal(source.read_region(5, part, 16), read_region(path, part, 16))
    for size, resize in ((16, None), (16, 18), (40, None)):
        from_file = read_centre(path, size, resize)
        assert torch.equal(source.read_centre(5, size, resize), from_file)


def test_another_size_is_resized_from_what_is_packed(kinds):
    pack(kinds)
    path = kinds / "train" / "cat" / "a_wide.jpg"
    image = reference(path)
    resized = image.resize((20 * image.width // SIZE, 20), Image.Resampling.BILINEAR)
    left = round((resized.width - 16) / 2)

    expected = to_tensor(resized.crop((left, 2, left + 16, 18)))
    assert torch.equal(open_part(kinds).read_centre(0, 16, resize=20), expected)


def test_what_is_read_is_a_copy_that_may_be_changed(folder):
    pack(folder)
    source = open_part(folder)
    before = read_files(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that may not be written
        for _ in range(2):
            region = source.read_region(0, lambda height, width: Region(0, 0, height, width), SIZE)
            assert not torch.equal(region, torch.zeros_like(region))
            region.zero_()
            source.read_centre(0, SIZE, None).zero_()
    assert read_files(folder) == before


# What a pack says of itself.


def test_labels_classes_names_and_settings(folder):
    pack(folder)
    source = open_part(folder)
    index = index_folder(folder / "train")

    assert source.labels.dtype == np.int32
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert source.classes == ("cat", "dog")
    assert source.size == SIZE
    assert source.source_digest == index.digest
    assert source.describe(0) == f"{folder}/.lrd-pack/train: cat/0.jpg"
    assert source.describe(6) == f"{folder}/.lrd-pack/train: dog/2.jpg"

    values = json.loads((folder / ".lrd-pack" / "train" / "pack.json").read_text())
    assert values["version"] == packed.VERSION
    assert values["size"] == SIZE
    assert values["classes"] == ["cat", "dog"]
    assert values["source_digest"] == index.digest
    assert values["images"] == 8
    assert values["left_out"] == 0
    assert [shard["bytes"] >= SHARD_BYTES for shard in values["shards"]] == [True] * 2 + [False]
    assert values["digest"] == source.digest
    assert source.digest != open_part(folder, "test").digest


def test_the_digest_is_of_the_pixels_and_not_of_the_place(folder, tmp_path):
    pack(folder)
    digest = open_part(folder).digest
    moved = tmp_path / "moved"
    shutil.copytree(folder / ".lrd-pack", moved / ".lrd-pack")
    assert open_part(moved).digest == digest

    pack(folder, out=tmp_path / "other", size=SIZE - 1)
    assert open_part(tmp_path / "other").digest != digest


def test_a_copy_for_a_worker_is_small_and_reads_the_same(folder):
    pack(folder)
    source = open_part(folder)
    expected = source.read_centre(7, SIZE, None)  # a shard is open now

    content = pickle.dumps(source)
    assert len(content) < 2000
    copy = pickle.loads(content)
    assert torch.equal(copy.read_centre(7, SIZE, None), expected)
    assert copy.describe(7) == source.describe(7)
    assert copy.labels.tolist() == source.labels.tolist()

    def read_in_child() -> None:
        assert torch.equal(source.read_centre(7, SIZE, None), expected)

    assert in_child(read_in_child) == 0


def test_few_shards_are_open_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(packing, "SHARD_BYTES", 1)
    monkeypatch.setattr(packed, "_MOST_OPEN_SHARDS", 2)
    pack(folder)
    source = open_part(folder)
    assert len(source.shard_bytes) == 8

    before = len(os.listdir("/proc/self/fd"))
    first = [source.read_centre(i, SIZE, None) for i in range(8)]
    assert len(os.listdir("/proc/self/fd")) - before == 2
    for i in range(8):
        assert torch.equal(source.read_centre(i, SIZE, None), first[i])


# Kills.


def test_a_killed_packer_goes_on_and_ends_with_the_same_files(folder, tmp_path, capsys):
    pack(folder, out=tmp_path / "undisturbed")
    capsys.readouterr()

    def pack_and_die(out: Path, calls_left: int) -> None:
        # It dies before it flushes or renames a file, or when an image has been written.
        def dying(function):
            def call(*arguments):
                nonlocal calls_left
                calls_left -= 1
                if calls_left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            return call

        os.fsync = dying(os.fsync)
        Path.replace = dying(Path.replace)
        console.ProgressMeter.update = dying(console.ProgressMeter.update)
        pack(folder, out=out)

    # 3 images, then 3 calls for the shard and 3 for its .json file; and so on.
    for calls in (2, 4, 5, 7, 11, 14, 17, 30, 50, 60, 1000):
        out = tmp_path / f"killed-{calls}"
        ended_by = in_child(lambda out=out, calls=calls: pack_and_die(out, calls))
        assert ended_by == (signal.SIGKILL if calls < 1000 else 0)
        assert (open_pack(out, "test") is None) == (calls < 1000)

        pack(folder, out=out)
        assert read_files(out) == read_files(tmp_path / "undisturbed"), calls
    assert "anew" not in capsys.readouterr().out


def test_shards_that_are_there_are_kept(folder, monkeypatch):
    pack(folder)
    complete = read_files(folder)
    train = folder / ".lrd-pack" / "train"
    (train / "pack.json").unlink()
    (train / "shard-00001.json").unlink()
    kept_since = (train / "shard-00000.bin").stat().st_ino

    decoded: list[str] = []
    read_shrunk = packing.read_shrunk

    def record(path: Path, size: int):
        decoded.append(f"{path.parent.name}/{path.name}")
        return read_shrunk(path, size)

    monkeypatch.setattr(packing, "read_shrunk", record)
    pack(folder)
    assert read_files(folder) == complete
    assert (train / "shard-00000.bin").stat().st_ino == kept_since
    assert decoded[0] == "cat/3.jpg"


def test_the_last_shard_is_hashed_before_it_is_kept(folder, capsys):
    pack(folder)
    complete = read_files(folder)
    train = folder / ".lrd-pack" / "train"
    (train / "pack.json").unlink()
    flip_a_byte(train / "shard-00002.bin")

    pack(folder)
    assert f"{train}/shard-00002.bin: is damaged; made anew" in capsys.readouterr().out
    assert read_files(folder) == complete


def test_a_shard_that_rots_while_others_are_made_is_found_at_the_end(folder):
    pack(folder)
    complete = read_files(folder)
    train = folder / ".lrd-pack" / "train"
    (train / "pack.json").unlink()
    flip_a_byte(train / "shard-00000.bin")

    with pytest.raises(UserError, match=r"shard-00000\.bin: what was read back is not what was"):
        pack(folder)
    assert open_pack(folder, "train") is None
    pack(folder)
    assert read_files(folder) == complete


def test_two_packers_at_a_time_pack_once(folder, monkeypatch, capsys):
    decoded: list[Path] = []
    read_shrunk = packing.read_shrunk

    def record(path: Path, size: int):
        decoded.append(path)
        return read_shrunk(path, size)

    monkeypatch.setattr(packing, "read_shrunk", record)
    deadline = time.monotonic() + 60
    with ThreadPoolExecutor() as pool:
        with one_process_at_a_time(folder / ".lrd-pack"):
            packers = [pool.submit(pack, folder) for _ in range(2)]
            printed = ""
            while printed.count("another process packs it; waiting") < 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
                printed += capsys.readouterr().out
            assert decoded == []
        for packer in packers:
            packer.result(timeout=60)

    assert len(decoded) == 10
    assert capsys.readouterr().out.count("has all 8 images already") == 1


# Files that cannot be decoded.


def test_a_file_that_cannot_be_decoded_is_named(folder):
    path = folder / "train" / "dog" / "2.jpg"
    path.write_bytes(path.read_bytes()[:200])

    with pytest.raises(
        UserError, match=r"train/dog/2\.jpg: not a readable image \(.*--skip-corrupt"
    ):
        pack(folder)
    assert open_pack(folder, "train") is None
    assert not list((folder / ".lrd-pack" / "train").glob(".*"))


def test_with_skip_corrupt_it_is_left_out_and_named(folder, capsys):
    path = folder / "train" / "cat" / "1.jpg"
    path.write_bytes(b"no image")
    pack(folder, skip_corrupt=True)

    output = capsys.readouterr().out
    assert re.search(r"train/cat/1\.jpg: not a readable image \(.*\); left out\n", output)
    assert f"{folder}/.lrd-pack/train: 7 images, 0.0 MB; 1 left out" in output

    source = open_part(folder)
    names = [source.describe(i).rpartition(": ")[2] for i in range(len(source))]
    assert names == [f"cat/{i}.jpg" for i in (0, 2, 3)] + [f"dog/{i}.jpg" for i in range(4)]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert source.num_left_out == 1
    for i, name in enumerate(names):
        expected = read_centre(folder / "train" / name, SIZE, SIZE)
        assert torch.equal(source.read_centre(i, SIZE, SIZE), expected)


def test_what_was_left_out_is_tried_again_without_skip_corrupt(folder, tmp_path):
    path = folder / "train" / "cat" / "1.jpg"
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))
    pack(folder, skip_corrupt=True)
    with pytest.raises(UserError, match=r"cat/1\.jpg: not a readable image"):
        pack(folder)

    # With it the first shard ends, and the second one begins, with another image than before.
    path.write_bytes(content)
    pack(folder)
    pack(folder, out=tmp_path / "new")
    assert read_files(folder) == read_files(tmp_path / "new")


def test_a_class_without_a_readable_image_is_refused(folder):
    (folder / "test" / "dog" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no readable image in .*test/dog"):
        pack(folder, skip_corrupt=True)
    assert open_pack(folder, "test") is None


# Other settings, other files.


def test_another_size_is_made_anew(folder, tmp_path, capsys):
    pack(folder, size=SIZE)
    capsys.readouterr()
    pack(folder, size=20)

    output = capsys.readouterr().out
    line = f"{folder}/.lrd-pack/train: what is there has 32 pixels, not 20; all of it is made anew"
    assert output.count(line) == 1
    assert open_part(folder).size == 20
    pack(folder, size=20, out=tmp_path / "new")
    assert read_files(folder) == read_files(tmp_path / "new")  # there were more shards


def test_other_files_are_made_anew(folder, capsys):
    pack(folder)
    noise(40, 40).save(folder / "train" / "cat" / "new.png")
    pack(folder)
    output = capsys.readouterr().out
    assert f"the files in {folder}/train have changed since it was made" in output
    assert f"{folder}/.lrd-pack/test: has all 2 images already" in output
    assert len(open_part(folder)) == 9


# Damage.


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_nothing_is_opened_where_nothing_is(folder):
    assert open_pack(folder, "train") is None
    assert open_pack(folder / "nothing", "test") is None
    with pytest.raises(UserError, match=r"has no complete pack; lrd data pack .*/set makes it"):
        verify_pack(folder)


def test_a_flipped_bit_in_a_shard_is_found_by_verify(folder):
    pack(folder)
    complete = read_files(folder)
    train, test = verify_pack(folder)
    assert (train.part, train.num_images, train.faults) == ("train", 8, [])
    assert train.num_bytes == sum(len(complete[f"train/shard-0000{i}.bin"]) for i in range(3))
    assert (test.part, test.num_images, test.faults) == ("test", 2, [])

    shard = folder / ".lrd-pack" / "train" / "shard-00001.bin"
    flip_a_byte(shard)
    train, test = verify_pack(folder)
    (fault,) = train.faults
    assert fault.startswith(f"{shard}: is damaged; delete it, and lrd data pack {folder} --size 32")
    assert test.faults == []

    shard.unlink()
    pack(folder)
    assert read_files(folder) == complete


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shard-00001.bin", "truncated"),
        ("shard-00001.bin", "missing"),
        ("label.npy", "truncated"),
        ("label.npy", "missing"),
        ("label.npy", "flipped"),
        ("name.npy", "flipped"),
        ("pack.json", "truncated"),
        ("pack.json", "flipped"),
    ],
)
def test_damage_is_found_when_a_pack_is_opened_and_packing_repairs_it(folder, name, damage):
    pack(folder)
    complete = read_files(folder)

    path = folder / ".lrd-pack" / "train" / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    else:
        flip_a_byte(path)

    with pytest.raises(UserError) as caught:
        open_pack(folder, "train")
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert f"; lrd data pack {folder}" in message
    assert len(message.splitlines()) == 1
    assert verify_pack(folder)[0].faults == [message]

    pack(folder)
    assert read_files(folder) == complete


def test_a_pack_of_a_later_version_is_refused(folder):
    pack(folder)
    path = folder / ".lrd-pack" / "train" / "pack.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(UserError, match=r"pack\.json: is of version 2, this lrd reads 1; lrd data"):
        open_pack(folder, "train")


def test_a_shard_that_is_gone_is_named(folder):
    pack(folder)
    source = open_part(folder)
    shard = source.shard_path(2)
    shard.unlink()
    source.read_centre(0, SIZE, None)
    with pytest.raises(UserError, match=re.escape(f"{shard}: cannot be read: No such file")):
        source.read_centre(7, SIZE, None)


def test_a_shard_that_is_truncated_while_it_is_open_is_named(folder):
    pack(folder)
    source = open_part(folder)
    expected = source.read_centre(0, SIZE, None)

    shard = source.shard_path(0)
    num_bytes = shard.stat().st_size
    os.truncate(shard, num_bytes - 1)
    assert torch.equal(source.read_centre(0, SIZE, None), expected)
    message = f"{shard}: has {num_bytes - 1} bytes, should have {num_bytes}; lrd data pack"
    with pytest.raises(UserError, match=re.escape(message)):
        [source.read_centre(index, SIZE, None) for index in range(len(source))]


# Disks.


def test_too_little_room_is_found_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    with pytest.raises(UserError) as caught:
        pack(folder)
    message = str(caught.value)
    numbers = re.search(r"will take about (.*) MB more, but only 0.0 MB are free", message)
    assert numbers is not None, message
    assert message.startswith(f"{folder}: ")
    assert not (folder / ".lrd-pack").exists()


def test_only_what_is_missing_needs_room(folder, monkeypatch):
    pack(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    pack(folder)

    train = folder / ".lrd-pack" / "train"
    for name in ("pack.json", "shard-00002.json", "shard-00002.bin"):
        (train / name).unlink()
    figures: list[float] = []
    monkeypatch.setattr(packing, "describe_bytes", lambda value: figures.append(value) or "")
    with pytest.raises(UserError):
        pack(folder)
    needed, free = figures
    assert free == 100
    assert 5_000 < needed < 10_000  # two images of the ten, which have 43,000 bytes
    assert (train / "shard-00001.bin").exists()


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(folder):
    def pack_with_little_room() -> None:
        _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES + 100, hard_limit))
        with pytest.raises(UserError) as caught:
            pack(folder)
        shard = folder / ".lrd-pack" / "train" / "shard-00000.bin"
        expected = f"{shard}: cannot be written: File too large; the same command goes on there"
        assert str(caught.value) == expected

    assert in_child(pack_with_little_room) == 0
    assert read_files(folder) == {}
    pack(folder)
    assert len(open_part(folder)) == 8


# The command.


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_packs_and_verifies(folder, tmp_path):
    out = tmp_path / "elsewhere"
    result = invoke("data", "pack", folder, "--out", out, "--size", 24)
    assert result.exit_code == 0, result.output
    assert f"{out}/.lrd-pack/train: 8 images, 0.0 MB" in result.stdout
    assert open_part(out).size == 24
    assert not (folder / ".lrd-pack").exists()

    result = invoke("data", "verify", out)
    assert result.exit_code == 0
    cells = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    num_bytes = len(b"".join(read_files(out)[f"train/shard-0000{i}.bin"] for i in range(2)))
    assert ["train", "8", "0.0", "MB", f"{num_bytes / 8:,.0f}", "yes"] in cells

    shard = out / ".lrd-pack" / "test" / "shard-00000.bin"
    flip_a_byte(shard)
    result = invoke("data", "verify", out)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    command = f"lrd data pack DIR --out {out} --size 24"
    assert line == f"lrd: {shard}: is damaged; delete it, and {command} makes it anew"


def test_without_a_size_it_is_256(folder):
    assert invoke("data", "pack", folder).exit_code == 0
    assert open_part(folder).size == 256


def make_set_without_classes(root: Path) -> str:
    for name in ("dog", "cat"):
        shutil.rmtree(root / "test" / name)
    (root / "test" / "cow").mkdir()
    return (
        f"{root}/train and {root}/test have different classes; only in one of them: cat, cow, dog"
    )


def make_set_without_test(root: Path) -> str:
    (root / "test").rename(root / "val")
    return f"there is no folder {root}/test, but {root}/val; rename it"


def make_file_in_place_of_folder(root: Path) -> str:
    shutil.rmtree(root)
    root.write_text("no folder")
    return f"{root}/train is not a folder"


def make_no_folder(root: Path) -> str:
    shutil.rmtree(root)
    return f"{root}/train is not a folder"


def make_corrupt_file(root: Path) -> str:
    (root / "test" / "cat" / "0.jpg").write_bytes(b"")
    return f"{root}/test/cat/0.jpg: not a readable image"


def make_file_in_place_of_pack(root: Path) -> str:
    (root / ".lrd-pack").write_text("no folder")
    return f"{root}/.lrd-pack"


@pytest.mark.parametrize(
    "make",
    [
        make_set_without_classes,
        make_set_without_test,
        make_file_in_place_of_folder,
        make_no_folder,
        make_corrupt_file,
        make_file_in_place_of_pack,
    ],
)
def test_the_command_refuses_in_one_line(folder, make):
    expected = make(folder)
    result = invoke("data", "pack", folder)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("lrd: ")
    assert expected in line


def test_out_that_is_a_file_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("data", "pack", folder, "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert result.stderr == f"lrd: --out: {tmp_path}/file is not a folder\n"
