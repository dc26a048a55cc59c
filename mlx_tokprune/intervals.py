"""95 % intervals of shares and of means."""

import math
import statistics
from collections.abc import Sequence

_Z = 1.96


def of_share(right: float, total: int) -> tuple[float, float]:
    """Wilson's interval of `right` out of `total`, which is at least 1."""
    share = right / total
    centre = share + _Z * _Z / (2 * total)
    half = _Z * math.sqrt(share * (1 - share) / total + _Z * _Z / (4 * total**2))
    scale = 1 + _Z * _Z / total
    return (centre - half) / scale, (centre + half) / scale


def of_mean(values: Sequence[float]) -> tuple[float, float]:
    """The normal interval of the mean; that of one value is the value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean
    half = _Z * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half
