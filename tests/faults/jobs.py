"""One job of the campaign: its starts, what each did, and whether its end is that of a run that nobody disturbed."""

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
from launching import RECIPE, ROOT, SMALL, command, environment, scalars

from lrd import checkpoint

# 29 steps an epoch, for one, two or three ranks: the checkpoints of steps 5, 10, ... lie in the middle of epochs
INTERVAL = 5
SETTINGS = [*SMALL, "data.batch_size=48", "data.augment=crop", f"checkpoint.every_steps={INTERVAL}", "trainer.epochs=2"]
RANK = str(Path(__file__).with_name("rank.py"))
SPEED = "train/images_per_second"
SECONDS_TO_END = 150.0


class Failure(Exception):
    """What should not have happened."""


class Start:
    """One start of a job.

    Attributes:
        began: when, by `time.monotonic`.
    """

    def __init__(self, folder: Path, number: int, arguments: list[str]) -> None:
        self.output_file, self._marks = folder / f"output-{number}.txt", folder / f"marks-{number}.txt"
        variables = {**environment(), "FAULTS_MARKS": str(self._marks)}
        self.began = time.monotonic()
        with self.output_file.open("w") as output:
            self.process = psutil.Popen(arguments, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    @property
    def complaints(self) -> list[str]:
        """The lines in which lrd says what is wrong."""
        return re.findall(r"^lrd: (.*)$", self.output, re.MULTILINE)

    @property
    def has_own_traceback(self) -> bool:
        return f'File "{ROOT / "lrd"}' in self.output

    def marks(self) -> list[tuple[str, float]]:
        """What rank 0 marked, whole lines only."""
        text = self._marks.read_text() if self._marks.exists() else ""
        parts = (line.rpartition(" ") for line in text.splitlines(keepends=True) if line.endswith("\n"))
        return [(what, float(at)) for what, _, at in parts]

    def lives(self) -> list[list[tuple[int, float]]]:
        """Each begins with the step that it went on from; then those that it did, each with the time.

        One start has several where its launcher restarts the ranks, none where it was not set up.
        """
        lives: list[list[tuple[int, float]]] = []
        for what, at in self.marks():
            if what.startswith("from "):
                lives.append([(int(what.removeprefix("from ")), at)])
            elif what.isdigit():
                lives[-1].append((int(what), at))
        return lives

    @property
    def done(self) -> int:
        """The step that it has done last, as far as is known."""
        lives = self.lives()
        return lives[-1][-1][0] if lives else -1

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks that there are by now."""
        found = {}
        with suppress(psutil.Error):
            for process in [self.process, *self.process.children()]:
                with suppress(psutil.Error):
                    if RANK in process.cmdline() and "accelerate.commands.launch" not in process.cmdline():
                        found[int(process.environ().get("RANK", "0"))] = process
        return found

    def signal(self, victim: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to `rank N`, `launcher`, `ranks` or `all`; to the launcher where that rank is not there yet."""
        ranks = self.ranks()
        if victim in ("ranks", "all"):
            targets = list(ranks.values()) + ([self.process] if victim == "all" else [])
        else:
            targets = [ranks.get(int(victim.split()[1]), self.process) if victim.startswith("rank") else self.process]
        for process in targets:
            with suppress(psutil.Error):
                process.send_signal(number)

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = SECONDS_TO_END) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise Failure(f"ended with {self.process.poll()} before {what}: {self.tail()}")
            if time.monotonic() > end:
                raise Failure(f"waited {seconds:.0f} s in vain for {what}: {self.tail()}")
            time.sleep(0.01)

    def reach(self, step: int) -> None:
        """Wait until a step is done."""
        self.wait_for(lambda: self.done >= step, f"step {step}")

    def wait(self, seconds: float = SECONDS_TO_END) -> int:
        """Its exit status."""
        try:
            return int(self.process.wait(seconds))
        except psutil.TimeoutExpired:
            self.signal("all")
            raise Failure(f"did not end within {seconds:.0f} s: {self.tail()}") from None

    def expect(self, status: int, *words: str, lines: int = 1, seconds: float = SECONDS_TO_END) -> None:
        """Wait for the end of a start that should say what is wrong, with all those words in its first line.

        A launcher has a status of its own and names its ranks'.
        """
        own = self.wait(seconds)
        if own != status and not re.search(rf"exitcode *: {status} ", self.output):
            raise Failure(f"ended with {own} and not {status}: {self.tail()}")
        if self.has_own_traceback:
            raise Failure(f"a trace-back of lrd's own: {self.tail()}")
        if words and (len(self.complaints) != lines or not all(word in self.complaints[0] for word in words)):
            raise Failure(f"said {self.complaints} and not {lines} line(s) with {words}: {self.output_file}")

    def tail(self) -> str:
        return f"{self.output_file}: ...{self.output[-600:]}"


class Job:
    """One run directory and the starts in it.

    Args:
        folder: of its own; the run directory, the output and the marks of each start lie in it.
        ranks: how many.
        overrides: of the recipe, after SETTINGS.
    """

    def __init__(self, folder: Path, ranks: int, *overrides: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.run_dir, self.ranks, self.overrides = folder, folder / "run", ranks, overrides
        self.starts: list[Start] = []

    def start(
        self, fault: str = "none", argument: str = "-", *overrides: str, ranks: int = 0, launcher: tuple[str, ...] = ()
    ) -> Start:
        """The command of this job. For this start only: a fault, more overrides, other ranks, launcher's options."""
        recipe = [RECIPE, f"run_dir={self.run_dir}", *SETTINGS, *self.overrides, *overrides]
        arguments = command(ranks or self.ranks, [*launcher, RANK, fault, argument, *recipe])
        self.starts.append(Start(self.folder, len(self.starts), arguments))
        return self.starts[-1]

    def finish(self, most_starts: int = 3) -> int:
        """The same command until it ends with 0, as a user would give it. Returns how many starts that took."""
        for count in range(1, most_starts + 1):
            if self.start().wait() == 0:
                self.refuse_orphans()
                return count
        raise Failure(f"not finished by {most_starts} starts: {self.starts[-1].tail()}")

    def refuse_orphans(self, seconds: float = 5.0) -> None:
        """No process of any start may be left."""
        _, left = psutil.wait_procs(processes_of(self.folder), timeout=seconds)
        if left:
            raise Failure(f"{self.folder}: {len(left)} processes of earlier starts are still there at the end")

    def steps_lost(self) -> list[int]:
        """Whenever it went on: steps done before, minus the step that it went on from."""
        lives = [life for start in self.starts for life in start.lives()]
        return [before[-1][0] - after[0][0] for before, after in pairwise(lives)]

    def seconds_to_running(self) -> list[float]:
        """For each start but the first: from the command to the end of its first step, where it did one."""
        firsts = ((start.began, start.lives()[:1]) for start in self.starts[1:])
        return [lives[0][1][1] - began for began, lives in firsts if lives and len(lives[0]) > 1]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those whose run directory is in a folder."""
    begin = f"run_dir={folder}/"
    everyone = psutil.process_iter(["cmdline"])
    return [one for one in everyone if any(word.startswith(begin) for word in one.info["cmdline"] or [])]


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        state: SHA-256 of all that the last checkpoint says of weights, optimizer, schedule and results.
        records: TensorBoard's, tag -> [(step, value)], values as text, for NaN equals nothing; of the speed the steps.
    """

    state: str
    records: dict[str, list[tuple[int, str]]]

    @staticmethod
    def of(run_dir: Path) -> End:
        newest, _ = checkpoint.survey(run_dir)
        if newest is None:
            raise Failure(f"no whole checkpoint in {run_dir}")
        weights = safetensors.torch.load_file(newest / "model.safetensors")
        optimizer = torch.load(newest / "optimizer.pt", weights_only=True)
        trainer = json.loads((newest / "trainer.json").read_text())
        results = {key: trainer[key] for key in ("step", "skipped", "evaluated", "best", "latest")}
        digest = hashlib.sha256()
        absorb([newest.name, weights, optimizer, results], digest)
        read = scalars(run_dir)
        records = {tag: [(step, "" if tag == SPEED else repr(value)) for step, value in read[tag]] for tag in read}
        return End(digest.hexdigest(), records)

    def has_every_step_once(self) -> bool:
        steps = [step for step, _ in self.records["train/loss"]]
        return steps == list(range(1, len(steps) + 1))


def absorb(value: Any, digest: Any) -> None:
    """Nested dicts, lists and tensors, in an order of their own and each with its type."""
    digest.update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            absorb(key, digest)
            absorb(value[key], digest)
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for item in value:
            absorb(item, digest)
    else:
        digest.update(repr(value).encode())
