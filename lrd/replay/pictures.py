"""Pictures of what a replay shows: lrs of elements, masks over steps, images of a step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lrd.replay.coverage import Coverage
from lrd.replay.probe import ProbeResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KEPT = "#0072B2"
_EXPECTED = "#D55E00"
_MAX_TRACES = 16  # elements in one picture
_IMAGES_IN_A_ROW = 16
_MAX_ROWS_OF_IMAGES = 40


def plot_probes(result: ProbeResult) -> Figure:
    """The lr of each element over the steps, a strip for each, with that of its group behind it."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    shown = result.probed[:_MAX_TRACES]
    height = 1.2 + 0.75 * len(shown)
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(11, height), sharex=True, squeeze=False, layout="constrained"
    )
    steps = np.arange(1, result.trajectories.num_steps + 1)
    for panel, probed in zip(axes[:, 0], shown, strict=True):
        group = result.trajectories.parameters[probed.name].group
        panel.step(
            steps,
            result.trajectories.lrs[group],
            where="mid",
            color="#999999",
            linewidth=1,
            label="lr of the group",
        )
        panel.bar(steps, probed.lrs, width=1.0, color=_KEPT, label="lr of the element")
        panel.set_ylabel("lr")
        panel.set_ylim(bottom=0)
        panel.set_title(
            f"{probed.label}: moved in {probed.num_moved} of {len(steps)} steps, "
            f"longest wait {probed.longest_wait}",
            loc="left",
            fontsize=9,
        )
    axes[-1, 0].set_xlabel("step")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8)
    left_out = len(result.probed) - len(shown)
    if left_out:
        figure.supxlabel(f"{left_out} more elements are not shown", fontsize=8)
    return figure


def plot_coverage(coverages: list[Coverage]) -> Figure:
    """A row for each parameter: its mask over steps, its waits, and how often elements moved."""
    from matplotlib import pyplot as plt

    shown = coverages[:6]
    figure, axes = plt.subplots(
        len(shown),
        3,
        figsize=(15, 0.6 + 3.4 * len(shown)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"width_ratios": [2.2, 1, 1]},
    )
    for row, coverage in zip(axes, shown, strict=True):
        _draw_mask(row[0], coverage)
        _draw_waits(row[1], coverage)
        _draw_moves(row[2], coverage)
    left_out = len(coverages) - len(shown)
    if left_out:
        figure.supxlabel(f"{left_out} more parameters are not shown", fontsize=8)
    return figure


def _draw_mask(axes: Axes, coverage: Coverage) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    num_rows, num_steps = coverage.rows.shape
    first = coverage.first_shown
    axes.imshow(
        coverage.rows,
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(["#f2f2f2", _KEPT]),
        vmin=0,
        vmax=1,
        extent=(first - 0.5, first + num_steps - 0.5, num_rows - 0.5, -0.5),
    )
    axes.set_title(
        f"{coverage.name} {list(coverage.shape)}: blue where an element moved", fontsize=9
    )
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"its first {num_rows} elements")


def _draw_waits(axes: Axes, coverage: Coverage) -> None:
    lengths = np.arange(len(coverage.waits))
    axes.bar(lengths, np.maximum(coverage.waits, 0), color=_KEPT, label="counted")
    expected = coverage.expected_waits()
    if expected is not None:
        axes.plot(
            lengths,
            expected,
            color=_EXPECTED,
            marker="o",
            markersize=3,
            linewidth=1,
            label="geometric distribution",
        )
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_title(f"waits, the longest {int(coverage.longest.max())} steps", fontsize=9)
    axes.set_xlabel("steps between two moves")
    axes.set_ylabel("how many waits")
    axes.legend(fontsize=8)


def _draw_moves(axes: Axes, coverage: Coverage) -> None:
    low, high = int(coverage.moves.min()), int(coverage.moves.max())
    width = max(1, math.ceil((high - low + 1) / 40))
    edges = np.arange(low, high + width + 1, width) - 0.5
    axes.hist(coverage.moves, bins=edges.tolist(), color=_KEPT, label="elements")

    keep_prob = "changed"
    if coverage.keep_prob is not None:
        keep_prob = f"{coverage.keep_prob:g}"
        counts = np.arange(low, high + 1)
        chance = _binomial(counts, coverage.num_steps, coverage.keep_prob)
        expected = len(coverage.moves) * width * chance
        axes.plot(counts, expected, color=_EXPECTED, linewidth=1.2, label="binomial distribution")
    axes.set_title(f"moves in {coverage.num_steps:,} steps, keep_prob {keep_prob}", fontsize=9)
    axes.set_xlabel("steps in which an element moved")
    axes.set_ylabel("elements")
    axes.margins(y=0.3)  # room for the legend
    axes.legend(fontsize=8)


def _binomial(counts: NDArray[np.int64], num_steps: int, prob: float) -> NDArray[np.float64]:
    """The probability of each number of moves, float64 (counts,)."""
    if prob >= 1.0:
        return np.array(counts == num_steps, np.float64)
    logs = [
        math.lgamma(num_steps + 1)
        - math.lgamma(k + 1)
        - math.lgamma(num_steps - k + 1)
        + k * math.log(prob)
        + (num_steps - k) * math.log1p(-prob)
        for k in counts.tolist()
    ]
    chances: NDArray[np.float64] = np.exp(np.array(logs))
    return chances


def plot_samples(path: Path) -> Figure:
    """The images that each rank saw at each step, with their labels and numbers.

    Args:
        path: the file that `lrd.replay.computing.samples` wrote.
    """
    import torch
    from matplotlib import pyplot as plt

    saved = torch.load(path, weights_only=True)
    classes: list[str] = saved["classes"]
    strips = []  # (title, images, captions)
    for row in saved["rows"]:
        pixels = row["pixels"].permute(0, 2, 3, 1).numpy()  # uint8 (images, H, W, 3)
        captions = [
            f"{classes[label] if label < len(classes) else label}\n#{index}"
            for index, label in zip(row["indices"], row["labels"], strict=True)
        ]
        num_all = len(row["indices"])
        for first in range(0, len(pixels), _IMAGES_IN_A_ROW):
            part = slice(first, first + _IMAGES_IN_A_ROW)
            title = f"step {row['step']}\nrank {row['rank']}" if first == 0 else ""
            if first == 0 and num_all > len(pixels):
                title += f"\n{len(pixels)} of {num_all}"
            strips.append((title, pixels[part], captions[part]))

    strips = strips[:_MAX_ROWS_OF_IMAGES]
    figure, axes = plt.subplots(
        len(strips),
        _IMAGES_IN_A_ROW,
        figsize=(1.05 * _IMAGES_IN_A_ROW + 1, 1.35 * len(strips) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for row_axes, (title, images, captions) in zip(axes, strips, strict=True):
        for number, panel in enumerate(row_axes):
            panel.axis("off")
            if number < len(images):
                panel.imshow(images[number], interpolation="nearest")
                panel.set_title(captions[number], fontsize=7, pad=2)
        row_axes[0].text(
            -0.25,
            0.5,
            title,
            transform=row_axes[0].transAxes,
            ha="right",
            va="center",
            fontsize=8,
        )
    return figure
