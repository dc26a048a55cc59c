"""Robot actions: token bins to values, and values to robot units. NumPy only."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, nearest

MOST_NUMBERS = 64  # of an action or a robot state
_LARGEST = 1e12  # in any unit of a robot
_SHOWN = 20  # keys in a message


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
        with np.errstate(over="ignore"):  # infinite is clipped too
            scaled = 2 * (values - self.low) / (self.high - self.low + 1e-8) - 1
        return np.clip(np.where(self.mask, scaled, values), -1, 1)

    def from_units_unclipped(self, values: np.ndarray) -> np.ndarray:
        """(..., A) in robot units -> float32, not clipped, as lerobot does it."""
        low, high = self.low.astype(np.float32), self.high.astype(np.float32)
        width, values = high - low, np.asarray(values, np.float32)
        width = np.where(width == 0, np.float32(1e-8), width)
        with np.errstate(over="ignore"):
            return np.where(self.mask, 2 * (values - low) / width - 1, values)


@dataclass(frozen=True)
class Deviations:
    """Mean and standard deviation of each dimension in robot units, (A,) float64."""

    mean: np.ndarray
    std: np.ndarray

    @property
    def low(self) -> np.ndarray:
        """(A,): what -1 stands for."""
        return self.mean - self.std

    @property
    def high(self) -> np.ndarray:
        return self.mean + self.std

    def to_units(self, normalized: np.ndarray) -> np.ndarray:
        """(..., A) normalised -> robot units."""
        return normalized * self.std + self.mean

    def from_units(self, values: np.ndarray) -> np.ndarray:
        """(..., A) in robot units -> normalised, clipped to [-1, 1]."""
        return np.clip(self.from_units_unclipped(values), -1, 1)

    def from_units_unclipped(self, values: np.ndarray) -> np.ndarray:
        """(..., A) in robot units -> float32, not clipped, as lerobot does it."""
        mean, std = self.mean.astype(np.float32), self.std.astype(np.float32)
        with np.errstate(over="ignore"):
            return (np.asarray(values, np.float32) - mean) / (std + np.float32(1e-8))


Scale = Bounds | Deviations
# What a rule of normalisation reads of the statistics of a data set.
RULES = {
    "bounds_q99": ("q01", "q99"),
    "bounds_q90": ("q10", "q90"),
    "bounds": ("min", "max"),
    "mean_std": ("mean", "std"),
}


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
    keys = ", ".join(map(repr, sorted(norm_stats)[:_SHOWN]))
    keys += f" and {len(norm_stats) - _SHOWN} more" if len(norm_stats) > _SHOWN else ""
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
    if not isinstance(unnorm_key, str) or unnorm_key not in norm_stats:
        raise InputError(
            f"unknown unnorm key {unnorm_key!r}; the keys are {keys}."
            + nearest(str(unnorm_key), norm_stats)
        )
    return norm_stats[unnorm_key]


def read_bounds(statistics: Mapping, part: str, rule: str = "bounds_q99") -> Bounds:
    """The bounds of `action` or `proprio`: quantiles, or extremes for rule `bounds`.

    Raises `InputError` when they are missing, no numbers, or do not fit together.
    """
    names, low, high, mask = _read(statistics, part, rule)
    if (low > high).any():
        raise InputError(f"norm_stats of {part} have {names[0]} above {names[1]}")
    return Bounds(low, high, mask)


def read_deviations(statistics: Mapping, part: str) -> Deviations:
    """Mean and deviation of `action` or `proprio`. Raises as `read_bounds` does."""
    _, mean, std, _ = _read(statistics, part, "mean_std")
    if (std < 0).any():
        raise InputError(f"norm_stats of {part} have a std below 0")
    return Deviations(mean, std)


def _read(statistics: Mapping, part: str, rule: str):
    """The names that a rule reads, (A,) numbers of both, and (A,) the mask."""
    names = RULES[rule]
    entry = statistics.get(part) if isinstance(statistics, Mapping) else None
    if not isinstance(entry, Mapping) or any(n not in entry for n in names):
        raise InputError(
            f"norm_stats have no {names[0]} and {names[1]} of {part}; expected both"
        )
    low, high = (_numbers(entry[n], f"{n} of {part}") for n in names)
    mask = entry.get("mask", [True] * len(low))
    if not isinstance(mask, list) or not all(isinstance(m, bool) for m in mask):
        raise InputError(f"norm_stats say mask {mask!r} of {part}; expected booleans")
    if not len(low) == len(high) == len(mask):
        raise InputError(
            f"norm_stats of {part} disagree: {names[0]} has {len(low)} numbers, "
            f"{names[1]} {len(high)} and mask {len(mask)}; expected lists of one length"
        )
    return names, low, high, np.array(mask)


def _numbers(values, name: str) -> np.ndarray:
    right = isinstance(values, list) and 0 < len(values) <= MOST_NUMBERS
    right = right and all(type(value) in (int, float) for value in values)
    if not right or not all(abs(value) < _LARGEST for value in values):
        raise InputError(
            f"norm_stats say {name} {str(values)[:60]}; expected a list of 1 to "
            f"{MOST_NUMBERS} finite numbers"
        )
    return np.array(values, dtype=np.float64)
