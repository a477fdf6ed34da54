"""`lrd runs` and `lrd compare`: what they say of runs, and the groups of seeds."""

from __future__ import annotations

import json
import os
import re
import statistics
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from lrd import console
from lrd import recipe as recipes
from lrd.checkpoint.run_dir import RunDir
from lrd.checkpoint.run_records import describe_seconds, find_runs
from lrd.cli import compare
from lrd.cli.app import app
from tests.helpers.tracked_run import TrackedRun, make_recipe


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def make_run(path: Path, seed: int = 0, keep_prob: float | None = 0.5, steps: int = 6) -> Path:
    """A run directory as a finished run leaves it, without checkpoints."""
    values = make_recipe(keep_prob).model_dump(mode="json")
    recipe = recipes.parse({**values, "seed": seed, "run_dir": str(path)}, "test")
    run = TrackedRun(path, recipe=recipe)
    for step in range(1, steps + 1):
        run.update(step, loss=2.0 / step + 0.1 * seed)
    run.tracker.record_evaluation(steps, {"loss": 0.5, "accuracy": 0.9 + 0.01 * seed})
    run.tracker.flush()

    run_dir = RunDir(path)
    run_dir.write("recipe.yaml", recipe.dump())
    run_dir.write_status("finished", step=steps, total_steps=steps, best_accuracy=0.9 + 0.01 * seed)
    run_dir.close()
    return path


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory) -> list[Path]:
    """Three seeds with learning rate dropout and three without."""
    root = tmp_path_factory.mktemp("runs")
    paths = [make_run(root / f"lrd-seed{seed}", seed) for seed in range(3)]
    return paths + [make_run(root / f"sgd-seed{seed}", seed, None) for seed in range(3)]


def test_runs_in_a_pipe_are_one_line_each_and_nothing_is_cut(run_dirs):
    lines = invoke("runs", run_dirs[0].parent).stdout.splitlines()
    assert lines[0].split()[:2] == ["run", "recipe"]
    for path, line in zip(run_dirs, lines[1:], strict=True):
        assert line.split()[0] == str(path)
        assert "6/6" in line
        assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d", line)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_runs_never_fold_a_path(run_dirs, monkeypatch, width):
    monkeypatch.chdir(run_dirs[0].parent)
    monkeypatch.setattr(console, "stdout", Console(width=width, force_terminal=True, no_color=True))
    output = re.sub(r"\x1b\[[0-9;]*m", "", invoke("runs", ".").stdout)
    for path in run_dirs:
        (line,) = [line for line in output.splitlines() if line.startswith(path.name + " ")]
        assert "finished" in line
        assert "0.9" in line
    assert all(len(line) <= width for line in output.splitlines() if not line.startswith("("))


def test_runs_are_sorted_and_the_unknown_comes_last(run_dirs, tmp_path):
    for i, accuracy in enumerate([0.2, None, 0.7]):
        run_dir = RunDir(tmp_path / f"r{i}")
        run_dir.write_status("stopped", step=i, total_steps=9, best_accuracy=accuracy)
        run_dir.close()

    output = invoke("runs", tmp_path, "--sort", "accuracy", "--json").stdout
    assert [Path(run["path"]).name for run in json.loads(output)] == ["r2", "r0", "r1"]
    assert json.loads(output)[2]["best_accuracy"] is None

    wrong = invoke("runs", tmp_path, "--sort", "size")
    assert wrong.exit_code == 2
    assert "may be run, steps, loss" in wrong.stderr


def test_the_duration_counts_all_starts(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.write_status("finished", step=1, total_steps=1)
    run_dir.close()
    for began, ended in ((1000, 1060), (5000, 5030)):
        path = tmp_path / "run" / f"events.out.tfevents.{began}.host.1.0"
        path.write_bytes(b"")
        os.utime(path, (ended, ended))

    (run,) = find_runs(tmp_path)
    assert run.seconds == 90
    assert describe_seconds(90) == "1:30"
    assert describe_seconds(3 * 3600 + 65) == "3:01:05"


def test_runs_that_differ_only_in_the_seed_are_a_group(run_dirs):
    groups = compare.group_by_seed(compare.read_runs(run_dirs))
    assert [group.name for group in groups] == ["lrd (3 seeds)", "sgd (3 seeds)"]
    assert list(compare.differing_settings(groups)) == ["lr_dropout.keep_prob"]

    columns, rows = compare.make_table(groups, ["lr_dropout.keep_prob"])
    spread = statistics.stdev([0.9, 0.91, 0.92])
    cells = dict(zip(columns, rows[0], strict=True))
    assert cells["keep_prob"] == "0.5"
    assert cells["best acc"] == f"0.9100 ± {spread:.4f}"
    assert rows[1][1] == "-"


def test_the_same_seed_twice_is_not_called_two_seeds(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    (group,) = compare.group_by_seed(compare.read_runs(runs))
    assert group.name.endswith(" (2 runs)")


def test_mean_and_spread_at_the_steps_that_all_have():
    steps, means, spreads = compare.mean_and_spread([{1: 1.0, 2: 4.0, 3: 0.0}, {1: 3.0, 2: 4.0}])
    assert steps == [1, 2]
    assert means == [2.0, 4.0]
    assert spreads == pytest.approx([2**0.5, 0.0])


def test_compare_draws_a_picture(run_dirs, tmp_path):
    out = tmp_path / "compare.png"
    result = invoke("compare", *run_dirs, "-o", out)
    assert result.exit_code == 0, result.output
    assert "lrd (3 seeds)" in result.stdout
    with Image.open(out) as image:
        assert min(image.size) > 1000


def test_compare_writes_a_page_that_needs_no_network(run_dirs, tmp_path):
    name = "a<b>&[c]"
    run = make_run(tmp_path / name)
    out = tmp_path / "compare.html"
    result = invoke("compare", run, *run_dirs[3:], "-o", out)
    assert result.exit_code == 0, result.output

    page = out.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|url\(", page)
    assert page.count('src="data:image/png;base64,') == 1
    assert "a&lt;b&gt;&amp;[c]" in page
    assert name not in page
    assert name in result.stdout


@pytest.mark.parametrize(
    ("make_arguments", "expected"),
    [
        (lambda runs, tmp: [runs[0]], "two run directories"),
        (lambda runs, tmp: [runs[0], tmp / "nowhere"], "nowhere: no such run directory"),
        (lambda runs, tmp: [runs[0], tmp], "no run in it"),
        (lambda runs, tmp: [*runs, "-o", tmp / "x.doc"], "must end in .png"),
        (lambda runs, tmp: [*runs, "-o", tmp / "nowhere" / "x.html"], "cannot be written"),
    ],
)
def test_compare_refuses_in_one_line(run_dirs, tmp_path, make_arguments, expected):
    result = invoke("compare", *make_arguments(run_dirs[:2], tmp_path))
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("lrd: ")
    assert expected in line
