"""How often each element moved, and how long it waited between two moves.

Each element is kept with probability `keep_prob` in each step, independently of all others. So the
number of its moves has a binomial distribution, and its waits have a geometric one: a wait of w
steps has the probability keep_prob (1 - keep_prob) ** w.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrd.errors import UserError
from lrd.optim import mask
from lrd.replay.probe import Parameter, Trajectories, read_trajectories

# Elements of one parameter that are looked at: those at its beginning.
MAX_ELEMENTS = 1 << 16
MAX_ROWS = 64  # elements whose masks are kept for the picture
MAX_STEPS_SHOWN = 200  # the last ones


@dataclass
class Coverage:
    """What the masks of one parameter did up to a step.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        keep_prob: of its masks; None: it was changed in the run.
        num_steps: steps in which its group could have moved: those that were not skipped.
        moves: how often each element moved, int64 (elements,).
        waits: how many waits of each length there were, int64 (longest + 1,). A wait is the number
            of steps between two moves, or from the beginning to the first one; a wait that still
            lasts does not count.
        longest: the longest wait of each element, also one that still lasts, int64 (elements,).
        rows: whether each of the first elements moved in each of the last steps, bool (elements,
            steps).
        first_shown: the number of the first of these steps.
    """

    name: str
    shape: tuple[int, ...]
    keep_prob: float | None
    num_steps: int
    moves: NDArray[np.int64]
    waits: NDArray[np.int64]
    longest: NDArray[np.int64]
    rows: NDArray[np.bool_]
    first_shown: int

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def never_moved(self) -> int:
        return int((self.moves == 0).sum())

    def expected_waits(self) -> NDArray[np.float64] | None:
        """How many waits of each length the geometric distribution leads to, float64, as `waits`.

        None if `keep_prob` was changed.

        Only those that have ended within the steps can be counted: after a wait of w steps there
        are num_steps - w places at which the move that ends it may be.
        """
        if self.keep_prob is None:
            return None

        lengths = np.arange(len(self.waits))
        places = np.maximum(0, self.num_steps - lengths)
        # A wait begins after a move, or at the beginning.
        starts = 1.0 + self.keep_prob * np.maximum(0, places - 1)
        chance = self.keep_prob * (1.0 - self.keep_prob) ** lengths
        expected: NDArray[np.float64] = len(self.moves) * starts * chance * (places > 0)
        return expected

    def as_json(self) -> dict[str, Any]:
        expected = self.expected_waits()
        return {
            "parameter": self.name,
            "shape": list(self.shape),
            "keep_prob": self.keep_prob,
            "steps": self.num_steps,
            "elements": len(self.moves),
            "moved_fraction": float(self.moves.mean() / max(1, self.num_steps)),
            "fewest_moves": int(self.moves.min()),
            "most_moves": int(self.moves.max()),
            "never_moved": self.never_moved,
            "longest_wait": int(self.longest.max()),
            "waits": self.waits.tolist(),
            "expected_waits": None if expected is None else expected.tolist(),
        }


def measure_coverage(
    run_dir: Path,
    patterns: list[str],
    until: int | None = None,
    on_progress: Callable[[str], None] = lambda name: None,
) -> list[Coverage]:
    """Count the moves and waits of the elements of some parameters.

    Args:
        run_dir: the run directory.
        patterns: names of parameters, with `*` as in file names.
        until: the last step that counts; None: the last one of the run.
        on_progress: called with the name of each parameter before it is counted.

    Raises:
        UserError: a pattern matches no parameter, or there is no such step.
    """
    trajectories = read_trajectories(run_dir)
    num_steps = trajectories.num_steps if until is None else until
    if not 0 < num_steps <= trajectories.num_steps:
        raise UserError(f"coverage: step {until}: the run has {trajectories.num_steps} steps")

    names: dict[str, None] = {}
    for pattern in patterns:
        matching = [name for name in trajectories.parameters if fnmatchcase(name, pattern)]
        if not matching:
            raise UserError(f"coverage: {pattern!r} matches no parameter of the run")
        names |= dict.fromkeys(matching)

    found = []
    for name in names:
        on_progress(name)
        found.append(count(trajectories, name, num_steps))
    return found


def count(trajectories: Trajectories, name: str, num_steps: int) -> Coverage:
    """Count the moves and waits of a parameter's elements in the first steps of a run."""
    parameter = trajectories.parameters[name]
    numel = min(MAX_ELEMENTS, math.prod(parameter.shape))
    num_rows = min(MAX_ROWS, numel)
    first_shown = max(0, num_steps - MAX_STEPS_SHOWN)

    moves = np.zeros(numel, np.int64)
    waiting = np.zeros(numel, np.int64)  # steps since the last move
    longest = np.zeros(numel, np.int64)
    waits = np.zeros(num_steps + 1, np.int64)
    rows = np.zeros((num_rows, num_steps - first_shown), np.bool_)
    num_taken = 0
    keep_probs = set()

    for segment in trajectories.segments:
        if segment.first >= num_steps:
            break
        if name not in segment.parameters:
            continue
        parameter = segment.parameters[name]
        keep_probs.add(parameter.keep_prob)
        for step in range(segment.first, min(segment.last, num_steps)):
            if trajectories.is_skipped[step] or trajectories.lrs[parameter.group][step] == 0.0:
                continue
            num_taken += 1
            update = int(segment.updates[parameter.group][step - segment.first])
            is_kept = draw_elements(parameter, update, numel)

            waits += np.bincount(waiting[is_kept], minlength=len(waits))
            moves += is_kept
            waiting = np.where(is_kept, 0, waiting + 1)
            np.maximum(longest, waiting, out=longest)
            if step >= first_shown:
                rows[:, step - first_shown] = is_kept[:num_rows]

    last_wait = int(np.flatnonzero(waits)[-1]) if waits.any() else 0
    return Coverage(
        name=name,
        shape=parameter.shape,
        keep_prob=keep_probs.pop() if len(keep_probs) == 1 else None,
        num_steps=num_taken,
        moves=moves,
        waits=waits[: last_wait + 1],
        longest=longest,
        rows=rows,
        first_shown=first_shown + 1,
    )


def draw_elements(parameter: Parameter, update: int, numel: int) -> NDArray[np.bool_]:
    """Whether the mask of an update kept each of the first elements, bool (numel,)."""
    if parameter.seed is None:
        return np.ones(numel, np.bool_)

    position: dict[str, Any] = {
        "seed": parameter.seed,
        "step": update,
        "index": parameter.index,
    }
    if parameter.granularity == "element":
        kept = mask.draw(numel, keep_prob=parameter.keep_prob, **position)
        return np.asarray(kept.numpy(), np.bool_)

    whole = mask.keep_mask(
        parameter.shape,
        keep_prob=parameter.keep_prob,
        granularity=parameter.granularity,
        **position,
    )
    flat = whole.expand(parameter.shape).flatten()[:numel]
    return np.asarray(flat.numpy(), np.bool_)
