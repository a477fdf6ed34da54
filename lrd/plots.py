"""lr trajectories as a picture: of recipes, without training; of runs, as TensorBoard recorded them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrd import console, data
from lrd import recipe as recipes
from lrd.errors import UserError
from lrd.schedules import trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PROBED_STEPS = 60
_ASSUMED_IMAGES = 50_000


def draw_trajectories(sources: list[Path], out: Path) -> None:
    """Plot the lr of recipes over epochs, or of run directories over steps.

    Raises:
        UserError: a source is neither, the two kinds are mixed, or the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = [source for source in sources if source.is_dir()]
    if runs and len(runs) < len(sources):
        raise UserError("lr: recipes and run directories do not go into one picture")
    recorded = {run: _recorded(run) for run in runs}
    planned = {source: recipes.load(source) for source in sources if source not in recorded}
    only = recorded[runs[0]] if len(runs) == 1 else {}
    probes = {tag.removeprefix("probes/"): points for tag, points in only.items() if tag.startswith("probes/")}
    rows = 2 if probes else 1
    figure, axes = plt.subplots(rows, figsize=(10, 2 + 3 * rows), layout="constrained", squeeze=False)
    top: Axes = axes[0, 0]
    for run, scalars in recorded.items():
        _draw_run(top, run.name if len(runs) > 1 else "", scalars)
    _draw_recipes(top, {source.stem: recipe for source, recipe in planned.items()})
    top.set(xlabel="step" if runs else "epoch", ylabel="learning rate", title=str(runs[0]) if len(runs) == 1 else "")
    top.grid(alpha=0.3)
    if runs:
        top.legend(fontsize="small")
    else:
        top.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if probes:
        _draw_probes(axes[1, 0], probes)
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    finally:
        plt.close(figure)
    console.say(f"{out}: lr of {len(sources)} {'run' if runs else 'recipe'}{'s' if len(sources) > 1 else ''}")


def _draw_recipes(axes: Axes, planned: dict[str, recipes.Recipe]) -> None:
    """A line for each trajectory; recipes and groups that share one share the line."""
    curves: dict[tuple[int, tuple[float, ...]], list[str]] = {}
    for name, recipe in planned.items():
        steps_per_epoch = _steps_per_epoch(name, recipe)
        lines = trajectory(recipe, steps_per_epoch)
        for group, lrs in lines.items():
            label = name if len(lines) == 1 else f"{name}: {group}"
            label += " (if the metric never stalls)" if recipe.schedule.name == "ReduceLROnPlateau" else ""
            curves.setdefault((steps_per_epoch, tuple(lrs)), []).append(label)
    for (steps_per_epoch, curve), labels in curves.items():
        axes.plot([step / steps_per_epoch for step in range(len(curve))], curve, label="\n".join(labels), linewidth=1.5)
    highest = [max(curve) for _, curve in curves]
    if min(highest, default=0.0) > 0 and max(highest) > 20 * min(highest):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(highest) / 1000)  # a cosine ends at zero


def _steps_per_epoch(name: str, recipe: recipes.Recipe) -> int:
    try:
        images = data.count_training_images(recipe.data)
    except UserError:  # the recipe's folder of images is elsewhere, or not yet there
        images = _ASSUMED_IMAGES
        console.say(f"{name}: no images in {recipe.data.root}; drawn as if there were {images:,}")
    if recipe.data.batch_size > images:
        raise UserError(f"{name}: data.batch_size: is {recipe.data.batch_size}, but there are only {images} images")
    return images // recipe.data.batch_size


def _draw_run(axes: Axes, name: str, scalars: dict[str, Any]) -> None:
    for tag, points in scalars.items():
        if tag.startswith(("lr/", "lr_effective/")):
            style = "-" if tag.startswith("lr/") else "--"
            axes.plot(*points, style, linewidth=1.2, label=f"{name}: {tag}" if name else tag)


def _draw_probes(axes: Axes, probes: dict[str, Any]) -> None:
    """Single elements, each on a line of its own, over the first steps: the lr it had, or zero."""
    for row, (steps, lrs) in enumerate(probes.values()):
        top = max(lrs) or 1.0
        heights = [row + 0.8 * lr / top for lr in lrs[:_PROBED_STEPS]]
        axes.step(steps[:_PROBED_STEPS], heights, where="mid", linewidth=1.2)
    axes.set_yticks(range(len(probes)), list(probes))
    axes.set(xlabel="step", title="lr of single elements: the group's, or zero")
    axes.grid(axis="x", alpha=0.3)


def _recorded(run_dir: Path) -> dict[str, tuple[list[int], list[float]]]:
    """tag -> (steps, values) of a run's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags: Iterable[str] = events.Tags()["scalars"]
    scalars = {tag: events.Scalars(tag) for tag in tags}
    if not any(tag.startswith("lr/") for tag in scalars):
        raise UserError(f"{run_dir}: no lr recorded in it")
    return {tag: ([p.step for p in points], [p.value for p in points]) for tag, points in scalars.items()}
