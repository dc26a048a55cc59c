"""Test bed: pictures of one to six things on a photograph, and questions about them.

The seed defines everything. The cut-outs tell which visual tokens a question needs:
those that its things cover.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .things import COLOURS, KINDS, Stock, Thing, stock

SIZE = 512  # px
STRIDE = 32  # px of a visual token
_CELLS = 3  # cells along each side
_MOST = 6  # things
_SIZES = (105, 160)  # px, of a thing's longer side
_COVERED = 0.2  # least share of a token's square that a thing covers
_NUMBERS = ("one", "two", "three", "four", "five", "six")
_WHERE = (
    *("at the top left", "at the top", "at the top right"),
    *("at the left", "in the centre", "at the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)
# Offset to a neighbour: rows, columns.
_BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Placement:
    """Placement of a thing in a picture.

    cell: number of its cell, by rows. size: of its longer side, px. angle: in degrees.
    flipped: mirrored left to right. shift: right and down, as shares of the room that
    is left in the cell.
    """

    thing: Thing
    cell: int
    size: float
    angle: float
    flipped: bool
    shift: tuple[float, float]

    def draw(self) -> tuple[Image.Image, tuple[int, int]]:
        """Return the thing's RGBA picture, and its top left corner in px."""
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
    """Square of a photograph, behind the things.

    box: left, top, right and lower edges in px. bright: factor of the pixels.
    """

    photograph: Image.Image
    box: tuple[int, int, int, int]
    flipped: bool
    bright: float

    def draw(self) -> Image.Image:
        """Draw the square, `SIZE` x `SIZE` pixels, RGB."""
        bilinear = Image.Resampling.BILINEAR
        picture = self.photograph.resize((SIZE, SIZE), bilinear, self.box)
        if self.flipped:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return picture.point([min(255, int(v * self.bright)) for v in range(256)] * 3)


@dataclass(frozen=True)
class Scene:
    """Background and placed things of a picture."""

    background: Background
    placed: tuple[Placement, ...]

    def draw(self) -> Image.Image:
        """Draw the picture, `SIZE` x `SIZE` pixels, RGB."""
        picture = self.background.draw()
        for item in self.placed:
            thing, corner = item.draw()
            picture.paste(thing, corner, thing)
        return picture


@dataclass(frozen=True)
class Question:
    """Question with its correct answer.

    needed: placed things that show the answer.
    """

    kind: str
    prompt: str
    answer: str
    needed: tuple[Placement, ...]


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """Draw a scene: things of different kinds in different cells.

    split: "train" or "test". Raises `InputError` where the pictures are missing.
    """
    pictures = stock(split)
    count = int(rng.integers(1, _MOST + 1))
    kinds = rng.choice(len(KINDS), count, replace=False)
    cells = rng.choice(_CELLS**2, count, replace=False)
    placed = []
    for kind, cell in zip(kinds, cells, strict=True):
        things = pictures.things[KINDS[kind]]
        thing = things[rng.integers(len(things))]
        size, angle = rng.uniform(*_SIZES), rng.uniform(-10, 10)
        flipped = bool(rng.random() < 0.5) and thing.kind != "sign"
        shift = (rng.random(), rng.random())
        placed.append(Placement(thing, int(cell), size, angle, flipped, shift))
    return Scene(_background(rng, pictures), tuple(placed))


def _background(rng: np.random.Generator, pictures: Stock) -> Background:
    picture = pictures.backgrounds[rng.integers(len(pictures.backgrounds))]
    side = int(min(picture.size) * rng.uniform(0.5, 1))
    left, top = (int(rng.integers(length - side + 1)) for length in picture.size)
    box = (left, top, left + side, top + side)
    return Background(picture, box, bool(rng.random() < 0.5), rng.uniform(0.75, 1.2))


# Questions --------------------------------------------------------------------------


def _what(rng: np.random.Generator, scene: Scene) -> Question:
    item = _pick(rng, scene.placed)
    prompt = f"What is {_WHERE[item.cell]}?"
    return Question("what", prompt, item.thing.kind, (item,))


def _count(rng: np.random.Generator, scene: Scene) -> Question:
    answer = _NUMBERS[len(scene.placed) - 1]
    return Question("count", "How many things are there?", answer, scene.placed)


def _beside(rng: np.random.Generator, scene: Scene) -> Question | None:
    cells = {item.cell: item for item in scene.placed}
    pairs = []
    for item in scene.placed:
        row, column = divmod(item.cell, _CELLS)
        for words, (down, right) in _BESIDE.items():
            neighbour = row + down, column + right
            if all(0 <= place < _CELLS for place in neighbour):
                other = cells.get(neighbour[0] * _CELLS + neighbour[1])
                pairs += [(words, item, other)] if other else []
    if not pairs:
        return None
    words, item, other = pairs[rng.integers(len(pairs))]
    prompt = f"What is {words} the {item.thing.kind}?"
    return Question("beside", prompt, other.thing.kind, (item, other))


def _exists(rng: np.random.Generator, scene: Scene) -> Question:
    present = {item.thing.kind: item for item in scene.placed}
    absent = [kind for kind in KINDS if kind not in present]
    if rng.random() < 0.5:
        item = _pick(rng, scene.placed)
        name, answer, needed = item.thing.kind, "yes", (item,)
    else:
        name, answer, needed = absent[rng.integers(len(absent))], "no", ()
    prompt = f"Is there {_article(name)} {name}?"
    return Question("exists", prompt, answer, needed)


def _colour(rng: np.random.Generator, scene: Scene) -> Question | None:
    colours = ((item, item.thing.colour) for item in scene.placed)
    plain = [(item, colour) for item, colour in colours if colour]
    if not plain:
        return None
    item, colour = plain[int(rng.integers(len(plain)))]
    prompt = f"What colour is the {item.thing.kind}?"
    return Question("colour", prompt, colour, (item,))


def _pick(rng: np.random.Generator, placed: Sequence[Placement]) -> Placement:
    return placed[int(rng.integers(len(placed)))]


ASKING: tuple[Callable[..., Question | None], ...] = (
    *(_what, _count, _beside, _exists, _colour),
)


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


_NAMES = KINDS
# All possible questions and answers.
QUESTIONS = (
    *(f"What is {where}?" for where in _WHERE),
    "How many things are there?",
    *(f"What is {words} the {name}?" for words in _BESIDE for name in _NAMES),
    *(f"Is there {_article(name)} {name}?" for name in _NAMES),
    *(f"What colour is the {name}?" for name in _NAMES),
)
ANSWERS = (*_NAMES, *_NUMBERS, "yes", "no", *COLOURS)


def ask(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """Draw one question of each kind that the scene has an answer to."""
    return [question for make in ASKING if (question := make(rng, scene))]


def covered(placed: tuple[Placement, ...]) -> tuple[int, ...]:
    """Return the numbers, by rows, of the visual tokens that these things cover.

    A token counts when the things cover at least a fifth of its square.
    """
    alpha = Image.new("L", (SIZE, SIZE))
    for item in placed:
        thing, corner = item.draw()
        alpha.paste(255, corner, thing.getchannel("A"))
    side = SIZE // STRIDE
    squares = np.asarray(alpha, np.float32).reshape(side, STRIDE, side, STRIDE)
    share = squares.mean(axis=(1, 3)) / 255
    return tuple(np.flatnonzero(share.reshape(-1) >= _COVERED).tolist())
