"""`lrd compare`: runs side by side, as a table and as curves, in a picture or an HTML page."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrd import __version__, console
from lrd.checkpoint.run_records import RunSummary, describe_seconds, read_recipe, read_summary
from lrd.cli.plots import COLOURS, STYLES, name_paths
from lrd.errors import UserError
from lrd.tracking.event_file import read_scalars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = dict[int, float]  # step -> value

# Title, and the tag whose values are drawn. `lr` stands for the first group's effective lr.
_PANELS = (
    ("training loss", "train/loss"),
    ("test loss", "test/loss"),
    ("test accuracy", "test/accuracy"),
    ("effective learning rate", "lr"),
)
_SMOOTHED = "train/loss"
_SMOOTHED_PARTS = 50  # a running mean takes this part of a run's steps
_FORMATS = (".png", ".svg", ".pdf", ".html")
_SEED_KEYS = ("seed", "lr_dropout.seed")
_MAX_SETTINGS_IN_TERMINAL = 4


@dataclass
class ComparedRun:
    """One run.

    Attributes:
        name: what the table and the legend call it.
        summary: of its files.
        settings: those that affect its results, and its length; empty if they cannot be read.
        scalars: tag -> step -> value, as recorded for TensorBoard.
    """

    name: str
    summary: RunSummary
    settings: dict[str, Any]
    scalars: dict[str, Points]

    def curve(self, tag: str) -> Points:
        """The values of a panel."""
        if tag == "lr":
            for name in ("lr_effective/", "lr/"):
                found = [points for key, points in self.scalars.items() if key.startswith(name)]
                if found:
                    return found[0]
            return {}
        points = self.scalars.get(tag, {})
        return _running_mean(points) if tag == _SMOOTHED else points

    def last(self, tag: str) -> float | None:
        """The last value of a curve; None if there is none."""
        points = self.curve(tag)
        return points[max(points)] if points else None


@dataclass
class Group:
    """Runs whose settings differ in nothing but the seed."""

    name: str
    runs: list[ComparedRun]

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings


def compare(run_dirs: list[Path], out: Path) -> None:
    """Print a table of runs and draw their curves.

    Args:
        run_dirs: two run directories or more; runs that differ only in the seed become a group.
        out: the picture (.png, .svg, .pdf) or page (.html) to write.

    Raises:
        UserError: a run cannot be read, or `out` cannot be written.
    """
    if len(run_dirs) < 2:
        raise UserError("compare: name two run directories or more")
    if out.suffix.lower() not in _FORMATS:
        raise UserError(f"{out}: cannot be written: the name must end in {', '.join(_FORMATS)}")

    groups = group_by_seed(read_runs(run_dirs))
    differing = list(differing_settings(groups))
    columns, rows = make_table(groups, differing[:_MAX_SETTINGS_IN_TERMINAL])
    console.listing(columns, rows, leave_out=_leave_out(columns), wrap="run")
    if len(differing) > _MAX_SETTINGS_IN_TERMINAL:
        console.info(f"(they also differ in {', '.join(differing[_MAX_SETTINGS_IN_TERMINAL:])})")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plot_groups(groups)
    try:
        if out.suffix.lower() == ".html":
            out.write_text(make_page(groups, figure), encoding="utf-8")
        else:
            figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    finally:
        plt.close(figure)
    console.info(f"{out}: curves of {len(run_dirs)} runs")


def read_runs(run_dirs: list[Path]) -> list[ComparedRun]:
    """Read run directories.

    Raises:
        UserError: one of them is missing, is no run, or has recorded nothing.
    """
    runs = []
    for run_dir, name in zip(run_dirs, name_paths(run_dirs), strict=True):
        if not run_dir.is_dir():
            raise UserError(f"{run_dir}: no such run directory")
        summary = read_summary(run_dir)
        if summary is None:
            raise UserError(f"{run_dir}: no run in it; a run leaves a status.json in its run_dir")

        scalars = {tag: dict(points) for tag, points in read_scalars(run_dir).items()}
        if not scalars:
            raise UserError(f"{run_dir}: nothing recorded in it")

        recipe = read_recipe(run_dir)
        settings: dict[str, Any] = {}
        if recipe is not None:
            settings = {**recipe.result_settings(), "trainer.epochs": recipe.trainer.epochs}
            settings["trainer.max_steps"] = recipe.trainer.max_steps
        runs.append(ComparedRun(name, summary, settings, scalars))
    return runs


def group_by_seed(runs: list[ComparedRun]) -> list[Group]:
    """Put runs together that differ in nothing but the seed, in the order of their first ones."""
    groups: dict[Any, list[ComparedRun]] = {}
    for run in runs:
        key: Any = sorted(
            (key, repr(value)) for key, value in run.settings.items() if key not in _SEED_KEYS
        )
        # A recipe that cannot be read is like no other.
        groups.setdefault(tuple(key) or run.name, []).append(run)
    return [Group(_name_group(members), members) for members in groups.values()]


def _name_group(runs: list[ComparedRun]) -> str:
    """The beginning that the names of a group's runs share, and their number."""
    names = [run.name for run in runs]
    if len(names) == 1:
        return names[0]
    # Character by character: the names are no paths with parts in common.
    common = os.path.commonprefix(names).rstrip("0123456789")  # noqa: RUF071
    common = common.rstrip("-_. ").removesuffix("seed").rstrip("-_. ")
    # The same run twice, or copies of it, are no further seeds.
    seeds = {run.settings.get("seed") for run in runs}
    what = "seeds" if len(seeds) == len(runs) else "runs"
    return f"{common or names[0]} ({len(names)} {what})"


def differing_settings(groups: list[Group]) -> Iterator[str]:
    """The keys in which groups differ, without the seeds.

    Of a section that some groups leave out, one key shows that: `lr_dropout.keep_prob`.
    """
    keys = {key: None for group in groups for key in group.settings}
    for key in keys:
        values = {repr(group.settings[key]) for group in groups if key in group.settings}
        is_left_out = any(key not in group.settings for group in groups)
        is_different = len(values) > 1 or (is_left_out and key == "lr_dropout.keep_prob")
        if is_different and key not in _SEED_KEYS:
            yield key


def make_table(groups: list[Group], settings: list[str]) -> tuple[list[str], list[list[str]]]:
    """A row for each group.

    Args:
        groups: what is compared.
        settings: keys that have a column.

    Returns:
        The headings and the rows.
    """
    short = [key.rpartition(".")[2] for key in settings]
    headings = [
        name if short.count(name) == 1 else key for name, key in zip(short, settings, strict=True)
    ]
    columns = ["run", *headings, "steps", "train loss", "test loss", "test acc", "best acc", "time"]

    rows = []
    for group in groups:
        runs = group.runs
        steps = {run.summary.step for run in runs}
        seconds = [run.summary.seconds for run in runs if run.summary.seconds is not None]
        rows.append(
            [
                group.name,
                *(_describe_setting(group.settings.get(key)) for key in settings),
                "/".join(str(step) for step in sorted(steps, key=str)),
                _describe_spread([run.last("train/loss") for run in runs]),
                _describe_spread([run.last("test/loss") for run in runs]),
                _describe_spread([run.last("test/accuracy") for run in runs]),
                _describe_spread([run.summary.best_accuracy for run in runs]),
                describe_seconds(statistics.mean(seconds) if seconds else None),
            ]
        )
    return columns, rows


def _leave_out(columns: list[str]) -> list[str]:
    """The columns that a narrow terminal can do without, the first one first."""
    return ["time", "test loss", "steps", "train loss", *reversed(columns[1:-6])]


def _describe_setting(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _describe_spread(values: list[float | None]) -> str:
    """One value, or the mean and standard deviation of several."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = statistics.fmean(known)
    if len(known) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {statistics.stdev(known):.4f}"


def plot_groups(groups: list[Group]) -> Figure:
    """Draw the panels side by side; groups of several runs as their mean and spread."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for panel, (title, tag) in zip(axes.flat, _PANELS, strict=True):
        for i, group in enumerate(groups):
            _draw_group(panel, group, tag, i)
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
    _choose_scale(axes[0, 0], groups, "train/loss")
    _choose_scale(axes[0, 1], groups, "test/loss")

    handles, labels = axes[0, 0].get_legend_handles_labels()
    if any(len(group.runs) > 1 for group in groups):
        labels = [
            f"{label}: mean ± sd" if label.endswith((" seeds)", " runs)")) else label
            for label in labels
        ]
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(3, len(labels)),
        fontsize="medium" if len(labels) <= 9 else "small",
        handlelength=3.5,
    )
    return figure


def _choose_scale(axes: Axes, groups: list[Group], tag: str) -> None:
    """A logarithmic axis where a loss falls far."""
    values = [value for group in groups for run in group.runs for value in run.curve(tag).values()]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")


def _draw_group(axes: Axes, group: Group, tag: str, number: int) -> None:
    curves = [curve for curve in (run.curve(tag) for run in group.runs) if curve]
    style: dict[str, Any] = {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[number // len(COLOURS) % len(STYLES)],
    }
    steps, means, spreads = mean_and_spread(curves)
    marker = "o" if tag.startswith("test/") and len(steps) <= 30 else None
    axes.plot(steps, means, linewidth=1.6, marker=marker, markersize=3.5, label=group.name, **style)
    if len(curves) > 1:
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)


def mean_and_spread(curves: list[Points]) -> tuple[list[int], list[float], list[float]]:
    """Mean and standard deviation of several curves at the steps that all of them have.

    Returns:
        Steps, means and standard deviations; the latter are zero for a single curve.
    """
    if not curves:
        return [], [], []
    steps = sorted(set[int].intersection(*(set(curve) for curve in curves)))
    means = []
    spreads = []
    for step in steps:
        values = [curve[step] for curve in curves]
        means.append(statistics.fmean(values))
        is_finite = all(math.isfinite(value) for value in values)
        spreads.append(statistics.stdev(values) if len(values) > 1 and is_finite else 0.0)
    return steps, means, spreads


def _running_mean(points: Points) -> Points:
    """The mean over the last few values, a fiftieth of all of them, at each step."""
    window = max(1, len(points) // _SMOOTHED_PARTS)
    steps = sorted(points)
    smoothed = {}
    total = 0.0
    for i, step in enumerate(steps):
        total += points[step]
        if i >= window:
            total -= points[steps[i - window]]
        smoothed[step] = total / min(i + 1, window)
    return smoothed


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem;
       padding: 0 1rem; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid #ddd;
         white-space: nowrap; }
th { border-bottom: 2px solid #888; }
footer { color: #666; margin-top: 2rem; font-size: .85rem; }
"""


def make_page(groups: list[Group], figure: Figure) -> str:
    """An HTML page that needs no network: the picture is a part of it."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    source = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"

    settings = list(differing_settings(groups))
    title = " / ".join(group.name for group in groups)
    runs = [Group(run.name, [run]) for group in groups for run in group.runs]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _make_html_table(*make_table(groups, settings)),
        f'<p><img src="{source}" alt="curves of {html.escape(title)}"></p>',
    ]
    if len(runs) > len(groups):
        parts += [
            "<h2>Each run</h2>",
            _make_html_table(*make_table(runs, [*settings, "seed"])),
        ]
    parts += ["<h2>Where they are</h2>", _make_html_table(*_locate(groups))]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        "<footer>The training loss is a running mean over a fiftieth of the steps. "
        f"± is the standard deviation over seeds. lrd {__version__}</footer>\n</body>\n</html>\n"
    )


def _locate(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [run.name, str(run.summary.path), run.summary.recipe, run.summary.state]
        for group in groups
        for run in group.runs
    ]
    return ["run", "directory", "recipe", "state"], rows


def _make_html_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ['<div class="wide"><table>']
    for tag, row in [("th", columns), *(("td", row) for row in rows)]:
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table></div>"])
