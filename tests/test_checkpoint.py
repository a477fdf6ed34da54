"""Checkpoints on disk: written whole or not at all, verified before they are read; and the run directory."""

import errno
import functools
import hashlib
import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

import lrd
from lrd import checkpoint, manifest, rundir
from lrd.checkpoint import State
from lrd.errors import UserError

FILES = ("model.safetensors", "optimizer.pt", "trainer.json")
ALL_FILES = (*FILES, "manifest.json")


def make_state(step: int) -> State:
    """What a run has after a few updates: weights of several kinds, an optimizer with LRDropout, a position."""
    torch.manual_seed(step)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    lrd.LRDropout(optimizer, keep_prob=0.5, seed=(1 << 64) - 1)
    for _ in range(2):
        network(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
    weights = {key: value.detach() for key, value in network.state_dict().items()}
    weights |= {"transposed": torch.randn(3, 2).t(), "half": torch.randn(3).bfloat16(), "scalar": torch.tensor(1.5)}
    schedule = {"steps": step, "scheduled": [0.1], "scheduler": {"last_epoch": step, "milestones": [1, 2]}}
    trainer = {"step": step, "epoch": 1, "samples": 64 * step, "best": {"step": 1, "accuracy": 0.1 + 0.2}}
    trainer |= {"skipped": 2, "evaluated": step - 1}
    return State(weights, {"optimizer": optimizer.state_dict(), "schedule": schedule}, trainer)


def same(a, b) -> bool:
    """Whether two nests of dicts, lists, tensors and plain values are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def listed(run_dir: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.folder(run_dir).iterdir())


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def read_manifest(path: Path) -> dict:
    """What a checkpoint's manifest says, but for the digest of itself."""
    facts = json.loads((path / "manifest.json").read_text())
    del facts["sha256"]
    return facts


def edit_manifest(path: Path, **changed) -> None:
    """A manifest that says other things and vouches for them."""
    (path / "manifest.json").write_text(manifest._render({**read_manifest(path), **changed}))


def replace_in_manifest(path: Path, old: str, new: str) -> None:
    text = (path / "manifest.json").read_text()
    assert text.count(old) == 1
    (path / "manifest.json").write_text(text.replace(old, new))


def measure_anew(path: Path) -> None:
    """Make the manifest hold for the files as they are."""
    manifest.write(path, read_manifest(path)["step"], FILES)


def as_layout_1(path: Path) -> None:
    """Make a checkpoint what lrd 0.1 would have written."""
    trainer = json.loads((path / "trainer.json").read_text())
    del trainer["skipped"], trainer["evaluated"]
    (path / "trainer.json").write_text(json.dumps(trainer, indent=1))
    measure_anew(path)
    facts = {"format": 1, "files": read_manifest(path)["files"]}
    (path / "manifest.json").write_text(json.dumps(facts, indent=1))


def test_a_checkpoint_has_the_published_layout(tmp_path):
    path = checkpoint.save(tmp_path, make_state(1234))
    assert path == tmp_path / "checkpoints" / "step-00001234"
    assert listed(tmp_path) == ["step-00001234"]
    assert sorted(file.name for file in path.iterdir()) == sorted(ALL_FILES)
    facts = json.loads((path / "manifest.json").read_text())
    vouched = facts.pop("sha256")
    assert vouched == hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    assert (facts["format"], facts["step"]) == (2, 1234)
    assert set(facts["files"]) == set(FILES)
    for name, measured in facts["files"].items():
        raw = (path / name).read_bytes()
        assert measured == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert checkpoint.damage(path) is None


def test_every_file_can_be_read_by_those_whom_the_umask_lets(tmp_path):
    umask = os.umask(0o022)
    try:
        path = checkpoint.save(tmp_path, make_state(1))
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o644}


def test_what_is_read_equals_what_was_saved(tmp_path):
    state = make_state(5)
    back = checkpoint.read(checkpoint.save(tmp_path, state))
    assert back.step == 5
    assert back.model.keys() == state.model.keys()
    assert all(same(back.model[key], value) for key, value in state.model.items())
    assert same(back.optimizer, state.optimizer)
    assert same({key: back.trainer[key] for key in state.trainer}, state.trainer)
    assert back.trainer["versions"]["torch"] == torch.__version__


def test_the_weights_are_loadable_by_anyone(tmp_path):
    state = make_state(1)
    weights = safetensors.torch.load_file(checkpoint.save(tmp_path, state) / "model.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in state.model.items())


def test_everything_is_on_disk_before_it_is_published(tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor):
        events.append(("flushed", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def note_rename(path, target):
        events.append(("published", Path(target).name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    path = checkpoint.save(tmp_path, make_state(1))
    published = events.index(("published", path.name))
    before = {name for _, name in events[:published]}
    assert set(ALL_FILES) <= before
    assert any(name.startswith(f".{path.name}") for name in before)
    assert ("flushed", "checkpoints") in events[published:]


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(torch, "save", 1), (os, "fsync", 1), (os, "fsync", 5), (Path, "write_text", 2), (Path, "rename", 1)],
)
def test_a_write_that_fails_midway_leaves_what_was_there(tmp_path, monkeypatch, owner, name, call):
    checkpoint.save(tmp_path, make_state(1))
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
            checkpoint.save(tmp_path, make_state(2))
    (line,) = str(caught.value).splitlines()
    assert "step-00000002" in line
    assert os.strerror(errno.ENOSPC) in line
    assert content(tmp_path) == before
    assert listed(tmp_path) == ["step-00000001"]
    assert checkpoint.steps(tmp_path) == [1]


def test_saving_a_step_that_exists_already_replaces_it(tmp_path):
    first, second = make_state(3), make_state(3)
    second.model["half"] += 1
    checkpoint.save(tmp_path, first)
    checkpoint.save(tmp_path, second)
    path, passed_over = checkpoint.newest(tmp_path)
    assert checkpoint.steps(tmp_path) == [3]
    assert passed_over == []
    assert torch.equal(checkpoint.read(path).model["half"], second.model["half"])


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    state = make_state(2)
    checkpoint.save(tmp_path, make_state(1))
    before = content(tmp_path)

    def fail(*args, **kwargs):
        raise AssertionError("something was written")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=state.nbytes - 1))
        for owner, name in ((safetensors.torch, "save_file"), (torch, "save"), (Path, "write_text")):
            patch.setattr(owner, name, fail)
        with pytest.raises(UserError) as caught:
            checkpoint.save(tmp_path, state)
    (line,) = str(caught.value).splitlines()
    assert "step-00000002: the checkpoint could not be written: it needs " in line
    assert content(tmp_path) == before
    assert listed(tmp_path) == ["step-00000001"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=state.nbytes))
    assert checkpoint.damage(checkpoint.save(tmp_path, state)) is None


def test_a_state_knows_the_bytes_of_all_its_tensors():
    nested = {"state": {0: {"a": torch.zeros(3), "b": (torch.zeros(2).bool(), [torch.zeros(()).double()])}}, "lr": 0.1}
    assert State({"w": torch.zeros(5, 2).bfloat16()}, nested, {"step": 1}).nbytes == 20 + 12 + 2 + 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[int], Path]:
    """The checkpoint of a step, written once."""
    run_dir = tmp_path_factory.mktemp("saved")
    return functools.cache(lambda step: checkpoint.save(run_dir, make_state(step)))


def publish(run_dir: Path, saved: Callable[[int], Path], *steps: int) -> list[Path]:
    return [shutil.copytree(saved(step), checkpoint.path_of(run_dir, step)) for step in steps]


@pytest.fixture
def whole(saved, tmp_path) -> Path:
    return publish(tmp_path, saved, 1)[0]


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "act",
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
def test_damage_of_a_file_is_found_and_named(whole, name, act):
    assert checkpoint.damage(whole) is None
    act(whole / name)
    (line,) = checkpoint.damage(whole).splitlines()
    assert line.startswith(f"{name}: ")


@pytest.mark.parametrize(
    "act",
    [
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_bytes(b""),
        lambda path: (path / "manifest.json").write_bytes(b"\xff\x00garbage"),
        lambda path: (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:-3]),
        lambda path: (path / "manifest.json").write_text("[]"),
        lambda path: (path / "manifest.json").write_text("{}"),
        lambda path: edit_manifest(path, format=manifest.FORMAT + 1),
        lambda path: edit_manifest(path, step=2),
        lambda path: replace_in_manifest(path, '"step": 1', '"step": 2'),
        lambda path: replace_in_manifest(path, '"format": 2', '"format": 1'),
        lambda path: replace_in_manifest(path, '"step": 1', '"step":  1'),
        lambda path: (path / "manifest.json").write_text(json.dumps(read_manifest(path))),
        lambda path: edit_manifest(path, files=[]),
        lambda path: edit_manifest(path, files={}),
        shutil.rmtree,
    ],
    ids=[
        *("missing", "empty", "garbage", "truncated", "a list", "an empty mapping", "of another layout"),
        *("of another step", "another step written in", "another layout written in", "a space more", "no digest"),
        *("files a list", "no files", "no folder"),
    ],
)
def test_damage_of_the_manifest_is_found_and_named(whole, act):
    act(whole)
    (line,) = checkpoint.damage(whole).splitlines()
    assert line.startswith("manifest.json: ")


def test_a_manifest_without_hashes_vouches_for_no_file(whole):
    edit_manifest(whole, files=dict.fromkeys(FILES, 3))
    line = checkpoint.damage(whole)
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


def mutated(rng: random.Random, contents: dict[str, bytes], others: dict[str, bytes]) -> dict[str, bytes]:
    """One random thing that befalls a checkpoint's files; `others` are another step's."""
    name, second = rng.sample(ALL_FILES, 2)
    kind = rng.randrange(len(CHANGES) + 3)
    if kind < len(CHANGES):
        return contents | {name: CHANGES[kind](rng, contents[name])}
    if kind == len(CHANGES):
        return contents | {name: contents[second], second: contents[name]}
    if kind == len(CHANGES) + 1:
        return contents | {name: others[name]}
    return {key: raw for key, raw in contents.items() if key != name}


def test_of_a_thousand_mutations_none_passes(tmp_path, saved):
    path, other = publish(tmp_path, saved, 1, 2)
    contents, others = ({name: (folder / name).read_bytes() for name in ALL_FILES} for folder in (path, other))
    rng = random.Random(0)
    passed, harmless = [], 0
    for number in range(1000):
        changed = mutated(rng, contents, others)
        touched = [name for name in ALL_FILES if changed.get(name) != contents[name]]
        for name in touched:
            (path / name).unlink()
            if name in changed:
                (path / name).write_bytes(changed[name])
        if (checkpoint.damage(path) is None) == bool(touched):
            passed.append((number, touched))
        harmless += not touched
        for name in touched:
            (path / name).write_bytes(contents[name])
    assert passed == []
    assert harmless < 10
    assert checkpoint.damage(path) is None


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path, saved):
    first, second = publish(tmp_path, saved, 1, 2)
    renamed = second.rename(checkpoint.path_of(tmp_path, 3))
    assert checkpoint.damage(renamed) == "manifest.json: is of step 2"
    path, (line,) = checkpoint.newest(tmp_path)
    assert path == first
    assert line.startswith(f"{renamed}: damaged: manifest.json: is of step 2")


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_file_of_another_step_is_damage_in_both(tmp_path, saved, name):
    first, second = publish(tmp_path, saved, 1, 2)
    (first / name).rename(tmp_path / name)
    (second / name).rename(first / name)
    (tmp_path / name).rename(second / name)
    for path in (first, second):
        assert checkpoint.damage(path).startswith(f"{name}: ")
    assert checkpoint.newest(tmp_path)[0] is None


def test_layout_1_is_read(tmp_path, saved):
    (path,) = publish(tmp_path, saved, 7)
    as_layout_1(path)
    assert checkpoint.newest(tmp_path) == (path, [])
    assert checkpoint.export(tmp_path, tmp_path / "weights.safetensors") == path
    back, expected = checkpoint.read(path), make_state(7)
    assert same({key: back.model[key] for key in expected.model}, expected.model)
    assert same(back.optimizer, expected.optimizer)
    assert (back.trainer["skipped"], back.trainer["evaluated"]) == (0, 7)
    assert back.trainer["samples"] == expected.trainer["samples"]


@pytest.mark.parametrize("name", FILES)
def test_damage_in_layout_1_is_found_and_named(tmp_path, saved, name):
    first, second = publish(tmp_path, saved, 6, 7)
    as_layout_1(second)
    flip_a_bit(second / name)
    assert checkpoint.damage(second).startswith(f"{name}: ")
    assert checkpoint.newest(tmp_path)[0] == first


def test_a_layout_to_come_is_refused_and_left_where_it_is(tmp_path, saved):
    _, second, _ = publish(tmp_path, saved, 1, 2, 3)
    edit_manifest(second, format=3)
    flip_a_bit(checkpoint.path_of(tmp_path, 3) / "trainer.json")
    before = content(tmp_path)
    for look in (checkpoint.newest, checkpoint.survey):
        with pytest.raises(UserError) as caught:
            look(tmp_path)
        (line,) = str(caught.value).splitlines()
        assert line == f"{second}: manifest.json: layout version 3, this lrd reads 1, 2"
    assert content(tmp_path) == before


@pytest.mark.parametrize("digit", "0139")
def test_another_digit_in_the_layout_version_is_damage(tmp_path, saved, digit):
    first, second = publish(tmp_path, saved, 1, 2)
    replace_in_manifest(second, '"format": 2', f'"format": {digit}')
    path, (line,) = checkpoint.newest(tmp_path)
    assert path == first
    assert line.startswith(f"{second}: damaged: manifest.json: sha256 ")
    assert listed(tmp_path) == [first.name, f"{second.name}.damaged"]


def test_the_newest_whole_one_is_found_and_damaged_ones_are_moved_aside(tmp_path, saved):
    _, second, third, fourth = publish(tmp_path, saved, 1, 2, 3, 4)
    flip_a_bit(third / "model.safetensors")
    (fourth / "optimizer.pt").unlink()
    path, passed_over = checkpoint.newest(tmp_path)
    assert path == second
    assert len(passed_over) == 2
    for line, damaged, name in zip(passed_over, (fourth, third), ("optimizer.pt", "model.safetensors"), strict=True):
        assert str(damaged) in line
        assert name in line
        assert "\n" not in line
    assert listed(tmp_path) == ["step-00000001", "step-00000002", "step-00000003.damaged", "step-00000004.damaged"]
    assert checkpoint.newest(tmp_path) == (second, [])


def test_a_step_damaged_twice_is_moved_aside_twice(tmp_path, saved):
    for _ in range(2):
        (path,) = publish(tmp_path, saved, 7)
        flip_a_bit(path / "trainer.json")
        assert checkpoint.newest(tmp_path)[0] is None
    assert len(listed(tmp_path)) == 2
    assert checkpoint.steps(tmp_path) == []


def test_where_nothing_is_whole_there_is_no_newest(tmp_path, saved):
    assert checkpoint.newest(tmp_path) == (None, [])
    for path in publish(tmp_path, saved, 1, 2):
        flip_a_bit(path / "optimizer.pt")
    path, passed_over = checkpoint.newest(tmp_path)
    assert path is None
    assert len(passed_over) == 2


def test_newest_is_by_step_and_not_by_time(tmp_path, saved):
    paths = publish(tmp_path, saved, 9, 99_999_999, 100_000_000)
    for age, path in enumerate(paths):
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    assert checkpoint.steps(tmp_path) == [9, 99_999_999, 100_000_000]
    assert checkpoint.newest(tmp_path)[0] == paths[-1]


def test_remains_of_interrupted_writes_are_removed_and_strangers_left(tmp_path, saved):
    (whole,) = publish(tmp_path, saved, 2)
    folder = checkpoint.folder(tmp_path)
    for name in (".step-00000003.77.tmp", ".step-00000001.8.tmp", "best", "step-7", "step-00000009.bak", "step-x"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    (folder / "notes.txt").touch()
    assert checkpoint.newest(tmp_path) == (whole, [])
    assert listed(tmp_path) == sorted(["best", "step-7", "step-00000009.bak", "step-x", "notes.txt", whole.name])


@pytest.mark.parametrize(
    "make", [lambda path: path.touch(), lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere")]
)
@pytest.mark.parametrize("name", ["step-00000009", "step-000000009"])
def test_a_stranger_that_is_named_like_a_checkpoint_is_never_chosen(tmp_path, saved, name, make):
    (whole,) = publish(tmp_path, saved, 2)
    make(checkpoint.folder(tmp_path) / name)
    assert checkpoint.newest(tmp_path)[0] == whole


def test_what_a_second_save_had_put_aside_when_it_was_killed_is_put_back(tmp_path, saved):
    _, second = publish(tmp_path, saved, 1, 2)
    before = content(second)
    shutil.copytree(second, second.with_name(f".{second.name}.77.tmp"))
    second.rename(second.with_name(f".{second.name}.77.old.tmp"))
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.newest(tmp_path) == (second, [])
    assert content(second) == before
    assert listed(tmp_path) == ["step-00000001", "step-00000002"]


def test_what_a_second_save_replaced_is_removed(tmp_path, saved):
    (path,) = publish(tmp_path, saved, 2)
    replaced = shutil.copytree(path, path.with_name(f".{path.name}.77.old.tmp"))
    flip_a_bit(replaced / "trainer.json")
    assert checkpoint.newest(tmp_path) == (path, [])
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
def test_the_newest_and_the_best_are_retained(tmp_path, saved, keep_last, best, kept):
    paths = publish(tmp_path, saved, 1, 2, 3, 4, 5)
    before = content(paths[-1])
    assert checkpoint.retain(tmp_path, keep_last, best) == []
    assert listed(tmp_path) == [checkpoint.name(step) for step in kept]
    assert content(paths[-1]) == before


@pytest.mark.parametrize(
    ("damaged", "best", "kept", "told"),
    [
        ([5], None, [3, 4], [5]),
        ([5, 4], None, [2, 3], [5, 4]),
        ([4], 1, [1, 3, 5], [4]),
        ([5, 4, 3, 2], None, [1], [5, 4, 3, 2]),
        ([5, 4, 3, 2, 1], 3, [], [5, 4, 3, 2, 1]),
        ([2], None, [4, 5], []),
    ],
)
def test_older_ones_are_retained_until_two_are_whole(tmp_path, saved, damaged, best, kept, told):
    publish(tmp_path, saved, 1, 2, 3, 4, 5)
    for step in damaged:
        flip_a_bit(checkpoint.path_of(tmp_path, step) / "optimizer.pt")
    lines = checkpoint.retain(tmp_path, 2, best)
    assert checkpoint.steps(tmp_path) == kept
    assert len(lines) == len(told)
    for line, step in zip(lines, told, strict=True):
        assert line.startswith(f"{checkpoint.path_of(tmp_path, step)}: damaged: optimizer.pt: ")
        assert f"{checkpoint.name(step)}.damaged" in listed(tmp_path)


def test_copies_under_other_steps_names_do_not_count_as_whole(tmp_path, saved):
    publish(tmp_path, saved, 1, 2)
    for step in (3, 4):
        shutil.copytree(saved(2), checkpoint.path_of(tmp_path, step))
    assert len(checkpoint.retain(tmp_path, 2, None)) == 2
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_checkpoint_of_another_layout_is_neither_counted_nor_touched(tmp_path, saved):
    *_, newest = publish(tmp_path, saved, 1, 2, 3, 4)
    edit_manifest(newest, format=3)
    assert checkpoint.retain(tmp_path, 2, None) == []
    assert checkpoint.steps(tmp_path) == [2, 3, 4]


def test_export_writes_the_weights_of_the_newest_whole_one_and_touches_nothing_else(tmp_path, saved):
    run_dir, out = tmp_path / "run", tmp_path / "weights.safetensors"
    _, second, third = publish(run_dir, saved, 1, 2, 3)
    flip_a_bit(third / "optimizer.pt")
    for name in (f".{third.name}.77.tmp", f".{checkpoint.name(4)}.77.old.tmp"):
        shutil.copytree(third, third.with_name(name))
    before, names = content(run_dir), listed(run_dir)
    out.write_text("older")
    assert checkpoint.export(run_dir, out) == second
    assert same(safetensors.torch.load_file(out), safetensors.torch.load_file(second / "model.safetensors"))
    assert content(run_dir) == before
    assert listed(run_dir) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", out.name]


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace"), (shutil, "copyfile")])
def test_an_export_that_fails_midway_leaves_what_was_there(tmp_path, saved, monkeypatch, owner, name):
    run_dir, out = tmp_path / "run", tmp_path / "weights.safetensors"
    publish(run_dir, saved, 1)
    out.write_text("older")

    def fail(source, target=None):
        if name == "copyfile":
            target.write_text("a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(UserError) as caught:
            checkpoint.export(run_dir, out)
    assert str(caught.value) == f"{out}: cannot be written: {os.strerror(errno.ENOSPC)}"
    assert out.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", out.name]


@pytest.mark.parametrize("out", ["nowhere/weights", "run", "run/recipe.yaml/weights", "w" * 300, "."])
def test_an_export_to_where_no_file_can_be_is_refused(tmp_path, saved, out):
    publish(tmp_path / "run", saved, 1)
    (tmp_path / "run" / "recipe.yaml").touch()
    before = content(tmp_path)
    with pytest.raises(UserError) as caught:
        checkpoint.export(tmp_path / "run", tmp_path / out)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path / out}: cannot be written: ")
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("steps", [(), (1, 2)])
def test_where_nothing_is_whole_nothing_is_exported(tmp_path, saved, steps):
    run_dir, out = tmp_path / "run", tmp_path / "weights.safetensors"
    for path in publish(run_dir, saved, *steps):
        flip_a_bit(path / "model.safetensors")
    out.write_text("older")
    with pytest.raises(UserError, match="no whole checkpoint") as caught:
        checkpoint.export(run_dir, out)
    assert str(run_dir) in str(caught.value)
    assert out.read_text() == "older"
    assert checkpoint.steps(run_dir) == list(steps)


class RunsCode:
    """An object whose unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_no_code_from_a_checkpoint_is_run(whole, tmp_path):
    marker = tmp_path / "code was run"
    torch.save({"optimizer": RunsCode(marker), "schedule": {}}, whole / "optimizer.pt")
    measure_anew(whole)
    assert checkpoint.damage(whole) is None
    with pytest.raises(UserError) as caught:
        checkpoint.read(whole)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{whole}: ")
    assert not marker.exists()
    torch.load(whole / "optimizer.pt", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("model.safetensors", b"no weights"),
        ("optimizer.pt", b"no archive"),
        ("trainer.json", b"{"),
    ],
)
def test_what_verifies_but_cannot_be_read_is_refused_in_one_line(whole, name, raw):
    (whole / name).write_bytes(raw)
    measure_anew(whole)
    assert checkpoint.damage(whole) is None
    with pytest.raises(UserError) as caught:
        checkpoint.read(whole)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{whole}: ")


def test_a_run_directory_has_one_run_at_a_time(tmp_path):
    first = rundir.RunDir(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        rundir.RunDir(tmp_path / "run", patience=0.3)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("run_dir: ")
    assert str(tmp_path / "run") in line
    rundir.RunDir(tmp_path / "another")
    del first
    rundir.RunDir(tmp_path / "run")


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        rundir.RunDir(tmp_path / "file" / below)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("run_dir: ")


def test_a_status_reads_back(tmp_path):
    run = rundir.RunDir(tmp_path)
    run.status("finished", step=7, total_steps=9, best_accuracy=None)
    status = rundir.read_status(tmp_path)
    assert {key: status[key] for key in ("state", "step", "total_steps", "best_accuracy", "pid")} == {
        "state": "finished", "step": 7, "total_steps": 9, "best_accuracy": None, "pid": os.getpid()
    }  # fmt: skip
    assert status["started"] <= status["updated"]


def test_a_run_that_is_there_no_more_was_interrupted(tmp_path):
    run = rundir.RunDir(tmp_path)
    run.status("running")
    assert rundir.read_status(tmp_path)["state"] == "running"
    del run
    assert rundir.read_status(tmp_path)["state"] == "interrupted"
    (tmp_path / ".lock").unlink()
    assert rundir.read_status(tmp_path)["state"] == "interrupted"


def test_nothing_is_known_of_a_run_on_another_host(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "running", "host": "another.host"}')
    assert rundir.read_status(tmp_path)["state"] == "running"


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\0"])
def test_a_status_that_cannot_be_read_is_none(tmp_path, text):
    if text is not None:
        (tmp_path / "status.json").write_text(text)
    assert rundir.read_status(tmp_path) is None


def test_a_file_of_a_run_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    run = rundir.RunDir(tmp_path)
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "recipe.yaml"]
