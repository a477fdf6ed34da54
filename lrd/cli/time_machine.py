"""`lrd probe`, `diff`, `fork`, `replay` and `verify`: what `lrd.replay` finds, shown to people."""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrd import console
from lrd.cli.plots import write_picture
from lrd.errors import UserError
from lrd.replay import pictures
from lrd.replay.coverage import Coverage, measure_coverage
from lrd.replay.diff import RunDiff
from lrd.replay.diff import diff as diff_runs
from lrd.replay.fork import fork as fork_run
from lrd.replay.probe import ProbeResult, write_probes
from lrd.replay.probe import probe as probe_run
from lrd.replay.rerun import Rerun, rerun, steps_around
from lrd.replay.verify import STEPS_COMPARED_ELSEWHERE, TOLERANCE, Verification
from lrd.replay.verify import verify as verify_run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

_LAST_STEPS = 12  # of a probe in the table
_MAX_SETTINGS = 20  # that differ, in the table
_LAYERS_NAMED = 3


def probe(
    run_dir: Path,
    patterns: list[str],
    coverage: bool,
    until: int | None,
    out: Path | None,
    tensorboard: bool,
    as_json: bool,
) -> None:
    """Show the lrs of elements, or how often and after which waits elements moved."""
    if coverage:
        if tensorboard:
            raise UserError("probe: --tensorboard is of elements, not of --coverage")
        _show_coverage(run_dir, patterns or ["*"], until, out, as_json)
        return
    if not patterns:
        raise UserError("probe: name an element, for example 'layer1.*.weight[0,0,0,0]'")
    if until is not None:
        raise UserError("probe: --until is of --coverage")

    result = probe_run(run_dir, patterns)
    if tensorboard:
        folder = run_dir / "replays" / "probes"
        write_probes(result, folder)
        _say(as_json, f"for TensorBoard: {folder}")
    _draw(out, lambda: pictures.plot_probes(result), as_json)
    if as_json:
        _print_json(result.as_json())
        return
    _print_probes(result)


def _print_probes(result: ProbeResult) -> None:
    for line in result.trajectories.notes:
        console.info(line)

    num_steps = result.trajectories.num_steps
    first = max(0, num_steps - _LAST_STEPS)
    rows = []
    for probed in result.probed:
        last = " ".join(_show_lr(lr) for lr in probed.lrs[first:].tolist())
        rows.append([probed.label, f"{probed.num_moved}", f"{probed.longest_wait}", last])
    columns = ["element", "moved", "longest wait", f"lr in steps {first + 1} to {num_steps}"]
    console.table(f"{result.run_dir}: {num_steps} steps", columns, rows)


def _show_lr(lr: float) -> str:
    if math.isnan(lr):
        return "?"
    return "0" if lr == 0 else f"{lr:.3g}"


def _show_coverage(
    run_dir: Path, patterns: list[str], until: int | None, out: Path | None, as_json: bool
) -> None:
    found = measure_coverage(run_dir, patterns, until)
    _draw(out, lambda: pictures.plot_coverage(found), as_json)
    if as_json:
        _print_json([coverage.as_json() for coverage in found])
        return

    columns = ["parameter", "elements", "moved", "keep_prob", "moves", "longest wait", "never"]
    console.table(
        f"{run_dir}: {found[0].num_steps} updates", columns, [_coverage_row(row) for row in found]
    )


def _coverage_row(coverage: Coverage) -> list[str]:
    num_counted = len(coverage.moves)
    elements = f"{num_counted:,}"
    if num_counted < coverage.numel:
        elements += f" of {coverage.numel:,}"
    fraction = coverage.moves.mean() / max(1, coverage.num_steps)
    return [
        coverage.name,
        elements,
        f"{fraction:.4f}",
        "changed" if coverage.keep_prob is None else f"{coverage.keep_prob:g}",
        f"{coverage.moves.min()} to {coverage.moves.max()}",
        f"{coverage.longest.max()}",
        f"{coverage.never_moved:,}",
    ]


def diff(first: Path, second: Path, replays: bool, overrides: list[str], as_json: bool) -> bool:
    """Show what differs between two runs.

    Returns:
        Whether their steps are equal as far as both go.
    """
    with _stdout_for_json(as_json):
        result = diff_runs(first, second, replays, overrides)
    if as_json:
        _print_json(result.as_json())
    else:
        _print_diff(result, first, second)
    return result.are_equal


def _print_diff(result: RunDiff, first: Path, second: Path) -> None:
    for line in result.notes:
        console.info(line)
    rows = [
        [key, _short(values[0]), _short(values[1])]
        for key, values in list((result.settings | result.circumstances).items())[:_MAX_SETTINGS]
    ]
    left_out = len(result.settings) + len(result.circumstances) - len(rows)
    if left_out:
        rows.append([f"and {left_out} more", "", ""])
    if result.data is not None:
        rows.append(["data.fingerprint", *(_short(value) for value in result.data)])
    if rows:
        console.table("what differs before the first step", ["", str(first), str(second)], rows)

    if result.are_equal:
        console.info(
            f"all records are equal up to step {result.common_steps}, and all checkpoints that "
            f"both have; the last of these is of step {result.equal_until}"
            if result.equal_until
            else f"all records are equal up to step {result.common_steps}; they have no checkpoint "
            "of the same step"
        )
        return
    if result.record is not None:
        console.info(f"first record that differs: {result.record.describe()}")
    if result.checkpoint is not None:
        console.info(f"first checkpoints that differ: those of step {result.checkpoint}")
    if result.replayed is None:
        return
    console.info(f"computed again: steps {result.equal_until + 1} to {result.replayed}")
    if result.step is not None:
        assert result.difference is not None
        console.info(f"first state that differs: after step {result.step}")
        console.info(f"  {result.difference.describe()}")
        return
    console.info("the computed states are equal")
    if result.not_reproduced:
        console.info("what differs does not follow from recipe, data and code:")
    for line in result.not_reproduced:
        console.info(f"  {line}")


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def fork(run_dir: Path, step: int, overrides: list[str], as_json: bool) -> None:
    """Make a run that goes on from a step of another one, and say how to start it."""
    with _stdout_for_json(as_json):
        forked = fork_run(run_dir, step, overrides)
    recipe = forked.run_dir / "recipe.yaml"
    command = f"lrd launch --num_processes {forked.ranks} {shlex.quote(str(recipe))}"
    if as_json:
        values = {
            "run_dir": str(forked.run_dir),
            "parent": str(forked.parent),
            "step": forked.step,
            "changes": forked.changes,
            "ranks": forked.ranks,
            "replayed": forked.num_replayed,
            "command": command,
        }
        _print_json(values)
        return

    computed = "its checkpoint"
    if forked.num_replayed:
        computed = f"{forked.num_replayed} step(s) computed again"
    console.info(f"{forked.run_dir}: begins after step {forked.step} of {run_dir} ({computed})")
    for key, (before, now) in forked.changes.items():
        console.info(f"  {key}: {_or_nothing(before)} before, {_or_nothing(now)} from here on")
    if not forked.is_exact:
        console.info(
            "  with gradient_exchange=kept the momentum is averaged here, which its parent did not "
            "do, so both agree only up to rounding"
        )
    elif not forked.changes:
        console.info("  with the same settings: it will take the steps that its parent took")
    console.info(f"start it: {command}")


def _or_nothing(value: Any) -> str:
    return "nothing" if value is None else str(value)


def replay(
    run_dir: Path,
    first: int | None,
    last: int | None,
    around: int | None,
    samples: bool,
    norms: bool,
    nonfinite: bool,
    profile: bool,
    ranks: int | None,
    out: Path | None,
    overrides: list[str],
    as_json: bool,
) -> bool:
    """Compute steps of a run again and show them.

    Returns:
        Whether all that the run recorded came out again.
    """
    if around is not None:
        if first is not None or last is not None:
            raise UserError("replay: give --around, or --from and --to")
        first, last = steps_around(run_dir, around)
    if first is None or last is None:
        raise UserError("replay: say which steps: --from and --to, or --around")

    with _stdout_for_json(as_json):
        result = rerun(
            run_dir, first, last, out, samples, norms, nonfinite, profile, ranks, overrides
        )
        if result.samples is not None:
            picture = result.samples.with_suffix(".png")
            samples_path = result.samples
            write_picture(lambda: pictures.plot_samples(samples_path), picture)
    if as_json:
        _print_json(result.as_json())
    else:
        _print_replay(result, run_dir)
    return result.difference is None


def _print_replay(result: Rerun, run_dir: Path) -> None:
    for line in result.notes:
        console.info(line)
    if result.rows:
        columns = ["step", "loss", "acc", "grad norm"]
        if result.norms:
            columns.append("largest gradients, relative to their median over these steps")
        rows = [_replay_row(result, step) for step in result.rows]
        console.table(f"{run_dir}: computed again", columns, rows)
        if result.difference is None:
            compared = f"{result.num_compared} records of these steps, all that the run has of them"
            if result.num_compared:
                console.info(f"{compared}, came out again, bit for bit")
            else:
                console.info("the run has no record of these steps to compare with")
        else:
            console.info(f"not as recorded: {result.difference}; recorded and computed")
    if result.nonfinite is not None:
        console.info(_describe_nonfinite(result.nonfinite))
    if result.samples is not None:
        console.info(f"images: {result.samples.with_suffix('.png')}")
    if result.norms:
        console.info(f"norms, for TensorBoard: {result.out}")
    if (result.out / "profile").is_dir():
        console.info(f"trace: {result.out / 'profile'}; open it at https://ui.perfetto.dev")


def _replay_row(result: Rerun, step: int) -> list[str]:
    values = result.rows[step]
    norm = values.get("train/grad_norm", values.get("train/grad_norm_of_rank_0"))
    row = [
        f"{step}",
        _show(values.get("train/loss")),
        _show(values.get("train/accuracy")),
        _show(norm),
    ]
    if result.norms:
        row.append(_describe_growth(result.norms, step))
    return row


def _show(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _describe_growth(norms: dict[int, dict[str, dict[str, float]]], step: int) -> str:
    """The parameters whose gradients are largest against their median over the steps."""
    growth = []
    for name, values in norms.get(step, {}).items():
        gradients = [
            by_name[name]["gradient"]
            for by_name in norms.values()
            if by_name.get(name, {}).get("gradient") is not None
        ]
        median = statistics.median(gradients) if gradients else 0.0
        if values.get("gradient") is not None and median > 0:
            growth.append((values["gradient"] / median, name))
    growth.sort(reverse=True)
    return ", ".join(f"{name} x{factor:.1f}" for factor, name in growth[:_LAYERS_NAMED])


def _describe_nonfinite(found: dict[str, Any]) -> str:
    if "where" not in found:
        return f"not finite, but in no module: {found['message']}"
    return (
        f"first value that is not finite: step {found['step']}, rank {found['rank']}: "
        f"{found['where']}: {found['elements']:,} of {found['of']:,} elements"
    )


def verify(
    run_dir: Path, num_windows: int | None, seed: int, overrides: list[str], as_json: bool
) -> bool:
    """Show whether a run follows from its recipe, data and code.

    Returns:
        Whether it does.
    """
    with _stdout_for_json(as_json):
        result = verify_run(run_dir, num_windows, seed, overrides)
    if as_json:
        _print_json(result.as_json())
    else:
        _print_verification(result, run_dir)
    return result.is_valid


def _print_verification(result: Verification, run_dir: Path) -> None:
    for line in result.notes:
        console.info(line)
    if not result.is_exact:
        console.info(
            "so not all bits can be the same: in windows that were computed elsewhere the records "
            f"of the first {STEPS_COMPARED_ELSEWHERE} steps are compared, within {TOLERANCE:g} of "
            "their value; weights are not"
        )
    for line in result.faults:
        console.error(line)

    rows = [
        [f"{window.first} to {window.last}", window.fault or "follows"] for window in result.windows
    ]
    console.table(f"{run_dir}: {result.steps} steps computed again", ["steps", "result"], rows)
    if result.is_valid and result.is_exact:
        console.info("weights, optimizer state and records follow, bit for bit")
    elif result.is_valid:
        console.info("the records follow, within the tolerance")


def _print_json(values: Any) -> None:
    """Print values as JSON, which has no NaN and no infinity: these become null."""
    console.info(json.dumps(_without_nonfinite(values), allow_nan=False))


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(out: Path | None, draw: Callable[[], Figure], as_json: bool) -> None:
    if out is None:
        return
    write_picture(draw, out)
    _say(as_json, f"written: {out}")


def _say(as_json: bool, line: str) -> None:
    """Print a line where it does not stand in the way of JSON."""
    if not as_json:
        console.info(line)


@contextmanager
def _stdout_for_json(as_json: bool) -> Iterator[None]:
    """A context in which the ranks' messages go to the error output, if the output is JSON."""
    if not as_json:
        yield
        return

    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
