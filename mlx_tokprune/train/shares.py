"""Shares of visual tokens between which each batch draws how many it keeps."""

import numpy as np

from ..errors import InputError
from ..pruners import count_kept


def check_shares(least: float, most: float) -> None:
    """Raise `InputError` unless both are in (0, 1], the smaller first."""
    if not 0 < least <= most <= 1:
        raise InputError(
            f"keep ratios {least:g} to {most:g} are out of order; expected two in "
            "(0, 1], the smaller first"
        )


def draw_count(rng: np.random.Generator, least: float, most: float, total: int) -> int:
    """How many of `total` tokens stay, evenly in the logarithm; fewer than all."""
    share = min(1.0, float(np.exp(rng.uniform(np.log(least), np.log(most)))))
    return min(count_kept(total, share), total - 1)
