"""docs/toys.md: its outputs are those of its code, and follow from formulas of their own."""

import contextlib
import io
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.testing.compare import compare_images

import lrd
from docs import make_toys

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "toys.md").read_text(encoding="utf-8")
CELL = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OUTPUTS = [output for _, output in CELL.findall(PAGE)]


@pytest.mark.parametrize(
    ("code", "output"),
    CELL.findall(PAGE),
    ids=["learning rates", "momentum", "saddle", "mean steps"],
)
def test_the_outputs_on_the_page_are_those_of_its_code(code, output):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a masked momentum buffer warns
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    assert printed.getvalue() == output


def test_gradient_descent_multiplies_x_by_one_minus_eight_lr():
    for lr in (*make_toys.FIVE_RATES, *make_toys.TEN_RATES, 0.25):
        expected = [2.0 * (1 - 8 * lr) ** step for step in range(9)]
        np.testing.assert_allclose(make_toys.descend(lr, 8), expected, rtol=1e-9, atol=1e-12)

    stated = re.findall(r"lr (\S+): after 4 steps x = (\S+)", OUTPUTS[0])
    assert [float(lr) for lr, _ in stated] == list(make_toys.FIVE_RATES)
    for lr, x in stated:
        assert float(x) == pytest.approx(2 * (1 - 8 * float(lr)) ** 4, rel=1e-4)

    factors = [abs(1 - 8 * lr) for lr in make_toys.TEN_RATES]
    assert max(factors) < 1
    assert f"{make_toys.TEN_RATES[int(np.argmin(factors))]:.3f}" == "0.116"


def test_momentum_weights_are_its_powers():
    once = torch.zeros(200, dtype=torch.float64)
    once[0] = 1

    lines = OUTPUTS[1].splitlines()
    for momentum, line in zip(make_toys.MOMENTA, lines, strict=True):
        powers = momentum ** np.arange(200)
        weights = make_toys.step_sizes(once, momentum)[:, 0]
        np.testing.assert_allclose(weights, powers, rtol=0, atol=1e-12)
        steps = make_toys.step_sizes(torch.ones_like(once), momentum)[:, 0]
        np.testing.assert_allclose(steps, np.cumsum(powers), rtol=1e-12)

        window = round(1 / (1 - momentum))
        assert line == (
            f"momentum {momentum}: weights sum to {1 / (1 - momentum):.1f}, at age {window} the "
            f"weight is {momentum**window:.2f}, younger gradients have {1 - momentum**window:.0%}"
        )


def sgd_steps(distance: float, lr: float = 0.05) -> float:
    """Steps of SGD until half way down: along and beside the line, the coordinates are apart."""
    along, beside = 1.0, distance
    for step in range(1000):
        if along**2 - beside**2 + beside**4 / 2 < -0.25:
            return step
        along -= lr * 2 * along
        beside -= lr * (-2 * beside + 2 * beside**3)
    return math.inf


def measured_steps(turned: bool, distance: float, **kwargs: float) -> float:
    loss = make_toys.turned_saddle if turned else make_toys.straight_saddle
    starts = make_toys.saddle_start(distance, turned).repeat(make_toys.NUM_PATHS, 1)
    path = make_toys.follow(loss, starts, 300, **kwargs)
    return make_toys.steps_to_leave(loss(path)).median().item()


def test_both_saddles_are_one_surface():
    along, beside = torch.linspace(-1.5, 1.5, 40, dtype=torch.float64).reshape(2, 20)
    straight = make_toys.straight_saddle(torch.stack([along, beside], dim=-1))
    turned_points = torch.stack([along + beside, along - beside], dim=-1) / 2**0.5
    torch.testing.assert_close(make_toys.turned_saddle(turned_points), straight)


def test_sgd_at_the_saddle_takes_the_steps_of_its_recursion():
    for turned in (True, False):
        assert measured_steps(turned, 0.0) == math.inf
        for distance in (1e-4, 1e-2, 0.1):
            assert measured_steps(turned, distance) == sgd_steps(distance)

    stated = re.findall(r"SGD +(\d+)", OUTPUTS[2])
    assert [int(steps) for steps in stated] == [sgd_steps(1e-4), sgd_steps(0.1)]


def test_lrd_leaves_a_straight_saddle_like_sgd_at_half_the_rate():
    assert measured_steps(False, 0.0, keep_prob=0.5) == math.inf
    for distance in (1e-4, 1e-2, 0.1):
        at_half_the_rate = sgd_steps(distance, lr=0.025)
        assert measured_steps(False, distance, keep_prob=0.5) == pytest.approx(
            at_half_the_rate, rel=0.1
        )


def test_lrd_leaves_the_line_of_a_turned_saddle_as_its_second_moments_say():
    # Near the saddle the loss is 2xy. The moments of x - 2 lr m_x y and y - 2 lr m_y x are exact.
    start = make_toys.saddle_start(0.0, turned=True).repeat(50_000, 1)
    path = make_toys.follow(lambda points: 2 * points.prod(-1), start, 10, keep_prob=0.5)
    beside = (path[..., 0] - path[..., 1]) / 2**0.5
    measured = beside.square().mean(dim=1)

    rate = 2 * make_toys.SADDLE_LR
    xx, yy, xy = 0.5, 0.5, 0.5
    for step in range(11):
        assert measured[step].item() == pytest.approx((xx - 2 * xy + yy) / 2, rel=0.03, abs=1e-12)
        xx, yy, xy = (
            xx - 2 * rate * 0.5 * xy + rate**2 * 0.5 * yy,
            yy - 2 * rate * 0.5 * xy + rate**2 * 0.5 * xx,
            xy - rate * 0.5 * (xx + yy) + rate**2 * 0.5**2 * xy,
        )
    assert measured[0] == 0
    assert measured[10] > 0.01


def test_what_the_page_says_of_the_turned_saddle():
    on_the_line = measured_steps(True, 0.0, keep_prob=0.5)
    noisy = measured_steps(True, 0.0, noise=make_toys.NOISE)
    assert on_the_line < sgd_steps(1e-3) < math.inf
    assert noisy == pytest.approx(on_the_line, rel=0.25)

    # From far away, SGD is faster, and noise does not hinder it.
    for distance in (0.01, 0.1):
        assert sgd_steps(distance) < measured_steps(True, distance, keep_prob=0.5)
    assert measured_steps(True, 0.1, noise=make_toys.NOISE) == pytest.approx(sgd_steps(0.1), abs=2)


def test_every_seed_leaves_the_line_of_a_turned_saddle():
    for seed in range(10):
        point = make_toys.saddle_start(0.0, turned=True).requires_grad_()
        optimizer = torch.optim.SGD([point], lr=make_toys.SADDLE_LR)
        lrd.LRDropout(optimizer, keep_prob=0.5, seed=seed)
        for _ in range(200):
            optimizer.zero_grad()
            make_toys.turned_saddle(point).backward()
            optimizer.step()
        assert make_toys.turned_saddle(point.detach()) < -0.25


def test_steps_of_lrd_and_its_controls_have_the_mean_and_spread_of_the_formulas():
    momentum, keep = 0.9, 0.5
    gradients = torch.ones(100, dtype=torch.float64)
    steps = {
        name: make_toys.step_sizes(gradients, momentum, masks, num_elements=20_000)
        for name, masks in make_toys.ARMS.items()
    }
    means = {
        "SGD": 1 / (1 - momentum),
        "LRD": keep / (1 - momentum),
        "gradient masked": keep / (1 - momentum),
        "momentum buffer masked": keep / (1 - keep * momentum),
    }
    for name, expected in means.items():
        assert steps[name][-20:].mean().item() == pytest.approx(expected, rel=0.01)

    stated = [float(mean) for mean in re.findall(r"mean step ([\d.]+)", OUTPUTS[3])]
    assert stated == [round(mean, 2) for mean in means.values()]
    in_table = re.findall(r"^\|[^|]*\|[^|]* / [^|]*\| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert [float(mean) for mean in in_table] == stated

    # Under LRD, an element stands still or takes the whole step.
    last = steps["LRD"][-1]
    moved = last[last != 0]
    assert len(moved) / len(last) == pytest.approx(keep, abs=0.015)
    torch.testing.assert_close(moved, torch.full_like(moved, 10.0), rtol=1e-3, atol=0)

    # With a masked gradient, the step is a sum of momentum^i m_i.
    spread = math.sqrt(keep * (1 - keep) / (1 - momentum**2))
    assert steps["gradient masked"][-1].std().item() == pytest.approx(spread, rel=0.03)

    # With a masked buffer, it depends on how long ago the element was dropped.
    last = steps["momentum buffer masked"][-1]
    for steps_since_drop in range(4):
        size = (1 - momentum**steps_since_drop) / (1 - momentum)
        share = (last - size).abs().lt(1e-9).double().mean().item()
        assert share == pytest.approx(keep**steps_since_drop * (1 - keep), abs=0.015)


@pytest.mark.slow
def test_the_pictures_of_the_page_are_drawn_by_the_command(tmp_path):
    make_toys.main(tmp_path)

    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(re.findall(r"\(toys/(\S+\.png)\)", PAGE))
    for name in drawn:
        difference = compare_images(ROOT / "docs" / "toys" / name, tmp_path / name, tol=5)
        assert difference is None, difference
