"""The report, of runs whose records are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from lrd import recipe as recipes
from lrd.cli.app import app
from lrd.study.grid import load_study, read_states
from lrd.study.pictures import plot_arms
from lrd.study.results import read_results
from tests.helpers.recorded_study import STUDY, load, record, write_study

DIVERGED = (
    "step 3: the loss is not finite on rank 0 on host (nan; training samples 1, 2); "
    "stopped before the optimizer's step"
)


def report(folder: Path, study: str = STUDY, *arguments: str) -> str:
    """Run `lrd study --report`. Returns what it prints."""
    path = write_study(folder, study)
    command = ["study", str(path), "--runs", str(folder / "runs"), "--report", *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return result.output


def read_json(folder: Path) -> dict:
    text = (folder / "runs" / "small" / "study.json").read_text()
    return json.loads(text, parse_constant=pytest.fail)


def record_all(folder: Path) -> None:
    runs = {run.name: run for run in load(folder).runs}
    record(runs["SGD, seed 0"], [0.30, 0.80, 0.70])
    record(runs["SGD, seed 1"], [0.30, 0.60, 0.72])
    record(runs["LRD 0.5, seed 0"], [0.50, 0.90, 0.80])
    record(runs["LRD 0.5, seed 1"], [0.50, 0.85, 0.84])


def test_the_measures_of_each_arm(tmp_path):
    record_all(tmp_path)
    report(tmp_path)
    values = read_json(tmp_path)
    assert (values["num_runs"], values["num_done"], values["seconds"]) == (4, 4, 240.0)

    sgd = values["arms"]["SGD"]
    assert sgd["runs"][0]["test_accuracy"] == 0.70
    assert sgd["runs"][0]["best_test_accuracy"] == 0.80
    assert sgd["runs"][0]["test_loss"] == pytest.approx(0.30)
    # Ten steps of the last epoch are 0.3 below the test accuracy and one 0.1.
    assert sgd["runs"][0]["train_accuracy"] == pytest.approx((10 * 0.40 + 0.60) / 11)
    assert sgd["runs"][0]["train_loss"] == pytest.approx((10 * 1.5 + 0.5) / 11)
    assert [run["epochs_to_goal"] for run in sgd["runs"]] == [2, None]
    assert sgd["estimates"]["epochs_to_goal"]["n"] == 1
    assert sgd["estimates"]["test_accuracy"]["mean"] == pytest.approx(0.71)
    assert sgd["differences"] == {}
    assert sgd["curves"]["test_accuracy"]["mean"] == pytest.approx([0.3, 0.7, 0.71])

    difference = values["arms"]["LRD 0.5"]["differences"]["test_accuracy"]
    assert difference["mean"] == pytest.approx(0.11)  # of 0.10 and 0.12
    assert difference["low"] == pytest.approx(0.11 - 12.7062 * 0.01, abs=1e-6)
    assert difference["n"] == 2
    assert 0.0 < difference["p"] < 1.0


def test_the_tables(tmp_path):
    record_all(tmp_path)
    output = report(tmp_path)
    assert "71.00 ± 1.41" in output
    assert "+11.00 [-1.71, +23.71]" in output
    assert "2.0 (1 of 2)" in output  # epochs to the goal
    assert "0: 70.00  1: 72.00" in output
    assert "so far" not in output

    markdown = (tmp_path / "runs" / "small" / "study.md").read_text()
    assert markdown.startswith("## Does it help?\n")
    assert "| LRD 0.5 | 2 | 82.00 ± 2.83 |" in markdown
    assert "| LRD 0.5 | lr_dropout.keep_prob=0.5 |" in markdown
    assert "4:00 for all runs" in markdown
    with Image.open(tmp_path / "runs" / "small" / "study.png") as picture:
        assert picture.width > 1000


def test_a_run_that_diverged_is_shown_and_counted(tmp_path):
    runs = {run.name: run for run in load(tmp_path).runs}
    record(runs["SGD, seed 0"], [0.30, 0.80, 0.70])
    record(runs["SGD, seed 1"], [0.30, 0.60, 0.72])
    record(runs["LRD 0.5, seed 0"], [0.5], state="failed", message=DIVERGED)
    record(runs["LRD 0.5, seed 1"], [0.5, 0.85, 0.84])

    output = report(tmp_path)
    assert "1 of 2*" in output
    assert "84.00*" in output
    assert "+12.00" in output  # of seed 1 alone
    assert "0: diverged  1: 84.00" in output
    expected = (
        "* LRD 0.5: 1 of 2 seeds diverged; its figures are of the others. "
        "0: step 3: the loss is not finite\n"
    )
    assert expected in output

    arm = read_json(tmp_path)["arms"]["LRD 0.5"]
    assert (arm["num_seeds"], arm["num_finished"], arm["num_diverged"]) == (2, 1, 1)
    assert arm["runs"][0]["state"] == "diverged"


def test_a_study_of_which_a_part_is_done(tmp_path):
    runs = {run.name: run for run in load(tmp_path).runs}
    record(runs["SGD, seed 0"], [0.30, 0.80, 0.70])
    record(runs["LRD 0.5, seed 0"], [0.5], state="stopped")
    record(runs["LRD 0.5, seed 1"], [0.5], state="failed", message="the disk is full")

    output = report(tmp_path)
    assert "1 of 4 runs are done so far." in output
    assert "0: 70.00  1: not begun" in output
    assert "0: begun  1: failed" in output
    assert read_json(tmp_path)["arms"]["LRD 0.5"]["estimates"]["test_accuracy"]["mean"] is None


def test_a_loss_that_is_not_finite_leaves_json_that_all_can_read(tmp_path):
    run = load(tmp_path).runs[0]
    record(run, [0.1, 0.2, 0.3])
    metrics = run.run_dir / "metrics.csv"
    metrics.write_text(metrics.read_text().replace(",0.7,0.3\n", ",nan,0.3\n"))
    report(tmp_path)
    assert read_json(tmp_path)["arms"]["SGD"]["runs"][0]["test_loss"] is None


def test_arms_may_have_seeds_of_their_own(tmp_path):
    study_text = STUDY.replace("0.5}", "0.5}\n    seeds: [1, 7]")
    study = load(tmp_path, study_text)
    assert [run.name for run in study.runs_of("LRD 0.5")] == ["LRD 0.5, seed 1", "LRD 0.5, seed 7"]
    for run in study.runs:
        record(run, [0.1, 0.2, 0.5 + run.seed / 100 + 0.1 * (run.arm != "SGD")])

    arms = {arm.name: arm for arm in read_results(study, read_states(study, is_report=True))}
    difference = arms["LRD 0.5"].differences["test_accuracy"]
    assert (difference.n, difference.mean) == (1, pytest.approx(0.1))  # seed 1 alone is in both


def test_a_study_without_a_baseline_compares_nothing(tmp_path):
    study_text = STUDY.replace("baseline: SGD", "").replace("accuracy_goal: 0.8", "")
    for run in load(tmp_path, study_text).runs:
        record(run, [0.1, 0.2, 0.3])
    output = report(tmp_path, study_text)
    assert "difference" not in output
    assert "epochs to" not in output


def test_an_arm_may_have_a_baseline_of_its_own(tmp_path):
    study_text = """
base: base.yaml
seeds: 2
baseline: 0.1
arms:
  0.1: {set: {optimizer.lr: 0.1}}
  Adam: {set: {optimizer: {name: Adam}}}
  Adam, LRD: {set: {optimizer: {name: Adam}, lr_dropout: {}}, baseline: Adam}
"""
    accuracies = {"0.1": 0.5, "Adam": 0.6, "Adam, LRD": 0.61}
    for run in load(tmp_path, study_text).runs:
        record(run, [0.1, 0.2, accuracies[run.arm] + run.seed * (accuracies[run.arm] - 0.5)])
    output = report(tmp_path, study_text)
    assert "compared with" in output
    assert "+1.50 [" in output
    arms = read_json(tmp_path)["arms"]
    assert [arm["baseline"] for arm in arms.values()] == [None, "0.1", "Adam"]
    assert arms["Adam"]["differences"]["test_accuracy"]["mean"] == pytest.approx(0.15)
    assert arms["Adam, LRD"]["differences"]["test_accuracy"]["mean"] == pytest.approx(0.015)


def test_a_report_takes_auto_as_the_runs_had_it(tmp_path):
    study_text = STUDY + "set: {trainer.precision: auto}\n"
    run = load(tmp_path, study_text).runs[0]
    for precision in ("bf16", "fp32"):  # as on one processor and on another one
        trainer = run.recipe.trainer.model_copy(update={"precision": precision})
        recipe = run.recipe.model_copy(update={"trainer": trainer})
        (tmp_path / precision).mkdir()
        run = load(tmp_path / precision, study_text).runs[0]
        record(run, [0.1, 0.2, 0.3], recipe=recipe)
        assert "1 of 4 runs are done" in report(tmp_path / precision, study_text)


def test_a_report_needs_no_data(tmp_path):
    study_text = STUDY + "set: {data.dataset: imagefolder, data.root: images}\n"
    path = write_study(tmp_path, study_text)
    record(load_study(path, tmp_path / "runs", [], is_report=True).runs[0], [0.1, 0.2, 0.3])
    assert "1 of 4 runs are done" in report(tmp_path, study_text)


def test_a_study_is_reported_into_another_folder(tmp_path):
    record_all(tmp_path)
    report(tmp_path, STUDY, "--out", str(tmp_path / "docs" / "help"))
    names = sorted(path.name for path in (tmp_path / "docs" / "help").iterdir())
    assert names == ["study.json", "study.md", "study.png"]
    assert not (tmp_path / "runs" / "small" / "study.json").exists()


def test_the_recipes_are_those_that_the_command_line_makes(tmp_path):
    """What a user types to run one run by hand makes the same recipe."""
    run = load(tmp_path).runs_of("LRD 0.5")[1]
    recipe = recipes.load(tmp_path / "base.yaml", ["lr_dropout.keep_prob=0.5", "seed=1"])
    assert run.recipe.result_settings() == recipe.result_settings()
    assert run.overrides == ["lr_dropout.keep_prob=0.5", "seed=1"]


def test_results_of_somebody_else_are_shown_beside(tmp_path):
    values = {"source": "a paper", "test_accuracy": [0.5, 0.91, 0.9], "train_accuracy": [0.6] * 3}
    (tmp_path / "theirs.json").write_text(json.dumps(values))
    study = f"published: {{Theirs: theirs.json}}\n{STUDY}"
    for run in load(tmp_path, study).runs:
        record(run, [0.3, 0.8, 0.7])

    expected = (
        "Theirs: 90.00 after the last of 3 epochs, best 91.00 (n = 1). Not run here: a paper."
    )
    assert expected in report(tmp_path, study)
    assert expected in (tmp_path / "runs" / "small" / "study.md").read_text()
    assert read_json(tmp_path)["published"] == {"Theirs": "a paper"}

    loaded = load(tmp_path, study)
    figure = plot_arms(loaded, read_results(loaded, read_states(loaded, is_report=True)))
    curves = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert curves["Theirs (published)"] == values["test_accuracy"]
