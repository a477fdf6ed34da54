"""Plots of learning rates: of recipes, without training; and of runs, as they were recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrd import console
from lrd import recipe as recipes
from lrd.data import datasets
from lrd.errors import UserError
from lrd.parts.schedules import lr_trajectory, total_steps
from lrd.tracking.event_file import read_scalars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PROBED_STEPS = 60  # steps in the plot of single elements
_ASSUMED_IMAGES = 50_000  # where a recipe's images cannot be counted
_MAX_STEPS = 5_000_000  # of a recipe
_MAX_LEGEND_ROWS = 24  # in one column of the legend

# Okabe and Ito's colours, which colour-blind readers can tell apart, without yellow, and black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# A source's groups differ by the line's style, sources by colour, then by marker.
STYLES = ("-", (0, (7, 2)), (0, (5, 2, 1, 2)), (0, (5, 2, 1, 2, 1, 2)))
_MARKERS = ("", "o", "s", "^", "v", "D", "x", "+")
_MARKED_POINTS = 8  # along a line

Scalars = dict[str, list[tuple[int, float]]]  # the (step, value) pairs of each tag


@dataclass
class Trajectory:
    """The learning rate of one parameter group.

    Attributes:
        group: name of the group.
        steps: the steps that have a value.
        lrs: the learning rate in each of them.
        effective: the learning rate times the fraction of the elements that keep it; for a recipe,
            the fraction to be expected; None without learning rate dropout.
    """

    group: str
    steps: list[int]
    lrs: list[float]
    effective: list[float] | None = None


@dataclass
class Source:
    """A recipe or a run in the picture.

    Attributes:
        name: what the legend calls it.
        trajectories: of its parameter groups.
        steps_per_epoch: of a recipe; None for a run.
        note: what else the legend says of it.
        probes: of a run, the learning rates of single elements, by their names.
    """

    name: str
    trajectories: list[Trajectory]
    steps_per_epoch: int | None = None
    note: str = ""
    probes: Scalars = field(default_factory=dict)


def draw_trajectories(arguments: list[str], out: Path) -> None:
    """Plot the learning rates of recipes over epochs; those of runs, or of both, over steps.

    Args:
        arguments: recipe files, run directories, and overrides of the recipes.
        out: the image file to write.

    Raises:
        UserError: a source cannot be read, or the image cannot be written.
    """
    if not out.suffix:
        raise UserError(f"--out: is {str(out)!r}, should be the name of a file such as lr.png")
    paths, overrides = split_arguments(arguments)
    sources = read_sources(paths, overrides)

    write_picture(lambda: plot_sources(sources), out)

    num_runs = sum(source.steps_per_epoch is None for source in sources)
    counts = [(len(sources) - num_runs, "recipe"), (num_runs, "run")]
    words = [f"{count} {kind}{'s' if count > 1 else ''}" for count, kind in counts if count]
    console.info(f"{out}: lr of {' and '.join(words)}")


def write_picture(draw: Callable[[], Figure], out: Path) -> None:
    """Draw a figure and write it to an image file, without a display.

    Raises:
        UserError: the file cannot be written, or its suffix is that of no image format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = draw()
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    finally:
        plt.close(figure)


def split_arguments(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Tell paths and overrides (`section.key=value`) apart.

    Raises:
        UserError: there is no path.
    """
    overrides = [text for text in arguments if "=" in text and not Path(text).exists()]
    paths = [Path(text) for text in arguments if text not in overrides]
    if not paths:
        raise UserError("lr: name a recipe or a run directory")
    return paths, overrides


def read_sources(paths: list[Path], overrides: list[str]) -> list[Source]:
    """Read recipes and runs.

    Raises:
        UserError: a source cannot be read, or there are overrides and no recipe.
    """
    if overrides and all(path.is_dir() for path in paths):
        raise UserError(f"lr: {overrides[0]}: overrides are for recipes, and these are runs")

    names = name_paths(paths)
    sources = []
    for path, name in zip(paths, names, strict=True):
        if path.is_dir():
            sources.append(_read_run(path, name))
        else:
            sources.append(_read_recipe(recipes.load(path, overrides), name))
    return sources


def name_paths(paths: list[Path]) -> list[str]:
    """A short name for each path: the last part, or the whole path where two end in the same."""
    short = [path.name if path.is_dir() else path.stem for path in paths]
    return [
        name if short.count(name) == 1 and name else str(path)
        for path, name in zip(paths, short, strict=True)
    ]


def _read_recipe(recipe: recipes.Recipe, name: str) -> Source:
    """The learning rates that a recipe prescribes, with those to be expected of its masks."""
    steps_per_epoch = _steps_per_epoch(name, recipe)
    num_steps = total_steps(recipe, steps_per_epoch)
    if num_steps > _MAX_STEPS:
        raise UserError(
            f"trainer.epochs: {name} has {num_steps:,} steps; at most {_MAX_STEPS:,} can be drawn"
        )

    trajectories = []
    for group, lrs in lr_trajectory(recipe, steps_per_epoch).items():
        steps = list(range(1, len(lrs) + 1))
        trajectory = Trajectory(group, steps, lrs)
        kept = _expected_fraction(recipe, group)
        if kept is not None:
            trajectory.effective = [lr * kept for lr in lrs]
        trajectories.append(trajectory)

    note = ""
    if recipe.schedule.name == "ReduceLROnPlateau":
        note = " (if the metric never stalls)"
    return Source(name, trajectories, steps_per_epoch, note)


def _expected_fraction(recipe: recipes.Recipe, group: str) -> float | None:
    """The fraction of a group's elements that move in a step, on average; None: all of them."""
    if recipe.lr_dropout is None:
        return None

    for name, section in zip(recipe.optimizer.group_names, recipe.optimizer.groups, strict=True):
        if name == group and section.keep_prob is not None:
            return section.keep_prob
    return recipe.lr_dropout.keep_prob


def _steps_per_epoch(name: str, recipe: recipes.Recipe) -> int:
    """Steps in an epoch of a recipe, as if there were 50,000 images if they cannot be counted.

    Raises:
        UserError: a batch is larger than the training set.
    """
    try:
        num_images = datasets.count_training_images(recipe.data, recipe.seed)
    except UserError as error:  # the images are on another machine, or not yet made
        num_images = _ASSUMED_IMAGES
        console.info(f"{name}: {error}; drawn as if there were {num_images:,} images")

    if recipe.data.batch_size > num_images:
        raise UserError(
            f"{name}: data.batch_size: is {recipe.data.batch_size}, "
            f"but there are only {num_images} images"
        )
    return num_images // recipe.data.batch_size


def _read_run(run_dir: Path, name: str) -> Source:
    """The learning rates that a run recorded.

    Raises:
        UserError: it recorded none.
    """
    scalars = read_scalars(run_dir)
    trajectories = []
    for tag, points in scalars.items():
        if not tag.startswith("lr/"):
            continue

        group = tag.removeprefix("lr/")
        trajectory = Trajectory(group, [step for step, _ in points], [lr for _, lr in points])
        effective = scalars.get(f"lr_effective/{group}")
        if effective is not None and len(effective) == len(points) and effective != points:
            trajectory.effective = [lr for _, lr in effective]
        trajectories.append(trajectory)
    if not trajectories:
        raise UserError(f"{run_dir}: no lr recorded in it")

    prefix = "probes/"
    probes = {
        tag.removeprefix(prefix): points
        for tag, points in scalars.items()
        if tag.startswith(prefix)
    }
    return Source(name, trajectories, probes=probes)


def plot_sources(sources: list[Source]) -> Figure:
    """Draw all sources into one plot; of a single run also the learning rates of its probes."""
    from matplotlib import pyplot as plt

    probes = sources[0].probes if len(sources) == 1 else {}
    num_rows = 2 if probes else 1
    figure, rows = plt.subplots(
        num_rows, figsize=(11, 2 + 3.5 * num_rows), layout="constrained", squeeze=False
    )
    axes: Axes = rows[0, 0]

    over_epochs = all(source.steps_per_epoch is not None for source in sources)
    lines = _merge_equal_lines(sources, over_epochs)
    colour_of_source = {source.name: i for i, source in enumerate(sources)}
    for i, line in enumerate(lines):
        num_above = sum(_has_same_lrs(line, later) for later in lines[i + 1 :])
        _draw_line(axes, line, colour_of_source[line.source.name], num_above)

    # Curves that differ by more than a factor of 20 need a logarithmic axis to be seen.
    peaks = [max(line.trajectory.lrs) for line in lines]
    if min(peaks, default=0.0) > 0 and max(peaks) > 20 * min(peaks):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(peaks) / 1000)  # a cosine ends at zero

    axes.set(xlabel="epoch" if over_epochs else "step", ylabel="learning rate")
    axes.grid(alpha=0.3)
    _draw_legend(axes, lines)
    if probes:
        _draw_probes(rows[1, 0], probes)
    return figure


@dataclass
class _Line:
    """A line of the plot, for all groups and recipes that have the same learning rates.

    Attributes:
        source: the first of them.
        trajectory: what is drawn.
        positions: epochs or steps, for each value.
        style: number of the line's style.
        labels: what the legend calls it, in lines.
    """

    source: Source
    trajectory: Trajectory
    positions: list[float]
    style: int
    labels: list[str]


def _merge_equal_lines(sources: list[Source], over_epochs: bool) -> list[_Line]:
    """A line for each trajectory; recipes and groups with the same one share the line."""
    lines: dict[Any, _Line] = {}
    for source in sources:
        for number, trajectory in enumerate(source.trajectories):
            label = source.name
            if len(source.trajectories) > 1:
                label += f": {trajectory.group}"
            label += source.note

            positions = [float(step) for step in trajectory.steps]
            if over_epochs and source.steps_per_epoch is not None:
                positions = [(step - 1) / source.steps_per_epoch for step in trajectory.steps]

            effective = None if trajectory.effective is None else tuple(trajectory.effective)
            key = (tuple(positions), tuple(trajectory.lrs), effective)
            if key in lines:
                lines[key].labels.append(label)
            else:
                lines[key] = _Line(source, trajectory, positions, number, [label])
    return list(lines.values())


def _has_same_lrs(line: _Line, other: _Line) -> bool:
    """Whether two lines with different effective learning rates lie upon each other."""
    is_same_axis = line.positions == other.positions
    return is_same_axis and line.trajectory.lrs == other.trajectory.lrs


def _draw_line(axes: Axes, line: _Line, source_number: int, num_above: int) -> None:
    """Draw the lr as a strong line and the effective lr as a pale one of the same colour.

    Args:
        num_above: how many equal lines will be drawn upon it; a broader line shows beside them.
    """
    marker = _MARKERS[source_number // len(COLOURS) % len(_MARKERS)]
    style: dict[str, Any] = {
        "color": COLOURS[source_number % len(COLOURS)],
        "marker": marker or None,
        "markevery": max(1, len(line.positions) // _MARKED_POINTS),
        "markersize": 5,
    }
    axes.plot(
        line.positions,
        line.trajectory.lrs,
        linestyle=STYLES[line.style % len(STYLES)],
        linewidth=1.8 + 2.5 * num_above,
        label="\n".join(line.labels),
        **style,
    )
    if line.trajectory.effective is not None:
        axes.plot(
            line.positions,
            line.trajectory.effective,
            linestyle=STYLES[line.style % len(STYLES)],
            linewidth=0.9,
            alpha=0.5,
            **style,
        )


def _draw_legend(axes: Axes, lines: list[_Line]) -> None:
    """A legend beside the plot, which stays readable for many lines."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    if any(line.trajectory.effective is not None for line in lines):
        handles.append(Line2D([], [], color="grey", linewidth=0.9, alpha=0.7))
        labels.append("thin: effective lr (lr x fraction kept)")

    num_rows = sum(label.count("\n") + 1 for label in labels)
    axes.legend(
        handles,
        labels,
        fontsize="small" if num_rows <= 12 else "x-small",
        ncols=1 + (num_rows - 1) // _MAX_LEGEND_ROWS,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        handlelength=4,
    )


def _draw_probes(axes: Axes, probes: Scalars) -> None:
    """Draw a row for each probed element over the first steps: the lr of its group, or zero."""
    for row, points in enumerate(probes.values()):
        peak = max(lr for _, lr in points) or 1.0
        first_points = points[:_PROBED_STEPS]
        steps = [step for step, _ in first_points]
        heights = [row + 0.8 * lr / peak for _, lr in first_points]
        axes.step(steps, heights, where="mid", linewidth=1.2, color=COLOURS[row % len(COLOURS)])

    axes.set_yticks(range(len(probes)), list(probes))
    axes.set(xlabel="step", title="lr of single elements: the group's, or zero")
    axes.grid(axis="x", alpha=0.3)
