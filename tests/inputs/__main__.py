"""Gives lrd bad inputs and reports what came of them: python -m tests.inputs --help."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import (
    commands,
    environments,
    image_folders,
    recipe_files,
    recipe_values,
    saved_runs,
    training_parts,
)
from .cases import Input
from .lab import Lab, Outcome

# In the order of the table.
_MODULES = (
    recipe_values,
    recipe_files,
    training_parts,
    image_folders,
    saved_runs,
    environments,
    commands,
)


def main() -> int:
    arguments = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    pattern = arguments.k.lower()
    inputs = [input for input in all_inputs() if pattern in input.full_name.lower()]
    if not inputs:
        console.print(Text(f"no input has {arguments.k!r} in its name"))
        return 2

    began = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="lrd-inputs-", ignore_cleanup_errors=True) as folder:
        for outcome in Lab(Path(folder), arguments.jobs).run(inputs):
            outcomes.append(outcome)
            if outcome.problem or arguments.verbose:
                print_outcome(console, outcome, arguments.verbose)
    seconds = time.monotonic() - began
    saved_runs.remove_finished_run()

    console.print(make_table(outcomes))
    num_failed = sum(bool(outcome.problem) for outcome in outcomes)
    console.print(f"{len(outcomes)} inputs, {num_failed} failures, {seconds:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(describe(outcomes, seconds), indent=1) + "\n")
    return 1 if num_failed else 0


def all_inputs() -> list[Input]:
    """Every input; the names are unique within a group."""
    return [input for module in _MODULES for input in module.inputs()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.inputs", description=__doc__)
    parser.add_argument(
        "-k", default="", metavar="PATTERN", help="only inputs that have this in `group: name`"
    )
    parser.add_argument("--jobs", type=int, default=2, help="inputs at a time (default: 2)")
    parser.add_argument("--json", type=Path, help="write each outcome to this file")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what each input prints")
    return parser.parse_args()


def print_outcome(console: Console, outcome: Outcome, is_verbose: bool) -> None:
    line = Text(f"{outcome.seconds:5.1f} s  {outcome.input.full_name!a}: ")
    line.append(outcome.problem or f"status {outcome.status}", "red" if outcome.problem else "")
    console.print(line, soft_wrap=True)
    if is_verbose:
        console.print(Text(outcome.output[-2000:] + outcome.errors[-2000:]), soft_wrap=True)


def make_table(outcomes: list[Outcome]) -> Table:
    table = Table("group", "inputs", "refused", "accepted", "failures", "longest, s")
    for group in dict.fromkeys(outcome.input.group for outcome in outcomes):
        members = [outcome for outcome in outcomes if outcome.input.group == group]
        statuses = Counter(outcome.status for outcome in members)
        num_failed = sum(bool(outcome.problem) for outcome in members)
        table.add_row(
            group,
            str(len(members)),
            str(len(members) - statuses[0]),
            str(statuses[0]),
            f"[red]{num_failed}[/red]" if num_failed else "0",
            f"{max(outcome.seconds for outcome in members):.1f}",
        )
    return table


def describe(outcomes: list[Outcome], seconds: float) -> dict[str, object]:
    return {
        "inputs": len(outcomes),
        "failures": sum(bool(outcome.problem) for outcome in outcomes),
        "seconds": round(seconds),
        "outcomes": [
            {
                "group": outcome.input.group,
                "name": outcome.input.name,
                "command": list(outcome.input.command),
                "status": outcome.status,
                "seconds": round(outcome.seconds, 2),
                "problem": outcome.problem,
                "errors": outcome.errors[-2000:],
                "reason": outcome.input.expected.reason,
            }
            for outcome in outcomes
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
