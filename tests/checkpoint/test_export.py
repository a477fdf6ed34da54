"""Exported weights: the checkpoint that was asked for, complete and verified, or nothing at all."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

from lrd import recipe as recipes
from lrd.checkpoint import export, manifest, network_config, store
from lrd.checkpoint.export import export_weights, find_checkpoint
from lrd.errors import UserError
from tests.helpers.checkpoints import content, flip_a_bit, listed, make_state

LAYOUT2 = Path(__file__).parent / "layout2"
HF_FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]


def make_full_state(step: int) -> store.TrainState:
    """A state whose config is that of a network; the best evaluation was at step 2."""
    import torch

    config = network_config.describe_network(
        recipes.Recipe(),
        classes=["a", "b"],
        mean=torch.tensor([1.0, 2.0, 3.0])[:, None, None],
        std=torch.tensor([0.1, 0.2, 0.3])[:, None, None],
        image_size=(8, 8),
    )
    config = network_config.with_results(
        config, step=step, epoch=1, evaluated=step, metrics={"accuracy": 0.5}, best=None
    )
    state = make_state(step)
    trainer = {**state.trainer, "best": {"step": 2, "accuracy": 0.9}}
    return dataclasses.replace(state, config=config, trainer=trainer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[int], Path]:
    """Return a function that gives the checkpoint of a step; each is written once."""
    run_dir = tmp_path_factory.mktemp("saved")
    return functools.cache(lambda step: store.save(run_dir, make_full_state(step)))


@pytest.fixture
def publish(tmp_path, saved) -> Callable[..., Path]:
    """Return a function that makes the run directory `run` with checkpoints of some steps."""

    def make(*steps: int) -> Path:
        for step in steps:
            shutil.copytree(saved(step), store.checkpoint_path(tmp_path / "run", step))
        return tmp_path / "run"

    return make


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(*arguments: object, **more: object) -> str:
    """The one line with which an export is refused."""
    with pytest.raises(UserError) as caught:
        export_weights(*arguments, **more)  # type: ignore[arg-type]
    (line,) = str(caught.value).splitlines()
    return line


def test_a_file_is_a_copy_of_the_newest_valid_weights(tmp_path, publish, capsys):
    run_dir = publish(1, 2, 3)
    damaged = store.checkpoint_path(run_dir, 3)
    flip_a_bit(damaged / "optimizer.pt")
    shutil.copytree(damaged, damaged.with_name(f".{damaged.name}.77.tmp"))
    before = content(run_dir)
    names = listed(run_dir)
    out = tmp_path / "w.safetensors"
    out.write_text("older")

    checkpoint = export_weights(run_dir, out)
    assert checkpoint == store.checkpoint_path(run_dir, 2)
    assert out.read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert f"{damaged}: passed over, it is damaged: optimizer.pt" in capsys.readouterr().out
    assert content(run_dir) == before
    assert listed(run_dir) == names
    assert left(tmp_path) == ["run", out.name]


@pytest.mark.parametrize(
    ("choice", "step"), [({}, 3), ({"best": True}, 2), ({"step": 1}, 1), ({"step": 3}, 3)]
)
@pytest.mark.parametrize("ema", [False, True])
def test_each_checkpoint_can_be_chosen_and_its_averages(tmp_path, publish, choice, step, ema):
    run_dir = publish(1, 2, 3)
    out = tmp_path / "w.safetensors"
    checkpoint = export_weights(run_dir, out, ema=ema, **choice)
    assert checkpoint == store.checkpoint_path(run_dir, step)

    name = "ema.safetensors" if ema else "model.safetensors"
    assert out.read_bytes() == (checkpoint / name).read_bytes()
    config = network_config.read_config(out)
    assert config["lrd"]["weights"] == ("ema" if ema else "network")
    assert config["lrd"]["step"] == step
    assert config["lrd"]["recipe"]["model"]["arch"] == "resnet34"
    assert "run_dir" not in config["lrd"]["recipe"]


@pytest.mark.parametrize("older", [None, [], HF_FILES])
def test_a_folder_has_hugging_faces_files_and_replaces_an_older_export(tmp_path, publish, older):
    run_dir = publish(1, 2)
    out = tmp_path / "out"
    if older is not None:
        out.mkdir()
        for name in older:
            (out / name).write_text("older")

    checkpoint = export_weights(run_dir, out, ema=True)
    assert left(out) == HF_FILES
    assert left(tmp_path) == ["out", "run"]
    weights = safetensors.torch.load_file(out / "model.safetensors")
    assert weights.keys() == safetensors.torch.load_file(checkpoint / "ema.safetensors").keys()

    config = json.loads((out / "config.json").read_text())
    assert config == network_config.read_config(checkpoint / "ema.safetensors")
    assert config["id2label"] == {"0": "a", "1": "b"}
    assert config["label2id"] == {"a": 0, "b": 1}
    preprocessor = json.loads((out / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"shortest_edge": 8}
    assert preprocessor["crop_size"] == {"height": 8, "width": 8}
    assert preprocessor["image_mean"] == [1.0, 2.0, 3.0]
    assert not preprocessor["do_rescale"]


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("x.pt", "an export is a file that ends in .safetensors, or a folder"),
        ("x.safetensor", "an export is a file that ends in .safetensors, or a folder"),
        ("run", "is not replaced: it contains checkpoints"),
        ("file", "an export is a file that ends in .safetensors"),
        ("nowhere/w.safetensors", "cannot be written: No such file"),
        ("nowhere/folder", "cannot be written: No such file"),
        ("w" * 300 + ".safetensors", "cannot be written: File name too long"),
    ],
)
def test_an_export_to_an_impossible_path_is_refused(tmp_path, publish, out, expected):
    run_dir = publish(1)
    (tmp_path / "file").write_text("a file")
    before = content(tmp_path)

    line = refused(run_dir, tmp_path / out)
    assert line.startswith(f"{tmp_path / out}: ")
    assert expected in line
    assert content(tmp_path) == before
    assert left(tmp_path) == ["file", "run"]


@pytest.mark.parametrize("out", ["w.safetensors", "folder"])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(os, "fsync", 1), (Path, "replace", 1), (Path, "rename", 2), (shutil, "copyfile", 1)],
)
def test_a_failed_export_leaves_the_old_one_untouched(
    tmp_path, publish, monkeypatch, owner, name, call, out
):
    run_dir = publish(1)
    out = tmp_path / out
    export_weights(run_dir, out)
    before = content(tmp_path)
    works = getattr(owner, name)
    calls = []

    def fail(*arguments, **more):
        calls.append(arguments)
        if len(calls) != call:
            return works(*arguments, **more)
        if name == "copyfile":
            arguments[1].write_text("a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        if (name, out.suffix) not in (("replace", ""), ("rename", ".safetensors")):
            line = refused(run_dir, out)
            assert line == f"{out}: cannot be written: {os.strerror(errno.ENOSPC)}"

    assert content(tmp_path) == before


def test_a_copy_that_the_disk_changes_is_noticed(tmp_path, publish, monkeypatch):
    run_dir = publish(1)
    monkeypatch.setattr(export, "sync", lambda path, drop_cache: flip_a_bit(path))
    line = refused(run_dir, tmp_path / "w.safetensors")
    assert "the copy differs from the checkpoint" in line
    assert left(tmp_path) == ["run"]


def test_what_is_not_there_is_named(tmp_path, publish):
    out = tmp_path / "w.safetensors"
    assert "no such run directory" in refused(tmp_path / "nowhere", out)

    run_dir = publish(1, 3)
    line = refused(run_dir, out, step=7)
    assert line.endswith("the checkpoint of step 7 is not there; has 1, 3")
    line = refused(run_dir, out, best=True)
    assert "step 2 of the best evaluation (checkpoint.keep_best keeps it) is not there" in line
    assert "give only one of them" in refused(run_dir, out, best=True, step=3)

    for path in store.checkpoints_dir(run_dir).iterdir():
        flip_a_bit(path / "model.safetensors")
    assert "model.safetensors: sha256" in refused(run_dir, out, step=3)
    assert refused(run_dir, out).endswith("there is no valid checkpoint in it")
    assert not out.exists()


def test_a_run_without_averages_has_none_to_export(tmp_path):
    state = dataclasses.replace(make_full_state(1), ema=None)
    path = store.save(tmp_path, state)
    line = refused(tmp_path, tmp_path / "w.safetensors", ema=True)
    assert line == f"{path}: has no averaged weights; a run has them with trainer.ema_decay"


def test_a_run_without_an_evaluation_has_no_best_checkpoint(tmp_path):
    state = make_full_state(1)
    store.save(tmp_path, dataclasses.replace(state, trainer={**state.trainer, "best": None}))
    assert "no evaluation yet" in refused(tmp_path, tmp_path / "w.safetensors", best=True)


def test_an_older_layout_can_be_exported_to_a_file_without_a_config(tmp_path):
    out = tmp_path / "w.safetensors"
    checkpoint = export_weights(LAYOUT2, out)
    assert manifest.layout_version(checkpoint) == 2
    assert network_config.read_config(out) == {}
    assert "does not describe its network" in refused(LAYOUT2, tmp_path / "folder")
    assert left(tmp_path) == ["w.safetensors"]


def test_the_newest_checkpoint_is_found_without_a_choice(publish):
    run_dir = publish(1, 2)
    assert find_checkpoint(run_dir) == store.checkpoint_path(run_dir, 2)
