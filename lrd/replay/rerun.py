"""Steps of a run again, with more to see than when it was trained."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.summary import scalar

from lrd.checkpoint.run_dir import read_status
from lrd.errors import UserError
from lrd.replay.computing.launching import Found, compute, scratch_folder
from lrd.replay.computing.plan import Leg, Watch
from lrd.replay.computing.samples import FILE_NAME as SAMPLES_FILE
from lrd.replay.history import RunHistory, read_history
from lrd.replay.records import find_difference, read_records
from lrd.tracking.event_file import EventFile

STEPS_AROUND = 5  # before and after a step that one wants to look at


@dataclass
class Rerun:
    """What came of computing steps again.

    Attributes:
        first, last: the steps that were observed, by their numbers.
        out: the folder of the trace and of the records.
        rows: for each step its records, recomputed.
        norms: step -> parameter -> norms of `gradient`, `update` and `weights`.
        samples: the file with the images; None: they were not asked for.
        nonfinite: the first value that was not finite; None: there was none, or nobody asked.
        num_compared: how many records were compared with those of the run.
        difference: the first one that differs, in one line; None: none does.
        notes: what the run lacks, and how this host differs.
        num_steps, seconds: how many steps were taken, and how long that took.
    """

    first: int
    last: int
    out: Path
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    norms: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    samples: Path | None = None
    nonfinite: dict[str, Any] | None = None
    num_compared: int = 0
    difference: str | None = None
    notes: list[str] = field(default_factory=list)
    num_steps: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "out": str(self.out),
            "samples": None if self.samples is None else str(self.samples),
        }


def rerun(
    run_dir: Path,
    first: int,
    last: int,
    out: Path | None = None,
    samples: bool = False,
    norms: bool = False,
    nonfinite: bool = False,
    profile: bool = False,
    ranks: int | None = None,
    overrides: Sequence[str] = (),
) -> Rerun:
    """Compute steps of a run again and look at them.

    Args:
        run_dir: the run directory.
        first, last: numbers of the steps, from 1. They are computed from the newest checkpoint
            before the first.
        out: the folder that gets images, trace and records; default: in the run directory.
        samples: keep the images that each rank saw.
        norms: measure each parameter's gradient, update and weights, also for TensorBoard.
        nonfinite: find the first value that is not finite, and end there.
        profile: write a trace for each rank.
        ranks: how many; default: as many as the run had. With another number the sums round in
            another way.
        overrides: settings that must differ here, such as `data.root`.

    Raises:
        UserError: there are no such steps, or they cannot be computed here.
    """
    history = read_history(run_dir, overrides)
    if not history.first_step < first <= last:
        raise UserError(
            f"replay: steps {first} to {last}: the first is {history.first_step + 1} or later, and "
            "not later than the last"
        )
    taken = last_step_taken(history)
    if last > taken:
        raise UserError(f"replay: step {last}: {run_dir} has taken {taken} steps")
    out = out or run_dir / "replays" / f"steps-{first}-{last}"
    out.mkdir(parents=True, exist_ok=True)

    steps = range(first, last + 1)
    watch = Watch(
        records=True,
        norms=norms,
        nonfinite=nonfinite,
        samples=[(step, history.ranks_at(step - 1)) for step in steps] if samples else [],
        profile=profile,
    )
    legs = _plan(history, first, last, ranks, watch)
    result = Rerun(first, last, out, notes=_describe_circumstances(history, legs, ranks))
    with scratch_folder(run_dir) as folder:
        found = compute(legs, watch, folder, history.name)
        if samples:
            result.samples = out / SAMPLES_FILE
            shutil.copyfile(folder / SAMPLES_FILE, result.samples)
        if (folder / "profile").is_dir():
            shutil.copytree(folder / "profile", out / "profile", dirs_exist_ok=True)
    _take(history, result, found)
    if norms:
        write_norms(result)
    return result


def last_step_taken(history: RunHistory) -> int:
    """The last step that a run has begun, as far as its files say.

    A step in which it failed, and those since the last tracked one, are not recorded.
    """
    recorded = max(read_records(history.run_dir), default=0)
    status = read_status(history.run_dir) or {}
    known = max(recorded, history.last_step, int(status.get("step") or 0))
    tracking = history.recipe_at(history.last_step).get("tracking", {})
    return min(known + int(tracking.get("every_steps", 1)), int(status.get("total_steps") or known))


def steps_around(run_dir: Path, step: int) -> tuple[int, int]:
    """The first and last of the steps around one, as far as the run has taken them."""
    last = min(step + STEPS_AROUND, last_step_taken(read_history(run_dir)))
    return max(1, step - STEPS_AROUND), max(step, last)


def _plan(history: RunHistory, first: int, last: int, ranks: int | None, watch: Watch) -> list[Leg]:
    legs = history.legs(first - 1, last)
    for leg in legs:
        leg.ranks = ranks or leg.ranks
    watch.samples = [(step, ranks or size) for step, size in watch.samples]
    only_samples = watch.samples and not (watch.norms or watch.nonfinite or watch.profile)
    if not only_samples:
        return legs

    # Images are a function of the position: no step needs to be taken, and one rank makes all.
    leg = history.legs(first - 1, last)[0]
    leg.last = leg.first
    leg.ranks = 1
    leg.saves = False
    return [leg]


def _describe_circumstances(
    history: RunHistory, legs: Sequence[Leg], ranks: int | None
) -> list[str]:
    first, last = legs[0].first, legs[-1].last
    notes = [*history.notes, *history.describe_other_code(first, last)]
    notes += history.describe_other_circumstances(first, last)
    for leg in legs:
        start = history.start_at(leg.first)
        if ranks is not None and start is not None and start.circumstances["ranks"] != ranks:
            notes.append(f"ranks: {start.circumstances['ranks']} then, {ranks} here")
            break
    return notes


def _take(history: RunHistory, result: Rerun, found: Found) -> None:
    result.rows = {
        step: values
        for step, values in sorted(found.records.items())
        if result.first <= step <= result.last
    }
    result.norms = found.norms
    result.nonfinite = found.nonfinite
    result.num_steps = found.steps
    result.seconds = found.seconds
    if not result.rows:
        return
    recorded = read_records(history.run_dir)
    steps = range(result.first, min(max(recorded, default=0), max(result.rows)) + 1)
    result.num_compared = sum(
        len(recorded.get(step, {}).keys() & result.rows.get(step, {}).keys()) for step in steps
    )
    difference = find_difference(recorded, result.rows, steps, only_common=True)
    result.difference = None if difference is None else difference.describe()


def write_norms(result: Rerun) -> None:
    """Record the norms for TensorBoard, each step at its own number."""
    events = EventFile(result.out, purge_step=0)
    for step, by_parameter in sorted(result.norms.items()):
        for name, norms in by_parameter.items():
            for kind, value in norms.items():
                if value is not None:
                    events.add(scalar(f"{kind}_norm/{name}", value), step)  # type: ignore[no-untyped-call]
    events.flush()
