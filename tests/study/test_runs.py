"""Real studies: killed, stopped and shared between processes, and what a run's end does to one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lrd.checkpoint.run_dir import read_status
from lrd.cli.app import app
from lrd.study.grid import GridRun, RunState, load_study, read_states
from lrd.study.progress import GridProgress, Position, read_position
from lrd.study.runner import child_environment
from tests.helpers.launching import environment, signal_all
from tests.helpers.recorded_study import BASE, load, record, write_study

TIMEOUT = 280  # seconds

# Forty steps of 120 images, 11 in an epoch: a second of training.
TINY_BASE = """
data: {dataset: digits, batch_size: 120}
model: {arch: resnet18, width: 4}
optimizer: {lr: 0.05, momentum: 0.9}
trainer: {epochs: 4, max_steps: 40, device: cpu}
checkpoint: {every_steps: 2}
"""
LONG_BASE = TINY_BASE.replace("epochs: 4, max_steps: 40", "epochs: 900")


def run(path: Path, *arguments: str, status: int = 0) -> str:
    """Run a study from this process, which has imported all that it needs; its runs are real.

    Returns:
        What it printed.
    """
    command = ["study", str(path), "--runs", str(path.parent / "runs"), *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        result = CliRunner().invoke(app, command)
    assert result.exit_code == status, result.output
    return result.output


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a study as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lrd", "study", path.name, *arguments],
        cwd=path.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_json(path: Path) -> dict[str, Any]:
    """study.json without the times."""

    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_times(item) for key, item in value.items() if key != "seconds"}
        if isinstance(value, list):
            return [without_times(item) for item in value]
        return value

    return without_times(json.loads((path / "study.json").read_text()))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait until a condition holds; fail if a process that it depends on ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def count_starts(folder: Path) -> int:
    """How often runs were started in a folder, by their logs."""
    return sum(
        log.read_text().count(" start on ") for log in folder.glob("runs/small/*/seed*/train.log")
    )


def kill_until_done(path: Path, num_kills: int, generator: random.Random) -> None:
    """Start a study again and again; kill it and its runs at random moments, then let it end.

    Every second kill comes when a run has just been set up, so that it hits a run that trains.
    """
    for i in range(num_kills):
        starts_before = count_starts(path.parent)
        process = start(path, "--jobs", "2")
        if i % 2:
            while process.poll() is None and count_starts(path.parent) == starts_before:
                time.sleep(0.02)
            seconds = generator.uniform(0.0, 0.8)
        else:
            seconds = generator.uniform(0.5, 8.0)

        try:
            process.wait(seconds)
            break  # there is nothing left to do
        except subprocess.TimeoutExpired:
            signal_all(process, signal.SIGKILL)
            process.communicate()
    run(path, "--jobs", "2")


def write_tiny_study(folder: Path, seeds: int) -> Path:
    arms = "arms: {SGD: , LRD: {set: {lr_dropout.keep_prob: 0.5}}}"
    text = f"base: base.yaml\nbaseline: SGD\nseeds: {seeds}\n{arms}"
    folder.mkdir()
    return write_study(folder, text, TINY_BASE)


# Slow, because each of its starts imports torch; test_a_study_that_is_stopped_or_killed is not.
@pytest.mark.slow
def test_a_study_killed_twice_ends_with_the_same_results(tmp_path):
    undisturbed = write_tiny_study(tmp_path / "undisturbed", seeds=1)
    killed = write_tiny_study(tmp_path / "killed", seeds=1)
    run(undisturbed, "--jobs", "2")
    kill_until_done(killed, num_kills=2, generator=random.Random(2))

    expected = read_json(undisturbed.parent / "runs" / "small")
    assert expected["num_done"] == 2
    assert read_json(killed.parent / "runs" / "small") == expected
    assert count_starts(killed.parent) > 2  # a run was interrupted

    # Nothing is left to do: no run is started, so none writes its log.
    logs = sorted(killed.parent.glob("runs/small/*/seed*/train.log"))
    before = [log.stat().st_mtime_ns for log in logs]
    assert len(logs) == 2
    run(killed)
    assert [log.stat().st_mtime_ns for log in logs] == before


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_study_killed_ten_times_ends_as_one_that_two_processes_shared(tmp_path):
    shared = write_tiny_study(tmp_path / "shared", seeds=2)
    killed = write_tiny_study(tmp_path / "killed", seeds=2)
    parts = [start(shared, "--only", f"{i}/2") for i in (1, 2)]
    outputs = [part.communicate(timeout=TIMEOUT)[0] for part in parts]
    assert [part.returncode for part in parts] == [0, 0], outputs
    kill_until_done(killed, num_kills=10, generator=random.Random(10))

    expected = read_json(shared.parent / "runs" / "small")
    assert expected["num_done"] == 4
    assert read_json(killed.parent / "runs" / "small") == expected
    assert count_starts(shared.parent) == 4
    assert count_starts(killed.parent) > 6  # runs were interrupted


def is_running(grid_run: GridRun, other_than: object = None) -> bool:
    """Whether a run has taken steps, and by another process than an earlier one."""
    status = read_status(grid_run.run_dir)
    if status is None or status["state"] != "running" or status["pid"] == other_than:
        return False
    return status["step"] > 0


def stop_this_process_when(condition: Callable[[], bool]) -> None:
    """Send SIGTERM to this process, from a thread, as soon as a condition holds."""

    def wait_and_stop() -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_and_stop).start()


@pytest.mark.slow
def test_a_study_that_is_stopped_or_killed_takes_its_runs_along(tmp_path):
    path = write_study(tmp_path, "base: base.yaml\nseeds: 1\narms: {A: , B: }", LONG_BASE)
    first = load_study(path, tmp_path / "runs", []).runs[0]

    stop_this_process_when(lambda: is_running(first))
    output = run(path, status=75)
    assert "stopped by signal 15: 0 of 2 runs are done, what was running is saved" in output
    assert "the same command goes on" in output
    stopped = read_status(first.run_dir)
    assert stopped["state"] == "stopped"

    # A study that is killed cannot tell its run to stop; the kernel does.
    process = start(path)
    wait_for(lambda: is_running(first, other_than=stopped["pid"]), process)
    process.kill()
    process.communicate()
    wait_for(lambda: read_status(first.run_dir)["state"] == "stopped")
    assert read_status(first.run_dir)["step"] > stopped["step"]


def test_what_ends_a_run_decides_about_the_others(tmp_path):
    # The first arm diverges, which is a result; the second one is refused, which ends the study.
    text = """
base: base.yaml
seeds: 1
arms:
  hot: {set: {optimizer.lr: 1.0e+9}}
  five classes: {set: {model.num_classes: 5}}
  never: {}
"""
    path = write_study(tmp_path, text, TINY_BASE)
    output = run(path, status=2)
    assert "hot, seed 0: diverged: step " in output
    assert "not finite" in output
    errors = [line for line in output.splitlines() if line.startswith("lrd: ")]
    assert errors == [
        "lrd: five classes, seed 0: model.num_classes: is 5, but the data has 10 classes"
    ]

    # The one that diverged is not run again.
    study = load_study(path, tmp_path / "runs", [])
    states = [state.name for state in read_states(study, is_report=False).values()]
    assert states == ["diverged", "new", "new"]
    assert "* hot: 1 of 1 seeds diverged" in run(path, "--report")


def test_a_plan_shows_what_is_left(tmp_path):
    study = load(tmp_path)
    for sgd_run in study.runs_of("SGD"):
        record(sgd_run, [0.1, 0.2, 0.3])
    output = run(write_study(tmp_path), "--plan")

    rows = {line[:9].strip(): line[9:].split() for line in output.splitlines()}
    assert rows["SGD"] == ["2", "0", "0", "0", "s"]
    done, left, steps, milliseconds, unit, *time_left = rows["LRD 0.5"]
    assert (done, left, steps, unit) == ("0", "2", "66", "ms")
    assert float(milliseconds) > 0.0
    assert rows["all"] == ["2", "2", "66", *time_left]
    assert not study.runs_of("LRD 0.5")[0].run_dir.exists()


def test_runs_that_run_at_a_time_share_cores_and_gpus(tmp_path, monkeypatch):
    grid_run = load(tmp_path).runs[0]
    monkeypatch.setattr("lrd.study.runner.available_cores", lambda: 8.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert child_environment(grid_run, 0, jobs=3, gpus=[])["OMP_NUM_THREADS"] == "2"
    assert child_environment(grid_run, 0, jobs=20, gpus=[])["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert child_environment(grid_run, 0, jobs=3, gpus=[])["OMP_NUM_THREADS"] == "1"

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in child_environment(grid_run, 1, jobs=2, gpus=["4", "5"])
    (tmp_path / "base.yaml").write_text(BASE.replace(", device: cpu", ""))
    grid_run = load_study(tmp_path / "small.yaml", tmp_path / "runs", []).runs[0]
    slots = [child_environment(grid_run, slot, jobs=3, gpus=["4", "5"]) for slot in range(3)]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["4", "5", "4"]
    assert all(slot["LRD_PARENT_PID"] == str(os.getpid()) for slot in slots)


def test_the_position_of_a_run_that_is_writing(tmp_path):
    assert read_position(tmp_path) == Position()
    metrics = tmp_path / "metrics.csv"
    header = 'step,epoch,test/accuracy,"probes/fc.weight[0,1]"\n'
    metrics.write_text(header)
    assert read_position(tmp_path) == Position()
    metrics.write_text(header + "1,1,,0.1\n2,1,0.25,0.1\n3,2,,0.1\n4,2,0.")
    assert read_position(tmp_path) == Position(step=3, epoch=2, accuracy=0.25)

    rows = "".join(f"{step},1,,0.1\n" for step in range(1, 20_000))
    metrics.write_text(header + rows + "20000,2,0.5,0.1\n")
    assert metrics.stat().st_size > 200_000
    assert read_position(tmp_path) == Position(step=20_000, epoch=2, accuracy=0.5)


def test_lines_of_progress_say_what_is_left_of_the_whole_grid(tmp_path, monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    runs = load(tmp_path).runs  # 4 of 33 steps
    states = {grid_run: RunState("new") for grid_run in runs}
    states[runs[0]] = RunState("finished", 33)

    with GridProgress(runs, states) as progress:
        record(runs[1], [0.5, 0.75], state="running")  # 22 steps in 11 s
        for clock[0] in (1002.0, 1011.0, 1012.0):
            progress.update([runs[1]])
    assert capsys.readouterr().out == (
        "run 2 of 4: LRD 0.5, seed 0: epoch 2/3 test acc 0.7500; 1 of 4 runs done, 38 s left\n"
    )
