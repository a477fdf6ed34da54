"""The line per epoch, in a terminal of any width and in a pipe, and its copy in `train.log`."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from lrd import console
from lrd.train import run
from tests.helpers.equality import assert_same_final_state
from tests.helpers.metrics_csv import read_metrics
from tests.helpers.tensorboard_events import load_events
from tests.helpers.training import train

DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
STEPS_PER_EPOCH = 5  # of the recipe of tests.helpers.training


def read_log(run_dir: Path) -> list[str]:
    """The lines of `train.log` without their dates."""
    lines = (run_dir / "train.log").read_text().splitlines()
    assert all(re.match(DATE, line) for line in lines)
    return [re.sub(DATE, "", line, count=1) for line in lines]


def epoch_lines(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("epoch ")]


@pytest.mark.usefixtures("one_thread")
def test_there_is_one_line_per_epoch_with_what_was_recorded(tmp_path, capsys):
    train(tmp_path, tmp_path / "run")
    lines = epoch_lines(capsys.readouterr().out.splitlines())
    assert epoch_lines(read_log(tmp_path / "run")) == lines

    rows = read_metrics(tmp_path / "run")
    assert len(lines) == 2
    for epoch, line in enumerate(lines, 1):
        last_step = epoch * STEPS_PER_EPOCH
        steps = [rows[step] for step in range(last_step - STEPS_PER_EPOCH + 1, last_step + 1)]
        loss = sum(step["train/loss"] for step in steps) / len(steps)
        accuracy = sum(step["train/accuracy"] for step in steps) / len(steps)
        last = steps[-1]
        assert re.sub(r"  \d+\.\d s$", "", line) == (
            f"epoch {epoch}/2  step {last_step}  loss {loss:.4f} acc {accuracy:.4f}  "
            f"test loss {last['test/loss']:.4f} acc {last['test/accuracy']:.4f}  lr 0.01"
        )


@pytest.mark.usefixtures("one_thread")
def test_an_epoch_that_was_interrupted_has_the_means_of_all_its_steps(tmp_path):
    train(tmp_path, tmp_path / "whole")
    train(tmp_path, tmp_path / "parts", "trainer.max_steps=8")
    train(tmp_path, tmp_path / "parts")

    whole = epoch_lines(read_log(tmp_path / "whole"))
    parts = epoch_lines(read_log(tmp_path / "parts"))
    assert [line.split("  ")[1] for line in parts] == ["step 5", "step 8", "step 10"]
    # How long it took is not known.
    assert parts[-1] == re.sub(r"  \d+\.\d s$", "", whole[-1])

    lines = read_log(tmp_path / "parts")
    assert len([line for line in lines if line.startswith("start on ")]) == 2
    assert any(line.endswith("going on after step 8") for line in lines)


@pytest.mark.usefixtures("one_thread")
def test_held_out_images_and_the_average_are_in_the_line(tmp_path):
    overrides = ["trainer.ema_decay=0.9", "data.validation=0.2", "trainer.epochs=1"]
    train(tmp_path, tmp_path / "run", *overrides)
    (line,) = epoch_lines(read_log(tmp_path / "run"))
    words = ["test", "test ema", "val", "val ema"]
    pattern = "  ".join(rf"{word} loss \d+\.\d{{4}} acc \d\.\d{{4}}" for word in words)
    assert re.search(pattern, line)


@pytest.mark.usefixtures("one_thread")
def test_without_an_evaluation_the_line_has_none(tmp_path):
    train(tmp_path, tmp_path / "run", "trainer.eval_every=2")
    first, second = epoch_lines(read_log(tmp_path / "run"))
    assert "test" not in first
    assert "test loss" in second


@pytest.mark.usefixtures("one_thread")
def test_histograms_of_updates_change_no_bit_of_the_training(tmp_path):
    train(tmp_path, tmp_path / "without")
    train(tmp_path, tmp_path / "with", "tracking.histograms_every=1")
    assert_same_final_state(tmp_path / "with", tmp_path / "without")

    events = load_events(tmp_path / "with")
    assert [record.step for record in events.Histograms("updates/conv1.weight")] == [*range(1, 11)]
    assert load_events(tmp_path / "without").Tags()["histograms"] == []


@pytest.mark.usefixtures("one_thread")
def test_the_error_that_ends_a_run_is_in_the_log(tmp_path):
    train(tmp_path, tmp_path / "run", "trainer.max_steps=1")
    changed = [f"run_dir={tmp_path / 'run'}", "optimizer.lr=0.5"]
    assert run(str(tmp_path / "recipe.yaml"), changed) == 2

    *_, change, advice = read_log(tmp_path / "run")
    assert change.startswith("error: optimizer.lr: ")
    assert "checkpoint.allow_changed" in advice


FORMS = ["one two three four", "one two three", "one two"]


@pytest.mark.parametrize(
    ("width", "shown"), [(18, FORMS[0]), (17, FORMS[1]), (13, FORMS[1]), (12, FORMS[2])]
)
def test_a_terminal_gets_the_longest_form_that_fits(monkeypatch, tmp_path, width, shown):
    output = io.StringIO()
    terminal = Console(file=output, width=width, force_terminal=True)
    monkeypatch.setattr(console, "stdout", terminal)
    with console.keep_log():
        console.open_log(tmp_path / "train.log")
        console.info_that_fits(FORMS)

    assert output.getvalue() == f"{shown}\n"
    assert read_log(tmp_path) == [FORMS[0]]


def test_what_is_printed_before_the_log_is_known_or_can_be_written_is_kept(tmp_path):
    folder = tmp_path / "later"
    with console.keep_log():
        console.info("before")
        console.open_log(folder / "train.log")
        console.error("two\nlines")
        folder.mkdir()
        console.table("title", ["a"], [["1"]])
    console.info("after")

    lines = read_log(folder)
    assert lines[:4] == ["before", "error: two", "error: lines", "title"]
    assert not any("after" in line for line in lines)


def test_the_log_has_the_traceback_of_a_fault(tmp_path):
    def divide() -> None:
        with console.keep_log():
            console.open_log(tmp_path / "train.log")
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        divide()
    lines = read_log(tmp_path)
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_other_processes_than_the_main_one_write_no_log(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with console.keep_log():
        console.open_log(tmp_path / "train.log")
        console.error("of rank 1")
    assert not (tmp_path / "train.log").exists()
