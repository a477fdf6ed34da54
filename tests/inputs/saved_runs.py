"""Checkpoints, event files and run directories: damaged, foreign, or something else."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from lrd.checkpoint import manifest

from .cases import (
    RECIPE,
    RECIPE_FILE,
    RUN_DIR,
    Expected,
    Input,
    accepted,
    refused,
    told,
    training,
)

_STEP = "trainer.max_steps=3"  # the saved run has two steps
_NEWEST = "run/checkpoints/step-00000002"
_OLDER = "run/checkpoints/step-00000001"
_lock = threading.Lock()


@lru_cache
def _finished_run() -> Path:
    """A run of two steps with a checkpoint of each, made once."""
    root = Path(__file__).parents[2]
    folder = Path(tempfile.mkdtemp(prefix="lrd-run-"))
    (folder / RECIPE_FILE).write_text(RECIPE)
    subprocess.run(
        [sys.executable, "-m", *training("checkpoint.every_steps=1")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return folder


def remove_finished_run() -> None:
    """Delete what `_finished_run` made."""
    if _finished_run.cache_info().currsize:
        shutil.rmtree(_finished_run(), ignore_errors=True)
        _finished_run.cache_clear()


def copy_run(folder: Path) -> None:
    """Put a finished run into a folder."""
    with _lock:
        run = _finished_run() / RUN_DIR
    shutil.copytree(run, folder / RUN_DIR, symlinks=True)


def _with(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        copy_run(folder)
        change(folder)

    return prepare


def _sign(checkpoint: Path) -> None:
    """Write a manifest that fits the files as they are now."""
    files = [path.name for path in sorted(checkpoint.iterdir()) if path.name != manifest.NAME]
    manifest.write_manifest(checkpoint, int(checkpoint.name.removeprefix("step-")), files)


def _rewrite(file: str, raw: bytes, is_signed: bool = False) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        (folder / _NEWEST / file).write_bytes(raw)
        if is_signed:
            _sign(folder / _NEWEST)

    return rewrite


def _cut(file: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / _NEWEST / file, 100)


def _flip(file: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        raw = bytearray((folder / _NEWEST / file).read_bytes())
        raw[len(raw) // 2] ^= 1
        (folder / _NEWEST / file).write_bytes(raw)

    return flip


class _Owned:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch owned",)


def _change_manifest(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / _NEWEST / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _change_trainer(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / _NEWEST / "trainer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        _sign(folder / _NEWEST)

    return change


def _damage_all(folder: Path) -> None:
    for checkpoint in (_NEWEST, _OLDER):
        (folder / checkpoint / "model.safetensors").write_bytes(b"")


def _replace_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "run/checkpoints")
    (folder / "run/checkpoints").write_text("")


def _copy_as(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copytree(folder / _NEWEST, folder / "run/checkpoints" / name)


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], Expected]] = {
    "valid": (lambda folder: None, told("going on after step 2")),
    **{
        f"a flipped bit in {file}": (_flip(file), told("damaged", "going on after step 1"))
        for file in ("model.safetensors", "optimizer.pt", "trainer.json")
    },
    **{
        f"{file} is cut": (_cut(file), told("damaged", "going on after step 1"))
        for file in ("model.safetensors", "optimizer.pt", "trainer.json", "manifest.json")
    },
    **{
        f"{file} is missing": (
            lambda folder, file=file: (folder / _NEWEST / file).unlink(),
            told("damaged", "going on after step 1"),
        )
        for file in ("model.safetensors", "optimizer.pt", "trainer.json", "manifest.json")
    },
    "manifest.json is a list": (_rewrite("manifest.json", b"[]"), told("damaged")),
    "manifest.json is deeply nested": (
        _rewrite("manifest.json", 100_000 * b"["),
        told("damaged"),
    ),
    "manifest.json is not UTF-8": (_rewrite("manifest.json", b"\xff\xfe"), told("damaged")),
    "a file is a folder": (
        lambda folder: (
            (folder / _NEWEST / "model.safetensors").unlink(),
            (folder / _NEWEST / "model.safetensors").mkdir(),
        ),
        told("damaged"),
    ),
    "a file is a FIFO": (
        lambda folder: (
            (folder / _NEWEST / "model.safetensors").unlink(),
            os.mkfifo(folder / _NEWEST / "model.safetensors"),
        ),
        told("damaged"),
    ),
    "the manifest names a file outside": (
        _change_manifest(files={"../../../recipe.yaml": {"bytes": 1, "sha256": ""}}),
        told("damaged"),
    ),
    "the manifest is of another layout": (
        _change_manifest(format=99, sha256=None),
        refused("99"),
    ),
    "the manifest is of another step": (_change_manifest(step=7), told("damaged")),
    "all are damaged": (_damage_all, told("no valid checkpoint")),
    "an empty folder is the newest": (
        lambda folder: (folder / "run/checkpoints/step-00000003").mkdir(),
        told("damaged", "going on after step 2"),
    ),
    "a file is the newest": (
        lambda folder: (folder / "run/checkpoints/step-00000003").write_text(""),
        accepted("is no checkpoint, and the checkpoint of that step takes its place"),
    ),
    "checkpoints is a file": (_replace_checkpoints, refused("run/checkpoints")),
    "checkpoints is a link to nothing": (
        lambda folder: (
            shutil.rmtree(folder / "run/checkpoints"),
            (folder / "run/checkpoints").symlink_to("nothing"),
        ),
        refused("run/checkpoints"),
    ),
    "a name of 30 digits": (
        _copy_as("step-" + 30 * "9"),
        told("damaged", "going on after step 2"),
    ),
    "a name with other characters": (_copy_as("step-0000000x"), accepted("is no checkpoint")),
    "a leftover of an interrupted write": (
        _copy_as(".step-00000003.1.tmp"),
        accepted("is removed"),
    ),
    # Files that fit their manifest, and yet are no state of this run.
    "optimizer.pt would run a command": (
        _rewrite("optimizer.pt", pickle.dumps(_Owned(), protocol=2), is_signed=True),
        refused(_NEWEST, "optimizer.pt"),
    ),
    "optimizer.pt is empty": (_rewrite("optimizer.pt", b"", is_signed=True), refused(_NEWEST)),
    "model.safetensors claims a huge header": (
        _rewrite("model.safetensors", b"\xff" * 8, is_signed=True),
        refused(_NEWEST),
    ),
    "model.safetensors has no tensors": (
        _rewrite("model.safetensors", b"\x02\0\0\0\0\0\0\0{}", is_signed=True),
        refused(_NEWEST),
    ),
    "trainer.json is empty": (_rewrite("trainer.json", b"", is_signed=True), refused(_NEWEST)),
    "trainer.json has no step": (_rewrite("trainer.json", b"{}", is_signed=True), refused(_NEWEST)),
    "trainer.json is a list": (_rewrite("trainer.json", b"[]", is_signed=True), refused(_NEWEST)),
    "trainer.json has a step of text": (_change_trainer(step="two"), refused(_NEWEST)),
    "trainer.json has a negative step": (_change_trainer(step=-5), refused(_NEWEST)),
    "trainer.json has a huge step": (_change_trainer(step=10**30), refused(_NEWEST)),
    "trainer.json has other settings": (
        _change_trainer(identity={"seed": 7}),
        refused(_NEWEST, "more settings differ", "run_dir"),
    ),
    "trainer.json has no settings": (_change_trainer(identity=None), refused(_NEWEST)),
    "trainer.json has a list as best": (_change_trainer(best=[1]), refused(_NEWEST)),
}

# Overrides with which a run of RECIPE cannot go on.
CHANGED: dict[tuple[str, ...], Expected] = {
    ("optimizer.lr=0.2",): refused("optimizer.lr", "run_dir"),
    ("seed=1",): refused("seed", "run_dir"),
    ("model.width=4",): refused("model.width", "run_dir"),
    ("model.width=4", "checkpoint.allow_changed=true"): refused("run/checkpoints"),
    ("model.arch=resnet34", "checkpoint.allow_changed=true"): refused("run/checkpoints"),
    ("model.arch=resnet50", "checkpoint.allow_changed=true"): refused("run/checkpoints"),
    ("lr_dropout=null",): refused("lr_dropout", "run_dir"),
    ("data.batch_size=120",): refused("data.batch_size", "run_dir"),
    ("optimizer.name=Adam", "optimizer.momentum=null"): refused("optimizer.name"),
    ("trainer.precision=bf16",): refused("trainer.precision"),
    ("data.dataset=synthetic",): refused("data.dataset"),
    ("trainer.max_steps=1",): told("nothing left"),
}


def _events(folder: Path) -> Path:
    (path,) = (folder / RUN_DIR).glob("events.out.tfevents.*")
    return path


def _cut_events(size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(_events(folder), size)


def _overwrite_events(raw: bytes, at: int) -> Callable[[Path], None]:
    def overwrite(folder: Path) -> None:
        with _events(folder).open("r+b") as stream:
            stream.seek(at)
            stream.write(raw)

    return overwrite


EVENT_FILES: dict[str, tuple[Callable[[Path], object], Expected]] = {
    "cut in the middle": (_cut_events(3000), told("events.out.tfevents", "step")),
    "cut at the beginning": (_cut_events(20), told("events.out.tfevents", "step")),
    "empty": (_cut_events(0), told("events.out.tfevents", "step")),
    "deleted": (lambda folder: _events(folder).unlink(), told("event", "step")),
    "garbage": (
        lambda folder: _events(folder).write_bytes(5000 * b"garbage"),
        told("events.out.tfevents", "step"),
    ),
    "garbage in the middle": (
        _overwrite_events(400 * b"\xff", 3000),
        told("events.out.tfevents", "step"),
    ),
    "a part of a record at the end": (
        lambda folder: _events(folder).open("ab").write(b"\x10\0\0\0\0\0\0\0abc"),
        accepted("a start that was killed leaves it, and no step is lost"),
    ),
    "a folder of such a name": (
        lambda folder: (folder / "run/events.out.tfevents.9999999999.x.1.0").mkdir(),
        told("events.out.tfevents.9999999999"),
    ),
    "a FIFO of such a name": (
        lambda folder: os.mkfifo(folder / "run/events.out.tfevents.0000000001.x.1.0"),
        told("events.out.tfevents.0000000001"),
    ),
    "a link to nothing": (
        lambda folder: (folder / "run/events.out.tfevents.0000000001.x.1.0").symlink_to("no"),
        told("events.out.tfevents.0000000001"),
    ),
    "another program's": (
        lambda folder: (folder / "run/events.out.tfevents").write_bytes(b""),
        accepted("has no time in its name"),
    ),
}

# Values of run_dir, and how to prepare it.
RUN_DIRS: dict[str, tuple[Callable[[Path], object], Expected]] = {
    "a-file": (lambda folder: (folder / "a-file").write_text(""), refused("run_dir", "a-file")),
    "a-file/run": (lambda folder: (folder / "a-file").write_text(""), refused("run_dir", "a-file")),
    "/proc/run": (lambda folder: None, refused("run_dir", "/proc")),
    "/dev/null/run": (lambda folder: None, refused("run_dir", "/dev/null")),
    "loop": (lambda folder: (folder / "loop").symlink_to("loop"), refused("run_dir", "loop")),
    "dangling": (
        lambda folder: (folder / "dangling").symlink_to("nothing/there"),
        refused("run_dir", "dangling"),
    ),
    '"a\\0b"': (lambda folder: None, refused("run_dir")),
    '"\\0"': (lambda folder: None, refused("run_dir")),
    "''": (lambda folder: None, refused("run_dir")),
    "' '": (lambda folder: None, accepted("a folder may have this name")),
    "'[/x]'": (lambda folder: None, told("[/x]")),
    "'runs/lr[a]0.1'": (lambda folder: None, told("lr[a]0.1")),
    '"a\\nb"': (lambda folder: None, accepted("a folder may have this name")),
    '"\\ud83d\\ude00"': (lambda folder: None, refused("run_dir")),
    "caf\u00e9-\u4e2d": (lambda folder: None, told("caf\u00e9-\u4e2d")),
    300 * "x": (lambda folder: None, refused("run_dir")),
    "/".join(100 * [60 * "x"]): (lambda folder: None, refused("run_dir")),
    "~nobody-here": (lambda folder: None, refused("run_dir", "nobody-here")),
    "~nobody-here/run": (lambda folder: None, refused("run_dir", "nobody-here")),
    "[a]": (lambda folder: None, refused("run_dir")),
    "1": (lambda folder: None, refused("run_dir")),
    "null": (lambda folder: None, refused("run_dir")),
    ".": (lambda folder: None, accepted("the working folder")),
    "recipe.yaml": (lambda folder: None, refused("run_dir", "recipe.yaml")),
}

# Files that stand where a run writes its own.
IN_THE_WAY: dict[str, tuple[Callable[[Path], object], Expected]] = {
    "status.json is a folder": (
        lambda folder: (folder / "run/status.json").mkdir(parents=True),
        refused("status.json"),
    ),
    "recipe.yaml is a folder": (
        lambda folder: (folder / "run/recipe.yaml").mkdir(parents=True),
        refused("recipe.yaml"),
    ),
    ".lock is a folder": (
        lambda folder: (folder / "run/.lock").mkdir(parents=True),
        refused("run_dir", "run"),
    ),
    "status.json is garbage": (
        lambda folder: ((folder / "run").mkdir(), (folder / "run/status.json").write_text("{")),
        accepted("it is written anew"),
    ),
}


def inputs() -> list[Input]:
    found = []
    for name, (change, expected) in CHECKPOINTS.items():
        command = training(_STEP)
        found.append(Input("checkpoints", name, expected, command, prepare=_with(change)))
    for overrides, expected in CHANGED.items():
        name = " ".join(overrides)
        command = training(_STEP, *overrides)
        found.append(Input("changed recipes", name, expected, command, prepare=copy_run))
    for name, (change, expected) in EVENT_FILES.items():
        command = training(_STEP)
        found.append(Input("event files", name, expected, command, prepare=_with(change)))
    for value, (change, expected) in RUN_DIRS.items():
        command = ("lrd.train", RECIPE_FILE, f"run_dir={value}")
        found.append(Input("run directories", value[:80], expected, command, prepare=change))
    for name, (change, expected) in IN_THE_WAY.items():
        found.append(Input("run directories", name, expected, training(), prepare=change))

    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = (sys.executable, "-m", "lrd.train", RECIPE_FILE, "run_dir=caf\u00e9-\u4e2d")
    expected = refused("run_dir", "PYTHONUTF8")
    found.append(
        Input(
            "run directories",
            "unicode under an ASCII locale",
            expected,
            command,
            environment=ascii_locale,
        )
    )
    return found
