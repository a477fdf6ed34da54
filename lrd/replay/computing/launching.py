"""Starts the ranks of a plan and reads what they found.

They are on this host, unless `LRD_REPLAY_LAUNCHER` is set.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lrd.distributed.signals import PARENT_VARIABLE
from lrd.errors import EXIT_OK, UserError, describe_os_error
from lrd.replay.computing.observers import DumpObserver, Results
from lrd.replay.computing.plan import Leg, Plan, Watch, group_legs

# A command that starts several ranks, in place of `lrd launch`: for example on several hosts, which
# share the run directory. Module and plan are added to it.
LAUNCHER_VARIABLE = "LRD_REPLAY_LAUNCHER"


class ReplayFailed(UserError):
    """The ranks that computed steps again failed, and said why."""


@dataclass
class Found:
    """What a replay found.

    Attributes:
        digests: step -> name of a tensor or value -> its digest.
        records: step -> tag -> value, a float32.
        norms: step -> parameter -> `gradient`, `update`, `weights`.
        compared: the comparisons with checkpoints: `step`, `first`, `difference`, `text`.
        nonfinite: the first value that was not finite; None: there was none.
        steps, seconds: how many steps were taken, and how long they took.
    """

    digests: dict[int, dict[str, str]] = field(default_factory=dict)
    records: dict[int, dict[str, float]] = field(default_factory=dict)
    norms: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    compared: list[dict[str, Any]] = field(default_factory=list)
    nonfinite: dict[str, Any] | None = None
    steps: int = 0
    seconds: float = 0.0


@contextmanager
def scratch_folder(run_dir: Path) -> Iterator[Path]:
    """A folder for what replays of a run write; it is gone at the end."""
    shared = None
    if os.environ.get(LAUNCHER_VARIABLE):  # a temporary folder would be that of this host alone
        shared = run_dir.absolute() / "replays"
        shared.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="lrd-replay-", dir=shared) as folder:
        yield Path(folder)


def compute(legs: Sequence[Leg], watch: Watch, out: Path, name: str) -> Found:
    """Compute the legs of a run again, and read what was observed.

    Args:
        legs: in their order.
        watch: what is observed.
        out: an empty folder for the results.
        name: of the run, for the progress bar.

    Raises:
        ReplayFailed: the ranks failed, and said why.
    """
    for number, group in enumerate(group_legs(legs)):
        path = out / f"plan-{number}.json"
        Plan(legs=group, watch=watch, out=str(out), name=name).write(path)
        status = start_ranks(group[0], path)
        if status != EXIT_OK:
            raise ReplayFailed(f"{name}: the steps could not be computed again, see above")
    return read_results(out)


def start_ranks(leg: Leg, plan: Path) -> int:
    """Start as many ranks as a leg needs, and wait for them.

    Returns:
        Their exit status.

    Raises:
        UserError: `LRD_REPLAY_LAUNCHER` is no command.
    """
    environment = {**os.environ}
    if leg.threads is not None:
        environment["OMP_NUM_THREADS"] = str(leg.threads)

    target = ["-m", "lrd.replay.computing.ranks", str(plan)]
    if leg.ranks == 1:
        command = [sys.executable, *target]
        environment[PARENT_VARIABLE] = str(os.getpid())
    elif launcher := os.environ.get(LAUNCHER_VARIABLE):
        command = [*_split_launcher(launcher), *target]
    else:
        options = ["--num_processes", str(leg.ranks), *(["--cpu"] if leg.on_cpu else [])]
        command = [sys.executable, "-m", "lrd", "launch", *options, *target]
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        raise UserError(f"{LAUNCHER_VARIABLE}: {describe_os_error(error)}") from None
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the ranks too
            continue


def _split_launcher(launcher: str) -> list[str]:
    try:
        return shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"{LAUNCHER_VARIABLE}: {launcher}: {error}") from None


def read_results(out: Path) -> Found:
    """Read what the ranks have written."""
    found = Found()
    path = out / Results.NAME
    if not path.is_file():
        return found

    with path.open(encoding="utf-8") as stream:
        for line in stream:
            values = json.loads(line)
            match values.pop("kind"):
                case "digests":
                    found.digests[values["step"]] = values["digests"]
                case "record":
                    by_tag = found.records.setdefault(values["step"], {})
                    by_tag[values["tag"]] = values["value"]
                case "norms":
                    found.norms[values["step"]] = values["norms"]
                case "compared":
                    found.compared.append(values)
                case "nonfinite":
                    found.nonfinite = values
                case "time":
                    found.steps += values["steps"]
                    found.seconds += values["seconds"]
    return found


def read_dump(out: Path) -> dict[str, Any]:
    """The values that `Watch.dump_at` asked for."""
    import torch

    values: dict[str, Any] = torch.load(out / DumpObserver.NAME, weights_only=True)
    return values
