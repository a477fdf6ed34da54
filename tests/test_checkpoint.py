"""Checkpoints on disk: written whole or not at all, verified before they are read; and the run directory."""

import errno
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

import lrd
from lrd import checkpoint, rundir
from lrd.checkpoint import State
from lrd.errors import UserError

FILES = ("model.safetensors", "optimizer.pt", "trainer.json")


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


def edit_manifest(path: Path, **changed) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changed}))


def measure_anew(path: Path) -> None:
    """Make the manifest hold for the files as they are."""
    files = {}
    for name in FILES:
        raw = (path / name).read_bytes()
        files[name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    edit_manifest(path, files=files)


def test_a_checkpoint_has_the_published_layout(tmp_path):
    path = checkpoint.save(tmp_path, make_state(1234))
    assert path == tmp_path / "checkpoints" / "step-00001234"
    assert listed(tmp_path) == ["step-00001234"]
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "manifest.json"])
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == set(FILES)
    for name, measured in manifest["files"].items():
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
    from safetensors.torch import load_file

    state = make_state(1)
    weights = load_file(checkpoint.save(tmp_path, state) / "model.safetensors")
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
    assert {*FILES, "manifest.json"} <= before
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("saved"), make_state(1))


@pytest.fixture
def whole(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints" / saved.name)


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
        lambda path: edit_manifest(path, format=checkpoint.FORMAT + 1),
        lambda path: edit_manifest(path, files=[]),
        lambda path: edit_manifest(path, files={}),
        lambda path: edit_manifest(path, files=dict.fromkeys(FILES, 3)),
        shutil.rmtree,
    ],
    ids=[
        *("missing", "empty", "garbage", "truncated", "a list", "an empty mapping", "of another layout"),
        *("files a list", "no files", "files without hashes", "no folder"),
    ],
)
def test_damage_of_the_manifest_is_found_and_named(whole, act):
    act(whole)
    (line,) = checkpoint.damage(whole).splitlines()
    assert line.startswith("manifest.json: ")


def publish(run_dir: Path, saved: Path, *steps: int) -> list[Path]:
    return [shutil.copytree(saved, checkpoint.folder(run_dir) / checkpoint.name(step)) for step in steps]


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


@pytest.mark.parametrize(
    ("keep_last", "best", "kept"),
    [
        (1, None, [5]),
        (2, None, [4, 5]),
        (2, 1, [1, 4, 5]),
        (2, 4, [4, 5]),
        (1, 5, [5]),
        (9, 2, [1, 2, 3, 4, 5]),
        (1, 77, [5]),
    ],
)
def test_the_newest_and_the_best_are_retained(tmp_path, saved, keep_last, best, kept):
    paths = publish(tmp_path, saved, 1, 2, 3, 4, 5)
    before = content(paths[-1])
    checkpoint.retain(tmp_path, keep_last, best)
    assert listed(tmp_path) == [checkpoint.name(step) for step in kept]
    assert content(paths[-1]) == before


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
