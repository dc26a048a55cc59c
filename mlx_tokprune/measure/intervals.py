"""95 % intervals of shares and of means."""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

_Z = 1.96
_SAMPLES = 2000


def wilson(right: float, total: int) -> tuple[float, float]:
    """Wilson's interval of `right` out of `total` independent ones, at least 1."""
    share = right / total
    centre = share + _Z * _Z / (2 * total)
    half = _Z * math.sqrt(share * (1 - share) / total + _Z * _Z / (4 * total**2))
    scale = 1 + _Z * _Z / total
    return (centre - half) / scale, (centre + half) / scale


def of_share(
    values: Sequence[float], groups: Sequence[Hashable]
) -> tuple[float, float]:
    """Of the mean of values in [0, 1].

    groups: what each is about. Wilson's where values are 0 or 1 and each is about
    something else; partial scores, and several questions about one picture, are drawn
    again by picture. Where no picture differs, Wilson's of so many pictures.
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
    """Of the mean: the middle 95 % of means over groups drawn again, from one seed."""
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
    """The mean of paired losses in [-1, 1], and its interval.

    groups: what each is about. rows: how many such intervals shall hold together in
    95 % of cases (Bonferroni). Agresti and Min's adjusted Wald interval (Statistics in
    Medicine 24, 2005), which has a width also where no answer changed, and wider by the
    design effect where several questions are about one picture.
    """
    z = NormalDist().inv_cdf(1 - 0.025 / rows)
    values = np.asarray(losses, np.float64)
    total, mean = len(values) + 2, float(values.mean())
    centre = values.sum() / total
    variance = ((np.square(values).sum() + 1) / total - centre**2) / total
    half = z * math.sqrt(variance * _design_effect(values - mean, groups))
    return mean, float(centre - half), float(centre + half)


def _design_effect(residuals: np.ndarray, groups: Sequence[Hashable]) -> float:
    """How much larger groups make the variance of a mean, at least 1."""
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sums = np.bincount([numbers[group] for group in groups], residuals)
    alone = np.square(residuals).sum()
    return max(1.0, float(np.square(sums).sum() / alone)) if alone else 1.0
