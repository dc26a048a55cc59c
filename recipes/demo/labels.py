"""Labels of a scene's visual tokens for the helper losses."""

import functools

import numpy as np

from mlx_tokprune.scenes.pictures import (
    CELL,
    COLORS,
    SHAPES,
    WORDS,
    Scene,
    font,
)

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
FINE = 16  # pixels of a cell of the fine labels
COLOR_NAMES = tuple(COLORS)


def cell_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Return the labels of each visual token: arrays `(cells,)` int64, -1 where unset.

    `shape` and `color` are 0 for empty cells; a sign is shape `len(SHAPES) + 1`. `x`,
    `y`: centre in the square, in units of 8 px. `word`, `tens`, `units`: text of the
    sign, a word or two digits.
    """
    side = scene.canvas // CELL
    n = side * side
    labels = {k: np.full(n, -1, np.int64) for k in ("x", "y", "word", "tens", "units")}
    labels |= {k: np.zeros(n, np.int64) for k in ("shape", "color")}

    def cell(x: float, y: float) -> int:
        at = int(y // CELL) * side + int(x // CELL)
        labels["x"][at], labels["y"][at] = int(x // 8), int(y // 8)
        return at

    for thing in scene.things:
        at = cell(thing.x, thing.y)
        labels["shape"][at] = 1 + SHAPES.index(thing.shape)
        labels["color"][at] = 1 + COLOR_NAMES.index(thing.color)
    if scene.sign is not None:
        left, top, right, bottom = scene.sign.box
        at = cell((left + right) / 2, (top + bottom) / 2)
        labels["shape"][at] = len(SHAPES) + 1
        text = scene.sign.text
        if text.isdigit():
            labels["tens"][at], labels["units"][at] = int(text[0]), int(text[1])
        else:
            labels["word"][at] = WORDS.index(text)
    return labels


def fine_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Return `shape`, `color` and `char` labels at stride 16.

    Arrays `(canvas / 16, canvas / 16)` int64, 0 where empty.
    """
    side = scene.canvas // FINE
    centers = (np.arange(side) + 0.5) * FINE
    labels = {k: np.zeros((side, side), np.int64) for k in ("shape", "color", "char")}
    for thing in scene.things:
        far = np.hypot(centers[None] - thing.x, centers[:, None] - thing.y)
        inside = far < thing.radius
        labels["shape"][inside] = 1 + SHAPES.index(thing.shape)
        labels["color"][inside] = 1 + COLOR_NAMES.index(thing.color)
    if scene.sign is not None:
        _, top, _, bottom = scene.sign.box
        rows = (centers > top - 4) & (centers < bottom + 4)
        sign = scene.sign
        edges = sign.box[0] + np.array(_letter_edges(sign.face, sign.size, sign.text))
        for letter, left, right in zip(sign.text, edges, edges[1:], strict=False):
            columns = (centers >= left) & (centers < right)
            here = rows[:, None] & columns[None]
            labels["char"][here] = 1 + CHARACTERS.index(letter)
    return labels


@functools.lru_cache(maxsize=8192)
def _letter_edges(face: int, size: int, text: str) -> tuple[float, ...]:
    letters = font(face, size)
    return tuple(letters.getlength(text[:i]) for i in range(len(text) + 1))
