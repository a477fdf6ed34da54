"""Plots of learning rates: of recipes, without training; or of runs, as they were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lrd import console
from lrd import recipe as recipes
from lrd.data import datasets
from lrd.errors import UserError
from lrd.job.schedules import lr_trajectory
from lrd.tracking.event_file import read_scalars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PROBED_STEPS = 60  # steps in the plot of single elements
_ASSUMED_IMAGES = 50_000  # where a recipe's images cannot be counted

Scalars = dict[str, list[tuple[int, float]]]  # the (step, value) pairs of each tag


def draw_trajectories(sources: list[Path], out: Path) -> None:
    """Plot the learning rates of recipes over epochs, or those of runs over steps.

    Args:
        sources: recipe files or run directories, but not both.
        out: the image file to write.

    Raises:
        UserError: a source cannot be read, recipes and runs are mixed, or the image cannot be
            written.
    """
    run_dirs = [source for source in sources if source.is_dir()]
    if run_dirs and len(run_dirs) < len(sources):
        raise UserError("lr: recipes and run directories do not go into one picture")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = _plot_runs(run_dirs) if run_dirs else _plot_recipes(sources)
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    finally:
        plt.close(figure)

    kind = "run" if run_dirs else "recipe"
    plural = "s" if len(sources) > 1 else ""
    console.info(f"{out}: lr of {len(sources)} {kind}{plural}")


def _plot_runs(run_dirs: list[Path]) -> Figure:
    """Plot what runs recorded; of a single run also the learning rates of its probed elements."""
    scalars_of_run = {run_dir: _read_recorded_lrs(run_dir) for run_dir in run_dirs}
    is_single = len(run_dirs) == 1

    probes: Scalars = {}
    if is_single:
        for tag, points in scalars_of_run[run_dirs[0]].items():
            if tag.startswith("probes/"):
                probes[tag.removeprefix("probes/")] = points

    figure, rows = _make_figure(num_rows=2 if probes else 1)
    axes = rows[0]
    names = [run_dir.name for run_dir in run_dirs]
    for run_dir, scalars in scalars_of_run.items():
        name = run_dir.name if names.count(run_dir.name) == 1 else str(run_dir)
        _draw_run(axes, "" if is_single else name, scalars)
    axes.set(
        xlabel="step",
        ylabel="learning rate",
        title=str(run_dirs[0]) if is_single else "",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")

    if probes:
        _draw_probes(rows[1], probes)
    return figure


def _plot_recipes(paths: list[Path]) -> Figure:
    """Plot the learning rates that recipes prescribe."""
    # Two recipes in different folders may have the same file name.
    stems = [path.stem for path in paths]
    recipe_of_name = {
        path.stem if stems.count(path.stem) == 1 else str(path): recipes.load(path)
        for path in paths
    }

    figure, rows = _make_figure(num_rows=1)
    axes = rows[0]
    _draw_recipes(axes, recipe_of_name)
    axes.set(xlabel="epoch", ylabel="learning rate")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _make_figure(num_rows: int) -> tuple[Figure, list[Axes]]:
    """Make a figure with plots one below the other."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        num_rows, figsize=(10, 2 + 3 * num_rows), layout="constrained", squeeze=False
    )
    return figure, list(axes[:, 0])


def _draw_recipes(axes: Axes, recipe_of_name: dict[str, recipes.Recipe]) -> None:
    """Draw a line for each trajectory; recipes and groups with the same one share the line."""
    labels_of_curve: dict[tuple[int, tuple[float, ...]], list[str]] = {}
    for name, recipe in recipe_of_name.items():
        steps_per_epoch = _steps_per_epoch(name, recipe)
        trajectories = lr_trajectory(recipe, steps_per_epoch)
        for group, lrs in trajectories.items():
            label = name if len(trajectories) == 1 else f"{name}: {group}"
            if recipe.schedule.name == "ReduceLROnPlateau":
                label += " (if the metric never stalls)"
            labels_of_curve.setdefault((steps_per_epoch, tuple(lrs)), []).append(label)

    for (steps_per_epoch, curve), labels in labels_of_curve.items():
        epochs = [step / steps_per_epoch for step in range(len(curve))]
        axes.plot(epochs, curve, label="\n".join(labels), linewidth=1.5)

    # Curves that differ by more than a factor of 20 need a logarithmic axis to be seen.
    peaks = [max(curve) for _, curve in labels_of_curve]
    if min(peaks, default=0.0) > 0 and max(peaks) > 20 * min(peaks):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(peaks) / 1000)  # a cosine ends at zero


def _steps_per_epoch(name: str, recipe: recipes.Recipe) -> int:
    """Steps in an epoch of a recipe, as if there were 50,000 images if they cannot be counted.

    Raises:
        UserError: a batch is larger than the training set.
    """
    try:
        num_images = datasets.count_training_images(recipe.data)
    except UserError:  # the recipe's folder of images is on another machine, or not yet made
        num_images = _ASSUMED_IMAGES
        console.info(
            f"{name}: no images in {recipe.data.root}; drawn as if there were {num_images:,}"
        )

    if recipe.data.batch_size > num_images:
        raise UserError(
            f"{name}: data.batch_size: is {recipe.data.batch_size}, "
            f"but there are only {num_images} images"
        )
    return num_images // recipe.data.batch_size


def _draw_run(axes: Axes, name: str, scalars: Scalars) -> None:
    """Draw each group's learning rate as a solid line, its effective one as a dashed line."""
    for tag, points in scalars.items():
        if not tag.startswith(("lr/", "lr_effective/")):
            continue
        steps = [step for step, _ in points]
        lrs = [lr for _, lr in points]
        style = "-" if tag.startswith("lr/") else "--"
        label = f"{name}: {tag}" if name else tag
        axes.plot(steps, lrs, style, linewidth=1.2, label=label)


def _draw_probes(axes: Axes, probes: Scalars) -> None:
    """Draw a row for each probed element over the first steps: the lr of its group, or zero."""
    for row, points in enumerate(probes.values()):
        peak = max(lr for _, lr in points) or 1.0
        first_points = points[:_PROBED_STEPS]
        steps = [step for step, _ in first_points]
        heights = [row + 0.8 * lr / peak for _, lr in first_points]
        axes.step(steps, heights, where="mid", linewidth=1.2)

    axes.set_yticks(range(len(probes)), list(probes))
    axes.set(xlabel="step", title="lr of single elements: the group's, or zero")
    axes.grid(axis="x", alpha=0.3)


def _read_recorded_lrs(run_dir: Path) -> Scalars:
    """Read the scalars of a run.

    Raises:
        UserError: no learning rate is among them.
    """
    scalars = read_scalars(run_dir)
    if not any(tag.startswith("lr/") for tag in scalars):
        raise UserError(f"{run_dir}: no lr recorded in it")
    return scalars
