"""`benchmarks/on_gpu.py`, which is meant for a GPU, runs on a CPU with tiny sizes."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_gpu.py"


def command(folder: Path, *arguments: str) -> list[str]:
    folders = ["--out", str(folder / "out"), "--runs", str(folder / "runs")]
    return [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", *folders, *arguments]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(folder, *arguments),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=240,
    )


@pytest.fixture(scope="module")
def on_gpu():
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("on_gpu")
    sys.path.remove(str(SCRIPT.parent))


def begin(on_gpu: ModuleType, folder: Path, minutes: float = 10.0) -> Any:
    return on_gpu.begin(
        argparse.Namespace(
            minutes=minutes,
            device="cpu",
            tiny=True,
            data=None,
            out=folder / "out",
            runs=folder / "runs",
        )
    )


def read(folder: Path, part: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "out" / f"{part}.json").read_text())
    return values


def check_training(result: dict[str, Any]) -> None:
    assert result["state"] == "done"
    assert result["steps"] == result["total_steps"] == 6  # 3 epochs of 64 images in batches of 32
    assert result["epochs_timed"] == 2
    assert 0 < result["epoch_seconds"]["min"] <= result["epoch_seconds"]["median"]
    assert result["seconds_for_200_epochs"] == 200 * result["epoch_seconds"]["median"]
    assert 0 <= result["test_accuracy"] <= result["best_test_accuracy"] <= 1


@pytest.mark.slow
def test_a_part_is_run_once_at_a_commit(tmp_path):
    first = run(tmp_path, "--parts", "resnet34", "tests")
    assert first.returncode == 0, first.stdout + first.stderr
    result = read(tmp_path, "resnet34")
    check_training(result)
    assert result["tiny"]
    assert {"commit", "device", "torch", "python", "command"} <= set(result)
    assert read(tmp_path, "tests")["reason"] == "these tests need a CUDA device"

    second = run(tmp_path, "--parts", "resnet34")
    assert second.returncode == 0
    assert "resnet34: is done already" in second.stdout
    assert read(tmp_path, "resnet34") == result


def test_a_part_for_which_there_is_no_time_is_left_out(on_gpu, tmp_path):
    session = begin(on_gpu, tmp_path, minutes=0.1)
    results = on_gpu.run_parts(session, ["resnet34", "study"])
    for name, least in (("resnet34", 60), ("study", 90)):
        assert results[name]["state"] == read(tmp_path, name)["state"] == "skipped"
        assert f"s are left, and it needs at least {least} s" in results[name]["reason"]


def test_a_part_without_its_packages_is_left_out(on_gpu, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("pydantic", "simpleeval") else find_spec(name),
    )
    results = on_gpu.run_parts(begin(on_gpu, tmp_path), ["resnet34"])
    reason = "not installed: pydantic, simpleeval"
    assert results == {"resnet34": {"state": "skipped", "reason": reason}}


@pytest.mark.slow
def test_a_part_that_fails_says_why(on_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(on_gpu, "RECIPE", tmp_path / "none.yaml")
    result = on_gpu.run_parts(begin(on_gpu, tmp_path), ["resnet34"])["resnet34"]
    assert result["state"] == read(tmp_path, "resnet34")["state"] == "failed"
    assert result["reason"].endswith("none.yaml: there is no such recipe")


@pytest.mark.parametrize("change", [{"commit": "other"}, {"device": "other"}, {"tiny": False}])
def test_a_result_of_another_commit_or_device_is_not_taken(on_gpu, tmp_path, change):
    session = begin(on_gpu, tmp_path)
    on_gpu.write_result(session, "tests", {"state": "done"})
    assert on_gpu.read_result(session, "tests")["state"] == "done"
    path = tmp_path / "out" / "tests.json"
    path.write_text(json.dumps(read(tmp_path, "tests") | change))
    assert on_gpu.read_result(session, "tests") == {}


def test_the_tests_that_failed_are_named(on_gpu, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): raise ValueError('too large')\n"
        "@pytest.mark.skip\n"
        "def test_left_out(): pass\n"
    )
    (tmp_path / "test_missing.py").write_text("import no_such_package\n")
    report = tmp_path / "report.xml"
    options = ["-q", "-c", os.devnull, "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    pytest_command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", "."]
    subprocess.run(pytest_command, cwd=tmp_path, capture_output=True, check=False)

    result = on_gpu.read_test_report(report)
    counts = {key: result[key] for key in ("passed", "failures", "errors", "skipped")}
    assert counts == {"passed": 1, "failures": 1, "errors": 1, "skipped": 1}
    faults = {fault["test"]: fault for fault in result["not_passed"]}
    assert faults["test_some::test_wrong"]["message"] == "ValueError: too large"
    assert "no_such_package" in faults["test_missing"]["last_line"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--minutes", "0"], "--minutes: is 0.0, should be more than 0"),
        (["--minutes", "nan"], "--minutes: is nan, should be more than 0"),
        (["--data", "nowhere"], "--data: there is no folder nowhere/train"),
        (["--out", str(SCRIPT)], f"--out: cannot be made: {SCRIPT}: File exists"),
    ],
)
def test_a_wrong_argument_is_one_line(on_gpu, monkeypatch, capsys, arguments, expected):
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--device", "cpu", "--tiny", *arguments])
    assert on_gpu.main() == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"on_gpu: {expected}\n")


@pytest.mark.slow
def test_all_parts_run(tmp_path):
    done = run(tmp_path, "--minutes", "10")
    assert done.returncode == 0, done.stdout + done.stderr
    check_training(read(tmp_path, "resnet34"))

    masked_step = read(tmp_path, "masked_step")
    assert masked_step["state"] == "done"
    measured = masked_step["target"]["measured"]
    assert set(measured) == {
        f"{n}, {p}" for n in ("SGD", "Adam", "AdamW") for p in (0.5, 0.75, 0.9)
    }
    assert all(ratio > 0 for ratio in measured.values())

    rows = read(tmp_path, "train_step")["cpu"]["rows"]
    assert len(rows) == 6  # two precisions, three layouts
    assert all(row["share_of_peak"] > 0 for row in rows)

    study = read(tmp_path, "study")
    assert (study["state"], study["runs"], study["runs_done"]) == ("done", 33, 2)
    assert study["arms"]["SGD"]["num_finished"] == 1
    assert (tmp_path / "out" / "study" / "study.md").is_file()


@pytest.mark.slow
def test_a_training_that_is_stopped_goes_on(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--parts", "resnet34"), stdout=subprocess.PIPE, text=True
    )
    metrics = "*/*/resnet34/metrics.csv"
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs").glob(metrics)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped; the same command goes on from here" in output
    stopped = read(tmp_path, "resnet34")
    assert stopped["state"] in ("stopped", "done")  # it may have been in its last step

    again = run(tmp_path, "--parts", "resnet34")
    assert again.returncode == 0, again.stdout + again.stderr
    result = read(tmp_path, "resnet34")
    assert (result["state"], result["steps"]) == ("done", 6)
