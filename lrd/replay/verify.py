"""Whether a run's checkpoints and records follow from its recipe, data and code.

Windows between checkpoints are computed again: from one checkpoint to the next, whose weights and
optimizer state must come out bit for bit, and all records on the way. Manifests are chained, so a
checkpoint in the place of another one is found without computing anything.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrd.checkpoint import manifest
from lrd.errors import UserError
from lrd.replay.computing.launching import Found, compute, scratch_folder
from lrd.replay.computing.plan import Leg, Watch
from lrd.replay.history import RunHistory, read_history
from lrd.replay.records import find_difference, read_records

# On another processor, or with another version of torch, sums round in another way and the
# difference grows from step to step. So there only the first records of each window are compared.
TOLERANCE = 1e-3
STEPS_COMPARED_ELSEWHERE = 3


@dataclass
class Window:
    """The steps between two checkpoints, and what came of them.

    Attributes:
        first, last: the steps of the checkpoints at its ends; 0 is the beginning of the run.
        is_exact: whether all bits were compared; else the first records, within TOLERANCE.
        fault: what does not follow; empty if all does.
        step: the step of the fault; None: there is none.
        name: the tensor or the tag of the fault.
    """

    first: int
    last: int
    is_exact: bool = True
    fault: str = ""
    step: int | None = None
    name: str | None = None


@dataclass
class Verification:
    """What came of all windows.

    Attributes:
        windows: in their order.
        faults: of checkpoints, by their files alone: damage, and links of the chain that are wrong.
        notes: what the run lacks, and how this host differs from those that computed it.
        steps, seconds: how many steps were computed again, and how long that took.
    """

    windows: list[Window]
    faults: list[str]
    notes: list[str] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0

    @property
    def is_valid(self) -> bool:
        return not self.faults and not any(window.fault for window in self.windows)

    @property
    def is_exact(self) -> bool:
        """Whether all bits were compared in all windows."""
        return all(window.is_exact for window in self.windows)

    def as_json(self) -> dict[str, Any]:
        return {"valid": self.is_valid, "is_exact": self.is_exact, **asdict(self)}


def verify(
    run_dir: Path, num_windows: int | None = None, seed: int = 0, overrides: Sequence[str] = ()
) -> Verification:
    """Compute windows of a run again and compare.

    Args:
        run_dir: the run directory.
        num_windows: how many windows; None: all.
        seed: draws them.
        overrides: settings that must differ here, such as `data.root`.

    Raises:
        UserError: the run has no checkpoint, or cannot be computed here.
    """
    history = read_history(run_dir, overrides)
    faults = [*history.damaged, *check_chain(history)]
    windows = list_windows(history)
    if not windows:
        line = f"{run_dir}: no two valid checkpoints between which there is a step to compute"
        raise UserError("\n".join([*faults, line]))
    if num_windows is not None and num_windows < len(windows):
        drawn = random.Random(seed).sample(range(len(windows)), num_windows)
        windows = [windows[number] for number in sorted(drawn)]

    notes = [
        *history.notes,
        *history.describe_other_code(windows[0].first, windows[-1].last),
    ]
    for window in windows:
        differences = history.describe_other_circumstances(window.first, window.last)
        window.is_exact = not differences
        notes += [line for line in differences if line not in notes]
    result = Verification(windows, faults, notes)
    legs = plan_legs(history, windows)
    with scratch_folder(run_dir) as out:
        found = compute(legs, Watch(records=True), out, history.name)
    judge(history, result, found)
    return result


def check_chain(history: RunHistory) -> list[str]:
    """A line for each checkpoint whose successor's manifest names another one in its place."""
    lines = []
    for step, path in history.checkpoints.items():
        previous = manifest.read_previous(path)
        if previous is None or previous.step not in history.checkpoints:
            continue
        found = manifest.read_link(history.checkpoints[previous.step])
        if found is not None and found.sha256 != previous.sha256:
            lines.append(
                f"{history.checkpoints[previous.step]}: is not the checkpoint that the one of step "
                f"{step} followed: its manifest has SHA-256 {found.sha256[:12]}..., and there it "
                f"is {previous.sha256[:12]}..."
            )
    return lines


def list_windows(history: RunHistory) -> list[Window]:
    """The windows between checkpoints, the first from the beginning of the run."""
    begin = [] if history.first_step in history.checkpoints else [history.first_step]
    steps = [*begin, *sorted(history.checkpoints)]
    return [Window(first, last) for first, last in itertools.pairwise(steps)]


def plan_legs(history: RunHistory, windows: Sequence[Window]) -> list[Leg]:
    """The legs of all windows, each compared with the checkpoint at its end."""
    legs = []
    for window in windows:
        window_legs = history.legs(window.first, window.last)
        window_legs[-1].expected = str(history.checkpoints[window.last])
        legs += window_legs
    return legs


def judge(history: RunHistory, result: Verification, found: Found) -> None:
    """Fill in what does not follow in each window."""
    recorded = read_records(history.run_dir)
    result.steps = found.steps
    result.seconds = found.seconds
    compared = {values["step"]: values for values in found.compared}

    for window in result.windows:
        state = compared[window.last]
        if not window.is_exact:
            steps = range(window.first + 1, window.first + 1 + STEPS_COMPARED_ELSEWHERE)
            record = find_difference(recorded, found.records, steps, TOLERANCE)
            state = {"difference": None}
        else:
            steps = range(window.first + 1, window.last + 1)
            record = find_difference(recorded, found.records, steps)

        if record is not None:
            window.step = record.step
            window.name = record.tag
            window.fault = f"records (recorded and computed): {record.describe()}"
            if state["difference"] is None and window.is_exact:
                window.fault += "; the state at the end of the window follows"
        elif state["difference"] is not None:
            window.step = window.last
            window.name = state["difference"]["name"]
            window.fault = f"checkpoint {window.last} (computed and saved): {state['text']}"
