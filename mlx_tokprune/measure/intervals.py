"""95 % confidence intervals of shares, means and paired losses."""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

_Z = 1.96
_SAMPLES = 2000  # of a bootstrap


def wilson(right: float, total: int) -> tuple[float, float]:
    """Return Wilson's score interval (low, high) of a share.

    right: successes. total: independent trials, at least 1.
    """
    share = right / total
    centre = share + _Z * _Z / (2 * total)
    half = _Z * math.sqrt(share * (1 - share) / total + _Z * _Z / (4 * total**2))
    scale = 1 + _Z * _Z / total
    return (centre - half) / scale, (centre + half) / scale


def of_share(
    values: Sequence[float], groups: Sequence[Hashable]
) -> tuple[float, float]:
    """Return the interval (low, high) of the mean of values in [0, 1].

    groups: image (or other group) of each value. Values of 0 or 1 with one value per
    group get Wilson's interval. Partial scores, and several values per group, get a
    bootstrap over groups; where no group differs, Wilson's interval of N groups.
    """
    total = len(set(groups))
    alone = total == len(values) and all(value in (0, 1) for value in values)
    low, high = (0.0, 0.0) if alone else bootstrap(values, groups)
    if low < high:
        return low, high
    return wilson(total * sum(values) / len(values), total)


def bootstrap(
    values: Sequence[float], groups: Sequence[Hashable]
) -> tuple[float, float]:
    """Return the interval (low, high) of a mean by a bootstrap over groups.

    It is the middle 95 % of the means of resampled groups; the seed is fixed.
    """
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    where = np.array([numbers[group] for group in groups])
    sums = np.bincount(where, np.asarray(values, np.float64))
    counts = np.bincount(where).astype(np.float64)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(_SAMPLES):
        drawn = rng.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def of_loss(
    losses: Sequence[float], groups: Sequence[Hashable], rows: int = 1
) -> tuple[float, float, float]:
    """Return the mean of paired losses in [-1, 1], and its interval (low, high).

    groups: image (or other group) of each loss. rows: number of intervals that hold
    together in 95 % of cases (Bonferroni). The interval is Agresti and Min's adjusted
    Wald interval (Statistics in Medicine 24, 2005), which has a width even if no answer
    changed. It is widened by the design effect where groups have several losses.
    """
    z = NormalDist().inv_cdf(1 - 0.025 / rows)
    values = np.asarray(losses, np.float64)
    total, mean = len(values) + 2, float(values.mean())
    centre = values.sum() / total
    variance = ((np.square(values).sum() + 1) / total - centre**2) / total
    half = z * math.sqrt(variance * _design_effect(values - mean, groups))
    return mean, float(centre - half), float(centre + half)


def _design_effect(residuals: np.ndarray, groups: Sequence[Hashable]) -> float:
    """Return the factor by which groups enlarge the variance of a mean, at least 1."""
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sums = np.bincount([numbers[group] for group in groups], residuals)
    alone = np.square(residuals).sum()
    return max(1.0, float(np.square(sums).sum() / alone)) if alone else 1.0
