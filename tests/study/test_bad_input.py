"""What is wrong with a study is one line with status 2, before anything runs."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lrd import recipe as recipes
from lrd.cli.app import app
from lrd.study.grid import check_arms, load_study
from lrd.study.schema import read_study_file
from tests.helpers.recorded_study import BASE, STUDY, load, record, write_study

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "recipes" / "studies").glob("*.yaml"))
SCHEDULES = sorted((ROOT / "recipes" / "schedules").glob("*.yaml"))


def refuse(*arguments: object) -> str:
    """Run `lrd study`, which must end with status 2 and one line. Returns the line."""
    result = CliRunner().invoke(app, ["study", *(str(argument) for argument in arguments)])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("lrd: ")


@pytest.fixture(autouse=True)
def no_child(monkeypatch):
    """No test of this file may start a run."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a run was started")

    monkeypatch.setattr("lrd.study.runner._Pool.start", fail)
    monkeypatch.setattr("lrd.study.cost._measure", fail)


ARM = "arms: {A: {set: {%s}}}\nbase: base.yaml"


@pytest.mark.parametrize(
    ("study", "expected"),
    [
        (STUDY.replace("accuracy_goal", "acuracy_goal"), "acuracy_goal: unknown key"),
        (STUDY.replace("accuracy_goal", "acuracy_goal"), "(did you mean accuracy_goal?)"),
        (
            STUDY.replace("set:", "sett:"),
            "arms.LRD 0.5.sett: unknown key; an arm has set, seeds, baseline",
        ),
        (STUDY.replace("LRD 0.5:", "SGD:"), "line 9: cannot be read as YAML: the key SGD appears"),
        (STUDY.replace("LRD 0.5:", "s-g-d:").replace("SGD:", "S g D:"), "have the same folder"),
        (STUDY.replace("LRD 0.5:", '"..":'), "arms...: a name needs a letter or a digit"),
        (STUDY.replace("baseline: SGD", "baseline: SGDD"), "baseline: is 'SGDD', may be SGD, LRD"),
        (STUDY.replace("baseline: SGD", "baseline: SGDD"), "(did you mean SGD?)"),
        (
            "base: base.yaml\narms: {A: , B: {baseline: C}}",
            "arms.B.baseline: is 'C', may be A, B",
        ),
        (STUDY.replace("base.yaml", "bass.yaml"), "base: is 'bass.yaml', but there is no such"),
        (STUDY.replace("base: base.yaml", ""), "base: is missing"),
        ("base: base.yaml", "arms: is missing"),
        ("base: base.yaml\narms: {}", "arms: there is none"),
        ("base: base.yaml\narms: [SGD]", "arms: is ['SGD'], should be keys with their values"),
        ("base: base.yaml\narms: {A: 3}", "arms.A: is 3, should be keys with their values"),
        (STUDY.replace("seeds: 2", "seeds: 0"), "seeds: is 0, should be from 1 to"),
        (STUDY.replace("seeds: 2", "seeds: [1, 1]"), "seeds: is [1, 1], names a seed twice"),
        (STUDY.replace("seeds: 2", "seeds: [-1]"), "seeds: is [-1], should be a number"),
        (STUDY.replace("seeds: 2", "seeds: true"), "seeds: is True, should be a number"),
        (STUDY.replace("0.8", "80"), "accuracy_goal: is 80, should be less than or equal to 1"),
        ("published: {A: a.json}\n" + ARM % "", "published.A: "),
        ("published: {A: a.json}\n" + ARM % "", "a.json: cannot be read: No such file"),
        ("published: {A: base.yaml}\n" + ARM % "", "base.yaml: is not JSON"),
        ("published: [a.json]\n" + ARM % "", "published: is ['a.json'], should be keys"),
        (ARM % "seed: 3", "must not have the key seed: the key seeds chooses the seeds"),
        (ARM % "optimizer.lr: fast", "arms.A: optimizer.lr=fast: optimizer.lr: is 'fast'"),
        (ARM % "optimiser.lr: 0.1", "unknown key"),
        (ARM % "data.batch_sice: 8", "(did you mean batch_size?)"),
        (ARM % "optimizer.momentun: 0.9", "(did you mean momentum?)"),
        (ARM % "trainer.device: cuda", "has no CUDA device"),
        (ARM % "data.batch_size: 5000", "but there are 1437 training images"),
        (ARM % "schedule: {name: StepLR, step_size: 0}", "arms.A: schedule"),
        ("set: {optimizer.lr: x}\n" + ARM % "", "set: optimizer.lr=x: optimizer.lr: is 'x'"),
        ("- 1", "a study must be a mapping of sections, not a list"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_study_that_is_wrong_is_one_line(tmp_path, study, expected):
    path = write_study(tmp_path, study)
    line = refuse(path, "--runs", tmp_path / "runs")
    assert line.startswith(str(path)), line
    assert expected in line
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_with_the_base_recipe_names_it(tmp_path):
    path = write_study(tmp_path, base=BASE.replace("optimizer:", "optimiser:"))
    assert refuse(path).startswith(f"{tmp_path / 'base.yaml'}: optimiser: unknown key")


def test_a_study_that_is_not_there(tmp_path):
    path = tmp_path / "none.yaml"
    assert refuse(path) == f"{path}: there is no such study"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "0/4"], "--only: is '0/4', should be i/n"),
        (["--only", "5/4"], "--only: is '5/4', should be i/n"),
        (["--only", "2"], "--only: is '2', should be i/n"),
        (["--plan", "--report"], "give --plan or --report, not both"),
        (["--report"], "no run of this study is done yet"),
        (["seed=3"], "seed=3: the study chooses seed"),
        (["run_dir=x"], "run_dir=x: the study chooses run_dir"),
        (["lr_dropout.keep_prob=0.3"], "the arm 'LRD 0.5' sets lr_dropout.keep_prob itself"),
        (["lr_dropout={}"], "the arm 'LRD 0.5' sets lr_dropout.keep_prob itself"),
        (["trainer.epoch=3"], "trainer.epoch=3: trainer.epoch: unknown key"),
        (["trainer.epochs"], "an override has the form section.key=value"),
    ],
)
def test_arguments_that_are_wrong_are_one_line(tmp_path, arguments, expected):
    line = refuse(write_study(tmp_path), "--runs", tmp_path / "runs", *arguments)
    assert expected in line
    assert "set:" not in line  # it is not in the file


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=0.1", "optimizer.lr is 0.05 there and 0.1 in this study"),
        ("trainer.epochs=4", "trainer.epochs is 3 there and 4 in this study"),
        ("lr_dropout={}", "lr_dropout.keep_prob is None there and 0.5 in this study"),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--report"]], ids=["run", "report"])
def test_a_finished_run_of_another_recipe_is_not_taken(tmp_path, override, expected, mode):
    study = load(tmp_path)
    run = study.runs_of("SGD")[1]
    record(run, [0.1, 0.5, 0.9])

    line = refuse(
        write_study(tmp_path, STUDY.replace("set: {lr_dropout.keep_prob: 0.5}", "")),
        "--runs",
        tmp_path / "runs",
        override,
        *mode,
    )
    assert line.startswith(f"{run.run_dir}: is a run of another recipe: {expected}")


def test_a_recipe_of_a_run_that_cannot_be_read_is_one_line(tmp_path):
    run = load(tmp_path).runs[0]
    record(run, [0.1])
    (run.run_dir / "recipe.yaml").write_text("a: [")
    line = refuse(write_study(tmp_path), "--runs", tmp_path / "runs")
    assert line.startswith(f"{run.run_dir}/recipe.yaml: cannot be read")


def test_metrics_that_are_lost_are_one_line(tmp_path):
    run = load(tmp_path).runs[0]
    record(run, [0.1, 0.2, 0.3])
    (run.run_dir / "metrics.csv").unlink()
    line = refuse(write_study(tmp_path), "--runs", tmp_path / "runs", "--report")
    assert line.startswith(f"{run.run_dir}/metrics.csv: has no test accuracy")


def test_a_run_that_another_study_works_on_is_refused(tmp_path, monkeypatch):
    def is_taken(*_: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", is_taken)
    line = refuse(write_study(tmp_path), "--runs", tmp_path / "runs")
    assert "another `lrd study` is working on this run" in line


def test_files_of_the_report_that_cannot_be_written_are_one_line(tmp_path):
    record(load(tmp_path).runs[0], [0.1, 0.2, 0.3])
    out = tmp_path / "file"
    out.write_text("")
    line = refuse(
        write_study(tmp_path), "--runs", tmp_path / "runs", "--report", "--out", out / "x"
    )
    assert "study.json: cannot be written" in line


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_repository_are_right(path, tmp_path):
    # There is no folder of images here.
    base = read_study_file(path).base
    is_folder = "imagefolder" in base or "few_images" in base
    study = load_study(path, tmp_path, ["data.dataset=synthetic"] if is_folder else [])
    check_arms(study, path)
    assert f"lrd study recipes/studies/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", SCHEDULES, ids=lambda path: path.stem)
def test_the_schedules_of_the_repository_are_those_of_their_study(path):
    recipe = recipes.load(path)
    study = read_study_file(ROOT / "recipes" / "studies" / "schedules.yaml")
    assert len(SCHEDULES) == 6
    settings = {name: arm.settings for name, arm in study.arms.items()}
    section = settings[recipe.schedule.name]["schedule"]
    found = recipe.schedule.model_dump()
    assert section == {key: found[key] for key in section}
    assert settings[f"{recipe.schedule.name}, LRD"]["schedule"] == section
    assert (recipe.trainer.epochs, recipe.optimizer.lr) == (200, 0.1)


def test_the_study_of_the_other_tests_is_right(tmp_path):
    study = load(tmp_path)
    names = ["SGD, seed 0", "LRD 0.5, seed 0", "SGD, seed 1", "LRD 0.5, seed 1"]
    assert [run.name for run in study.runs] == names
    assert study.runs[1].run_dir == Path(tmp_path / "runs" / "small" / "lrd-0.5" / "seed0")
