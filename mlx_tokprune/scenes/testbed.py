"""Pictures of one to six things on a photograph, and what is asked about them.

Everything comes from the seed. Which visual tokens a question needs is known from the
cut-outs: those that its things cover.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .things import COLOURS, KINDS, Stock, Thing, stock

SIZE = 512  # px
STRIDE = 32  # px of a visual token
_CELLS = 3  # places along each side
_MOST = 6  # things
_SIZES = (105, 160)  # px, of a thing's longer side
_COVERED = 0.2  # share of a token's square that makes it one of a thing's
_NUMBERS = ("one", "two", "three", "four", "five", "six")
_WHERE = (
    *("at the top left", "at the top", "at the top right"),
    *("at the left", "in the centre", "at the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)
# Towards a neighbour: rows and columns.
_BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Placed:
    """A thing in a cell, numbered by rows.

    size: of its longer side, px. angle: in degrees. shift: right and down, as shares of
    the room that is left in the cell.
    """

    thing: Thing
    cell: int
    size: float
    angle: float
    flipped: bool
    shift: tuple[float, float]

    def draw(self) -> tuple[Image.Image, tuple[int, int]]:
        """Its RGBA picture, and where its top left corner is."""
        picture = self.thing.picture
        if self.flipped:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture = picture.rotate(self.angle, Image.Resampling.BICUBIC, expand=True)
        factor = self.size / max(picture.size)
        sides = [max(8, round(side * factor)) for side in picture.size]
        picture = picture.resize((sides[0], sides[1]), Image.Resampling.BILINEAR)
        room, (row, column) = SIZE / _CELLS, divmod(self.cell, _CELLS)
        left, top = (
            round(place * room + share * max(0, room - side))
            for place, share, side in zip((column, row), self.shift, sides, strict=True)
        )
        return picture, (left, top)


@dataclass(frozen=True)
class Background:
    """A square of a photograph; box: its left, top, right and lower edges in px."""

    photograph: Image.Image
    box: tuple[int, int, int, int]
    flipped: bool
    bright: float

    def draw(self) -> Image.Image:
        how = Image.Resampling.BILINEAR
        picture = self.photograph.resize((SIZE, SIZE), how, self.box)
        if self.flipped:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return picture.point(lambda value: min(255, int(value * self.bright)))


@dataclass(frozen=True)
class Scene:
    background: Background
    placed: tuple[Placed, ...]

    def draw(self) -> Image.Image:
        picture = self.background.draw()
        for one in self.placed:
            thing, corner = one.draw()
            picture.paste(thing, corner, thing)
        return picture


@dataclass(frozen=True)
class Question:
    """needed: the things that the answer is about."""

    kind: str
    prompt: str
    answer: str
    needed: tuple[Placed, ...]


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """Things of different kinds at different places."""
    known = stock(split)
    count = int(rng.integers(1, _MOST + 1))
    kinds = rng.choice(len(KINDS), count, replace=False)
    cells = rng.choice(_CELLS**2, count, replace=False)
    placed = []
    for kind, cell in zip(kinds, cells, strict=True):
        things = known.things[KINDS[kind]]
        thing = things[rng.integers(len(things))]
        size, angle = rng.uniform(*_SIZES), rng.uniform(-10, 10)
        flipped = bool(rng.random() < 0.5) and thing.kind != "sign"
        shift = (rng.random(), rng.random())
        placed.append(Placed(thing, int(cell), size, angle, flipped, shift))
    return Scene(_background(rng, known), tuple(placed))


def _background(rng: np.random.Generator, known: Stock) -> Background:
    picture = known.backgrounds[rng.integers(len(known.backgrounds))]
    side = int(min(picture.size) * rng.uniform(0.5, 1))
    left, top = (int(rng.integers(length - side + 1)) for length in picture.size)
    box = (left, top, left + side, top + side)
    return Background(picture, box, bool(rng.random() < 0.5), rng.uniform(0.75, 1.2))


# Questions --------------------------------------------------------------------------


def _what(rng: np.random.Generator, scene: Scene) -> Question:
    one = _pick(rng, scene.placed)
    asked = f"What is {_WHERE[one.cell]}?"
    return Question("what", asked, one.thing.kind, (one,))


def _count(rng: np.random.Generator, scene: Scene) -> Question:
    answer = _NUMBERS[len(scene.placed) - 1]
    return Question("count", "How many things are there?", answer, scene.placed)


def _beside(rng: np.random.Generator, scene: Scene) -> Question | None:
    cells = {one.cell: one for one in scene.placed}
    pairs = []
    for one in scene.placed:
        row, column = divmod(one.cell, _CELLS)
        for words, (down, right) in _BESIDE.items():
            there = row + down, column + right
            if all(0 <= place < _CELLS for place in there):
                other = cells.get(there[0] * _CELLS + there[1])
                pairs += [(words, one, other)] if other else []
    if not pairs:
        return None
    words, one, other = pairs[rng.integers(len(pairs))]
    asked = f"What is {words} the {one.thing.kind}?"
    return Question("beside", asked, other.thing.kind, (one, other))


def _exists(rng: np.random.Generator, scene: Scene) -> Question:
    there = {one.thing.kind: one for one in scene.placed}
    absent = [kind for kind in KINDS if kind not in there]
    if rng.random() < 0.5:
        one = _pick(rng, scene.placed)
        name, answer, needed = one.thing.kind, "yes", (one,)
    else:
        name, answer, needed = absent[rng.integers(len(absent))], "no", ()
    asked = f"Is there {_article(name)} {name}?"
    return Question("exists", asked, answer, needed)


def _colour(rng: np.random.Generator, scene: Scene) -> Question | None:
    plain = [one for one in scene.placed if one.thing.colour]
    if not plain:
        return None
    one = _pick(rng, plain)
    asked = f"What colour is the {one.thing.kind}?"
    return Question("colour", asked, one.thing.colour, (one,))


def _pick(rng: np.random.Generator, placed) -> Placed:
    return placed[rng.integers(len(placed))]


ASKING: tuple[Callable[..., Question | None], ...] = (
    *(_what, _count, _beside, _exists, _colour),
)


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


_NAMES = KINDS
# Everything that can be asked and answered.
QUESTIONS = (
    *(f"What is {where}?" for where in _WHERE),
    "How many things are there?",
    *(f"What is {words} the {name}?" for words in _BESIDE for name in _NAMES),
    *(f"Is there {_article(name)} {name}?" for name in _NAMES),
    *(f"What colour is the {name}?" for name in _NAMES),
)
ANSWERS = (*_NAMES, *_NUMBERS, "yes", "no", *COLOURS)


def ask(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """One question of each kind that the scene has an answer to."""
    return [asked for make in ASKING if (asked := make(rng, scene))]


def covered(placed: tuple[Placed, ...]) -> tuple[int, ...]:
    """The visual tokens, by rows, of which these things cover a good part."""
    alpha = Image.new("L", (SIZE, SIZE))
    for one in placed:
        thing, corner = one.draw()
        alpha.paste(255, corner, thing.getchannel("A"))
    side = SIZE // STRIDE
    squares = np.asarray(alpha, np.float32).reshape(side, STRIDE, side, STRIDE)
    share = squares.mean(axis=(1, 3)) / 255
    return tuple(np.flatnonzero(share.reshape(-1) >= _COVERED).tolist())
