"""All that there is to measure on a GPU, with one command.

    python benchmarks/on_gpu.py --minutes 60 --data DIR [--out DIR] [--parts PART ...]
    python benchmarks/on_gpu.py --device cpu --tiny     # tries the script out, in a minute

| part | what |
| --- | --- |
| `tests` | the tests that need a GPU: `pytest -m cuda` |
| `masked_step` | the optimizer step with the mask, compared with torch's own (masked_step.py) |
| `train_step` | a training step of ResNet-34 by precision and layout (train_step.py) |
| `resnet34` | 200 epochs of ResNet-34 with the authors' settings, in bf16 where the GPU has it |
| `study` | recipes/studies/cifar10_resnet34.yaml: does it help, and which fault explains what? |

They run in this order as far as the minutes allow, and each writes `<part>.json` with commit,
versions and device. The same command again goes on: it leaves out what is done at this commit on
this device, and continues the trainings where they stopped. So does Ctrl-C, then the same command.

It needs a checkout and torch. What else a part needs is looked for first, and a part that misses
something is left out with the reason. A copy of the checkout without git may say its commit in a
file COMMIT.

Exit status: 0 done, or left out with a reason; 1 a part or a test failed; 2 an error of the user;
75 stopped by a signal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any
from xml.etree import ElementTree

import torch

# The checkout's lrd, also where it is not installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from common import RESULTS, ROOT, circumstances, summary

from lrd.distributed.signals import PARENT_VARIABLE
from lrd.errors import (
    EXIT_OK,
    EXIT_RUN_ERROR,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    UserError,
    describe_os_error,
)

RECIPE = ROOT / "recipes" / "cifar10_resnet34_sgd_lrd.yaml"
STUDY = ROOT / "recipes" / "studies" / "cifar10_resnet34.yaml"

MASKED_STEP_TARGET = 1.10  # ratio to the fastest stock step
EPOCHS = 200
EPOCHS_TARGET = 300.0  # seconds for these

SECONDS_BETWEEN_POLLS = 0.1
SECONDS_BETWEEN_LINES = 30.0
SECONDS_TO_SAVE = 40.0  # that a training has at the end; it gives its own runs 30
SECONDS_FOR_REPORT = 30.0
SECONDS_TO_COMPILE = 900.0  # `torch.compile` of all ways of train_step.py, at most

# Makes a training a matter of seconds.
TINY_DATA = ["data.dataset=synthetic", "data.num_samples=64", "data.image_size=8"]
TINY_RUN = ["model.arch=resnet18", "model.width=4", "data.batch_size=32", "trainer.epochs=3"]
TINY_STUDY_PART = "1/20"  # two runs of all

TRAINING_PACKAGES = (
    "accelerate",
    "numpy",
    "psutil",
    "pydantic",
    "rich",
    "safetensors",
    "simpleeval",
    "tensorboard",
    "torchvision",
    "yaml",
)


@dataclass
class Session:
    """One start of this script.

    Attributes:
        device: `cpu` or `cuda`.
        is_tiny: everything is small, to try the script out.
        data: folder with `train/<class>/*` and `test/<class>/*`; None: not given.
        out: the folder of the results.
        runs: the folder of the run directories of this commit and device.
        end: when the minutes are over, by `time.monotonic`.
        facts: commit, machine and versions.
        stop_signal: that has been received; 0: none.
    """

    device: str
    is_tiny: bool
    data: Path | None
    out: Path
    runs: Path
    end: float
    facts: dict[str, Any]
    stop_signal: int = 0

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def note_signal(self, number: int, _: FrameType | None) -> None:
        self.stop_signal = number


@dataclass
class Ended:
    """How a command ended.

    Attributes:
        command: what was run.
        status: its exit status.
        seconds: it took.
        cut: why it was stopped; empty if it ended by itself.
        last_line: that it printed.
    """

    command: list[str]
    status: int
    seconds: float
    cut: str = ""
    last_line: str = ""

    @property
    def state(self) -> str:
        """What has become of the part: `done`, `stopped` or `failed`."""
        if self.status == EXIT_OK:
            return "done"
        return "stopped" if self.cut or self.status == EXIT_STOPPED else "failed"

    @property
    def reason(self) -> str:
        """Why it did not end well, in one line."""
        return self.cut or f"ended with status {self.status}: {self.last_line}"


@dataclass(frozen=True)
class Part:
    """One of the measurements.

    Attributes:
        run: makes its result, the values of `<part>.json` beside the circumstances. Its `state` is
            `done`, `stopped` (the same command goes on), `skipped` or `failed`; `reason` says why.
        packages: modules without which it cannot run.
        least_seconds: it is left out if less time is left.
        least_tiny_seconds: the same with `--tiny`.
    """

    run: Callable[[Session], dict[str, Any]]
    packages: tuple[str, ...]
    least_seconds: float
    least_tiny_seconds: float = 2.0


def run_command(
    session: Session,
    name: str,
    command: list[str],
    most_seconds: float,
    ending_signal: signal.Signals = signal.SIGTERM,
    environment: dict[str, str] | None = None,
) -> Ended:
    """Run a command of a part; what it prints goes to `<out>/<part>.log`.

    It is asked to end when its time is over or this script is to stop.

    Args:
        session: this start.
        name: of the part.
        command: without the Python interpreter in front.
        most_seconds: it may take.
        ending_signal: how it is asked to end.
        environment: variables that it gets beside those of this process.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    log = session.out / f"{name}.log"
    began = time.monotonic()
    next_line = began + SECONDS_BETWEEN_LINES
    cut = ""

    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables, **(environment or {})},
            # A Ctrl-C in the terminal goes to this script alone, which passes it on.
            start_new_session=True,
        )
        try:
            while process.poll() is None and not cut:
                time.sleep(SECONDS_BETWEEN_POLLS)
                now = time.monotonic()
                if session.stop_signal:
                    cut = f"signal {session.stop_signal} was received"
                elif now - began > most_seconds:
                    cut = f"its time was over after {now - began:.0f} s"
                elif now > next_line:
                    next_line = now + SECONDS_BETWEEN_LINES
                    say(f"{name}: {now - began:.0f} s, {last_line(log)}")
        finally:
            end_process(process, ending_signal)
    return Ended(command, process.returncode, time.monotonic() - began, cut, last_line(log))


def end_process(process: subprocess.Popen[bytes], ending_signal: signal.Signals) -> None:
    """Have a process and all that it started end, if it runs."""
    if process.poll() is not None:
        return

    process.send_signal(ending_signal)
    try:
        process.wait(SECONDS_TO_SAVE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(log: Path) -> str:
    """The last line that a command has printed."""
    text = log.read_bytes()[-2000:].decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    return lines[-1][:200] if lines else "nothing printed yet"


def say(text: str) -> None:
    print(f"on_gpu: {text}", flush=True)


# The parts.


def run_tests(session: Session) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    if session.device != "cuda":
        return {"state": "skipped", "reason": "these tests need a CUDA device"}

    report = session.runs / "tests.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    ended = run_command(
        session,
        "tests",
        ["-m", "pytest", "-m", "cuda", *options, f"--junitxml={report}", "tests"],
        session.seconds_left() / 3,
        ending_signal=signal.SIGINT,  # it then writes what it has
    )
    if not report.is_file():
        return {"state": "stopped" if ended.cut else "failed", "reason": ended.reason}

    result = {
        "state": "stopped" if ended.cut else "done",
        "seconds": ended.seconds,
        "command": describe_command(ended),
        **read_test_report(report),
    }
    return {**result, "reason": ended.cut} if ended.cut else result


def read_test_report(path: Path) -> dict[str, Any]:
    """Read how tests ended, from the JUnit XML that pytest wrote.

    Returns:
        The numbers of tests that passed, failed, were skipped, or are in files that could not be
        imported (`errors`); and why each of those failed.
    """
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = {key: int(suite.get(key, "0")) for key in ("failures", "errors", "skipped")}
    passed = int(suite.get("tests", "0")) - sum(counts.values())
    faults = [fault for case in suite.iter("testcase") for fault in faults_of(case)]
    return {"passed": passed, **counts, "not_passed": faults}


def faults_of(case: ElementTree.Element) -> Iterator[dict[str, str]]:
    """Why a test failed, or a file of tests could not be imported: the last line of the output."""
    name = "::".join(filter(None, [case.get("classname"), case.get("name")]))
    for fault in case:
        if fault.tag in ("failure", "error"):
            message = fault.get("message", "").partition("\n")[0]
            lines = [line.strip() for line in (fault.text or "").splitlines() if line.strip()]
            last = lines[-1] if lines else ""
            yield {"test": name, "what": fault.tag, "message": message, "last_line": last}


def measure_masked_step(session: Session) -> dict[str, Any]:
    """Compare the masked step with torch's own for SGD, Adam and AdamW."""
    rounds = 2 if session.is_tiny else 30
    options = ["--device", session.device, "--rounds", f"{rounds}"]
    options += ["--optimizers", "SGD", "Adam", "AdamW"]
    result = run_benchmark(session, "masked_step", options, session.seconds_left() / 3)
    if result["state"] != "done":
        return result

    # What a GPU takes itself is what training waits for, since the CPU runs ahead of it there.
    key = "gpu_ratio" if session.device == "cuda" else "ratio"
    rows = [row for row in result["rows"] if row["way"] == "masked, one pass"]
    ratios = {f"{row['optimizer']}, {row['keep_prob']}": row[key]["median"] for row in rows}
    result["target"] = {
        "what": f"{key} of the step in one pass to the fastest stock step, median of {rounds}",
        "at_most": MASKED_STEP_TARGET,
        "measured": ratios,
        "is_met": {
            name: None if session.is_tiny else ratio <= MASKED_STEP_TARGET
            for name, ratio in ratios.items()
        },
    }
    return result


def measure_train_step(session: Session) -> dict[str, Any]:
    """Measure a training step by precision and memory layout."""
    is_compiled = session.device == "cuda" and session.seconds_left() > 2 * SECONDS_TO_COMPILE
    options = ["--devices", session.device, "--rounds", "1" if session.is_tiny else "10"]
    options += ["--compile" if is_compiled else "--no-compile"]
    options += ["--batches", "8"] if session.is_tiny else []
    return run_benchmark(session, "train_step", options, session.seconds_left() / 2)


def run_benchmark(
    session: Session, name: str, options: list[str], most_seconds: float
) -> dict[str, Any]:
    """Run a benchmark of this folder. Returns what it wrote."""
    written = session.runs / f"{name}.json"
    written.unlink(missing_ok=True)
    tiny = ["--tiny"] if session.is_tiny else []
    script = str(Path("benchmarks") / f"{name}.py")
    ended = run_command(
        session, name, [script, *options, *tiny, "--out", str(written)], most_seconds
    )
    if ended.state != "done":
        return {"state": ended.state, "reason": ended.reason}

    result = json.loads(written.read_text(encoding="utf-8"))
    return {**result, "state": "done", "seconds": ended.seconds, "command": describe_command(ended)}


def train_resnet34(session: Session) -> dict[str, Any]:
    """Train ResNet-34 for 200 epochs, or continue."""
    missing = explain_missing_data(session)
    if missing:
        return {"state": "skipped", "reason": missing}

    run_dir = session.runs / "resnet34"
    # A checkpoint takes longer than an epoch may.
    overrides = [*run_overrides(session), "trainer.precision=auto", "checkpoint.every_steps=3900"]
    ended = run_command(
        session,
        "resnet34",
        ["-m", "lrd.train", str(RECIPE), *overrides, f"run_dir={json.dumps(str(run_dir))}"],
        session.seconds_left() - SECONDS_TO_SAVE,
        environment={PARENT_VARIABLE: str(os.getpid())},
    )
    status = read_json(run_dir / "status.json")
    result = {
        "state": ended.state,
        "command": describe_command(ended),
        "steps": status.get("step", 0),
        "total_steps": status.get("total_steps"),
        **describe_epochs(run_dir, session.is_tiny),
    }
    return result if result["state"] == "done" else {**result, "reason": ended.reason}


def describe_epochs(run_dir: Path, is_tiny: bool) -> dict[str, Any]:
    """Time and accuracy of the epochs that a run recorded.

    An epoch's time is between two evaluations of the same start, so that evaluation and records are
    part of it, and the start is not.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    seconds = []
    accuracies: dict[int, float] = {}  # by step
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        times = []
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == "test/accuracy":
                    times.append(event.wall_time)
                    accuracies[event.step] = float(
                        value.tensor.float_val[0]
                        if value.HasField("tensor")
                        else value.simple_value
                    )
        seconds += [after - before for before, after in pairwise(times)]

    result: dict[str, Any] = {"epochs_timed": len(seconds), "epochs_evaluated": len(accuracies)}
    if accuracies:
        result["test_accuracy"] = accuracies[max(accuracies)]
        result["best_test_accuracy"] = max(accuracies.values())
    if seconds:
        whole = EPOCHS * statistics.median(seconds)
        result["epoch_seconds"] = summary(seconds)
        result[f"seconds_for_{EPOCHS}_epochs"] = whole
        result["target"] = {
            "what": f"{EPOCHS} times the median epoch, in seconds",
            "at_most": EPOCHS_TARGET,
            "is_met": None if is_tiny else whole <= EPOCHS_TARGET,
        }
    return result


def run_study(session: Session) -> dict[str, Any]:
    """Run what is left of the study at the paper's size."""
    missing = explain_missing_data(session)
    if missing:
        return {"state": "skipped", "reason": missing}

    folder = session.out / "study"
    if not read_result(session, "study"):  # what lies there is of another commit
        (folder / "study.json").unlink(missing_ok=True)
    options = ["--runs", str(session.runs), "--out", str(folder)]
    only = ["--only", TINY_STUDY_PART] if session.is_tiny else []
    study = ["-m", "lrd", "study", str(STUDY), *options]
    ended = run_command(
        session,
        "study",
        [*study, *only, *run_overrides(session)],
        session.seconds_left() - SECONDS_TO_SAVE - SECONDS_FOR_REPORT,
    )
    result: dict[str, Any] = {
        "state": ended.state,
        "command": describe_command(ended),
    }
    if ended.status != EXIT_OK:
        result["reason"] = ended.reason
    if result["state"] == "stopped" and not session.stop_signal:  # it has made no report
        command = [*study, "--report", *run_overrides(session)]
        run_command(session, "study_report", command, SECONDS_FOR_REPORT)

    report = read_json(folder / "study.json")
    result["runs"] = report.get("num_runs")
    result["runs_done"] = report.get("num_done", 0)
    result["arms"] = {
        name: {key: arm[key] for key in ("num_finished", "estimates", "differences")}
        for name, arm in report.get("arms", {}).items()
    }
    return result


def explain_missing_data(session: Session) -> str:
    """Why there are no images to train on; empty if there are."""
    if session.data is None and not session.is_tiny:
        return "it needs images: --data DIR with train/<class>/* and test/<class>/*"
    return ""


def run_overrides(session: Session) -> list[str]:
    """Settings of a training on this device and these images."""
    overrides = [f"trainer.device={session.device}"]
    if session.data is not None:
        root = json.dumps(str(session.data))
        overrides += ["data.dataset=imagefolder", f"data.root={root}", "data.image_size=32"]
    elif session.is_tiny:
        overrides += TINY_DATA
    return [*overrides, *TINY_RUN] if session.is_tiny else overrides


def describe_command(ended: Ended) -> str:
    return shlex.join(["python", *ended.command])


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that a run or a study wrote; empty if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


BENCHMARK_PACKAGES = ("numpy", "psutil", "rich", "torchvision")
STUDY_PACKAGES = (*TRAINING_PACKAGES, "matplotlib", "scipy", "typer")
TEST_PACKAGES = ("accelerate", "numpy", "psutil", "pytest", "pytest_timeout", "safetensors")

PARTS = {
    # A file of tests that needs more is named in the result as one that could not be imported.
    "tests": Part(run_tests, TEST_PACKAGES, 60.0),
    "masked_step": Part(measure_masked_step, BENCHMARK_PACKAGES, 60.0),
    "train_step": Part(measure_train_step, BENCHMARK_PACKAGES, 60.0),
    "resnet34": Part(train_resnet34, TRAINING_PACKAGES, 120.0, 60.0),
    "study": Part(run_study, STUDY_PACKAGES, 180.0, 90.0),
}


# Which parts run, and what is kept of them.


def run_parts(session: Session, names: list[str]) -> dict[str, dict[str, Any]]:
    """Run the parts that are not done. Returns the result of each that was reached."""
    results = {}
    for name in names:
        earlier = read_result(session, name)
        if earlier.get("state") == "done":
            say(f"{name}: is done already, see {session.out / name}.json")
            results[name] = earlier
            continue

        reason = explain_leaving_out(session, name)
        if reason:
            result = {"state": "skipped", "reason": reason}
        else:
            say(f"{name}: begins, {session.seconds_left() / 60:.1f} minutes are left")
            result = PARTS[name].run(session)
        say(f"{name}: {describe(result)}")

        # What is known of a training that was stopped is kept.
        if result["state"] != "skipped" or not earlier:
            write_result(session, name, result)
        results[name] = result
        if session.stop_signal:
            break
    return results


def explain_leaving_out(session: Session, name: str) -> str:
    """Why a part cannot run; empty if it can."""
    part = PARTS[name]
    packages = list(part.packages)
    if name == "masked_step":
        packages.append("triton" if session.device == "cuda" else "numba")
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"

    least = part.least_tiny_seconds if session.is_tiny else part.least_seconds
    left = session.seconds_left()
    if left < least:
        return f"{max(0.0, left):.0f} s are left, and it needs at least {least:.0f} s"
    return ""


def identify(session: Session) -> dict[str, Any]:
    """What two results must have in common so that one makes the other unnecessary."""
    return {
        "commit": session.facts["commit"],
        "device": session.facts["device"],
        "tiny": session.is_tiny,
        "torch": session.facts["torch"],
    }


def read_result(session: Session, name: str) -> dict[str, Any]:
    """An earlier result of this commit and device; empty if there is none."""
    result = read_json(session.out / f"{name}.json")
    is_same = all(result.get(key) == value for key, value in identify(session).items())
    return result if is_same else {}


def write_result(session: Session, name: str, result: dict[str, Any]) -> None:
    """Write a result as a whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    path = session.out / f"{name}.json"
    time_of_day = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    values = {"part": name, **session.facts, **result, **identify(session), "time": time_of_day}
    try:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--out: cannot be written: {describe_os_error(error)}") from None


def describe(result: dict[str, Any]) -> str:
    """A result in one line: its state, why, and the figure that matters most."""
    texts = [result["state"]]
    if result.get("reason"):
        texts.append(result["reason"])
    if "passed" in result:
        texts.append(f"{result['passed']} passed, {len(result['not_passed'])} failed")
    if "measured" in result.get("target", {}):
        ratios = result["target"]["measured"].items()
        texts.append(", ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios))
    for device in ("cpu", "cuda"):
        rows = result[device].get("rows", []) if isinstance(result.get(device), dict) else []
        if rows:
            best = max(rows, key=lambda row: row["images_per_second"])
            texts.append(
                f"at most {best['images_per_second']:.0f} images/s, in {best['precision']}, "
                f"{best['share_of_peak']:.0%} of torch.mm"
            )
    if "epoch_seconds" in result:
        texts.append(f"{result['epoch_seconds']['median']:.2f} s an epoch")
    if "runs_done" in result:
        texts.append(f"{result['runs_done']} of {result['runs'] or '?'} runs")
    return "; ".join(texts)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="for all parts; default: 60")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with train/<class>/* and test/<class>/*, which the trainings need",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder of the results")
    parser.add_argument(
        "--runs",
        type=Path,
        default=ROOT / "runs" / "on_gpu",
        help="folder of the run directories, with gigabytes of checkpoints",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script out")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    return parser.parse_args()


def begin(arguments: argparse.Namespace) -> Session:
    """Check the arguments and make the folders.

    Raises:
        UserError: an argument is wrong.
    """
    if not (math.isfinite(arguments.minutes) and arguments.minutes > 0):
        raise UserError(f"--minutes: is {arguments.minutes}, should be more than 0")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device: there is no CUDA device here; --device cpu --tiny tries the script out"
        )
    if arguments.data is not None:
        for part in ("train", "test"):
            if not (arguments.data / part).is_dir():
                raise UserError(f"--data: there is no folder {arguments.data / part}")

    facts = circumstances(arguments.device)
    size = "-tiny" if arguments.tiny else ""
    out = arguments.out.resolve()
    runs = arguments.runs.resolve() / facts["commit"] / f"{arguments.device}{size}"
    for key, folder in (("--out", out), ("--runs", runs)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{key}: cannot be made: {describe_os_error(error)}") from None
    data = None if arguments.data is None else arguments.data.resolve()
    end = time.monotonic() + 60 * arguments.minutes
    return Session(arguments.device, arguments.tiny, data, out, runs, end, facts)


def main() -> int:
    arguments = read_arguments()
    try:
        session = begin(arguments)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, session.note_signal)

        facts = session.facts
        say(f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}")
        # In the order of PARTS, whatever the order on the command line.
        results = run_parts(session, [name for name in PARTS if name in arguments.parts])
    except UserError as error:
        print(f"on_gpu: {error}", file=sys.stderr)
        return EXIT_USER_ERROR

    if session.stop_signal:
        say("stopped; the same command goes on from here")
        return EXIT_STOPPED
    say(f"results: {session.out}")
    is_failed = any(
        result["state"] == "failed" or result.get("not_passed") for result in results.values()
    )
    return EXIT_RUN_ERROR if is_failed else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
