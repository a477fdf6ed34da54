"""Means with their intervals, and paired differences. The formulas are scipy's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean of independent values, with an interval from Student's t distribution.

    Attributes:
        n: number of values.
        mean: their mean; None if there is no value, or one is not finite.
        sd: their standard deviation, of the sample (n - 1); None for fewer than two values.
        low, high: the interval that contains the true mean in 95 % of all such samples of normally
            distributed values; None for fewer than two values.
    """

    n: int
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """Mean difference of paired values, an arm minus the baseline.

    Attributes:
        n: number of pairs.
        mean: their mean difference; None if there is no pair, or a value is not finite.
        low, high: its 95 % interval; None for fewer than two pairs.
        p: of the paired t test: the probability of a difference at least this large between equal
            arms; None for fewer than two pairs, and if all differences are equal.
    """

    n: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def estimate_mean(values: Sequence[float]) -> Estimate:
    """Estimate the mean of what the values are a sample of."""
    n = len(values)
    if n == 0 or not all(math.isfinite(value) for value in values):
        return Estimate(n)
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(n, mean)

    sd = float(np.std(values, ddof=1))
    if len(set(values)) == 1:  # scipy divides by the standard deviation
        return Estimate(n, mean, sd=0.0, low=mean, high=mean)

    from scipy import stats

    interval = stats.ttest_1samp(values, popmean=0.0).confidence_interval(CONFIDENCE)
    return Estimate(n, mean, sd, float(interval.low), float(interval.high))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Estimate how much higher an arm is than the baseline, from runs with the same seeds.

    Args:
        values: of the arm, one for each seed.
        baseline: of the baseline, for the same seeds in the same order.
    """
    n = len(values)
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    if n == 0 or not all(math.isfinite(difference) for difference in differences):
        return Difference(n)
    mean = float(np.mean(differences))
    if n == 1:
        return Difference(n, mean)
    if len(set(differences)) == 1:
        return Difference(n, mean, low=mean, high=mean)

    from scipy import stats

    with warnings.catch_warnings():
        # Differences that are nearly equal lose digits; the interval says how little they differ.
        warnings.simplefilter("ignore", RuntimeWarning)
        test = stats.ttest_rel(values, baseline)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(n, mean, float(interval.low), float(interval.high), float(test.pvalue))
