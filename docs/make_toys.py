"""Draw the pictures of docs/toys.md: python docs/make_toys.py [FOLDER]"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch import Tensor

import lrd
from lrd.cli.plots import COLOURS

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FIVE_RATES = (1.0, 0.5, 0.2, 0.125, 0.1)
TEN_RATES = tuple(torch.linspace(0.01, 0.2, 10, dtype=torch.float64).tolist())
MOMENTA = (0.98, 0.95, 0.9, 0.8)
ARMS = {
    "SGD": None,
    "LRD": "update",
    "gradient masked": "gradient",
    "momentum buffer masked": "momentum_buffer",
}
ARM_COLOURS = dict(zip(ARMS, ("black", *COLOURS[:3]), strict=True))

SADDLE_LR = 0.05
NUM_PATHS = 200
NOISE = 0.1  # standard deviation of each element of the noisy gradient
LEFT_BELOW = -0.25  # a path has left the saddle, at 0, when it is half way down to the minima


# Computations


def descend(lr: float, num_steps: int, start: float = 2.0) -> list[float]:
    """Gradient descent on y = 4 x^2. Returns x before the first step and after each."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=lr)

    positions = [start]
    for _ in range(num_steps):
        optimizer.zero_grad()
        (4 * x**2).backward()
        optimizer.step()
        positions.append(x.item())
    return positions


def step_sizes(
    gradients: Tensor,  # (num_steps,)
    momentum: float,
    masks: str | None = None,
    num_elements: int = 1,
) -> Tensor:  # (num_steps, num_elements)
    """Steps of SGD at lr 1 when every element sees the same given gradients.

    Args:
        gradients: the gradient in each step.
        momentum: SGD's momentum.
        masks: what LRDropout masks at keep_prob 0.5; None for plain SGD.
        num_elements: elements of the parameter; each draws its own masks.
    """
    theta = torch.zeros(num_elements, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=1.0, momentum=momentum)
    if masks is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # LRDropout warns that the buffer's mask is a fault
            lrd.LRDropout(optimizer, keep_prob=0.5, masks=masks)

    steps = []
    for gradient in gradients:
        before = theta.detach().clone()
        theta.grad = gradient.expand(num_elements).clone()
        optimizer.step()
        steps.append(before - theta.detach())
    return torch.stack(steps)


def turned_saddle(points: Tensor) -> Tensor:
    """2xy + (x - y)^4 / 8: the lines up and down run between the axes. (..., 2) -> (...)"""
    x, y = points.unbind(-1)
    return 2 * x * y + (x - y) ** 4 / 8


def straight_saddle(points: Tensor) -> Tensor:
    """x^2 - y^2 + y^4 / 2: the same surface with its lines along the axes. (..., 2) -> (...)"""
    x, y = points.unbind(-1)
    return x**2 - y**2 + y**4 / 2


def saddle_start(distance: float | Tensor, turned: bool) -> Tensor:  # (..., 2), float64
    """A point 1 up the slope towards the saddle, and this far beside the line that leads into it.

    For the straight saddle, this is (1, distance).
    """
    beside = torch.as_tensor(distance, dtype=torch.float64)
    uphill = torch.ones_like(beside)
    if not turned:
        return torch.stack([uphill, beside], dim=-1)
    return torch.stack([uphill + beside, uphill - beside], dim=-1) / 2**0.5


def follow(
    loss: Callable[[Tensor], Tensor],
    starts: Tensor,  # (num_paths, 2), float64
    num_steps: int,
    *,
    keep_prob: float | None = None,
    noise: float = 0.0,
) -> Tensor:  # (num_steps + 1, num_paths, 2)
    """Many independent paths of SGD without momentum: each element draws its own masks.

    Args:
        loss: gives the loss of each point; (num_paths, 2) -> (num_paths,).
        starts: where each path begins.
        num_steps: steps to take.
        keep_prob: of learning rate dropout; None for plain SGD.
        noise: standard deviation of normal noise that is added to the gradient.
    """
    points = starts.clone().requires_grad_()
    optimizer = torch.optim.SGD([points], lr=SADDLE_LR)
    if keep_prob is not None:
        lrd.LRDropout(optimizer, keep_prob=keep_prob, seed=0)
    generator = torch.Generator().manual_seed(0)

    path = [starts]
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss(points).sum().backward()
        if noise:
            points.grad += noise * torch.randn(
                points.shape, generator=generator, dtype=torch.float64
            )
        optimizer.step()
        path.append(points.detach().clone())
    return torch.stack(path)


def steps_to_leave(losses: Tensor) -> Tensor:  # (num_steps + 1, ...) -> (...), float64
    """The first step whose loss is below LEFT_BELOW; inf where there is none."""
    has_left = losses < LEFT_BELOW
    first = has_left.to(torch.int8).argmax(dim=0).to(torch.float64)
    return first.masked_fill(~has_left.any(dim=0), float("inf"))


# Pictures


def draw_learning_rates() -> Figure:
    """Gradient descent on y = 4 x^2: what the learning rate decides."""
    figure, (factors, five, ten) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")

    limits = (0.0, 0.125, 0.25, 0.3)
    words = ("from one side", "oscillates", "diverges")
    shades = ("#e2f3ea", "#fdf3d8", "#fbe0d6")
    for left, right, word, shade in zip(limits, limits[1:], words, shades, strict=False):
        factors.axvspan(left, right, color=shade, zorder=0)
        factors.text((left + right) / 2, 1.47, word, ha="center", fontsize=9)
    factors.plot([0, 0.125, 0.3], [1, 0, 1.4], color="black")
    factors.axhline(1, color="grey", linewidth=0.8)
    for i, lr in enumerate(FIVE_RATES):
        if lr < 0.3:
            factors.plot(lr, abs(1 - 8 * lr), "o", color=COLOURS[i], markersize=8)
    factors.set(
        xlabel="learning rate",
        title="x is multiplied by 1 - 8 lr in each step",
        ylabel="|1 - 8 lr|",
        xlim=(0, 0.3),
        ylim=(0, 1.6),
    )

    for i, lr in enumerate(FIVE_RATES):
        positions = descend(lr, 8)
        five.plot(positions, "o-", color=COLOURS[i], label=f"lr {lr:g}", markersize=4)
    five.set_yscale("symlog", linthresh=1)
    five.set_ylim(-3e7, 3e7)
    five.set(xlabel="step", ylabel="x (logarithmic beyond ±1)", title="five rates from x = 2")
    five.legend(loc="lower left", fontsize="small")
    five.grid(alpha=0.3)

    shades_of_rates = plt.get_cmap("viridis")(torch.linspace(0, 0.92, len(TEN_RATES)).numpy())
    for lr, colour in zip(TEN_RATES, shades_of_rates, strict=True):
        losses = [4 * x**2 for x in descend(lr, 20)]
        is_oscillating = lr > 0.125
        ten.plot(losses, color=colour, linestyle="--" if is_oscillating else "-", label=f"{lr:.3f}")
    ten.set_yscale("log")
    ten.set_ylim(1e-13, 100)
    ten.set(xlabel="step", ylabel="y = 4 x²", title="ten rates; dashed: x changes its sign")
    ten.legend(title="lr", loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    ten.grid(alpha=0.3)
    return figure


def draw_momentum() -> Figure:
    """How momentum weights past gradients, and how long it takes to gather speed."""
    figure, (weights, speed) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")

    num_steps = 150
    gradient_once = torch.zeros(num_steps, dtype=torch.float64)
    gradient_once[0] = 1
    gradient_always = torch.ones(num_steps, dtype=torch.float64)

    for momentum, colour in zip(MOMENTA, COLOURS, strict=False):
        window = 1 / (1 - momentum)
        sizes = step_sizes(gradient_once, momentum)[:, 0]
        weights.plot(sizes, color=colour, label=f"momentum {momentum:g}")
        weights.plot(window, momentum**window, "o", color=colour)

        sizes = step_sizes(gradient_always, momentum)[:, 0]
        speed.plot(torch.arange(1, num_steps + 1), sizes, color=colour)
        speed.axhline(window, color=colour, linewidth=0.8, linestyle=":")

    weights.set(
        xlabel="age of the gradient in steps",
        ylabel="its weight in the step",
        title="weights; the dot is at the age 1 / (1 - momentum)",
        xlim=(0, 100),
        ylim=(0, 1),
    )
    weights.legend()
    speed.set(
        xlabel="step",
        ylabel="size of the step",
        title="gradient always 1, lr 1; dotted: 1 / (1 - momentum)",
        xlim=(0, num_steps),
        ylim=(0, 53),
    )
    for axes in (weights, speed):
        axes.grid(alpha=0.3)
    return figure


def draw_saddle() -> Figure:
    """Where learning rate dropout leaves a saddle point sooner than SGD, and where later."""
    figure, (turned, straight, leaving) = plt.subplots(
        1, 3, figsize=(15, 5), layout="constrained", width_ratios=(1, 1, 1.15)
    )

    _draw_paths(turned, turned_saddle, saddle_start(0.0, turned=True), num_steps=120)
    turned.set_title("turned: 2xy + (x - y)⁴ / 8, start on the line")
    _draw_paths(straight, straight_saddle, saddle_start(0.01, turned=False), num_steps=200)
    straight.set_title("straight: x² - y² + y⁴ / 2, start 0.01 beside it")
    turned.legend(loc="upper left", fontsize="small", framealpha=0.9)

    distances = torch.logspace(-6, -0.5, 23, dtype=torch.float64)
    sgd = _leaving_steps(turned_saddle, distances, turned=True)
    noisy = _leaving_steps(turned_saddle, distances, turned=True, noise=NOISE)
    lrd_turned = _leaving_steps(turned_saddle, distances, turned=True, keep_prob=0.5)
    lrd_straight = _leaving_steps(straight_saddle, distances, turned=False, keep_prob=0.5)

    arms = (
        ("SGD, turned or straight", sgd, "black", "-"),
        ("LRD, turned", lrd_turned, COLOURS[0], "-"),
        ("LRD, straight", lrd_straight, COLOURS[1], "-"),
        ("SGD, noisy gradient, turned", noisy, COLOURS[2], "--"),
    )
    for label, steps, colour, line in arms:
        low, middle, high = steps.quantile(torch.tensor([0.1, 0.5, 0.9]).double(), dim=1)
        leaving.plot(distances, middle, color=colour, linestyle=line, label=label)
        leaving.fill_between(distances, low, high, color=colour, alpha=0.15, linewidth=0)
    leaving.set_xscale("log")
    leaving.set(
        xlabel="distance of the start from the line into the saddle",
        ylabel="steps until half way down",
        title=f"median and 10 to 90 % of {NUM_PATHS} paths",
        ylim=(0, None),
    )
    leaving.legend(fontsize="small")
    leaving.grid(alpha=0.3)
    return figure


def _draw_paths(
    axes: Axes,
    loss: Callable[[Tensor], Tensor],
    start: Tensor,  # (2,)
    num_steps: int,
) -> None:
    """Contours, thirty paths with learning rate dropout, and the path of SGD."""
    reach = torch.linspace(-1.35, 1.35, 200, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(reach, reach, indexing="xy"), dim=-1)  # (200, 200, 2)
    levels = torch.linspace(-0.5, 2, 26).tolist()
    axes.contour(reach, reach, loss(grid), levels=levels, colors="#c3cad1", linewidths=0.7)

    paths = follow(loss, start.repeat(30, 1), num_steps, keep_prob=0.5)
    for i in range(paths.shape[1]):
        label = "LRD: 30 paths" if i == 0 else None
        x, y = paths[:, i].unbind(-1)
        axes.plot(x, y, color=COLOURS[0], linewidth=0.8, alpha=0.5, label=label)

    x, y = follow(loss, start[None], num_steps)[:, 0].unbind(-1)
    axes.plot(x, y, "o-", color="black", markersize=3, linewidth=1.2, label="SGD, a dot each step")
    axes.plot(*start, "s", color=COLOURS[1], markersize=8, label="start", zorder=4)
    axes.plot(0, 0, "x", color=COLOURS[1], markersize=9, markeredgewidth=2.5, label="saddle point")
    axes.set(xlabel="x", ylabel="y", aspect="equal")


def _leaving_steps(
    loss: Callable[[Tensor], Tensor],
    distances: Tensor,  # (n,)
    turned: bool,
    *,
    keep_prob: float | None = None,
    noise: float = 0.0,
) -> Tensor:  # (n, NUM_PATHS)
    """Steps to leave of many paths from each distance."""
    starts = saddle_start(distances.repeat_interleave(NUM_PATHS), turned)
    path = follow(loss, starts, num_steps=600, keep_prob=keep_prob, noise=noise)
    return steps_to_leave(loss(path)).view(len(distances), NUM_PATHS)


def draw_mean_steps() -> Figure:
    """Mean and spread of the steps of learning rate dropout and its controls."""
    figure, axes = plt.subplot_mosaic(
        [["mean", "LRD"], ["mean", "gradient masked"], ["mean", "momentum buffer masked"]],
        figsize=(12, 5),
        layout="constrained",
        width_ratios=(1.3, 1),
    )
    mean = axes["mean"]

    expected = {
        "SGD": 1 / (1 - 0.9),
        "LRD": 0.5 / (1 - 0.9),
        "gradient masked": 0.5 / (1 - 0.9),
        "momentum buffer masked": 0.5 / (1 - 0.5 * 0.9),
    }
    gradients = torch.ones(60, dtype=torch.float64)
    for name, masks in ARMS.items():
        steps = step_sizes(gradients, 0.9, masks, num_elements=10_000)
        line = (0, (4, 3)) if name == "gradient masked" else "-"
        colour = ARM_COLOURS[name]
        times = torch.arange(1, len(steps) + 1)
        mean.plot(times, steps.mean(dim=1), color=colour, linestyle=line, label=name)
        mean.axhline(expected[name], color=colour, linewidth=0.8, linestyle=":")

        if name != "SGD":
            panel = axes[name]
            bins = torch.arange(-0.125, 10.5, 0.25).tolist()
            share = torch.full_like(steps[-1], 1 / steps.shape[1])
            panel.hist(steps[-1], bins=bins, weights=share, color=colour)
            panel.axvline(steps[-1].mean(), color="black", linewidth=1, linestyle="--")
            panel.set(ylabel="share", title=name, xlim=(-0.3, 10.5))
            panel.title.set_fontsize("medium")

    mean.set(
        xlabel="step",
        ylabel="mean step of 10,000 elements",
        title="gradient always 1, lr 1, momentum 0.9; dotted: the formula",
        ylim=(0, 10.5),
    )
    mean.legend(loc="upper right", bbox_to_anchor=(1, 0.82))
    mean.grid(alpha=0.3)
    axes["momentum buffer masked"].set_xlabel("what the elements do in step 60; dashed: mean")
    return figure


PICTURES = {
    "learning_rates.png": draw_learning_rates,
    "momentum.png": draw_momentum,
    "saddle.png": draw_saddle,
    "mean_steps.png": draw_mean_steps,
}


def main(folder: Path) -> None:
    """Draw all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)

        # 256 colours are enough, and a third of the size.
        with Image.open(folder / name) as image:
            reduced = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        reduced.save(folder / name, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("toys"))
