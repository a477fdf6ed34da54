"""Runs inputs, several at a time, and judges what came of each."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .cases import RECIPE, RECIPE_FILE, RUN_DIR, Expected, Input, accepted, training

ROOT = Path(__file__).parents[2]
SECONDS = 10.0  # how long an input may take beyond a valid one
MAX_LINES = 12  # of an error
_MEMORY_BYTES = 12 << 30  # that a forked process may allocate, so that no input fills the machine

# What is imported once, before the processes are forked.
_PRELOADED = [
    "lrd.train",
    "lrd.cli.app",
    "lrd.cli.compare",
    "lrd.cli.plots",
    "lrd.cli.tables",
    "torch.utils.tensorboard",
    "torchvision.transforms.v2.functional",
    "matplotlib.figure",
]


# Now and then the fork server does not pass a status on, so the process writes it here.
_STATUS_FILE = ".status"

_FAULTS = ("Traceback (most recent call last)", "Fatal Python error", "terminate called")
_WRITTEN_FIRST = {".lock", "status.json", "train.log"}  # in a run directory that was there before


@dataclass(frozen=True)
class Outcome:
    """What came of an input.

    Attributes:
        input: the input.
        status: the exit status; None: it was still running at the end of its time.
        seconds: that it took.
        output: its standard output.
        errors: its standard error.
        problem: what is wrong with that, in one line; empty: nothing.
    """

    input: Input
    status: int | None
    seconds: float
    output: str
    errors: str
    problem: str = ""


class Lab:
    """Runs inputs in a folder of its own each.

    Args:
        folder: for the inputs' folders.
        jobs: how many inputs at a time.
    """

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder = folder
        self.jobs = jobs
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(_PRELOADED)
        self._baselines: dict[str, float] = {}  # kind of command -> seconds of a valid one

    def run(self, inputs: Iterable[Input]) -> Iterator[Outcome]:
        """Yields the outcome of each input, in the order in which they end."""
        inputs = list(inputs)
        for kind in {_kind(input): input for input in inputs}:
            self._measure_baseline(kind)

        with ThreadPoolExecutor(self.jobs) as pool:
            running = [pool.submit(self.run_one, input) for input in inputs]
            for done in as_completed(running):
                yield done.result()

    def run_one(self, input: Input) -> Outcome:
        """The outcome of an input, and of a second try where the first one took too long.

        The machine may have become busy with something else since the baseline was measured.
        """
        outcome = self._try(input)
        if outcome.status is None:
            self._measure_baseline(_kind(input))
            outcome = self._try(input)
        return outcome

    def _try(self, input: Input) -> Outcome:
        limit = SECONDS + self.jobs * self._baselines.get(_kind(input), 120.0)
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as name:
            folder = Path(name)
            (folder / RECIPE_FILE).write_text(RECIPE)
            try:
                input.prepare(folder)
                before = _content(folder / RUN_DIR)
                status, seconds = self._execute(input, folder, limit)
                after = _content(folder / RUN_DIR)
            finally:
                _make_writable(folder)

            outcome = Outcome(
                input,
                status,
                seconds,
                (folder / ".stdout").read_text(errors="replace"),
                (folder / ".stderr").read_text(errors="replace"),
            )
            problem = judge(outcome, limit) or _find_remains(outcome, before, after)
        return Outcome(**{**vars(outcome), "problem": problem})

    def _measure_baseline(self, kind: str) -> None:
        command = training()
        if kind == "started":
            command = (sys.executable, "-m", "lrd.train", *command[1:])
        if kind == "launched":
            command = (sys.executable, "-m", "lrd", "launch", "--num_processes", "2", *command[1:])

        valid = Input("baseline", kind, accepted("is valid"), command, is_launched=True)
        if kind == "forked":
            valid = Input("baseline", kind, accepted("is valid"), command)
            self._try(valid)  # the first one waits until the modules are imported
        outcome = self._try(valid)
        assert not outcome.problem, f"{outcome.problem}\n{outcome.errors}"
        self._baselines[kind] = outcome.seconds

    def _execute(self, input: Input, folder: Path, limit: float) -> tuple[int | None, float]:
        """Returns the exit status, None at the limit, and the seconds that it took."""
        began = time.monotonic()
        if input.is_forked:
            arguments = (list(input.command), dict(input.environment), str(folder))
            process = self._processes.Process(target=run_forked, args=arguments)
            process.start()
            process.join(limit)
            seconds = time.monotonic() - began
            status = process.exitcode
            if (folder / _STATUS_FILE).exists():
                status = int((folder / _STATUS_FILE).read_text())
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it may have left behind, too
            process.join()
            return status, seconds

        with (folder / ".stdout").open("wb") as out, (folder / ".stderr").open("wb") as err:
            started = subprocess.Popen(
                _command_line(input),
                cwd=folder,
                env=_environment(input.environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                status = started.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
                started.terminate()  # a launcher ends its ranks, which have sessions of their own
                with suppress(subprocess.TimeoutExpired):
                    started.wait(5.0)
            seconds = time.monotonic() - began
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        return status, seconds


def run_forked(command: list[str], environment: dict[str, str], folder: str) -> None:
    """What a forked process does: a command of lrd, as if it had been started."""
    status = 1
    try:
        _enter(environment, folder)
        _run_command(command)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else bool(error.code)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        Path(folder, _STATUS_FILE).write_text(str(int(status)))
        os._exit(status)


def _enter(environment: dict[str, str], folder: str) -> None:
    """Take the folder, variables and streams of a command, and a limit of memory."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(_environment(environment))
    for number, name in ((1, ".stdout"), (2, ".stderr")):
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, hard_limit))


def _run_command(command: list[str]) -> None:
    sys.argv = list(command)
    if command[0] == "lrd.train":
        from lrd.train import main

        main(command[1:])
    runpy.run_module("lrd", run_name="__main__")


def judge(outcome: Outcome, limit: float) -> str:
    """What is wrong with the end and the messages of a command; empty: nothing."""
    expected = outcome.input.expected
    lines = outcome.errors.splitlines()
    if any(fault in outcome.errors + outcome.output for fault in _FAULTS):
        return f"ends in a trace-back: {_last_line(outcome.errors)}"
    if outcome.status is None:
        return f"was still running after {limit:.0f} s"
    if outcome.status not in expected.statuses:
        wanted = " or ".join(map(str, expected.statuses))
        return f"status {outcome.status} in place of {wanted}: {_last_line(outcome.errors)}"
    if outcome.status == 0:
        return _judge_success(outcome, expected)

    if expected.is_in_output:
        return _missing_words(outcome.output, expected)
    if not outcome.errors.strip():
        return f"status {outcome.status} and no error"
    if not expected.is_usage:
        others = [line for line in lines if line.strip() and not line.startswith("lrd: ")]
        if others:
            return f"an error of another form: {others[0]}"
        if len(lines) > MAX_LINES:
            return f"the error has {len(lines)} lines"
        if len(outcome.errors) > 2000:
            return f"the error has {len(outcome.errors)} characters"
    return _missing_words(outcome.errors, expected)


def _judge_success(outcome: Outcome, expected: Expected) -> str:
    if expected.words:
        return _missing_words(outcome.output + outcome.errors, expected)
    return "" if expected.reason else "passes in silence"


def _missing_words(text: str, expected: Expected) -> str:
    flat = " ".join(text.split())
    missing = [word for word in expected.words if word not in flat]
    return f"does not name {missing[0]!r}: {_last_line(text)}" if missing else ""


def _find_remains(
    outcome: Outcome, before: dict[str, str] | None, after: dict[str, str] | None
) -> str:
    """What a command left in the run directory that it should not have; empty: nothing.

    Args:
        outcome: of the command.
        before: the content of the run directory; None: there was none.
        after: the same, afterwards.
    """
    after = after or {}
    remains = sorted({name for name in after if name.endswith(".tmp")} - set(before or {}))
    if remains:
        return f"left {remains[0]} in the run directory"
    if outcome.status != 2:
        return ""
    if before is None:
        return f"refuses, and leaves {min(after)} in a new run directory" if after else ""

    names = {*before, *after} - _WRITTEN_FIRST
    changed = sorted(name for name in names if before.get(name) != after.get(name))
    return f"refuses, and changes {changed[0]} in the run directory" if changed else ""


def _content(folder: Path) -> dict[str, str] | None:
    """The digest of each file below a folder, by its relative path; None: there is no folder."""
    if not folder.is_dir():
        return None
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):
                found[str(path.relative_to(folder))] = hashlib.md5(path.read_bytes()).hexdigest()
    return found


def _kind(input: Input) -> str:
    if input.is_launched:
        return "launched"
    return "forked" if input.is_forked else "started"


def _command_line(input: Input) -> list[str]:
    command = list(input.command)
    if command[0] in ("lrd", "lrd.train"):
        command = [sys.executable, "-m", *command]
    if input.stdout == "closed":
        return ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    if input.stdout:
        return ["sh", "-c", f'exec "$@" >{input.stdout}', "sh", *command]
    return command


def _environment(changes: dict[str, str] | object) -> dict[str, str]:
    """The variables of a command: this process's, without a launcher's, and the input's."""
    variables = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("ACCELERATE_", "LRD_", "TORCHELASTIC_", "PYTEST_"))
    }
    variables |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TERM": "dumb",
        "COLUMNS": "200",
        "NO_COLOR": "1",
        **dict(changes),  # type: ignore[call-overload]
    }
    return {key: value for key, value in variables.items() if value or key == "PYTHONPATH"}


def _make_writable(folder: Path) -> None:
    """Undo what an input did to permissions, so that the folder can be deleted."""
    for parent, folders, _ in os.walk(folder):
        for name in folders:
            with suppress(OSError):
                os.chmod(os.path.join(parent, name), 0o755)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no error"
