"""What the runs of a study recorded."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from lrd.checkpoint.run_records import read_summary
from lrd.errors import UserError
from lrd.study.grid import GridRun, RunState, Study
from lrd.study.statistics import Difference, Estimate, estimate_mean, paired_difference
from lrd.tracking.metrics_file import FILE_NAME, read_rows

# Name of a measure -> what it is, for the report.
MEASURES = {
    "test_accuracy": "test accuracy after the last epoch",
    "best_test_accuracy": "best test accuracy of all evaluations",
    "test_loss": "test loss after the last epoch",
    "train_accuracy": "accuracy on the batches of the last epoch",
    "train_loss": "loss on the batches of the last epoch",
    "epochs_to_goal": "epochs until the test accuracy reached the goal",
}

Curve = dict[int, float]  # epoch, from 1 -> value


@dataclass(frozen=True)
class RunResult:
    """What a run recorded.

    Attributes:
        run: which run it is.
        state: what has been done of it.
        measures: a value for each name in MEASURES; None if there is none. Empty unless the run
            is finished.
        test_accuracy: after each epoch with an evaluation.
        train_accuracy: mean over the records of each epoch.
        seconds: how long all of its starts took together.
    """

    run: GridRun
    state: RunState
    measures: dict[str, float | None]
    test_accuracy: Curve
    train_accuracy: Curve
    seconds: float


@dataclass(frozen=True)
class ArmResult:
    """An arm over its seeds.

    Attributes:
        name: of the arm.
        runs: all of its runs, finished or not, in the order of their seeds.
        estimates: of each measure, over the runs that are finished. A run that diverged has no
            value, and `epochs_to_goal` is over those that reached it.
        differences: of each measure to the arm's baseline, over the seeds that are finished in
            both arms; empty for an arm that is compared with none.
    """

    name: str
    runs: list[RunResult]
    estimates: dict[str, Estimate]
    differences: dict[str, Difference]

    @property
    def finished(self) -> list[RunResult]:
        return [result for result in self.runs if result.state.name == "finished"]

    @property
    def diverged(self) -> list[RunResult]:
        return [result for result in self.runs if result.state.name == "diverged"]


def read_results(study: Study, states: dict[GridRun, RunState]) -> list[ArmResult]:
    """Read what all runs of a study recorded, and compare its arms.

    Raises:
        UserError: a run is finished, but has no readable metrics.
    """
    goal = study.file.accuracy_goal
    by_arm = {
        name: [_read_run(run, states[run], goal) for run in study.runs_of(name)]
        for name in study.file.arms
    }

    arms = []
    for name, results in by_arm.items():
        estimates = {
            measure: estimate_mean(list(_values(results, measure).values())) for measure in MEASURES
        }
        differences = {}
        baseline = study.file.baseline_of(name)
        if baseline is not None:
            differences = {
                measure: _compare(results, by_arm[baseline], measure) for measure in MEASURES
            }
        arms.append(ArmResult(name, results, estimates, differences))
    return arms


def _values(results: list[RunResult], measure: str) -> dict[int, float]:
    """The values of a measure by seed, of the runs that have one."""
    values = {}
    for result in results:
        value = result.measures.get(measure)
        if value is not None:
            values[result.run.seed] = value
    return values


def _compare(results: list[RunResult], baseline: list[RunResult], measure: str) -> Difference:
    values = _values(results, measure)
    others = _values(baseline, measure)
    seeds = [seed for seed in values if seed in others]
    return paired_difference([values[seed] for seed in seeds], [others[seed] for seed in seeds])


def _read_run(run: GridRun, state: RunState, goal: float | None) -> RunResult:
    rows = read_rows(run.run_dir / FILE_NAME, first_step=1)
    if state.name == "finished" and not any("test/accuracy" in row for row in rows):
        raise UserError(
            f"{run.run_dir / FILE_NAME}: has no test accuracy, though the run is finished; "
            "delete the run directory to run it anew"
        )

    test_accuracy = {int(row["epoch"]): row["test/accuracy"] for row in rows if _is_evaluated(row)}
    train_accuracy = _mean_by_epoch(rows, "train/accuracy")
    measures: dict[str, float | None] = {}
    if state.name == "finished":
        train_loss = _mean_by_epoch(rows, "train/loss")
        test_losses = [row["test/loss"] for row in rows if "test/loss" in row]
        measures = {
            "test_accuracy": test_accuracy[max(test_accuracy)],
            "best_test_accuracy": max(test_accuracy.values()),
            "test_loss": test_losses[-1] if test_losses else None,
            "train_accuracy": _last(train_accuracy),
            "train_loss": _last(train_loss),
            "epochs_to_goal": _find_goal(test_accuracy, goal),
        }
    seconds = _read_seconds(run.run_dir)
    return RunResult(run, state, measures, test_accuracy, train_accuracy, seconds)


def _is_evaluated(row: dict[str, float]) -> bool:
    return "test/accuracy" in row


def _mean_by_epoch(rows: list[dict[str, float]], tag: str) -> Curve:
    """The mean of each epoch's records. Those of skipped steps are not finite and do not count."""
    values: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if math.isfinite(row.get(tag, math.nan)):
            values[int(row["epoch"])].append(row[tag])
    return {epoch: fmean(records) for epoch, records in values.items()}


def _last(curve: Curve) -> float | None:
    return curve[max(curve)] if curve else None


def _find_goal(test_accuracy: Curve, goal: float | None) -> float | None:
    """The first epoch whose test accuracy reaches the goal."""
    if goal is None:
        return None
    epochs = [epoch for epoch, accuracy in sorted(test_accuracy.items()) if accuracy >= goal]
    return float(epochs[0]) if epochs else None


def _read_seconds(run_dir: Path) -> float:
    summary = read_summary(run_dir)
    return 0.0 if summary is None or summary.seconds is None else summary.seconds


def mean_curve(curves: list[Curve]) -> tuple[list[int], list[float], list[float]]:
    """Mean and standard deviation of several curves at the epochs that all of them have.

    Returns:
        Epochs, means and standard deviations; the latter are zero for a single curve.
    """
    if not curves:
        return [], [], []
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
    columns = [[curve[epoch] for curve in curves] for epoch in epochs]
    means = [fmean(values) for values in columns]
    spreads = [stdev(values) if len(values) > 1 else 0.0 for values in columns]
    return epochs, means, spreads
