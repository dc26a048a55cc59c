"""95 % intervals of shares and of means."""

import math
from collections.abc import Hashable, Sequence

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
