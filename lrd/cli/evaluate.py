"""`lrd eval`: accuracy, loss, a table of classes and a picture of what is mistaken for what."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from lrd import console
from lrd.cli.plots import write_picture
from lrd.errors import UserError
from lrd.inference.evaluation import Evaluation, as_json, evaluate_path
from lrd.inference.loading import LoadedModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg", ".pdf")
_INCHES_PER_CLASS = 0.17
_MIN_INCHES = 5.0
_MAX_INCHES = 40.0
_MAX_CLASSES_WITH_NUMBERS = 20  # in the cells of the picture
_MAX_NAMED_CLASSES = 220  # of a larger matrix not every row has its name


def evaluate(
    path: Path,
    overrides: list[str],
    data: Path | None,
    part: str,
    best: bool,
    ema: bool,
    out: Path | None,
    as_json_text: bool,
) -> None:
    """Evaluate the weights in a run or file, and print what was found.

    Args:
        path: what `lrd.load_model` takes.
        overrides: keys of the recipe to change.
        data: a folder of images in place of the recipe's data.
        part: `test` or `validation`.
        best, ema: see `lrd.load_model`.
        out: the picture of the confusion matrix to write (.png, .svg, .pdf); None: none.
        as_json_text: print JSON in place of the table; messages then go to standard error.

    Raises:
        UserError: the weights or images cannot be used, or `out` cannot be written.
    """
    if out is not None and out.suffix.lower() not in _FORMATS:
        raise UserError(f"{out}: cannot be written: the name must end in {', '.join(_FORMATS)}")

    with console.messages_on_stderr() if as_json_text else nullcontext():
        with _Meter() as meter:
            model, evaluation = evaluate_path(
                path,
                data=data,
                part=part,
                best=best,
                ema=ema,
                overrides=overrides,
                on_batch=meter.update,
            )
        if out is not None:
            write_picture(lambda: plot_confusion(evaluation), out)

    if as_json_text:
        console.info(json.dumps(as_json(model, evaluation), indent=1))
        return

    _print_classes(evaluation)
    _print_result(model, evaluation)
    if out is not None:
        console.info(f"{out}: confusion matrix of {len(evaluation.classes)} classes")


class _Meter:
    """A progress bar that begins with the first batch, when the number of images is known."""

    def __init__(self) -> None:
        self._meter: console.ProgressMeter | None = None

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._meter is not None:
            self._meter.__exit__(*exception)

    def update(self, done: int, total: int) -> None:
        if self._meter is None:
            self._meter = console.ProgressMeter("evaluating", total)
            self._meter.__enter__()
        self._meter.update(done)


def _print_classes(evaluation: Evaluation) -> None:
    rows = []
    for label, name in enumerate(evaluation.classes):
        count = int(evaluation.confusion[label].sum())
        if count == 0:
            rows.append([name, "0", "", ""])
            continue

        accuracy = int(evaluation.confusion[label, label]) / count
        confused = evaluation.most_confused_with(label)
        mistake = "" if confused is None else f"{confused[0]} ({confused[1]})"
        rows.append([name, str(count), f"{accuracy:.4f}", mistake])

    columns = ["class", "images", "accuracy", "most confused with"]
    console.listing(columns, rows, leave_out=["images"], wrap="most confused with")


def _print_result(model: LoadedModel, evaluation: Evaluation) -> None:
    console.info(
        f"accuracy {evaluation.accuracy:.4f} ({evaluation.num_correct} of "
        f"{evaluation.num_images}), loss {evaluation.loss:.4f}: {evaluation.images}"
    )
    training = model.config.lrd
    kind = "averaged weights" if training.weights == "ema" else "weights"
    console.info(f"{model.path}: {kind} of {training.arch} after step {training.step}")

    if not evaluation.recorded:
        return
    recorded = evaluation.recorded["accuracy"]
    if recorded == evaluation.accuracy:
        console.info(f"the training run recorded the same accuracy, {recorded:.4f}")
        return
    difference = evaluation.num_correct - round(recorded * evaluation.num_images)
    console.info(
        f"the training run recorded another accuracy, {recorded:.4f} ({difference:+d} images): "
        "the images, the precision or the processor are not the same"
    )


def plot_confusion(evaluation: Evaluation) -> Figure:
    """Draw the confusion matrix: a row for each true class, its images by predicted class."""
    from matplotlib import pyplot as plt
    from matplotlib.colors import PowerNorm

    confusion = evaluation.confusion.numpy()  # int64 (classes, classes)
    num_classes = len(confusion)
    totals = confusion.sum(axis=1, keepdims=True).clip(min=1)  # images of each class
    fractions = confusion / totals  # float64 (classes, classes)

    inches = min(_MAX_INCHES, max(_MIN_INCHES, _INCHES_PER_CLASS * num_classes)) + 2.0
    figure, axes = plt.subplots(figsize=(inches, inches - 0.8), layout="constrained")
    # The square root: a few mistakes among hundreds of images would be white otherwise.
    image = axes.imshow(fractions, cmap="Blues", norm=PowerNorm(0.5, vmin=0.0, vmax=1.0))
    colorbar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    colorbar.ax.set_yticklabels(["0", "1 %", "5 %", "20 %", "50 %", "100 %"])
    colorbar.set_label("part of the images of the true class")

    _name_classes(axes, evaluation.classes)
    axes.set(
        xlabel="predicted",
        ylabel="true",
        title=f"accuracy {evaluation.accuracy:.4f}, {evaluation.num_images:,} images",
    )

    if num_classes <= _MAX_CLASSES_WITH_NUMBERS:
        for row, column in zip(*confusion.nonzero(), strict=True):
            color = "white" if fractions[row, column] > 0.35 else "black"
            text = f"{confusion[row, column]:,}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize="small")
    return figure


def _name_classes(axes: Axes, classes: tuple[str, ...]) -> None:
    """Write the names of the classes beside rows and columns, as many as there is room for."""
    num_classes = len(classes)
    every = -(-num_classes // _MAX_NAMED_CLASSES)
    labels = range(0, num_classes, every)
    names = [_shorten(classes[label]) for label in labels]

    size = "medium" if num_classes <= _MAX_CLASSES_WITH_NUMBERS else 7
    rotation = 0 if all(len(name) <= 3 for name in names) and num_classes <= 40 else 90
    axes.set_xticks(labels, names, fontsize=size, rotation=rotation)
    axes.set_yticks(labels, names, fontsize=size)

    # Thin lines lead the eye from a cell to its names.
    axes.set_xticks([label + 0.5 for label in labels], minor=True)
    axes.set_yticks([label + 0.5 for label in labels], minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.4)
    axes.tick_params(which="minor", length=0)


def _shorten(name: str, length: int = 24) -> str:
    # A dollar sign would begin a formula.
    name = name if len(name) <= length else f"{name[: length - 1]}…"
    return name.replace("$", r"\$")
