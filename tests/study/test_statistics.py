"""Means, intervals and differences: against a formula of the book, and by simulation."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from lrd.study.statistics import Difference, Estimate, estimate_mean, paired_difference

DRAWS = 5_000
# Of a proportion of 0.05 in so many draws; four of them are left in 6 of 100,000 seeds.
STANDARD_ERROR = math.sqrt(0.05 * 0.95 / DRAWS)


def test_an_interval_is_mean_plus_minus_t_times_the_standard_error():
    values = [0.953, 0.949, 0.951, 0.957, 0.942]
    estimate = estimate_mean(values)
    half_width = stats.t.ppf(0.975, df=4) * np.std(values, ddof=1) / math.sqrt(5)
    assert estimate.n == 5
    assert estimate.mean == pytest.approx(0.9504)
    assert estimate.sd == pytest.approx(math.sqrt(sum((v - 0.9504) ** 2 for v in values) / 4))
    assert estimate.low == pytest.approx(0.9504 - half_width)
    assert estimate.high == pytest.approx(0.9504 + half_width)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("n", [pytest.param(2, marks=SLOW), 3, pytest.param(5, marks=SLOW)])
def test_the_interval_contains_the_true_mean_in_95_percent(n):
    draws = np.random.default_rng(n).normal(0.95, 0.003, size=(DRAWS, n))
    estimates = [estimate_mean(list(values)) for values in draws]
    missed = np.mean([not estimate.low <= 0.95 <= estimate.high for estimate in estimates])
    assert abs(missed - 0.05) < 4 * STANDARD_ERROR


@pytest.mark.parametrize("n", [3, pytest.param(5, marks=SLOW)])
def test_equal_arms_are_called_different_in_5_percent(n):
    generator = np.random.default_rng(n)
    of_seed = generator.normal(0.95, 0.01, size=(DRAWS, 1, n))  # what the arms of a seed share
    pairs = of_seed + generator.normal(0.0, 0.003, size=(DRAWS, 2, n))

    found = [paired_difference(list(values), list(others)) for values, others in pairs]
    false_alarms = np.mean([difference.p < 0.05 for difference in found])
    assert abs(false_alarms - 0.05) < 4 * STANDARD_ERROR
    # The interval and p are of one test.
    for difference in found:
        assert (difference.p < 0.05) == (not difference.low <= 0.0 <= difference.high)


def test_pairs_show_a_difference_that_the_spread_over_seeds_hides():
    baseline = [0.90, 0.93, 0.95, 0.97]
    arm = [0.912, 0.940, 0.961, 0.979]
    difference = paired_difference(arm, baseline)
    assert difference.mean == pytest.approx(0.0105)
    assert difference.low > 0.0
    assert difference.p < 0.01
    assert stats.ttest_ind(arm, baseline).pvalue > 0.5


def test_few_equal_and_infinite_values_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert estimate_mean([]) == Estimate(0)
        assert estimate_mean([0.5]) == Estimate(1, 0.5)
        assert estimate_mean([0.5, 0.5]) == Estimate(2, 0.5, 0.0, 0.5, 0.5)
        assert estimate_mean([0.5, math.nan]) == Estimate(2)
        assert paired_difference([], []) == Difference(0)
        assert paired_difference([0.75], [0.5]) == Difference(1, 0.25)
        assert paired_difference([0.75, 0.5], [0.5, 0.25]) == Difference(2, 0.25, 0.25, 0.25)
        assert paired_difference([math.inf, 1.0], [1.0, 1.0]) == Difference(2)
        assert paired_difference([0.3, 0.1 + 0.2], [0.1, 0.1]).n == 2
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0, 2.0], [1.0])
