"""Robot actions: token bins to values, and values to robot units. NumPy only."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .errors import InputError, nearest


@dataclass(frozen=True)
class Bounds:
    """The range of each dimension in robot units; `mask` is false where unscaled.

    low, high: (A,) float64; mask: (A,) bool.
    """

    low: np.ndarray
    high: np.ndarray
    mask: np.ndarray

    def to_units(self, normalized: np.ndarray) -> np.ndarray:
        """(..., A) in [-1, 1] -> robot units, as OpenVLA does it.

        OpenVLA-OFT also adds 1e-8 to the range, which is left out.
        """
        scaled = 0.5 * (normalized + 1) * (self.high - self.low) + self.low
        return np.where(self.mask, scaled, normalized)

    def from_units(self, values: np.ndarray) -> np.ndarray:
        """(..., A) in robot units -> clipped to [-1, 1], as OpenVLA-OFT does it."""
        scaled = 2 * (values - self.low) / (self.high - self.low + 1e-8) - 1
        return np.clip(np.where(self.mask, scaled, values), -1, 1)


def bin_values(ids: np.ndarray, vocabulary: int, bins: int = 256) -> np.ndarray:
    """Action token ids -> centres of their bins in [-1, 1].

    The last tokens of the `vocabulary` (without its padding) are the bins, in reverse.
    OpenVLA (arXiv 2406.09246).
    """
    edges = np.linspace(-1, 1, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    return centres[np.clip(vocabulary - np.asarray(ids, np.int64) - 1, 0, bins - 2)]


def choose_statistics(norm_stats: Mapping[str, dict], unnorm_key: str | None) -> dict:
    """The statistics of one data set.

    Raises `InputError` that lists the keys when the key is unknown, or missing where
    there are several.
    """
    keys = ", ".join(sorted(norm_stats))
    if not norm_stats:
        raise InputError(
            "the checkpoint has no norm_stats, so actions have no units; expected them "
            "in config.json or dataset_statistics.json"
        )
    if unnorm_key is None:
        if len(norm_stats) > 1:
            raise InputError(
                f"the policy knows {len(norm_stats)} data sets; give an unnorm key, "
                f"one of {keys}"
            )
        unnorm_key = next(iter(norm_stats))
    if unnorm_key not in norm_stats:
        raise InputError(
            f"unknown unnorm key {unnorm_key!r}; the keys are {keys}."
            + nearest(str(unnorm_key), norm_stats)
        )
    return norm_stats[unnorm_key]


def read_bounds(statistics: Mapping, part: str, rule: str = "bounds_q99") -> Bounds:
    """The bounds of `action` or `proprio`: quantiles, or extremes for rule `bounds`.

    Raises `InputError` when they are missing or do not fit together.
    """
    names = ("q01", "q99") if rule == "bounds_q99" else ("min", "max")
    entry = statistics.get(part) if isinstance(statistics, Mapping) else None
    if not isinstance(entry, Mapping) or any(n not in entry for n in names):
        raise InputError(
            f"norm_stats have no {names[0]} and {names[1]} of {part}; expected both"
        )
    try:
        low, high = (np.asarray(entry[n], dtype=np.float64) for n in names)
        mask = np.asarray(entry.get("mask", np.ones(low.shape)), dtype=bool)
    except (ValueError, TypeError):
        raise InputError(f"norm_stats of {part} are not lists of numbers") from None
    finite = np.isfinite(low).all() and np.isfinite(high).all()
    if low.ndim != 1 or not low.shape == high.shape == mask.shape or not finite:
        raise InputError(
            f"norm_stats of {part} disagree: {names[0]} {low.shape}, {names[1]} "
            f"{high.shape}, mask {mask.shape}; expected finite lists of one length"
        )
    return Bounds(low, high, mask)
