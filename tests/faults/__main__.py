"""Makes the faults and says what came of each: python -m tests.faults --help."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from launching import ROOT
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrd import checkpoint

from .lab import Lab, Outcome, Row, Trial, as_json, summed_up
from .matrix import GROUPS

HOW = {
    "recovered": "the same command, given again up to three times and nothing else done, ended with 0, and the run's "
    "end is that of a run that nobody disturbed",
    "steps_lost_max": "the last step that rank 0 had done when it died, by a mark that it appends to a file after each "
    "step, minus the step that the next start went on from; checkpoints are every 5 steps and are written while "
    "training goes on, so the bound is 5 and the steps done during one write",
    "seconds_to_running_median": "from the command to the end of the first step that it did",
    "state_equal": "SHA-256 of the last checkpoint's weights, optimizer state, schedule state and results",
    "records_equal": "as TensorBoard's EventAccumulator reads them: each step once, each tag equal, but for the speed",
}


def main() -> int:
    arguments = parsed()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each resume
    console = Console(width=None if sys.stdout.isatty() else 180)
    folder = Path(tempfile.mkdtemp(prefix="lrd-faults-"))
    lab = Lab(folder, arguments.seed, arguments.kills, arguments.mutations)
    began, outcomes = time.monotonic(), []
    console.print(f"faults are made in {folder}")
    for name in arguments.only:
        started = time.monotonic()
        try:
            for trial, outcome in lab.run(GROUPS[name](lab)):
                outcomes.append((trial, outcome))
                say(console, time.monotonic() - began, trial, outcome)
        except Exception as error:  # a group that could not even begin is no reason to leave out the others
            outcomes.append((Trial(name, lambda _: Outcome()), Outcome(problem=f"{type(error).__name__}: {error}")))
            console.print_exception()
        console.print(f"{name}: {time.monotonic() - started:.0f} s")
    rows = summed_up(outcomes)
    console.print(table(rows))
    facts = {**circumstances(arguments.seed), "seconds": round(time.monotonic() - began), "how": HOW}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**facts, "rows": [as_json(row) for row in rows]}, indent=1) + "\n")
    has_problems = any(row.problems for row in rows)
    if not has_problems:
        shutil.rmtree(folder)
    return int(has_problems)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="random SIGKILLs (default: 200)")
    parser.add_argument("--mutations", type=int, default=1000, help="of checkpoint files (default: 1000)")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="NAME", help=", ".join(GROUPS)
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments and places (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/faults.json"))
    return parser.parse_args()


def say(console: Console, seconds: float, trial: Trial, outcome: Outcome) -> None:
    verdict = Text(outcome.problem, "red") if outcome.problem else Text(outcome.expected, "green")
    lost = f", {max(outcome.lost)} steps lost" if outcome.lost else ""
    console.print(Text(f"{seconds:5.0f} s  {trial.row} ({outcome.times}): ").append(verdict).append(lost))


def table(rows: list[Row]) -> Table:
    columns = ["fault", "expected", "times", "steps lost", "s to running", "state equal", "TensorBoard equal"]
    grid = Table(*columns)
    for row in rows:
        share = f"{row.as_expected}/{row.times}"
        grid.add_row(
            row.fault, row.expected, share if not row.problems else f"[red]{share}[/red]",
            *("" if value is None else str(value) for value in (row.steps_lost_max, row.seconds_to_running_median)),
            row.state_equal, row.records_equal,
        )  # fmt: skip
    return grid


def circumstances(seed: int) -> dict[str, object]:
    return {
        "command": " ".join(["python -m tests.faults", *sys.argv[1:]]),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "lrd", "launch") else ""),
        "versions": checkpoint.versions(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
    }


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
