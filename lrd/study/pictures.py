"""The curves of a study: mean and spread over the seeds of each arm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrd.errors import UserError
from lrd.study.grid import Study
from lrd.study.published import Published
from lrd.study.results import ArmResult, Curve, RunResult, mean_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1, 1.5)))
_PUBLISHED_STYLE: dict[str, Any] = {"color": "grey", "linewidth": 1, "zorder": 1}
_WIDTH = 13.0  # inches
_LETTERS_PER_INCH = 11  # of the legend's font
_LETTERS_OF_HANDLE = 8  # as wide as the line beside a label, and the space between labels

_PANELS: tuple[tuple[str, Callable[[RunResult | Published], Curve]], ...] = (
    ("test accuracy", lambda result: result.test_accuracy),
    ("training accuracy", lambda result: result.train_accuracy),
)


def draw_curves(study: Study, arms: list[ArmResult], path: Path) -> None:
    """Draw test and training accuracy over the epochs into a file.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plot_arms(study, arms)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, dpi=150, format="png")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        plt.close(figure)


def plot_arms(study: Study, arms: list[ArmResult]) -> Figure:
    """A panel each for test and training accuracy, side by side."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    height = 4.6 + 0.16 * len(arms)
    figure, axes = plt.subplots(1, 2, figsize=(_WIDTH, height), layout="constrained")
    figure.suptitle(study.file.title)
    styles = _choose_styles(study)

    has_spread = any(len(arm.finished) > 1 for arm in arms)
    for panel, (title, curve_of) in zip(axes, _PANELS, strict=True):
        means = [_draw_arm(panel, arm, curve_of, styles[arm.name]) for arm in arms]
        for published in study.published:
            curve = curve_of(published)
            label = f"{published.name} (published)"
            panel.plot(list(curve), list(curve.values()), label=label, **_PUBLISHED_STYLE)
            means.append(list(curve.values()))

        panel.set(title=f"{title}, mean ± sd" if has_spread else title, xlabel="epoch")
        panel.grid(alpha=0.3)
        panel.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _zoom(panel, means)

    handles, labels = axes[0].get_legend_handles_labels()
    columns = int(_WIDTH * _LETTERS_PER_INCH / (max(map(len, labels)) + _LETTERS_OF_HANDLE))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=max(1, min(4, columns, len(labels))),
        handlelength=3,
    )
    return figure


def _choose_styles(study: Study) -> dict[str, dict[str, Any]]:
    """Colour and line of each arm: the baseline is black.

    An arm with a baseline of its own has that arm's colour, and another line.
    """
    import matplotlib

    colours = matplotlib.color_sequences["petroff10"]
    styles: dict[str, dict[str, Any]] = {}
    number = 0
    for name, arm in study.file.arms.items():
        if name == study.file.baseline:
            styles[name] = {"color": "black", "linestyle": "-", "zorder": 3}
        elif arm.baseline in styles:
            colour = styles[arm.baseline]["color"]
            num_lines = sum(style["color"] == colour for style in styles.values())
            line = _LINES[num_lines % len(_LINES)]
            styles[name] = {"color": colour, "linestyle": line, "zorder": 2}
        else:
            line = _LINES[number // len(colours) % len(_LINES)]
            styles[name] = {
                "color": colours[number % len(colours)],
                "linestyle": line,
                "zorder": 2,
            }
            number += 1
    return styles


def _draw_arm(
    axes: Axes,
    arm: ArmResult,
    curve_of: Callable[[RunResult | Published], Curve],
    style: dict[str, Any],
) -> list[float]:
    """Draw the mean over the seeds that are finished; runs that diverged end in a cross.

    Returns:
        The means.
    """
    curves = [curve_of(result) for result in arm.finished]
    epochs, means, spreads = mean_curve(curves)

    label = f"{arm.name} (n = {len(curves)})"
    if arm.diverged:
        label += f", {len(arm.diverged)} diverged"
    marker = "o" if len(epochs) < 20 else None
    axes.plot(epochs, means, label=label, linewidth=1.5, marker=marker, markersize=3, **style)
    if len(curves) > 1:
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)

    for result in arm.diverged:
        curve = curve_of(result)
        ends = sorted(curve)
        values = [curve[epoch] for epoch in ends]
        axes.plot(ends, values, color=style["color"], linestyle=":", linewidth=1)
        axes.plot(ends[-1:], values[-1:], color=style["color"], marker="x", linestyle="none")
    return means


def _zoom(axes: Axes, curves: list[list[float]]) -> None:
    """Leave out what the first quarter of the epochs alone has, so that differences are seen.

    Args:
        axes: the panel.
        curves: the means over the epochs of each arm.
    """
    lowest = [min(curve[len(curve) // 4 :]) for curve in curves if curve]
    if not lowest:
        return
    highest = max(max(curve) for curve in curves if curve)
    margin = 0.05 * (highest - min(lowest))
    if margin > 0.0:
        axes.set_ylim(bottom=min(lowest) - margin)
