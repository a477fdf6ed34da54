"""Steps of a run are computed again, compared, forked and looked at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lrd.checkpoint import manifest, store
from lrd.errors import UserError
from lrd.replay.computing.state import Difference, find_difference
from lrd.replay.diff import diff
from lrd.replay.fork import fork
from lrd.replay.history import read_history
from lrd.replay.rerun import rerun
from lrd.replay.verify import verify
from tests.helpers.equality import assert_same_final_state
from tests.helpers.replaying import (
    FlipBit,
    replays_in_this_process,
    tamper_with_checkpoint,
    tamper_with_record,
    train,
    train_on_one_thread,
    train_recipe,
)
from tests.helpers.tensorboard_events import read_scalars

pytestmark = pytest.mark.usefixtures("one_thread")

ELEMENT = "layer3.0.conv1.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 15 steps with checkpoints after 5, 10 and 15."""
    return train_on_one_thread(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of that run, to be tampered with."""
    return Path(shutil.copytree(trained, tmp_path / "copied"))


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    with replays_in_this_process(monkeypatch):
        yield


# What a checkpoint says of its past


def test_checkpoints_say_who_computed_them_and_which_came_before(trained):
    trainer = store.read_trainer(store.checkpoint_path(trained, 15))
    (start,) = trainer["starts"]
    assert (start["step"], start["ranks"], start["threads"], start["device"]) == (0, 1, 1, "cpu")
    assert start["versions"]["torch"] == torch.__version__

    links = [manifest.read_previous(store.checkpoint_path(trained, step)) for step in (5, 10, 15)]
    assert links[0] is None
    assert links[1:] == [
        manifest.read_link(store.checkpoint_path(trained, step)) for step in (5, 10)
    ]


# verify


def test_a_run_follows_from_its_recipe(trained):
    result = verify(trained)
    assert result.is_valid
    assert result.is_exact
    assert [(window.first, window.last) for window in result.windows] == [(0, 5), (5, 10), (10, 15)]
    assert result.steps == 15


def test_some_windows_are_drawn_from_a_seed(trained):
    result = verify(trained, num_windows=1, seed=1)
    assert result.is_valid
    assert len(result.windows) == 1


def test_a_checkpoint_that_was_changed_is_found_by_step_and_tensor(copied):
    tamper_with_checkpoint(copied, 10, ELEMENT, 7)
    result = verify(copied)
    (chain,) = result.faults
    assert "step-00000010" in chain
    assert "step 15" in chain
    # What comes after it does not follow from it either.
    assert [bool(window.fault) for window in result.windows] == [False, True, True]
    assert (result.windows[1].step, result.windows[1].name) == (10, ELEMENT)
    assert f"{ELEMENT}[0,0,2,1]" in result.windows[1].fault


def test_a_record_that_was_changed_is_found_by_step_and_tag(copied):
    tamper_with_record(copied, 8, "train/loss")
    result = verify(copied)
    assert [bool(window.fault) for window in result.windows] == [False, True, False]
    assert (result.windows[1].step, result.windows[1].name) == (8, "train/loss")
    assert "the state at the end of the window follows" in result.windows[1].fault


def test_on_another_processor_a_tolerance_is_stated(copied, monkeypatch):
    monkeypatch.setattr("lrd.distributed.hardware.describe_processor", lambda: "another one")
    result = verify(copied)
    assert result.is_valid
    assert not result.is_exact
    assert any("another one" in note for note in result.notes)


def test_other_data_are_refused_by_key(trained):
    with pytest.raises(UserError, match="could not be computed again"):
        verify(trained, overrides=["data.dataset=synthetic"])


# diff


def test_equal_runs_are_equal(trained, copied):
    result = diff(trained, copied)
    assert result.are_equal
    assert (result.settings, result.circumstances) == ({}, {})
    assert (result.equal_until, result.common_steps) == (15, 15)


def test_another_lr_from_one_step_on_is_found_there(trained, tmp_path):
    other = tmp_path / "other" / "run"
    train(other, "schedule.name=MultiStepLR", "schedule.milestones=[7]", "schedule.unit=step")
    result = diff(trained, other)
    assert result.settings["schedule.name"] == ("constant", "MultiStepLR")
    assert (result.record.step, result.record.tag) == (8, "lr/group0")
    assert result.equal_until == 5
    assert result.step == 8
    assert result.difference.name == "conv1.weight"


def test_a_bit_that_flips_is_found_by_step_tensor_and_element(trained, copied, monkeypatch):
    tamper_with_record(copied, 9, "train/loss")  # else there is nothing to look for
    name = f"{ELEMENT} (momentum_buffer)"
    flip = FlipBit(7, name, 11)
    with replays_in_this_process(monkeypatch, flip, of_run=copied):
        result = diff(trained, copied)
    assert result.step == 7
    assert (result.difference.name, result.difference.num_elements) == (name, 1)
    assert result.difference.element == (0, 1, 0, 2)


def test_a_difference_that_does_not_follow_from_the_runs_is_told(trained, copied):
    tamper_with_record(copied, 8, "train/grad_norm")
    result = diff(trained, copied)
    assert result.step is None
    (line,) = result.not_reproduced
    assert line.startswith(f"{copied}: step 8: train/grad_norm")


# fork


def test_a_fork_without_changes_equals_its_parent(trained, tmp_path):
    run_dir = tmp_path / "forked"
    forked = fork(trained, 7, [f"run_dir={run_dir}"])
    assert (forked.changes, forked.num_replayed, forked.ranks) == ({}, 2, 1)
    heading = (run_dir / "recipe.yaml").read_text().splitlines()[0]
    assert heading.startswith(f"# forked from {trained} at step 7")

    train_recipe(run_dir / "recipe.yaml")
    assert_same_final_state(run_dir, trained)
    records = read_scalars(run_dir)
    expected = read_scalars(trained)
    for tag in records:
        if not tag.startswith("train/images_per_second"):
            assert records[tag] == expected[tag], tag
    assert records.keys() == expected.keys()
    columns = (run_dir / "metrics.csv").read_text().splitlines()[0]
    assert columns == (trained / "metrics.csv").read_text().splitlines()[0]

    trainer = store.read_trainer(store.checkpoint_path(run_dir, 15))
    origin = store.checkpoint_path(trained, 5)
    assert trainer["forked_from"]["manifest"] == manifest.read_link(origin).sha256
    assert 7 in store.list_steps(run_dir)
    assert verify(run_dir).is_valid


def test_a_fork_with_another_lr_differs_from_its_first_step_on(trained, tmp_path):
    run_dir = tmp_path / "forked"
    forked = fork(trained, 10, [f"run_dir={run_dir}", "optimizer.lr=0.01"])
    assert forked.changes == {"optimizer.lr": (0.05, 0.01)}
    assert forked.num_replayed == 0
    train_recipe(run_dir / "recipe.yaml")

    result = diff(trained, run_dir)
    assert result.settings == {"optimizer.lr": (0.05, 0.01)}
    assert (result.equal_until, result.record.step, result.step) == (10, 11, 11)
    assert verify(run_dir).is_valid


@pytest.mark.parametrize(
    ("step", "overrides", "message"),
    [
        (7, [], "run_dir=NEW is missing"),
        (0, ["run_dir={new}"], "a fork begins at step 1"),
        (16, ["run_dir={new}"], "checkpoints up to step 15"),
        (7, ["run_dir={old}"], "has a run already"),
        (7, ["run_dir={new}", "optimizer.lrr=1"], "lrr"),
    ],
)
def test_a_fork_that_cannot_be_made_leaves_nothing(trained, tmp_path, step, overrides, message):
    places = {"new": tmp_path / "new", "old": trained}
    with pytest.raises(UserError, match=message):
        fork(trained, step, [override.format(**places) for override in overrides])
    assert not (tmp_path / "new").exists()


# replay


def test_steps_come_out_again_and_show_norms_and_images(trained, tmp_path):
    result = rerun(trained, 7, 9, out=tmp_path / "out", norms=True, samples=True)
    assert result.difference is None
    assert list(result.rows) == [7, 8, 9]
    assert list(result.norms) == [7, 8, 9]
    assert result.norms[8]["conv1.weight"]["update"] > 0
    assert "gradient_norm/conv1.weight" in read_scalars(tmp_path / "out")

    rows = torch.load(result.samples, weights_only=True)["rows"]
    assert [(row["step"], row["rank"], len(row["indices"])) for row in rows] == [
        (7, 0, 240),
        (8, 0, 240),
        (9, 0, 240),
    ]
    # Both epochs see each sample at most once.
    assert len(set(rows[0]["indices"] + rows[1]["indices"])) == 480


def test_images_alone_need_no_step(trained, tmp_path):
    result = rerun(trained, 7, 7, out=tmp_path / "out", samples=True)
    assert result.num_steps == 0
    assert result.samples.is_file()


def test_the_first_value_that_is_not_finite_is_found_with_its_module(tmp_path):
    run_dir = tmp_path / "run"
    overrides = ["optimizer.lr=1e30", "trainer.on_nonfinite=skip", "trainer.max_steps=4"]
    train(run_dir, *overrides)
    result = rerun(run_dir, 1, 4, nonfinite=True)
    assert result.nonfinite["step"] == 2
    assert result.nonfinite["where"].startswith("the output of ")


@pytest.mark.parametrize(("first", "last"), [(0, 3), (5, 4)])
def test_steps_that_do_not_exist_are_refused(trained, first, last):
    with pytest.raises(UserError, match="steps"):
        rerun(trained, first, last)


# Runs of former versions


def test_a_run_of_a_former_version_is_read_with_one_line(copied):
    for step in store.list_steps(copied):
        path = store.checkpoint_path(copied, step)
        trainer = store.read_trainer(path)
        del trainer["starts"], trainer["steps_per_epoch"]
        (path / store.TRAINER_FILE).write_text(json.dumps(trainer, indent=1))
        manifest.write_manifest(path, step, list(manifest.read_files(path)))

    result = verify(copied)
    assert any("did not record ranks" in note for note in result.notes)
    assert result.is_valid


# Comparing states


def test_states_are_compared_by_their_bits():
    nan = torch.tensor([float("nan"), 0.0, 1.0])
    assert find_difference({"a": nan}, {"a": nan.clone()}) is None
    zero = {"a": torch.tensor([[0.0, 1.0]])}
    difference = find_difference(zero, {"a": torch.tensor([[-0.0, 1.0]])})
    assert isinstance(difference, Difference)
    assert difference.element == (0, 0)
    assert find_difference(zero, {"a": torch.tensor([[0.0, 1.0]], dtype=torch.float64)}) is not None
    assert find_difference({"a": True}, {"a": True}) is None
    assert find_difference({"a": 1}, {"a": 1.0}).name == "a"
    assert find_difference(zero, {}).name == "a"


# What a run may have been through


def test_a_fork_where_the_recipe_changed_takes_the_new_one(tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, "trainer.epochs=2")
    train(run_dir, "trainer.epochs=3", "lr_dropout.keep_prob=0.8", "checkpoint.allow_changed=true")
    new = tmp_path / "new"
    forked = fork(run_dir, 10, [f"run_dir={new}"])
    assert forked.changes == {}
    train_recipe(new / "recipe.yaml")
    assert_same_final_state(new, run_dir)
    assert verify(run_dir).is_valid
    assert verify(new).is_valid


def test_a_fork_of_a_fork_before_its_first_step_has_its_changes(trained, tmp_path):
    first = tmp_path / "first"
    fork(trained, 8, [f"run_dir={first}", "optimizer.lr=0.02"])
    second = tmp_path / "second"
    forked = fork(first, 8, [f"run_dir={second}"])
    assert forked.changes == {}
    train_recipe(first / "recipe.yaml")
    train_recipe(second / "recipe.yaml")
    assert_same_final_state(second, first)

    # Neither the way from parent to child nor where the parent lies matters.
    moved = Path(shutil.copytree(trained, tmp_path / "moved"))
    result = diff(moved, second)
    assert (result.record.step, result.step) == (9, 9)


def test_a_change_of_the_length_is_one_where_the_lr_depends_on_it(tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, "schedule.name=CosineAnnealingLR", "trainer.epochs=2")
    forked = fork(run_dir, 7, [f"run_dir={tmp_path / 'new'}", "trainer.epochs=4"])
    assert forked.changes == {"trainer.epochs": (2, 4)}


def test_a_fork_leaves_its_parents_mirror_alone(copied, tmp_path):
    recipe = copied / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("mirror: null", "mirror: s3://bucket/parent"))
    assert "s3://bucket/parent" in recipe.read_text()
    new = tmp_path / "new"
    fork(copied, 15, [f"run_dir={new}", "trainer.epochs=4"])
    assert "s3://bucket/parent" not in (new / "recipe.yaml").read_text()


def test_a_stranger_at_the_place_of_the_parent_is_not_taken_for_it(trained, tmp_path):
    parent = Path(shutil.copytree(trained, tmp_path / "parent"))
    child = tmp_path / "child"
    fork(parent, 11, [f"run_dir={child}"])
    train_recipe(child / "recipe.yaml")
    shutil.rmtree(parent)
    train(parent, "seed=1")
    result = diff(parent, child)
    assert (result.record.step, result.step) == (1, None)
    assert any("a run was forked there" in note for note in result.notes)


def test_steps_after_the_newest_checkpoint_are_those_of_the_last_recipe(trained, tmp_path):
    """As of a run that was killed before its first checkpoint with another recipe."""
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    longer = ["trainer.epochs=4", "lr_dropout.keep_prob=0.9", "checkpoint.allow_changed=true"]
    train(run_dir, *longer)
    shutil.rmtree(store.checkpoint_path(run_dir, 20))
    result = rerun(run_dir, 16, 18)
    assert result.difference is None
    assert result.num_compared > 20


def test_an_evaluation_that_a_signal_left_out_is_left_out(tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, "trainer.epochs=2")
    path = store.checkpoint_path(run_dir, 10)
    trainer = store.read_trainer(path)
    before = store.read_trainer(store.checkpoint_path(run_dir, 5))
    for key in ("evaluated", "best", "latest"):
        trainer[key] = before[key]
    (path / store.TRAINER_FILE).write_text(json.dumps(trainer, indent=1))
    manifest.write_manifest(path, 10, list(manifest.read_files(path)), manifest.read_previous(path))
    result = verify(run_dir)
    # The record of it, which a signal would have left out too, is all that differs.
    assert result.windows[1].name == "test/accuracy"
    assert "follows" in result.windows[1].fault


def test_ranks_of_a_run_without_a_checkpoint_are_those_of_its_last_start(trained, tmp_path):
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(store.checkpoints_dir(run_dir))
    status = json.loads((run_dir / "status.json").read_text())
    (run_dir / "status.json").write_text(json.dumps({**status, "ranks": 2}))
    assert [leg.ranks for leg in read_history(run_dir).legs(0, 3)] == [2]
