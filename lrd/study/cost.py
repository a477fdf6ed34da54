"""What the runs that are left of a study will take, from a few measured steps of each arm."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from lrd import console
from lrd.checkpoint.run_records import describe_seconds
from lrd.errors import EXIT_USER_ERROR, UserError
from lrd.study.grid import GridRun, RunState, Study, command_overrides
from lrd.study.runner import child_environment, visible_gpus


@dataclass
class ArmCost:
    """What an arm has taken and will take.

    Attributes:
        name: of the arm.
        num_done: runs that are done.
        num_left: runs that are not, those that have begun among them.
        steps_left: optimizer steps of these.
        step_seconds: measured; None if nothing is left or the first steps fail.
        seconds_left: of these, in one process at a time, with their evaluations.
        note: why nothing could be measured.
    """

    name: str
    num_done: int
    num_left: int
    steps_left: int
    step_seconds: float | None = None
    seconds_left: float = 0.0
    note: str = ""


def measure_costs(
    study: Study, runs: list[GridRun], states: dict[GridRun, RunState], jobs: int
) -> list[ArmCost]:
    """Measure a few steps of each arm that has runs left, one arm at a time.

    Args:
        study: the study.
        runs: the runs that are counted.
        states: what has been done of each run.
        jobs: how many runs will run at a time; each gets its share of the cores.

    Raises:
        UserError: an arm cannot be run here.
    """
    costs = []
    for name in study.file.arms:
        arm_runs = [run for run in runs if run.arm == name]
        left = [run for run in arm_runs if not states[run].is_done]
        cost = ArmCost(
            name=name,
            num_done=len(arm_runs) - len(left),
            num_left=len(left),
            steps_left=sum(max(0, run.total_steps - states[run].step) for run in left),
        )
        if left:
            with console.stdout.status(f"measuring {name}"):
                _measure(study, left[0], jobs, cost)
        costs.append(cost)
    return costs


def _measure(study: Study, run: GridRun, jobs: int, cost: ArmCost) -> None:
    """Run `lrd check` on a run, in a process of its own, and fill in the times."""
    command = [sys.executable, "-m", "lrd", "check", "--json", str(study.base)]
    checked = subprocess.run(
        [*command, *command_overrides(run)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=child_environment(run, 0, jobs, visible_gpus()) | {"COLUMNS": "200"},
    )
    if checked.returncode:
        lines = [line.removeprefix("lrd: ") for line in checked.stderr.splitlines()]
        if checked.returncode == EXIT_USER_ERROR:
            raise UserError("\n".join(f"{run.name}: {line}" for line in lines[-1:]))
        cost.note = lines[-1] if lines else f"lrd check ended with status {checked.returncode}"
        return

    times: dict[str, Any] = json.loads(checked.stdout)
    epochs_left = cost.steps_left / times["steps_per_epoch"]
    evaluations = math.ceil(epochs_left / run.recipe.trainer.eval_every)
    cost.step_seconds = times["step_seconds"]
    cost.seconds_left = (
        cost.steps_left * times["step_seconds"] + evaluations * times["evaluation_seconds"]
    )


def print_costs(costs: list[ArmCost], jobs: int) -> None:
    """Print the costs as a table, with the sum."""
    columns = ["arm", "runs done", "runs left", "steps left", "a step", "time"]
    rows = [
        [
            cost.name,
            f"{cost.num_done}",
            f"{cost.num_left}",
            f"{cost.steps_left:,}",
            "" if cost.step_seconds is None else f"{1e3 * cost.step_seconds:,.1f} ms",
            cost.note or describe_seconds(cost.seconds_left),
        ]
        for cost in costs
    ]
    seconds = sum(cost.seconds_left for cost in costs)
    rows.append(
        [
            "all",
            f"{sum(cost.num_done for cost in costs)}",
            f"{sum(cost.num_left for cost in costs)}",
            f"{sum(cost.steps_left for cost in costs):,}",
            "",
            describe_seconds(seconds / jobs) + (f" with {jobs} jobs" if jobs > 1 else ""),
        ]
    )
    console.listing(columns, rows, leave_out=["steps left", "a step"], wrap="time")
    console.info(
        "The time of a step is the median of a few, in one process alone "
        f"({os.uname().nodename}); starts of runs and checkpoints are not counted."
    )
