"""Robot actions: from token bins to values, and to robot units. NumPy only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, nearest

MOST_NUMBERS = 64  # dimensions of an action or a robot state
_LARGEST = 1e12  # largest statistic, in any unit of a robot
_SHOWN = 20  # keys in a message


@dataclass(frozen=True)
class Bounds:
    """The range of each dimension in robot units.

    low, high: (A,) float64. mask: (A,) bool, false for dimensions that are not scaled.
    """

    low: np.ndarray
    high: np.ndarray
    mask: np.ndarray

    def to_units(self, normalized: np.ndarray) -> np.ndarray:
        """Convert (..., A) in [-1, 1] to robot units, as OpenVLA does.

        OpenVLA-OFT also adds 1e-8 to the range, which is left out here.
        """
        scaled = 0.5 * (normalized + 1) * (self.high - self.low) + self.low
        return np.where(self.mask, scaled, normalized)

    def from_units(self, values: np.ndarray) -> np.ndarray:
        """Normalise (..., A) from robot units, clipped to [-1, 1], as OpenVLA-OFT."""
        with np.errstate(over="ignore"):  # infinite values are clipped
            scaled = 2 * (values - self.low) / (self.high - self.low + 1e-8) - 1
        return np.clip(np.where(self.mask, scaled, values), -1, 1)

    def from_units_unclipped(self, values: np.ndarray) -> np.ndarray:
        """Normalise (..., A) from robot units, float32, not clipped, as lerobot."""
        low, width = self.low.astype(np.float32), self.high - self.low
        width, values = width.astype(np.float32), np.asarray(values, np.float32)
        width = np.where(width == 0, np.float32(1e-8), width)
        with np.errstate(over="ignore"):
            return np.where(self.mask, 2 * (values - low) / width - 1, values)


@dataclass(frozen=True)
class Deviations:
    """Mean and standard deviation of each dimension in robot units, (A,) float64.

    eps: added to the deviation where values are normalised.
    """

    mean: np.ndarray
    std: np.ndarray
    eps: float = 1e-8

    @property
    def low(self) -> np.ndarray:
        """Value of -1 in robot units, (A,)."""
        return self.mean - self.std

    @property
    def high(self) -> np.ndarray:
        """Value of 1 in robot units, (A,)."""
        return self.mean + self.std

    def to_units(self, normalized: np.ndarray) -> np.ndarray:
        """Convert normalised (..., A) to robot units."""
        return normalized * self.std + self.mean

    def from_units(self, values: np.ndarray) -> np.ndarray:
        """Normalise (..., A) from robot units, clipped to [-1, 1]."""
        return np.clip(self.from_units_unclipped(values), -1, 1)

    def from_units_unclipped(self, values: np.ndarray) -> np.ndarray:
        """Normalise (..., A) from robot units, float32, not clipped, as lerobot."""
        mean, std = self.mean.astype(np.float32), self.std.astype(np.float32)
        with np.errstate(over="ignore"):
            centred = np.asarray(values, np.float32) - mean
            return centred / (std + np.float32(self.eps))


Scale = Bounds | Deviations
# The two statistics of a data set that a rule of normalisation reads.
RULES = {
    "bounds_q99": ("q01", "q99"),
    "bounds_q90": ("q10", "q90"),
    "bounds": ("min", "max"),
    "mean_std": ("mean", "std"),
}
# Rules by the names of lerobot's normalization modes, in lower case.
NORMS = {
    "quantiles": "bounds_q99",
    "quantile10": "bounds_q90",
    "min_max": "bounds",
    "mean_std": "mean_std",
    "identity": "identity",
}


def bin_values(ids: np.ndarray, vocabulary: int, bins: int = 256) -> np.ndarray:
    """Return the bin centres in [-1, 1] of action token ids, any shape.

    The last tokens of the `vocabulary` (without its padding) are the bins, in reverse.
    OpenVLA (arXiv 2406.09246).
    """
    edges = np.linspace(-1, 1, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    return centres[np.clip(vocabulary - np.asarray(ids, np.int64) - 1, 0, bins - 2)]


def choose_statistics(norm_stats: Mapping[str, dict], unnorm_key: str | None) -> dict:
    """Return the statistics of one data set; `None` chooses the only one.

    Raises `InputError` that lists the keys for an unknown key, for `None` with several
    data sets, and for a checkpoint without statistics.
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
    """Return the bounds of `action` or `proprio`, by a rule of `RULES`.

    Raises `InputError` for statistics that are missing, no numbers or inconsistent.
    """
    names, low, high, mask = _read(statistics, part, rule)
    if (low > high).any():
        raise InputError(f"norm_stats of {part} have {names[0]} above {names[1]}")
    return Bounds(low, high, mask)


def read_deviations(statistics: Mapping, part: str) -> Deviations:
    """Return mean and deviation of `action` or `proprio`; raises as `read_bounds`."""
    _, mean, std, _ = _read(statistics, part, "mean_std")
    if (std < 0).any():
        raise InputError(f"norm_stats of {part} have a std below 0")
    return Deviations(mean, std)


def _read(
    statistics: Mapping, part: str, rule: str
) -> tuple[tuple[str, str], np.ndarray, np.ndarray, np.ndarray]:
    """Return the two names of a rule, both statistics (A,) and the mask (A,)."""
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


def _numbers(values: Any, name: str) -> np.ndarray:
    valid = isinstance(values, list) and 0 < len(values) <= MOST_NUMBERS
    valid = valid and all(type(value) in (int, float) for value in values)
    if not valid or not all(abs(value) < _LARGEST for value in values):
        raise InputError(
            f"norm_stats say {name} {str(values)[:60]}; expected a list of 1 to "
            f"{MOST_NUMBERS} finite numbers"
        )
    return np.array(values, dtype=np.float64)
