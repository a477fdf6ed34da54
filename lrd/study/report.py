"""The results of a study: a table, Markdown for a page of documentation, and JSON."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lrd
from lrd import __version__, console
from lrd.checkpoint.run_records import describe_seconds
from lrd.checkpoint.store import package_versions
from lrd.errors import UserError
from lrd.study.grid import Study, describe_arm
from lrd.study.results import ArmResult, RunResult, mean_curve
from lrd.study.statistics import Difference, Estimate

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Origin:
    """What made the results of a report.

    Attributes:
        commit: of lrd's checkout, with `+` if its files have changed since; None without one.
        versions: of lrd, Python, torch and Accelerate.
        processor: the processor of this host.
        gpu: its first GPU; None if there is none.
    """

    commit: str | None
    versions: dict[str, str]
    processor: str
    gpu: str | None


def find_origin() -> Origin:
    """What this process and host are."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    versions = {"lrd": __version__, **package_versions()}
    return Origin(_find_commit(Path(lrd.__file__).parent), versions, _name_processor(), gpu)


def _find_commit(package: Path) -> str | None:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie in somebody else's repository.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return commit + "+" if git("status", "--porcelain", "--", ".") else commit


def _name_processor() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# JSON


def as_json(study: Study, arms: list[ArmResult], origin: Origin) -> dict[str, Any]:
    """All that is known about a study. Only `seconds` depends on interruptions."""
    runs = [result for arm in arms for result in arm.runs]
    return {
        "title": study.file.title,
        "base": study.file.base,
        "set": study.file.settings,
        "baseline": study.file.baseline,
        "accuracy_goal": study.file.accuracy_goal,
        "published": {published.name: published.source for published in study.published},
        "num_runs": len(runs),
        "num_done": sum(result.state.is_done for result in runs),
        "seconds": sum(result.seconds for result in runs),
        **asdict(origin),
        "arms": {arm.name: _arm_as_json(study, arm) for arm in arms},
    }


def _arm_as_json(study: Study, arm: ArmResult) -> dict[str, Any]:
    return {
        "set": study.file.arms[arm.name].settings,
        "baseline": study.file.baseline_of(arm.name),
        "num_seeds": len(arm.runs),
        "num_finished": len(arm.finished),
        "num_diverged": len(arm.diverged),
        "estimates": {name: asdict(estimate) for name, estimate in arm.estimates.items()},
        "differences": {name: asdict(value) for name, value in arm.differences.items()},
        "runs": [
            {
                "seed": result.run.seed,
                "state": result.state.name,
                "message": result.state.message,
                **result.measures,
                "seconds": result.seconds,
            }
            for result in arm.runs
        ],
        "curves": {
            "test_accuracy": _curve_as_json([result.test_accuracy for result in arm.finished]),
            "train_accuracy": _curve_as_json([result.train_accuracy for result in arm.finished]),
        },
    }


def _curve_as_json(curves: list[dict[int, float]]) -> dict[str, list[Any]]:
    epochs, means, spreads = mean_curve(curves)
    return {
        "epoch": epochs,
        "mean": [round(mean, 6) for mean in means],
        "sd": [round(spread, 6) for spread in spreads],
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON, which has no numbers that are not finite: they become null."""
    write_text(path, json.dumps(_without_nonfinite(values), indent=1, ensure_ascii=False) + "\n")


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(item) for item in value]
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file, so that readers see the old one or the new one.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


# Tables


def print_report(study: Study, arms: list[ArmResult]) -> None:
    """Print the table of a study, the value of each seed, and what the marks mean."""
    columns, rows = make_table(study, arms)
    # The first to go is the last one in this order.
    keep = ["arm", "seeds", "test acc", "difference", "p", "compared with", "95 % interval"]
    leave_out = [column for column in reversed(columns) if column not in keep]
    leave_out += [column for column in ("95 % interval", "p", "compared with") if column in columns]
    console.info(study.file.title)
    console.listing(columns, rows, leave_out=leave_out, wrap="arm")

    console.info("")
    console.listing(*make_seeds_table(arms), leave_out=[], wrap="test accuracy of each seed")
    for note in ["Accuracies in percent, mean ± standard deviation.", *make_notes(study, arms)]:
        console.info(note)


def make_table(study: Study, arms: list[ArmResult]) -> tuple[list[str], list[list[str]]]:
    """A row for each arm, accuracies in percent.

    Returns:
        The headings and the rows.
    """
    goal = study.file.accuracy_goal
    columns = ["arm", "seeds", "test acc", "95 % interval"]
    is_compared = any(arm.differences for arm in arms)
    has_other_baselines = len(_baselines(study)) > 1
    if is_compared:
        columns += ["difference", "p"]
    if has_other_baselines:
        columns.append("compared with")
    columns += ["best test acc", "train acc", "train loss"]
    if goal is not None:
        columns.append(f"epochs to {100 * goal:g} %")

    rows = []
    for arm in arms:
        estimates = arm.estimates
        row = [
            arm.name,
            _describe_seeds(arm),
            _describe_percent(arm, "test_accuracy") or ("diverged" if arm.diverged else ""),
            _describe_interval(estimates["test_accuracy"]),
        ]
        if is_compared:
            difference = arm.differences.get("test_accuracy")
            row += [_mark(arm, _describe_difference(difference)), _describe_p(difference)]
        if has_other_baselines:
            row.append(study.file.baseline_of(arm.name) or "")
        row += [
            _describe_percent(arm, "best_test_accuracy"),
            _describe_percent(arm, "train_accuracy"),
            _mark(arm, _describe_estimate(estimates["train_loss"], 1, 4)),
        ]
        if goal is not None:
            row.append(_mark(arm, _describe_epochs(arm)))
        rows.append(row)
    return columns, rows


def make_seeds_table(arms: list[ArmResult]) -> tuple[list[str], list[list[str]]]:
    """A row for each arm with the value of each of its seeds."""
    rows = []
    for arm in arms:
        values = [f"{result.run.seed}: {_describe_run(result)}" for result in arm.runs]
        rows.append([arm.name, "  ".join(values)])
    return ["arm", "test accuracy of each seed"], rows


def _baselines(study: Study) -> list[str]:
    """The arms that others are compared with, each once."""
    found = [study.file.baseline_of(name) for name in study.file.arms]
    return list(dict.fromkeys(name for name in found if name is not None))


def make_notes(study: Study, arms: list[ArmResult]) -> list[str]:
    """What the table leaves to be said: marks, what is missing, and what diverged."""
    notes = []
    runs = [result for arm in arms for result in arm.runs]
    num_open = sum(not result.state.is_done for result in runs)
    if num_open:
        notes.append(f"{len(runs) - num_open} of {len(runs)} runs are done so far.")

    baselines = _baselines(study)
    if baselines:
        to = baselines[0] if len(baselines) == 1 else "the arm that it is compared with"
        notes.append(
            f"difference: of the test accuracy to {to}, in percentage points, by seed, with its "
            "95 % interval; p is of the paired t test."
        )
    compared = [arm.differences["test_accuracy"] for arm in arms if arm.differences]
    num_tests = sum(difference.p is not None for difference in compared)
    if num_tests > 1:
        notes.append(
            f"{num_tests} arms are compared: if all were equal to their baselines, about "
            f"{0.05 * num_tests:.1f} of them would have p < 0.05."
        )

    for arm in arms:
        if arm.diverged:
            causes = [f"{run.run.seed}: {run.state.short_message}" for run in arm.diverged]
            notes.append(
                f"* {arm.name}: {len(arm.diverged)} of {len(arm.runs)} seeds diverged; its "
                f"figures are of the others. {', '.join(causes)}"
            )
    notes += [published.describe() for published in study.published]
    return notes


def make_markdown(study: Study, arms: list[ArmResult], origin: Origin, command: str) -> str:
    """The report for a page of documentation.

    Args:
        study: the study.
        arms: its results.
        origin: what made them.
        command: that makes them again.
    """
    columns, rows = make_table(study, arms)
    changes = [[arm.name, describe_arm(study.file.arms[arm.name])] for arm in arms]
    seconds = sum(result.seconds for arm in arms for result in arm.runs)
    device = origin.processor if origin.gpu is None else f"{origin.gpu}, {origin.processor}"
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    commit = "" if origin.commit is None else f", commit {origin.commit}"

    parts = [
        f"## {study.file.title}",
        _markdown_table(columns, rows),
        "Mean ± standard deviation over seeds; accuracies in percent. The 95 % intervals are "
        "Student's.",
        *(note.replace("*", "\\*") for note in make_notes(study, arms)),
        _markdown_table(*make_seeds_table(arms)),
        _markdown_table(["arm", "what it changes"], changes),
        f"![Test and training accuracy over epochs: {study.file.title}](study.png)",
        f"`{command}`: {describe_seconds(seconds)} for all runs, without their starts, on "
        f"{device}; {versions}{commit}.",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in line) + " |"
        for line in lines
    )


def _describe_seeds(arm: ArmResult) -> str:
    """`5`, or `3 of 5`; a star if some of them diverged."""
    num_finished = len(arm.finished)
    text = f"{num_finished}"
    if num_finished < len(arm.runs):
        text += f" of {len(arm.runs)}"
    return f"{text}*" if arm.diverged else text


def _mark(arm: ArmResult, text: str) -> str:
    """A figure with a star if some of the arm's seeds diverged and have no part in it."""
    return f"{text}*" if arm.diverged and text else text


def _describe_percent(arm: ArmResult, measure: str) -> str:
    return _mark(arm, _describe_estimate(arm.estimates[measure], 100, 2))


def _describe_estimate(estimate: Estimate, factor: float, digits: int) -> str:
    if estimate.mean is None:
        return ""
    text = f"{factor * estimate.mean:.{digits}f}"
    return text if estimate.sd is None else f"{text} ± {factor * estimate.sd:.{digits}f}"


def _describe_interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{100 * estimate.low:.2f} to {100 * estimate.high:.2f}"


def _describe_difference(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    if difference.mean is None:
        return ""
    text = f"{100 * difference.mean:+.2f}"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"


def _describe_p(difference: Difference | None) -> str:
    if difference is None or difference.p is None:
        return ""
    return "<0.001" if difference.p < 0.001 else f"{difference.p:.3f}"


def _describe_epochs(arm: ArmResult) -> str:
    """The mean over the seeds that reached the goal, and how many these are if not all."""
    estimate = arm.estimates["epochs_to_goal"]
    text = _describe_estimate(estimate, 1, 1)
    num_finished = len(arm.finished)
    if estimate.n == 0:
        return f"none of {num_finished}" if num_finished else ""
    if estimate.n < num_finished:
        return f"{text} ({estimate.n} of {num_finished})"
    return text


def _describe_run(result: RunResult) -> str:
    accuracy = result.measures.get("test_accuracy")
    if accuracy is None:
        return "not begun" if result.state.name == "new" else result.state.name
    return f"{100 * accuracy:.2f}"
