"""`Temporal`: reuse of visual tokens in the unchanged regions of video frames.

FastViTHD is convolutional with conditional positions, so any part of an image can be
encoded alone. Only the smallest rectangle with all changed cells of a frame is encoded,
with a border of unchanged cells around it; its tokens replace the old ones. This is an
approximation: through the tower's attention and its squeeze-and-excite, tokens far from
a change would change a little, too. Similarly, VLA-Cache (arXiv 2502.02175) reuses keys
and values of unchanged patches in the language model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..features import Features
from ..models.protocol import VisionModel
from ..pipeline import Scene, VisualTokens, prune_at_tower
from ..pipeline.timing import NO_CLOCK, NoClock
from ..pruners import Plan, Pruner, as_plan

_BORDER = 1  # unchanged cells around the changed rectangle that are encoded, too
_MOST = 0.6  # largest share of cells to encode as a part; above, the whole frame


Box = tuple[int, int, int, int]  # top, left, bottom, right, in cells


@dataclass(frozen=True)
class _Frame:
    """Tokens of the previous frame.

    pixels: the pixels that each token was encoded from. ages: (H, W), frames since each
    token was encoded.
    """

    pixels: np.ndarray
    tokens: mx.array
    ages: np.ndarray


class Temporal:
    """Encoder of video frames, in order: `stream_generate(..., vision=Temporal(p))`.

    pruner: one pruner, or several at different places. threshold: change of a pixel,
    in [0, 1], above which its cell is encoded again. max_age: frames for which a token
    may be reused. `reset` begins another video; a frame of another size or another
    model does so, too. `encoded` is the share of the last frame's cells that were
    encoded. Raises `InputError` for values out of range and for methods that need more
    than the frame's tokens.
    """

    def __init__(
        self,
        pruner: Pruner | Iterable[Pruner] | None = None,
        threshold: float = 0.05,
        max_age: int = 8,
    ):
        self.plan = as_plan(pruner)
        for chosen in self.plan:
            if chosen.place == "tower" and set(chosen.needs) - {"grid"}:
                raise InputError(
                    f"method {chosen.method!r} needs more of a frame than its tokens, "
                    "which parts of it cannot give; choose another, such as 'norm'"
                )
        if not 0 <= threshold < 1 or not isinstance(max_age, int) or max_age < 0:
            raise InputError(
                f"threshold {threshold:g} and max age {max_age} are out of range; "
                "expected a threshold in [0, 1) and a whole number of frames"
            )
        self._threshold, self._max_age = threshold, max_age
        self.reset()

    def reset(self) -> None:
        """Begin another video: forget the previous frame."""
        self._last: _Frame | None = None
        self._model = None
        self.encoded = 0.0

    def check(self, model: VisionModel) -> None:
        """Raise `InputError` for a tower that cannot encode parts of an image."""
        if not model.sees_parts:
            raise InputError(
                "this model's tower cannot encode a part of an image alone; expected "
                "a FastVLM"
            )

    def __call__(
        self, model: VisionModel, scene: Scene, plan: Plan, clock: NoClock = NO_CLOCK
    ) -> VisualTokens:
        """Return the kept, projected visual tokens of the next frame.

        The scene has the (1, h, w, 3) pixels of one frame; else raises `InputError`.
        """
        pixels = scene.pixels
        if pixels is None or pixels.shape[0] != 1:
            frames = 0 if pixels is None else pixels.shape[0]
            raise InputError(f"frames come one by one; {frames} given")
        with clock.stage("vision") as done:
            features = self._encode(model, pixels)
            done += features.arrays()
        return prune_at_tower(model, scene, plan, features, clock)

    def _encode(self, model: VisionModel, pixels: mx.array) -> Features:
        """Return the frame's features and compute only the changed part."""
        if self._model is not model:
            self.reset()
            self._model = model
        frame, stride = np.array(pixels)[0], model.stride
        cells = (frame.shape[0] // stride, frame.shape[1] // stride)
        if self._last is None or self._last.pixels.shape != frame.shape:
            box = (0, 0, *cells)
        else:
            box = _box(self._stale(frame, cells, stride))
        self._last = self._updated(model, frame, cells, box)
        return Features(self._last.tokens.flatten(1, 2), cells)

    def _stale(
        self, frame: np.ndarray, cells: tuple[int, int], stride: int
    ) -> np.ndarray:
        """Return (H, W) bool: cells that changed since encoding or are too old."""
        change = np.abs(frame - self._last.pixels).max(axis=-1)
        change = change.reshape(cells[0], stride, cells[1], stride)
        changed = change.max(axis=(1, 3)) > self._threshold
        return changed | (self._last.ages >= self._max_age)

    def _updated(
        self,
        model: VisionModel,
        frame: np.ndarray,
        cells: tuple[int, int],
        box: Box | None,
    ) -> _Frame:
        """Encode the cells in `box` and merge them into the previous frame."""
        if box is None:
            self.encoded = 0.0
            return _Frame(self._last.pixels, self._last.tokens, self._last.ages + 1)
        outer, stride = _with_border(box, cells), model.stride
        self.encoded = _area(outer) / (cells[0] * cells[1])
        if self.encoded > _MOST:
            box = outer = (0, 0, *cells)
            self.encoded = 1.0
        top, left, bottom, right = (side * stride for side in outer)
        features = model.encode(mx.array(frame[None, top:bottom, left:right]))
        grid = features.grid or (1, features.total)
        tokens = features.tokens.reshape(1, *grid, -1)
        if outer == (0, 0, *cells):
            return _Frame(frame, tokens, np.zeros(cells, int))
        top, left, bottom, right = box
        inner = tokens[
            :,
            top - outer[0] : bottom - outer[0],
            left - outer[1] : right - outer[1],
        ]
        merged = mx.array(self._last.tokens)
        merged[:, top:bottom, left:right] = inner
        ages = self._last.ages + 1
        ages[top:bottom, left:right] = 0
        # Each cell keeps the pixels of its encoding: slow changes add up against them.
        encoded = self._last.pixels.copy()
        rows = slice(top * stride, bottom * stride)
        columns = slice(left * stride, right * stride)
        encoded[rows, columns] = frame[rows, columns]
        mx.eval(merged)  # else the graph would hold every earlier frame
        return _Frame(encoded, merged, ages)


def _box(stale: np.ndarray) -> Box | None:
    """Return the smallest rectangle with all stale cells; `None` without any."""
    if not stale.any():
        return None
    rows, columns = np.flatnonzero(stale.any(1)), np.flatnonzero(stale.any(0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def _with_border(box: Box, cells: tuple[int, int]) -> Box:
    top, left, bottom, right = box
    return (
        max(0, top - _BORDER),
        max(0, left - _BORDER),
        min(cells[0], bottom + _BORDER),
        min(cells[1], right + _BORDER),
    )


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
