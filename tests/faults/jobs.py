"""One job of the campaign: its starts, what each of them did, and how the run ended."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch

from lrd.checkpoint import store
from tests.helpers.launching import RECIPE, ROOT, SMALL, command, environment
from tests.helpers.tensorboard_events import read_scalars

INTERVAL = 5  # steps between checkpoints

# 29 steps an epoch on one, two or three ranks, so checkpoints are in the middle of epochs.
SETTINGS = [
    *SMALL,
    "data.batch_size=48",
    "data.augment=crop",
    f"checkpoint.every_steps={INTERVAL}",
    "trainer.epochs=2",
]
RANK = str(Path(__file__).with_name("rank.py"))
TIMES = ("train/images_per_second", "ranks/")  # how the tags of times begin
SECONDS_TO_END = 150.0


class Failure(Exception):
    """Something that should not have happened."""


class Start:
    """One start of a job.

    Args:
        folder: for its output and its marks.
        number: counts the starts of the job from 0.
        arguments: the command.

    Attributes:
        process: the launcher, or the rank if there is no launcher.
        began: when, on the clock of `time.monotonic`.
    """

    def __init__(self, folder: Path, number: int, arguments: list[str]) -> None:
        self.output_file = folder / f"output-{number}.txt"
        self._marks_file = folder / f"marks-{number}.txt"

        variables = {**environment(), "FAULTS_MARKS": str(self._marks_file)}
        self.began = time.monotonic()
        with self.output_file.open("w") as output:
            self.process = psutil.Popen(
                arguments, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    @property
    def lrd_lines(self) -> list[str]:
        """The lines in which lrd reports what is wrong, without their prefix."""
        return re.findall(r"^lrd: (.*)$", self.output, re.MULTILINE)

    @property
    def has_lrd_traceback(self) -> bool:
        return f'File "{ROOT / "lrd"}' in self.output

    def tail(self) -> str:
        """Return the end of its output, for messages."""
        return f"{self.output_file}: ...{self.output[-600:]}"

    def marks(self) -> list[tuple[str, float]]:
        """Return what rank 0 marked and when; see rank.py."""
        text = self._marks_file.read_text() if self._marks_file.exists() else ""
        marks = []
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):  # a kill may leave half a line
                what, _, seconds = line.rpartition(" ")
                marks.append((what, float(seconds)))
        return marks

    def lives(self) -> list[list[tuple[int, float]]]:
        """Return the steps of each life of the ranks, with the time of each step.

        A life begins with the step from which the run went on; the steps that it did follow. A
        start has several lives if its launcher restarts the ranks, and none if it was not set up.
        """
        lives: list[list[tuple[int, float]]] = []
        for what, seconds in self.marks():
            if what.startswith("from "):
                lives.append([(int(what.removeprefix("from ")), seconds)])
            elif what.isdigit():
                lives[-1].append((int(what), seconds))
        return lives

    @property
    def last_step(self) -> int:
        """The last step that it is known to have done; -1 before it is set up."""
        lives = self.lives()
        return lives[-1][-1][0] if lives else -1

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes of the ranks that have been started by now."""
        ranks = {}
        with suppress(psutil.Error):
            for process in [self.process, *self.process.children()]:
                with suppress(psutil.Error):
                    words = process.cmdline()
                    if RANK in words and "accelerate.commands.launch" not in words:
                        rank = int(process.environ().get("RANK", "0"))
                        ranks[rank] = process
        return ranks

    def signal(self, victim: str, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal.

        Args:
            victim: `rank N`, `launcher`, `ranks`, or `all`. A rank that has not been started yet is
                replaced by the launcher.
        """
        ranks = self.ranks()
        if victim == "all":
            targets = [*ranks.values(), self.process]
        elif victim == "ranks":
            targets = list(ranks.values())
        elif victim == "launcher":
            targets = [self.process]
        else:
            rank = int(victim.removeprefix("rank "))
            targets = [ranks.get(rank, self.process)]

        for process in targets:
            with suppress(psutil.Error):
                process.send_signal(signal_number)

    def wait_for(
        self, condition: Callable[[], bool], what: str, seconds: float = SECONDS_TO_END
    ) -> None:
        """Wait until `condition` holds.

        Raises:
            Failure: the start ended before, or the time is up.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            status = self.process.poll()
            if status is not None:
                raise Failure(f"ended with {status} before {what}: {self.tail()}")
            if time.monotonic() > deadline:
                raise Failure(f"waited {seconds:.0f} s in vain for {what}: {self.tail()}")
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is done."""
        self.wait_for(lambda: self.last_step >= step, f"step {step}")

    def wait(self, seconds: float = SECONDS_TO_END) -> int:
        """Wait for the end. Returns the exit status."""
        try:
            return int(self.process.wait(seconds))
        except psutil.TimeoutExpired:
            self.signal("all")
            raise Failure(f"did not end within {seconds:.0f} s: {self.tail()}") from None

    def wait_for_success(self) -> None:
        """Wait for the end, which must be a success."""
        if self.wait() != 0:
            raise Failure(self.tail())

    def wait_for_error(
        self,
        status: int,
        *words: str,
        num_lines: int = 1,
        seconds: float = SECONDS_TO_END,
    ) -> None:
        """Wait for the end of a start that should report an error.

        Args:
            status: of a rank. The launcher's own is another, and it reports that of its ranks.
            words: that the first line of the report must contain; none: anything is reported.
            num_lines: of the report.
        """
        actual_status = self.wait(seconds)
        if actual_status != status and not re.search(rf"exitcode *: {status} ", self.output):
            raise Failure(f"ended with {actual_status} and not {status}: {self.tail()}")
        if self.has_lrd_traceback:
            raise Failure(f"a traceback of lrd: {self.tail()}")

        if words:
            lines = self.lrd_lines
            if len(lines) != num_lines or not all(word in lines[0] for word in words):
                raise Failure(
                    f"reported {lines} and not {num_lines} line(s) with {words}: {self.output_file}"
                )


class Job:
    """One run directory and the starts in it.

    Args:
        folder: for the run directory, and for the output and the marks of each start.
        ranks: how many.
        overrides: of the recipe, after SETTINGS.
    """

    def __init__(self, folder: Path, ranks: int, *overrides: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.run_dir = folder / "run"
        self.ranks = ranks
        self.overrides = overrides
        self.starts: list[Start] = []

    def start(
        self,
        fault: str = "none",
        argument: str = "-",
        *overrides: str,
        ranks: int = 0,
        launcher_options: tuple[str, ...] = (),
    ) -> Start:
        """Start the job.

        Args:
            fault: for this start only, see rank.py, as are the other arguments.
            argument: of the fault.
            overrides: of the recipe.
            ranks: how many; 0: as many as the job has.
            launcher_options: of `accelerate launch`.
        """
        recipe = [RECIPE, f"run_dir={self.run_dir}", *SETTINGS, *self.overrides, *overrides]
        target = [*launcher_options, RANK, fault, argument, *recipe]
        start = Start(self.folder, len(self.starts), command(ranks or self.ranks, target))
        self.starts.append(start)
        return start

    def finish(self, max_starts: int = 3) -> int:
        """Give the same command until it ends with 0, as a user would.

        Returns:
            How many starts that took.
        """
        for num_starts in range(1, max_starts + 1):
            if self.start().wait() == 0:
                self.require_no_orphans()
                return num_starts
        raise Failure(f"not finished by {max_starts} starts: {self.starts[-1].tail()}")

    def require_no_orphans(self, seconds: float = 5.0) -> None:
        """Raise Failure if a process of any start stays."""
        _, orphans = psutil.wait_procs(processes_of(self.folder), timeout=seconds)
        if orphans:
            raise Failure(
                f"{self.folder}: {len(orphans)} processes of earlier starts are still running"
            )

    def steps_lost(self) -> list[int]:
        """Return, for each time that it went on, the steps done before that were lost."""
        lives = [life for start in self.starts for life in start.lives()]
        lost = []
        for life, next_life in pairwise(lives):
            last_step = life[-1][0]
            first_step = next_life[0][0]
            lost.append(last_step - first_step)
        return lost

    def seconds_to_running(self) -> list[float]:
        """Return the seconds from the command to the end of the first step of a start.

        The job's first start is left out, and so are starts that did no step.
        """
        seconds = []
        for start in self.starts[1:]:
            lives = start.lives()
            if lives and len(lives[0]) > 1:
                _, first_step_done = lives[0][1]
                seconds.append(first_step_done - start.began)
        return seconds


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes whose run directory is in a folder."""
    prefix = f"run_dir={folder}/"
    processes = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.startswith(prefix) for word in words):
            processes.append(process)
    return processes


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        state: SHA-256 of weights, optimizer, schedule and results in the last checkpoint.
        records: TensorBoard's, tag -> [(step, value)]. Values are text, because NaN does not equal
            itself; those of the speed are left out.
    """

    state: str
    records: dict[str, list[tuple[int, str]]]

    @staticmethod
    def read(run_dir: Path) -> End:
        """Read it from a run directory."""
        newest, _ = store.find_newest_valid(run_dir)
        if newest is None:
            raise Failure(f"no valid checkpoint in {run_dir}")

        weights = safetensors.torch.load_file(newest / "model.safetensors")
        optimizer = torch.load(newest / "optimizer.pt", weights_only=True)
        trainer = json.loads((newest / "trainer.json").read_text())
        results = {key: trainer[key] for key in ("step", "skipped", "evaluated", "best", "latest")}
        digest = hashlib.sha256()
        update_digest(digest, [newest.name, weights, optimizer, results])

        records = {
            tag: [(step, "" if tag.startswith(TIMES) else repr(value)) for step, value in points]
            for tag, points in read_scalars(run_dir).items()
        }
        return End(digest.hexdigest(), records)

    def has_every_step_once(self) -> bool:
        steps = [step for step, _ in self.records["train/loss"]]
        return steps == list(range(1, len(steps) + 1))


def update_digest(digest: Any, value: Any) -> None:
    """Feed nested dicts, lists and tensors to a hash, with the type of each value.

    The order of a dict's keys does not count.
    """
    digest.update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            update_digest(digest, key)
            update_digest(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for item in value:
            update_digest(digest, item)
    else:
        digest.update(repr(value).encode())
