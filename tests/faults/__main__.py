"""Makes the faults and reports what came of each: python -m tests.faults --help."""

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
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrd.checkpoint import store
from tests.helpers.launching import ROOT

from .lab import Lab, Outcome, Row, Trial, sum_up
from .matrix import GROUPS

# Explains the columns, in the file of results.
HOW = {
    "recovered": (
        "the same command, given up to three times and nothing else done, ended with status 0, "
        "and the run's end equals that of an undisturbed run"
    ),
    "steps_lost_max": (
        "the last step that rank 0 had done when it died, by a mark that it appends to a file "
        "after each step, minus the step from which the next start went on; checkpoints are every "
        "5 steps and are written while training goes on, so the bound is 5 and the steps done "
        "during one write"
    ),
    "seconds_to_running_median": "from the command to the end of the first step that it did",
    "state_equal": (
        "SHA-256 of the last checkpoint's weights, optimizer state, schedule state and results"
    ),
    "records_equal": (
        "as TensorBoard's EventAccumulator reads them: each step once, each tag equal, "
        "except for the speed"
    ),
}


def main() -> int:
    arguments = parse_arguments()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it logs each resume
    console = Console(width=None if sys.stdout.isatty() else 180)
    folder = Path(tempfile.mkdtemp(prefix="lrd-faults-"))
    console.print(f"faults are made in {folder}")

    lab = Lab(folder, arguments.seed, arguments.kills, arguments.mutations)
    began = time.monotonic()
    outcomes = []
    for name in arguments.only:
        outcomes += run_group(console, lab, name, began)
    rows = sum_up(outcomes)
    console.print(make_table(rows))

    facts = {
        **circumstances(arguments.seed),
        "seconds": round(time.monotonic() - began),
        "how": HOW,
        "rows": [asdict(row) for row in rows],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")

    if any(row.problems for row in rows):
        return 1
    shutil.rmtree(folder)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="random SIGKILLs (default: 200)")
    parser.add_argument(
        "--mutations", type=int, default=1000, help="of checkpoint files (default: 1000)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=GROUPS,
        default=list(GROUPS),
        metavar="NAME",
        help=", ".join(GROUPS),
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments and places (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/faults.json"))
    return parser.parse_args()


def run_group(
    console: Console, lab: Lab, name: str, campaign_began: float
) -> list[tuple[Trial, Outcome]]:
    """Run all trials of a group, and print what comes of each.

    Args:
        campaign_began: when, on the clock of `time.monotonic`.
    """
    outcomes = []
    group_began = time.monotonic()
    try:
        for trial, outcome in lab.run(GROUPS[name](lab)):
            outcomes.append((trial, outcome))
            print_outcome(console, time.monotonic() - campaign_began, trial, outcome)
    except Exception as error:  # a group that could not even begin must not stop the others
        trial = Trial(name, lambda _: Outcome())
        outcomes.append((trial, Outcome(problem=f"{type(error).__name__}: {error}")))
        console.print_exception()

    console.print(f"{name}: {time.monotonic() - group_began:.0f} s")
    return outcomes


def print_outcome(console: Console, seconds: float, trial: Trial, outcome: Outcome) -> None:
    verdict = Text(outcome.expected, "green")
    if outcome.problem:
        verdict = Text(outcome.problem, "red")
    lost = f", {max(outcome.lost)} steps lost" if outcome.lost else ""
    line = Text(f"{seconds:5.0f} s  {trial.row} ({outcome.times}): ")
    console.print(line.append(verdict).append(lost))


def make_table(rows: list[Row]) -> Table:
    table = Table(
        "fault",
        "expected",
        "times",
        "steps lost",
        "s to running",
        "state equal",
        "TensorBoard equal",
    )
    for row in rows:
        share = f"{row.as_expected}/{row.times}"
        table.add_row(
            row.fault,
            row.expected,
            f"[red]{share}[/red]" if row.problems else share,
            "" if row.steps_lost_max is None else str(row.steps_lost_max),
            "" if row.seconds_to_running_median is None else str(row.seconds_to_running_median),
            row.state_equal,
            row.records_equal,
        )
    return table


def circumstances(seed: int) -> dict[str, object]:
    commit = git("rev-parse", "HEAD")
    if git("status", "--porcelain", "lrd", "launch"):
        commit += " with changes"
    return {
        "command": " ".join(["python -m tests.faults", *sys.argv[1:]]),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "versions": store.package_versions(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
    }


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
