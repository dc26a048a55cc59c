"""Select redundant visual tokens by their pixels, before a model runs.

A group is the patches that become one visual token of Qwen's towers: 2 x 2 patches of
one frame, where a frame is two pictures of a video.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..pruners import Pruner

_GLANCE = 64  # values of a group that are compared first


@dataclass(frozen=True)
class TemporalPruner:
    """Pruner of video tokens that do not change from frame to frame.

    The first frame is kept whole. A token of a later frame is kept where a pixel, in
    [0, 1], differs by more than `threshold` from the token that was last kept at its
    place, or where that token is `max_age` frames old. The tower encodes whole frames.
    Raises `InputError` for a threshold or an age out of range.
    """

    threshold: float = 0.05
    max_age: int | None = None

    def __post_init__(self):
        _check_threshold(self.threshold)
        age = self.max_age
        if age is not None and (not isinstance(age, int) or age < 1):
            raise InputError(
                f"max age {age!r} is out of range; expected a number of frames from 1"
            )


@dataclass(frozen=True)
class RepeatPruner:
    """Pruner of groups that repeat their left or upper neighbour, before the tower.

    A border of one colour keeps its first group alone. Two groups are equal where no
    pixel, in [0, 1], differs by more than `threshold`; all repeats of a group are
    compared with that one group. The other groups keep their places in the tower and
    the language model. Raises `InputError` for a threshold out of range. The idea is
    PixelPrune's (arXiv:2604.00886).
    """

    threshold: float = 0.0

    def __post_init__(self):
        _check_threshold(self.threshold)


def _check_threshold(threshold: float) -> None:
    if isinstance(threshold, bool) or not 0 <= threshold < 1:
        raise InputError(f"threshold {threshold!r} is out of range; expected [0, 1)")


@dataclass(frozen=True)
class PixelSelection:
    """Visual tokens of a batch of prompts that pixel pruners keep.

    All fields are lists, which mlx-vlm passes on unconverted.
    kept: for each prompt, the kept visual tokens, ascending. encoded: for each prompt,
    the number of tokens that the tower encodes. sources: for each call of the tower,
    the group whose token stands for each group: itself, unless it is left out.
    """

    kept: list[list[int]]
    encoded: list[int]
    sources: list[list[int]]


@dataclass(frozen=True)
class Pixels:
    """Pixel pruners of one attachment; false if there are none."""

    temporal: TemporalPruner | None = None
    repeats: RepeatPruner | None = None

    def __bool__(self) -> bool:
        return self != Pixels()

    @property
    def pruners(self) -> list[TemporalPruner | RepeatPruner]:
        """Pruners that are set."""
        return [pruner for pruner in (self.temporal, self.repeats) if pruner]

    @classmethod
    def read(cls, section: Mapping) -> "Pixels":
        """Return the pruners of a section that `dataclasses.asdict` wrote.

        Raises `InputError` for a section of another form.
        """
        kinds = {"temporal": TemporalPruner, "repeats": RepeatPruner}
        try:
            fields = {
                name: value for name, value in section.items() if value is not None
            }
            return cls(**{name: kinds[name](**value) for name, value in fields.items()})
        except (AttributeError, KeyError, TypeError):
            raise InputError(
                f"{section!r} says no pruners of pixels; expected temporal with "
                "threshold and max_age, and repeats with threshold"
            ) from None

    def look(
        self, patches: np.ndarray, grids: Iterable, side: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (N,) the kept groups, and (N,) the group that stands for each.

        patches: (P, D) values in [0, 1]. grids: (t, h, w) patches of each picture or
        video. side: patches along a group.
        """
        kept, sources, start = [np.zeros(0, bool)], [np.zeros(0, int)], 0
        for t, h, w in grids:
            count = t * (h // side) * (w // side)
            part = patches[start * side**2 : (start + count) * side**2]
            frames = part.reshape(t, h // side, w // side, -1)
            new = np.ones(frames.shape[:3], bool)
            if self.temporal is not None:
                new = changed(frames, self.temporal)
            source = np.arange(count).reshape(new.shape)
            if self.repeats is not None:
                area, limit = source[0].size, self.repeats.threshold
                for number, (frame, fresh) in enumerate(zip(frames, new, strict=True)):
                    source[number] = repeated(frame, fresh, limit) + number * area
            kept.append(new.ravel() & (source.ravel() == np.arange(count)))
            sources.append(source.ravel() + start)
            start += count
        return np.concatenate(kept), np.concatenate(sources)


def changed(frames: np.ndarray, pruner: TemporalPruner) -> np.ndarray:
    """Return (T, H, W) bool: groups (T, H, W, D) that differ from the last kept one.

    Each group is compared with the last kept group at its place, so that slow changes
    do not add up.
    """
    kept = np.ones(frames.shape[:3], bool)
    last, ages = frames[0].copy(), np.zeros(frames.shape[1:3], int)
    for number, frame in enumerate(frames[1:], 1):
        ages += 1
        new = np.abs(frame - last).max(axis=-1) > pruner.threshold
        if pruner.max_age is not None:
            new |= ages >= pruner.max_age
        last[new], ages[new] = frame[new], 0
        kept[number] = new
    return kept


def repeated(frame: np.ndarray, new: np.ndarray, threshold: float) -> np.ndarray:
    """Return (H, W): the group that each group (H, W, D) of a frame repeats, or itself.

    new: (H, W) bool; the other groups neither repeat nor are repeated. A group depends
    on those to its left and above, so each diagonal is computed at once.
    """
    height, width = new.shape
    groups, border = frame.reshape(height * width, -1), borders(frame, threshold)
    own = np.arange(height * width).reshape(height, width)
    # The group that a place repeats; -1 outside the frame and where nothing is new.
    sources = np.full((height + 1, width + 1), -1)
    anchor = -1  # the first group of the border
    for diagonal in range(height + width - 1):
        i = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        j = diagonal - i
        i, j = i[new[i, j]], j[new[i, j]]
        here, edge = own[i, j], border[i, j]
        source = here.copy()
        for other in (sources[i + 1, j], sources[i, j + 1], np.where(edge, anchor, -1)):
            open_ = np.flatnonzero((source == here) & (other >= 0))
            same = open_[_near(groups, here[open_], other[open_], threshold)]
            source[same] = other[same]
        sources[i + 1, j + 1] = source
        if anchor < 0 and edge.any():
            anchor = source[edge][0]
    return np.where(sources[1:, 1:] < 0, own, sources[1:, 1:])


def _near(
    groups: np.ndarray, indices: np.ndarray, others: np.ndarray, threshold: float
) -> np.ndarray:
    """Return (n,) bool: groups (N, D) at `indices` that equal those at `others`."""
    near = np.ones(len(indices), bool)
    # Most pairs differ in their first values: compare the rest of the other pairs only.
    for part in (slice(None, _GLANCE), slice(_GLANCE, None)):
        open_ = np.flatnonzero(near)
        first, second = groups[indices[open_], part], groups[others[open_], part]
        near[open_] = np.abs(first - second).max(axis=-1, initial=0) <= threshold
    return near


def borders(frame: np.ndarray, threshold: float) -> np.ndarray:
    """Return (H, W) bool: rows and columns at the edges whose groups are all equal."""
    height, width = frame.shape[:2]
    groups = frame.reshape(height, width, -1)
    border = np.zeros((height, width), bool)
    for axis, lines in ((0, groups), (1, groups.swapaxes(0, 1))):
        for order in (range(len(lines)), range(len(lines) - 1, -1, -1)):
            for line in order:
                spread = np.abs(lines[line] - lines[line][:1]).max()
                if spread > threshold:
                    break
                border[(slice(None), line) if axis else line] = True
    return border


def split(
    pruners: Pruner | TemporalPruner | RepeatPruner | Iterable,
) -> tuple[list[Pruner], Pixels]:
    """Split one pruner, or several, into token pruners and pixel pruners.

    Raises `InputError` for two pixel pruners of one class.
    """
    kinds = {TemporalPruner: "temporal", RepeatPruner: "repeats"}
    several: Any = pruners if isinstance(pruners, (list, tuple)) else [pruners]
    named = {}
    for pruner in several:
        name = kinds.get(type(pruner))
        if name in named:
            raise InputError(f"two of {type(pruner).__name__}; expected one at most")
        if name is not None:
            named[name] = pruner
    return [p for p in several if type(p) not in kinds], Pixels(**named)


def scales(processor: Any) -> Mapping[str, np.ndarray]:
    """Return, by kind of media, (C,) factors from a processor's values to pixels.

    Differences of scaled values are differences of pixels in [0, 1]. Raises
    `InputError` for a processor without `image_std`.
    """
    factors = {}
    for kind in ("image", "video"):
        part = getattr(processor, f"{kind}_processor", None)
        part = part or getattr(processor, "image_processor", None)
        deviation = getattr(part, "image_std", None)
        if deviation is None:
            raise InputError(
                f"the {kind} processor of {type(processor).__name__} does not give the "
                "scale of its pixels; expected an image_std"
            )
        normal = getattr(part, "do_normalize", True)
        factors[kind] = np.array(deviation if normal else np.ones(3), np.float32)
    return factors
