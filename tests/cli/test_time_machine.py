"""`lrd probe`, `diff`, `fork`, `replay` and `verify`: what they print, and their exit statuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lrd.cli.app import app
from tests.helpers.replaying import (
    replays_in_this_process,
    tamper_with_record,
    train_on_one_thread,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_on_one_thread(tmp_path_factory.mktemp("shown") / "run", "trainer.epochs=2")


def lrd(*arguments: object, expected: int = 0) -> str:
    """Run a command in this process. Returns what it printed, errors included."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == expected, result.output
    return result.output


def test_probes_as_table_json_and_picture(trained, tmp_path):
    picture = tmp_path / "probe.png"
    shown = lrd("probe", trained, "fc.bias[2]", "-o", picture, "--tensorboard")
    assert "fc.bias[2]" in shown
    assert picture.stat().st_size > 5_000
    assert list((trained / "replays" / "probes").glob("events.*"))

    told = json.loads(lrd("probe", trained, "fc.bias[2]", "--json"))
    (element,) = told["elements"]
    assert len(element["lrs"]) == told["steps"] == 10
    assert element["moved"] == sum(lr > 0 for lr in element["lrs"])


def test_coverage_as_table_json_and_picture(trained, tmp_path):
    picture = tmp_path / "coverage.png"
    assert "conv1.weight" in lrd("probe", trained, "--coverage", "conv1.weight", "-o", picture)
    assert picture.stat().st_size > 5_000
    (told,) = json.loads(lrd("probe", trained, "--coverage", "conv1.weight", "--json"))
    assert (told["elements"], told["steps"], told["keep_prob"]) == (54, 10, 0.5)


def test_equal_runs_and_runs_that_differ(trained, tmp_path):
    copied = Path(shutil.copytree(trained, tmp_path / "copied"))
    assert "all records are equal up to step 10" in lrd("diff", trained, copied)
    tamper_with_record(copied, 4, "train/loss")
    shown = lrd("diff", trained, copied, "--files-only", expected=1)
    assert "first record that differs: step 4: train/loss" in shown


def test_a_run_is_verified(trained, monkeypatch):
    with replays_in_this_process(monkeypatch):
        shown = lrd("verify", trained)
    assert "weights, optimizer state and records follow, bit for bit" in shown


def test_steps_are_shown_again(trained, tmp_path, monkeypatch):
    with replays_in_this_process(monkeypatch):
        steps = ["--from", 8, "--to", 9]
        shown = lrd("replay", trained, *steps, "--norms", "--samples", "-o", tmp_path / "o")
    assert "came out again, bit for bit" in shown.replace("\n", " ")
    assert (tmp_path / "o" / "samples.png").stat().st_size > 10_000


def test_a_fork_says_how_to_start_it(trained, tmp_path):
    new = tmp_path / "new"
    shown = lrd("fork", trained, "--at", 5, f"run_dir={new}", "optimizer.lr=0.01")
    assert "optimizer.lr: 0.05 before, 0.01 from here on" in shown
    assert "start it: lrd launch --num_processes 1" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["probe", "{run}"], "name an element"),
        (["probe", "{run}", "nothing.*"], "matches no parameter"),
        (["probe", "{run}", "fc.bias[1 2]"], "numbers with commas"),
        (["probe", "{run}", "--coverage", "--tensorboard"], "--tensorboard is of elements"),
        (["probe", "missing", "fc.bias"], "no such run directory"),
        (["verify", "missing"], "no such run directory"),
        (["verify", "{run}", "typo"], "section.key=value"),
        (["diff", "{run}", "missing"], "no such run directory"),
        (["fork", "{run}", "--at", "5", "seed=1"], "run_dir=NEW is missing"),
        (["replay", "{run}"], "say which steps"),
        (["replay", "{run}", "--from", "3", "--to", "11"], "run has taken 10 steps"),
        (["replay", "{run}", "--around", "3", "--to", "4"], "--around, or --from and --to"),
        (["runs", "{run}", "--watch", "--json"], "leave --watch out"),
        (["runs", "{run}", "--watch"], "needs a terminal"),
    ],
)
def test_what_cannot_be_done_is_one_line(trained, arguments, message):
    (line,) = lrd(
        *[argument.format(run=trained) for argument in arguments], expected=2
    ).splitlines()
    assert message in line
