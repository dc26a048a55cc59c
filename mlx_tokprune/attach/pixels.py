"""Which visual tokens say nothing new, by their pixels, before a model has run.

A group is the patches that become one visual token of Qwen's towers: 2 x 2 of them, of
one frame, which is two pictures of a video.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

_GLANCE = 64  # values of a group that are compared first


@dataclass(frozen=True)
class TemporalPruner:
    """Of a video the first frame, and of each later one what changed.

    A token stays where a pixel, in [0, 1], differs by more than `threshold` from the
    token that was last kept at its place, or where that one is `max_age` frames old.
    The tower sees whole frames.
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
    """Before the tower: groups that repeat their left or upper neighbour are left out.

    So is a border of one colour, but for its first group. Two are the same where no
    pixel, in [0, 1], differs by more than `threshold`; all that repeat a group are
    compared with that one. Tower and language model have the rest at their places.
    """

    threshold: float = 0.0

    def __post_init__(self):
        _check_threshold(self.threshold)


def _check_threshold(threshold: float) -> None:
    if isinstance(threshold, bool) or not 0 <= threshold < 1:
        raise InputError(f"threshold {threshold!r} is out of range; expected [0, 1)")


@dataclass(frozen=True)
class Seen:
    """What the pixels of a batch of prompts say, in lists, which can travel.

    stays: of each prompt, the visual tokens that stay, ascending. encoded: of each, how
    many the tower makes. sources: for each call of the tower, of each group the one
    whose token stands for it: itself, unless it is left out.
    """

    stays: list[list[int]]
    encoded: list[int]
    sources: list[list[int]]


@dataclass(frozen=True)
class Pixels:
    """The pruners of one attachment that look at pixels; none of them: false."""

    temporal: TemporalPruner | None = None
    repeats: RepeatPruner | None = None

    def __bool__(self) -> bool:
        return self != Pixels()

    @property
    def pruners(self) -> list[TemporalPruner | RepeatPruner]:
        return [pruner for pruner in (self.temporal, self.repeats) if pruner]

    @classmethod
    def read(cls, section: Mapping) -> "Pixels":
        """What `dataclasses.asdict` wrote."""
        kinds = {"temporal": TemporalPruner, "repeats": RepeatPruner}
        try:
            given = {name: how for name, how in section.items() if how is not None}
            return cls(**{name: kinds[name](**how) for name, how in given.items()})
        except (AttributeError, KeyError, TypeError):
            raise InputError(
                f"{section!r} says no pruners of pixels; expected temporal with "
                "threshold and max_age, and repeats with threshold"
            ) from None

    def look(
        self, patches: np.ndarray, grids: Iterable, side: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N,) which groups stay, and (N,) which group stands for each in the tower.

        patches: (P, D) values in [0, 1]. grids: (t, h, w) patches of each picture or
        video. side: patches along a group.
        """
        stays, sources, start = [np.zeros(0, bool)], [np.zeros(0, int)], 0
        for t, h, w in grids:
            count = t * (h // side) * (w // side)
            part = patches[start * side**2 : (start + count) * side**2]
            frames = part.reshape(t, h // side, w // side, -1)
            new = np.ones(frames.shape[:3], bool)
            if self.temporal is not None:
                new = changed(frames, self.temporal)
            found = np.arange(count).reshape(new.shape)
            if self.repeats is not None:
                area, limit = found[0].size, self.repeats.threshold
                for number, (frame, some) in enumerate(zip(frames, new, strict=True)):
                    found[number] = repeated(frame, some, limit) + number * area
            stays.append(new.ravel() & (found.ravel() == np.arange(count)))
            sources.append(found.ravel() + start)
            start += count
        return np.concatenate(stays), np.concatenate(sources)


def changed(frames: np.ndarray, pruner: TemporalPruner) -> np.ndarray:
    """(T, H, W) bool: groups (T, H, W, D) that are not as last kept at their place."""
    found = np.ones(frames.shape[:3], bool)
    last, ages = frames[0].copy(), np.zeros(frames.shape[1:3], int)
    for number, frame in enumerate(frames[1:], 1):
        ages += 1
        new = np.abs(frame - last).max(axis=-1) > pruner.threshold
        if pruner.max_age is not None:
            new |= ages >= pruner.max_age
        last[new], ages[new] = frame[new], 0
        found[number] = new
    return found


def repeated(frame: np.ndarray, new: np.ndarray, threshold: float) -> np.ndarray:
    """(H, W): for each group (H, W, D) of a frame the one that it repeats, or itself.

    new: (H, W) bool; the others neither repeat nor are repeated. A group depends on
    those to its left and above, so that a diagonal is found at once.
    """
    height, width = new.shape
    groups, border = frame.reshape(height * width, -1), borders(frame, threshold)
    own = np.arange(height * width).reshape(height, width)
    # What can be repeated at a place: -1 for nothing, as on the outside.
    known = np.full((height + 1, width + 1), -1)
    anchor = -1  # the first group of the border
    for diagonal in range(height + width - 1):
        i = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        j = diagonal - i
        i, j = i[new[i, j]], j[new[i, j]]
        here, edge = own[i, j], border[i, j]
        found = here.copy()
        for other in (known[i + 1, j], known[i, j + 1], np.where(edge, anchor, -1)):
            open_ = np.flatnonzero((found == here) & (other >= 0))
            same = open_[_near(groups, here[open_], other[open_], threshold)]
            found[same] = other[same]
        known[i + 1, j + 1] = found
        if anchor < 0 and edge.any():
            anchor = found[edge][0]
    return np.where(known[1:, 1:] < 0, own, known[1:, 1:])


def _near(groups: np.ndarray, some: np.ndarray, others: np.ndarray, threshold: float):
    """(n,) bool: which of `some` groups (N, D) are as `others` are."""
    near = np.ones(len(some), bool)
    for part in (slice(None, _GLANCE), slice(_GLANCE, None)):
        open_ = np.flatnonzero(near)
        first, second = groups[some[open_], part], groups[others[open_], part]
        near[open_] = np.abs(first - second).max(axis=-1, initial=0) <= threshold
    return near


def borders(frame: np.ndarray, threshold: float) -> np.ndarray:
    """(H, W) bool: rows and columns at the edges whose groups are all the same."""
    height, width = frame.shape[:2]
    groups = frame.reshape(height, width, -1)
    found = np.zeros((height, width), bool)
    for axis, lines in ((0, groups), (1, groups.swapaxes(0, 1))):
        for order in (range(len(lines)), range(len(lines) - 1, -1, -1)):
            for line in order:
                spread = np.abs(lines[line] - lines[line][:1]).max()
                if spread > threshold:
                    break
                found[(slice(None), line) if axis else line] = True
    return found


def split(pruners) -> tuple[list, Pixels]:
    """Pruners of tokens, and those of pixels, of one or several."""
    kinds = {TemporalPruner: "temporal", RepeatPruner: "repeats"}
    several = pruners if isinstance(pruners, (list, tuple)) else [pruners]
    named = {}
    for pruner in several:
        name = kinds.get(type(pruner))
        if name in named:
            raise InputError(f"two of {type(pruner).__name__}; expected one at most")
        if name is not None:
            named[name] = pruner
    return [p for p in several if type(p) not in kinds], Pixels(**named)


def scales(processor) -> Mapping[str, np.ndarray]:
    """(C,) what makes a processor's values of pictures and videos differ as pixels."""
    found = {}
    for kind in ("image", "video"):
        part = getattr(processor, f"{kind}_processor", None)
        part = part or getattr(processor, "image_processor", None)
        deviation = getattr(part, "image_std", None)
        if deviation is None:
            raise InputError(
                f"the {kind} processor of {type(processor).__name__} does not say how "
                "it scales pixels; expected an image_std"
            )
        normal = getattr(part, "do_normalize", True)
        found[kind] = np.array(deviation if normal else np.ones(3), np.float32)
    return found
