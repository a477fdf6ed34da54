"""Checkpoints on disk: written completely or not at all, verified before they are read.

Also the run directory: its lock and its status.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import random
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from lrd.checkpoint import manifest, run_dir, store
from lrd.checkpoint.store import TrainState
from lrd.errors import UserError
from tests.helpers.checkpoints import content, flip_a_bit, listed, make_state, same

# Spelled out: users rely on these.
FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt", "trainer.json", "config.json")
ALL_FILES = (*FILES, "manifest.json")


def read_manifest(path: Path) -> dict:
    """Return the entries of a checkpoint's manifest, without the SHA-256 of itself."""
    entries = json.loads((path / "manifest.json").read_text())
    del entries["sha256"]
    return entries


def edit_manifest(path: Path, **changed) -> None:
    """Change entries of a manifest and give it the SHA-256 of the new entries."""
    (path / "manifest.json").write_text(manifest._render({**read_manifest(path), **changed}))


def replace_in_manifest(path: Path, old: str, new: str) -> None:
    text = (path / "manifest.json").read_text()
    assert text.count(old) == 1
    (path / "manifest.json").write_text(text.replace(old, new))


def measure_anew(path: Path) -> None:
    """Write a manifest that matches the files as they are now."""
    manifest.write_manifest(path, read_manifest(path)["step"], FILES)


def test_a_checkpoint_has_the_documented_layout(tmp_path):
    path = store.save(tmp_path, make_state(1234))
    assert path == tmp_path / "checkpoints" / "step-00001234"
    assert listed(tmp_path) == ["step-00001234"]
    assert sorted(file.name for file in path.iterdir()) == sorted(ALL_FILES)

    entries = json.loads((path / "manifest.json").read_text())
    digest = entries.pop("sha256")
    assert digest == hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    assert entries["format"] == 3
    assert entries["step"] == 1234
    assert set(entries["files"]) == set(FILES)
    for name, measured in entries["files"].items():
        raw = (path / name).read_bytes()
        assert measured == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    assert store.find_damage(path) is None


def test_all_files_have_the_mode_that_the_umask_gives(tmp_path):
    umask = os.umask(0o022)
    try:
        path = store.save(tmp_path, make_state(1))
    finally:
        os.umask(umask)

    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o644}


def test_what_is_read_equals_what_was_saved(tmp_path):
    state = make_state(5)
    back = store.read(store.save(tmp_path, state))
    assert back.step == 5
    assert back.model.keys() == state.model.keys()
    assert all(same(back.model[key], value) for key, value in state.model.items())
    assert same({key: back.ema[key] for key in state.ema}, state.ema)
    assert same(back.optimizer, state.optimizer)
    assert back.config["num_labels"] == state.config["num_labels"]
    assert same({key: back.trainer[key] for key in state.trainer}, state.trainer)
    assert back.trainer["versions"]["torch"] == torch.__version__


def test_equal_states_give_equal_files(tmp_path):
    """safetensors writes metadata in a random order, which differs within a process too."""
    contents = [content(store.save(tmp_path / str(i), make_state(1))) for i in range(8)]
    names = ("model.safetensors", "ema.safetensors", "config.json")
    assert len({tuple(files[name] for name in names) for files in contents}) == 1


def test_both_files_of_weights_have_the_config_in_their_metadata(tmp_path):
    state = make_state(1)
    path = store.save(tmp_path, state)
    for name, weights in (("model.safetensors", "network"), ("ema.safetensors", "ema")):
        with safetensors.safe_open(path / name, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        config = json.loads(metadata["lrd"])
        assert config["lrd"]["weights"] == weights
        assert config["num_labels"] == state.config["num_labels"]
        assert config["lrd"]["versions"]["torch"] == torch.__version__
    assert json.loads((path / "config.json").read_text())["lrd"]["weights"] == "network"


def test_without_averages_there_is_no_file_of_them(tmp_path):
    state = dataclasses.replace(make_state(1), ema=None)
    path = store.save(tmp_path, state)
    assert not (path / "ema.safetensors").exists()
    assert store.find_damage(path) is None
    assert store.read(path).ema is None


@pytest.mark.parametrize("files", [FILES[:-1], (*FILES, "more.txt")])
def test_a_manifest_with_other_files_than_those_of_a_checkpoint_is_damage(checkpoint, files):
    (checkpoint / "more.txt").write_text("more")
    manifest.write_manifest(checkpoint, 1, files)
    assert store.find_damage(checkpoint) == (
        "manifest.json: does not list the files of a checkpoint"
    )


def test_the_weights_are_loadable_by_anyone(tmp_path):
    state = make_state(1)
    weights = safetensors.torch.load_file(store.save(tmp_path, state) / "model.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in state.model.items())


def test_everything_is_on_disk_before_it_is_published(tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    fsync = os.fsync
    rename = Path.rename

    def note_fsync(descriptor):
        events.append(("flushed", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def note_rename(path, target):
        events.append(("published", Path(target).name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    path = store.save(tmp_path, make_state(1))
    published = events.index(("published", path.name))
    before = {name for _, name in events[:published]}
    assert set(ALL_FILES) <= before
    assert any(name.startswith(f".{path.name}") for name in before)
    assert ("flushed", "checkpoints") in events[published:]


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (torch, "save", 1),
        (os, "fsync", 1),
        (os, "fsync", 5),
        (Path, "write_text", 2),
        (Path, "rename", 1),
    ],
)
def test_a_failed_write_leaves_older_checkpoints_untouched(
    tmp_path, monkeypatch, owner, name, call
):
    store.save(tmp_path, make_state(1))
    before = content(tmp_path)
    calls = []
    works = getattr(owner, name)

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return works(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(UserError) as caught:
            store.save(tmp_path, make_state(2))

    (line,) = str(caught.value).splitlines()
    assert "step-00000002" in line
    assert os.strerror(errno.ENOSPC) in line
    assert content(tmp_path) == before
    assert listed(tmp_path) == ["step-00000001"]
    assert store.list_steps(tmp_path) == [1]


def test_saving_a_step_that_exists_already_replaces_it(tmp_path):
    first = make_state(3)
    second = make_state(3)
    second.model["half"] += 1
    store.save(tmp_path, first)
    store.save(tmp_path, second)
    path, lines = store.recover_newest(tmp_path)
    assert store.list_steps(tmp_path) == [3]
    assert lines == []
    assert torch.equal(store.read(path).model["half"], second.model["half"])


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    state = make_state(2)
    store.save(tmp_path, make_state(1))
    before = content(tmp_path)

    def fail(*args, **kwargs):
        raise AssertionError("something was written")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=state.nbytes - 1))
        patch.setattr(safetensors.torch, "save_file", fail)
        patch.setattr(torch, "save", fail)
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(UserError) as caught:
            store.save(tmp_path, state)

    (line,) = str(caught.value).splitlines()
    assert "step-00000002: the checkpoint could not be written: it needs " in line
    assert content(tmp_path) == before
    assert listed(tmp_path) == ["step-00000001"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=state.nbytes))
    assert store.find_damage(store.save(tmp_path, state)) is None


def test_nbytes_counts_all_tensors_of_a_state():
    model = {"w": torch.zeros(5, 2).bfloat16()}  # 20 bytes
    param_state = {
        "a": torch.zeros(3),  # 12 bytes
        "b": (torch.zeros(2).bool(), [torch.zeros(()).double()]),  # 2 and 8 bytes
    }
    ema = {"w": torch.zeros(3)}  # 12 bytes
    state = TrainState(model, {"state": {0: param_state}, "lr": 0.1}, {"step": 1}, ema)
    assert state.nbytes == 20 + 12 + 2 + 8 + 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[int], Path]:
    """Return a function that gives the checkpoint of a step; each is written once."""
    run_dir = tmp_path_factory.mktemp("saved")
    return functools.cache(lambda step: store.save(run_dir, make_state(step)))


def publish(run_dir: Path, saved: Callable[[int], Path], *steps: int) -> list[Path]:
    """Copy the checkpoints of these steps into a run directory."""
    return [shutil.copytree(saved(step), store.checkpoint_path(run_dir, step)) for step in steps]


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    return publish(tmp_path, saved, 1)[0]


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        flip_a_bit,
        replace_by_folder,
    ],
    ids=["truncated", "longer", "emptied", "deleted", "one bit flipped", "a folder"],
)
@pytest.mark.parametrize("name", FILES)
def test_damage_of_a_file_is_found_and_named(checkpoint, name, damage):
    assert store.find_damage(checkpoint) is None
    damage(checkpoint / name)
    (line,) = store.find_damage(checkpoint).splitlines()
    assert line.startswith(f"{name}: ")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_bytes(b""),
        lambda path: (path / "manifest.json").write_bytes(b"\xff\x00garbage"),
        lambda path: (path / "manifest.json").write_bytes(
            (path / "manifest.json").read_bytes()[:-3]
        ),
        lambda path: (path / "manifest.json").write_text("[]"),
        lambda path: (path / "manifest.json").write_text("{}"),
        lambda path: edit_manifest(path, format=manifest.LAYOUT_VERSION + 1),
        lambda path: edit_manifest(path, step=2),
        lambda path: replace_in_manifest(path, '"step": 1', '"step": 2'),
        lambda path: replace_in_manifest(path, '"format": 3', '"format": 2'),
        lambda path: replace_in_manifest(path, '"step": 1', '"step":  1'),
        lambda path: (path / "manifest.json").write_text(json.dumps(read_manifest(path))),
        lambda path: edit_manifest(path, files=[]),
        lambda path: edit_manifest(path, files={}),
        shutil.rmtree,
    ],
    ids=[
        "missing",
        "empty",
        "garbage",
        "truncated",
        "a list",
        "an empty mapping",
        "another layout",
        "another step",
        "step edited by hand",
        "layout edited by hand",
        "one more space",
        "no digest",
        "files are a list",
        "no files",
        "no folder",
    ],
)
def test_damage_of_the_manifest_is_found_and_named(checkpoint, damage):
    damage(checkpoint)
    (line,) = store.find_damage(checkpoint).splitlines()
    assert line.startswith("manifest.json: ")


def test_a_manifest_without_hashes_is_damage(checkpoint):
    edit_manifest(checkpoint, files=dict.fromkeys(FILES, 3))
    line = store.find_damage(checkpoint)
    assert line.startswith("model.safetensors: ")
    assert line.endswith("the manifest says None")


def flip_bit_of(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]


def change_byte_of(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + rng.randbytes(1) + raw[at + 1 :]


def repeat_chunk_of(rng: random.Random, raw: bytes) -> bytes:
    start, end = sorted(rng.sample(range(len(raw) + 1), 2))
    return raw[:end] + raw[start:]


CHANGES = [
    flip_bit_of,
    change_byte_of,
    repeat_chunk_of,
    lambda rng, raw: raw[: rng.randrange(len(raw))],
    lambda rng, raw: raw + rng.randbytes(rng.randint(1, 9)),
    lambda rng, raw: b"",
    lambda rng, raw: bytes(len(raw)),
]


def mutated(
    rng: random.Random, contents: dict[str, bytes], others: dict[str, bytes]
) -> dict[str, bytes]:
    """Damage a checkpoint's files in one random way.

    Args:
        rng: decides about the file and the damage.
        contents: the files of the checkpoint, name -> bytes.
        others: the files of another step's checkpoint.

    Returns:
        The files after the damage; a file may be missing.
    """
    name, second = rng.sample(ALL_FILES, 2)
    kind = rng.randrange(len(CHANGES) + 3)
    if kind < len(CHANGES):
        return contents | {name: CHANGES[kind](rng, contents[name])}

    if kind == len(CHANGES):
        return contents | {name: contents[second], second: contents[name]}

    if kind == len(CHANGES) + 1:
        return contents | {name: others[name]}

    return {key: raw for key, raw in contents.items() if key != name}


def test_a_thousand_random_mutations_are_all_found(tmp_path, saved):
    path, other = publish(tmp_path, saved, 1, 2)
    contents, others = (
        {name: (folder / name).read_bytes() for name in ALL_FILES} for folder in (path, other)
    )
    rng = random.Random(0)
    missed = []
    num_harmless = 0  # mutations that changed no byte

    for number in range(1000):
        changed = mutated(rng, contents, others)
        touched = [name for name in ALL_FILES if changed.get(name) != contents[name]]
        for name in touched:
            (path / name).unlink()
            if name in changed:
                (path / name).write_bytes(changed[name])

        if (store.find_damage(path) is None) == bool(touched):
            missed.append((number, touched))
        num_harmless += not touched

        for name in touched:
            (path / name).write_bytes(contents[name])

    assert missed == []
    assert num_harmless < 10
    assert store.find_damage(path) is None


def test_a_checkpoint_renamed_to_another_step_is_damaged(tmp_path, saved):
    first, second = publish(tmp_path, saved, 1, 2)
    renamed = second.rename(store.checkpoint_path(tmp_path, 3))
    assert store.find_damage(renamed) == "manifest.json: is of step 2"
    path, (line,) = store.recover_newest(tmp_path)
    assert path == first
    assert line.startswith(f"{renamed}: damaged: manifest.json: is of step 2")


@pytest.mark.parametrize("name", ALL_FILES)
def test_files_swapped_between_two_steps_are_damage_in_both(tmp_path, saved, name):
    first, second = publish(tmp_path, saved, 1, 2)
    (first / name).rename(tmp_path / name)
    (second / name).rename(first / name)
    (tmp_path / name).rename(second / name)
    for path in (first, second):
        assert store.find_damage(path).startswith(f"{name}: ")

    assert store.recover_newest(tmp_path)[0] is None


def test_a_later_layout_is_refused_and_left_where_it_is(tmp_path, saved):
    _, second, _ = publish(tmp_path, saved, 1, 2, 3)
    edit_manifest(second, format=4)
    flip_a_bit(store.checkpoint_path(tmp_path, 3) / "trainer.json")
    before = content(tmp_path)
    for find in (store.recover_newest, store.find_newest_valid):
        with pytest.raises(UserError) as caught:
            find(tmp_path)
        assert (
            str(caught.value)
            == f"{second}: manifest.json: layout version 4, this lrd reads 2 and 3"
        )

    assert content(tmp_path) == before


def test_layout_1_without_a_digest_is_refused_by_version_and_left_where_it_is(tmp_path, saved):
    _, second = publish(tmp_path, saved, 1, 2)
    entries = {"format": 1, "files": read_manifest(second)["files"]}
    (second / "manifest.json").write_text(json.dumps(entries, indent=1))
    before = content(tmp_path)

    expected = f"{second}: manifest.json: layout version 1, this lrd reads 2 and 3"
    for find in (store.recover_newest, store.find_newest_valid):
        with pytest.raises(UserError) as caught:
            find(tmp_path)
        assert str(caught.value) == expected

    assert store.delete_old(tmp_path, 1, None) == []
    assert content(tmp_path) == before


def test_a_manifest_of_this_layout_without_a_digest_is_damage(tmp_path, saved):
    first, second = publish(tmp_path, saved, 1, 2)
    (second / "manifest.json").write_text(json.dumps(read_manifest(second), indent=1))
    path, (line,) = store.recover_newest(tmp_path)
    assert path == first
    assert line.startswith(f"{second}: damaged: manifest.json: sha256 of its entries is missing")
    assert listed(tmp_path) == [first.name, f"{second.name}.damaged"]


@pytest.mark.parametrize("digit", "0129")
def test_another_digit_in_the_layout_version_is_damage(tmp_path, saved, digit):
    first, second = publish(tmp_path, saved, 1, 2)
    replace_in_manifest(second, '"format": 3', f'"format": {digit}')
    path, (line,) = store.recover_newest(tmp_path)
    assert path == first
    assert line.startswith(f"{second}: damaged: manifest.json: sha256 ")
    assert listed(tmp_path) == [first.name, f"{second.name}.damaged"]


def test_the_newest_valid_checkpoint_is_found_and_damaged_ones_are_moved_aside(tmp_path, saved):
    _, second, third, fourth = publish(tmp_path, saved, 1, 2, 3, 4)
    flip_a_bit(third / "model.safetensors")
    (fourth / "optimizer.pt").unlink()
    path, lines = store.recover_newest(tmp_path)
    assert path == second

    line_of_fourth, line_of_third = lines
    assert line_of_fourth.startswith(f"{fourth}: damaged: optimizer.pt: ")
    assert line_of_third.startswith(f"{third}: damaged: model.safetensors: ")
    assert "\n" not in line_of_fourth + line_of_third

    assert listed(tmp_path) == [
        "step-00000001",
        "step-00000002",
        "step-00000003.damaged",
        "step-00000004.damaged",
    ]
    assert store.recover_newest(tmp_path) == (second, [])


def test_a_step_damaged_twice_is_moved_aside_twice(tmp_path, saved):
    for _ in range(2):
        (path,) = publish(tmp_path, saved, 7)
        flip_a_bit(path / "trainer.json")
        assert store.recover_newest(tmp_path)[0] is None

    assert len(listed(tmp_path)) == 2
    assert store.list_steps(tmp_path) == []


def test_without_a_valid_checkpoint_there_is_no_newest(tmp_path, saved):
    assert store.recover_newest(tmp_path) == (None, [])
    for path in publish(tmp_path, saved, 1, 2):
        flip_a_bit(path / "optimizer.pt")

    path, lines = store.recover_newest(tmp_path)
    assert path is None
    assert len(lines) == 2


def test_newest_is_by_step_and_not_by_time(tmp_path, saved):
    paths = publish(tmp_path, saved, 9, 99_999_999, 100_000_000)
    for age, path in enumerate(paths):
        os.utime(path, (1_000_000 - age, 1_000_000 - age))

    assert store.list_steps(tmp_path) == [9, 99_999_999, 100_000_000]
    assert store.recover_newest(tmp_path)[0] == paths[-1]


def test_leftovers_of_interrupted_writes_are_removed_and_other_files_left(tmp_path, saved):
    (checkpoint,) = publish(tmp_path, saved, 2)
    folder = store.checkpoints_dir(tmp_path)
    for name in (
        ".step-00000003.77.tmp",
        ".step-00000001.8.tmp",
        "best",
        "step-7",
        "step-00000009.bak",
        "step-x",
    ):
        (folder / name).mkdir()
        (folder / name / "file").touch()

    (folder / "notes.txt").touch()
    assert store.recover_newest(tmp_path) == (checkpoint, [])
    assert listed(tmp_path) == sorted(
        ["best", "step-7", "step-00000009.bak", "step-x", "notes.txt", checkpoint.name]
    )


@pytest.mark.parametrize(
    "make",
    [lambda path: path.touch(), lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere")],
)
@pytest.mark.parametrize("name", ["step-00000009", "step-000000009"])
def test_something_else_named_like_a_checkpoint_is_never_chosen(tmp_path, saved, name, make):
    (checkpoint,) = publish(tmp_path, saved, 2)
    make(store.checkpoints_dir(tmp_path) / name)
    assert store.recover_newest(tmp_path)[0] == checkpoint


def test_a_checkpoint_that_a_killed_second_save_set_aside_is_restored(tmp_path, saved):
    _, second = publish(tmp_path, saved, 1, 2)
    before = content(second)
    shutil.copytree(second, second.with_name(f".{second.name}.77.tmp"))
    second.rename(second.with_name(f".{second.name}.77.old.tmp"))
    assert store.list_steps(tmp_path) == [1]
    assert store.recover_newest(tmp_path) == (second, [])
    assert content(second) == before
    assert listed(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_that_a_second_save_replaced_is_removed(tmp_path, saved):
    (path,) = publish(tmp_path, saved, 2)
    replaced = shutil.copytree(path, path.with_name(f".{path.name}.77.old.tmp"))
    flip_a_bit(replaced / "trainer.json")
    assert store.recover_newest(tmp_path) == (path, [])
    assert listed(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("keep_last", "best", "kept"),
    [
        (1, None, [4, 5]),
        (2, None, [4, 5]),
        (2, 1, [1, 4, 5]),
        (2, 4, [4, 5]),
        (3, 5, [3, 4, 5]),
        (9, 2, [1, 2, 3, 4, 5]),
        (2, 77, [4, 5]),
    ],
)
def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, saved, keep_last, best, kept):
    paths = publish(tmp_path, saved, 1, 2, 3, 4, 5)
    before = content(paths[-1])
    assert store.delete_old(tmp_path, keep_last, best) == []
    assert listed(tmp_path) == [store.checkpoint_name(step) for step in kept]
    assert content(paths[-1]) == before


@pytest.mark.parametrize(
    ("damaged", "best", "kept", "reported"),
    [
        ([5], None, [3, 4], [5]),
        ([5, 4], None, [2, 3], [5, 4]),
        ([4], 1, [1, 3, 5], [4]),
        ([5, 4, 3, 2], None, [1], [5, 4, 3, 2]),
        ([5, 4, 3, 2, 1], 3, [], [5, 4, 3, 2, 1]),
        ([2], None, [4, 5], []),
    ],
)
def test_older_checkpoints_are_kept_until_two_are_valid(
    tmp_path, saved, damaged, best, kept, reported
):
    publish(tmp_path, saved, 1, 2, 3, 4, 5)
    for step in damaged:
        flip_a_bit(store.checkpoint_path(tmp_path, step) / "optimizer.pt")

    lines = store.delete_old(tmp_path, 2, best)
    assert store.list_steps(tmp_path) == kept
    assert len(lines) == len(reported)
    for line, step in zip(lines, reported, strict=True):
        assert line.startswith(f"{store.checkpoint_path(tmp_path, step)}: damaged: optimizer.pt: ")
        assert f"{store.checkpoint_name(step)}.damaged" in listed(tmp_path)


def test_copies_renamed_to_other_steps_do_not_count_as_valid(tmp_path, saved):
    publish(tmp_path, saved, 1, 2)
    for step in (3, 4):
        shutil.copytree(saved(2), store.checkpoint_path(tmp_path, step))

    assert len(store.delete_old(tmp_path, 2, None)) == 2
    assert store.list_steps(tmp_path) == [1, 2]


def test_a_checkpoint_of_another_layout_is_neither_counted_nor_moved(tmp_path, saved):
    *_, newest = publish(tmp_path, saved, 1, 2, 3, 4)
    edit_manifest(newest, format=4)
    assert store.delete_old(tmp_path, 2, None) == []
    assert store.list_steps(tmp_path) == [2, 3, 4]


class RunsCode:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_no_code_from_a_checkpoint_is_run(checkpoint, tmp_path):
    marker = tmp_path / "code was run"
    torch.save({"optimizer": RunsCode(marker), "schedule": {}}, checkpoint / "optimizer.pt")
    measure_anew(checkpoint)
    assert store.find_damage(checkpoint) is None
    with pytest.raises(UserError) as caught:
        store.read(checkpoint)

    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{checkpoint}: ")
    assert not marker.exists()
    torch.load(checkpoint / "optimizer.pt", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("model.safetensors", b"no weights"),
        ("optimizer.pt", b"no archive"),
        ("trainer.json", b"{"),
        ("ema.safetensors", b"no weights"),
        ("config.json", b"{"),
    ],
)
def test_a_file_that_verifies_but_cannot_be_loaded_is_refused_in_one_line(checkpoint, name, raw):
    (checkpoint / name).write_bytes(raw)
    measure_anew(checkpoint)
    assert store.find_damage(checkpoint) is None
    with pytest.raises(UserError) as caught:
        store.read(checkpoint)

    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{checkpoint}: ")


def test_a_run_directory_has_one_run_at_a_time(tmp_path):
    first = run_dir.RunDir(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        run_dir.RunDir(tmp_path / "run", patience=0.3)

    (line,) = str(caught.value).splitlines()
    assert line.startswith("run_dir: ")
    assert str(tmp_path / "run") in line
    run_dir.RunDir(tmp_path / "another")
    del first
    run_dir.RunDir(tmp_path / "run")


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_run_directory_that_cannot_be_created_is_refused(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        run_dir.RunDir(tmp_path / "file" / below)

    (line,) = str(caught.value).splitlines()
    assert line.startswith("run_dir: ")


def test_a_status_reads_back(tmp_path):
    run = run_dir.RunDir(tmp_path)
    run.write_status("finished", step=7, total_steps=9, best_accuracy=None)
    status = run_dir.read_status(tmp_path)
    assert status.pop("started") <= status.pop("updated")
    assert status == {
        "state": "finished",
        "step": 7,
        "total_steps": 9,
        "best_accuracy": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def test_a_run_whose_process_is_gone_is_interrupted(tmp_path):
    run = run_dir.RunDir(tmp_path)
    run.write_status("running")
    assert run_dir.read_status(tmp_path)["state"] == "running"
    del run
    assert run_dir.read_status(tmp_path)["state"] == "interrupted"
    (tmp_path / ".lock").unlink()
    assert run_dir.read_status(tmp_path)["state"] == "interrupted"


def test_a_run_on_another_host_is_never_called_interrupted(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "running", "host": "another.host"}')
    assert run_dir.read_status(tmp_path)["state"] == "running"


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\0"])
def test_a_status_that_cannot_be_read_is_none(tmp_path, text):
    if text is not None:
        (tmp_path / "status.json").write_text(text)

    assert run_dir.read_status(tmp_path) is None


def test_a_file_of_the_run_directory_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    run = run_dir.RunDir(tmp_path)
    run.write("recipe.yaml", "first")

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(UserError, match=r"recipe\.yaml"):
            run.write("recipe.yaml", "second")

    assert (tmp_path / "recipe.yaml").read_text() == "first"
    run.write("recipe.yaml", "second")
    assert (tmp_path / "recipe.yaml").read_text() == "second"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [run_dir.LOCK, run_dir.SURVIVORS_LOCK, "recipe.yaml"]


def test_tensors_that_share_memory_are_saved(tmp_path):
    """Tied layers: safetensors refuses two names for one memory."""
    state = make_state(1)
    state.model["tied"] = state.model["0.weight"]
    state.model["part"] = state.model["0.weight"][1:]
    back = store.read(store.save(tmp_path, state))
    assert all(same(back.model[key], value) for key, value in state.model.items())
