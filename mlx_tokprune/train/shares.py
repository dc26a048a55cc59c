"""Keep ratios: their check, and the draw of each batch's token count."""

import numpy as np

from ..errors import InputError
from ..pruners import count_kept


def check_shares(least: float, most: float) -> None:
    """Raise `InputError` unless 0 < least <= most <= 1."""
    if not 0 < least <= most <= 1:
        raise InputError(
            f"keep ratios {least:g} to {most:g} are out of order; expected two in "
            "(0, 1], the smaller first"
        )


def draw_count(rng: np.random.Generator, least: float, most: float, total: int) -> int:
    """Draw how many of `total` tokens to keep: log-uniform, fewer than all.

    The keep ratio is drawn between `least` and `most`.
    """
    share = min(1.0, float(np.exp(rng.uniform(np.log(least), np.log(most)))))
    return min(count_kept(total, share), total - 1)
