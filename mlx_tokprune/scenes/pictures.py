"""Generated pictures for the embedded demo model.

A scene holds a few coloured shapes and, most of the time, a sign with a short word or
number. One `numpy.random.Generator` draws everything, so a seed defines a data set.
`questions.py` generates the questions. The demo's training is in `recipes/demo`.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..errors import InputError

COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 20),
    "yellow": (245, 222, 40),
    "green": (40, 160, 60),
    "blue": (40, 90, 215),
    "purple": (150, 50, 180),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
WORDS: Sequence[str] = (
    "EXIT STOP OPEN TAXI CAFE BANK FIRE HOTEL PARK SHOP SALE MILK BREAD TEA FISH BOOK "
    "NORTH SOUTH EAST WEST SLOW WAIT HELP FREE DOOR LIFT BUS TRAM GATE ZONE PIZZA CITY"
).split()
CELL = 64  # pixels a visual token covers: the total stride of the tower
CANVAS = 512

_TRIES = 12  # places drawn for a thing or a sign before it is left out
_COLOR_NAMES = tuple(COLORS)
_Box = tuple[float, float, float, float]  # left, top, right, bottom
_Color = tuple[int, ...]  # RGB


@dataclass(frozen=True)
class Thing:
    """Coloured shape; centre and radius in pixels of the padded square."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    turn: float  # radians


@dataclass(frozen=True)
class Sign:
    """Printed text; box `(left, top, right, bottom)` of its ink in the square."""

    text: str
    box: tuple[float, float, float, float]
    face: int  # index into `font_files()`
    size: int  # of the font, in pixels
    margin: int  # pixels of plate around the ink


@dataclass(frozen=True)
class Scene:
    """Content of a picture of `width` x `height`, padded to `canvas` x `canvas`."""

    width: int
    height: int
    canvas: int
    things: tuple[Thing, ...]
    sign: Sign | None


@dataclass
class _Layout:
    """Occupied cells and boxes while a scene is laid out."""

    cells: set[tuple[int, int]] = field(default_factory=set)
    boxes: list[_Box] = field(default_factory=list)

    def find(
        self, rng: np.random.Generator, area: _Box, half_w: float, half_h: float
    ) -> tuple[float, float] | None:
        """Reserve a free centre inside `area`; return `None` when there is no room."""
        left, top = area[0] + half_w, area[1] + half_h
        right, bottom = area[2] - half_w, area[3] - half_h
        if left >= right or top >= bottom:
            return None
        for _ in range(_TRIES):
            x, y = rng.uniform(left, right), rng.uniform(top, bottom)
            if self._take(x, y, half_w, half_h):
                return x, y
        return None

    def _take(self, x: float, y: float, half_w: float, half_h: float) -> bool:
        """Reserve a cell and a box; return false when either is occupied."""
        cell = (int(x // CELL), int(y // CELL))
        box = (x - half_w - 3, y - half_h - 3, x + half_w + 3, y + half_h + 3)
        free = all(
            box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1]
            for b in self.boxes
        )
        if cell in self.cells or not free:
            return False
        self.cells.add(cell)
        self.boxes.append(box)
        return True


def check_fonts() -> None:
    """Raise `InputError` unless the fonts of the signs are installed."""
    try:
        import matplotlib  # noqa: F401  (it ships the fonts)
    except ImportError:
        raise InputError(
            "the fonts of the generated pictures come with matplotlib; "
            "pip install 'mlx-tokprune[train]'"
        ) from None


@functools.lru_cache(maxsize=1)
def font_files() -> tuple[str | None, ...]:
    """Return Pillow's default font (`None`) and the DejaVu faces of matplotlib."""
    from matplotlib import get_data_path

    names = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
    return (None, *(f"{get_data_path()}/fonts/ttf/{name}.ttf" for name in names))


@functools.lru_cache(maxsize=256)
def font(index: int, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font of a sign. index: in `font_files()`. size: in pixels."""
    path = font_files()[index]
    if path is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(path, size)


def _polygon(
    shape: str, x: float, y: float, r: float, turn: float
) -> list[tuple[float, float]]:
    def ring(n: int, radii: list[float], phase: float) -> list[tuple[float, float]]:
        angles = [phase + turn + 2 * math.pi * i / n for i in range(n)]
        return [
            (x + rr * math.cos(a), y + rr * math.sin(a))
            for a, rr in zip(angles, radii, strict=True)
        ]

    if shape == "square":
        return ring(4, [r * 1.15] * 4, math.pi / 4)
    if shape == "triangle":
        return ring(3, [r * 1.2] * 3, -math.pi / 2)
    if shape == "star":
        return ring(10, [r * 1.2, r * 0.5] * 5, -math.pi / 2)
    t = r * 0.36
    arms = [(-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t)]
    arms += [(t, r), (-t, r), (-t, t), (-r, t), (-r, -t), (-t, -t)]
    c, s = math.cos(turn), math.sin(turn)
    return [(x + c * a - s * b, y + s * a + c * b) for a, b in arms]


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, fill: _Color) -> None:
    x, y, r = thing.x, thing.y, thing.radius
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "ring":
        width = max(5, round(r * 0.36))
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=width)
    else:
        draw.polygon(_polygon(thing.shape, x, y, r, thing.turn), fill=fill)


def _draw_sign(
    draw: ImageDraw.ImageDraw, sign: Sign, ink: _Color, plate: _Color
) -> None:
    letters = font(sign.face, sign.size)
    left, top, right, bottom = sign.box
    m = sign.margin
    draw.rectangle((left - m, top - m, right + m, bottom + m), fill=plate)
    dx, dy, *_ = _ink_box(sign.face, sign.size, sign.text)
    draw.text((left - dx, top - dy), sign.text, font=letters, fill=ink)


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    base = rng.uniform(30, 165) + rng.uniform(-14, 14, 3)
    style = rng.integers(4)
    ys, xs = np.ogrid[:height, :width]
    shade = np.zeros((height, width), np.float32)
    if style == 1:
        ramp = ys / height if rng.integers(2) else xs / width
        shade = shade + ramp * rng.uniform(-45, 45)
    elif style == 2:
        coarse = rng.normal(0, 16, (height // 32 + 2, width // 32 + 2)) + 128
        blobs = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
        blobs = blobs.resize((width, height), Image.Resampling.BILINEAR)
        shade = np.asarray(blobs).astype(np.float32) - 128
    elif style == 3:
        period = int(rng.integers(12, 48))
        stripes = ((xs * rng.integers(0, 2) + ys) // period) % 2
        shade = stripes * np.float32(rng.uniform(-28, 28))
    pixels = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        pixels[..., channel] = np.clip(shade + np.float32(base[channel]), 0, 255)
    return Image.fromarray(pixels)


@functools.lru_cache(maxsize=8192)
def _ink_box(face: int, size: int, text: str) -> tuple[float, float, float, float]:
    return font(face, size).getbbox(text)


def _sample_text(rng: np.random.Generator) -> str:
    if rng.random() < 0.4:
        return str(rng.integers(10, 100))
    return WORDS[int(rng.integers(len(WORDS)))]


def _sample_sign(rng: np.random.Generator, layout: _Layout, area: _Box) -> Sign | None:
    """Draw a sign; return `None` where there is no room for it."""
    text = _sample_text(rng)
    face, size = int(rng.integers(len(font_files()))), int(rng.integers(30, 50))
    left, top, right, bottom = _ink_box(face, size, text)
    margin = int(rng.integers(6, 14))
    half_w, half_h = (right - left) / 2, (bottom - top) / 2
    at = layout.find(rng, area, half_w + margin, half_h + margin)
    if at is None:
        return None
    x, y = at
    box = (x - half_w, y - half_h, x + half_w, y + half_h)
    return Sign(text, box, face, size, margin)


def _sample_things(
    rng: np.random.Generator, layout: _Layout, area: _Box, most: int
) -> tuple[Thing, ...]:
    shapes = rng.permutation(SHAPES)[: rng.integers(2, 6)]
    colors = rng.permutation(_COLOR_NAMES)[: rng.integers(2, 6)]
    things = []
    for _ in range(rng.integers(1, most + 1)):
        shape = str(shapes[rng.integers(len(shapes))])
        color = str(colors[rng.integers(len(colors))])
        radius, turn = rng.uniform(20, 44), rng.uniform(-0.25, 0.25)
        at = layout.find(rng, area, radius * 1.2, radius * 1.2)
        if at is not None:
            things.append(Thing(shape, color, *at, radius, turn))
    return tuple(things)


def sample_scene(
    rng: np.random.Generator, canvas: int = CANVAS, max_things: int = 5
) -> Scene:
    """Draw the content of a picture whose longer side is `canvas` pixels.

    Half of the pictures are not square; coordinates are those of the centred square
    that preprocessing pads to. No two centres share a visual token. max_things: largest
    number of shapes.
    """
    width = height = canvas
    if rng.random() < 0.5:
        short = int(canvas * rng.uniform(0.6, 1.0))
        width, height = (canvas, short) if rng.random() < 0.6 else (short, canvas)
    left, top = (canvas - width) // 2, (canvas - height) // 2
    area = (left, top, left + width, top + height)
    while True:  # a large sign in a small picture can leave no room for a thing
        layout = _Layout()
        sign = _sample_sign(rng, layout, area) if rng.random() < 0.8 else None
        things = _sample_things(rng, layout, area, max_things)
        if things:
            return Scene(width, height, canvas, things, sign)


def render(rng: np.random.Generator, scene: Scene) -> Image.Image:
    """Draw the RGB picture of a scene, `width` x `height` pixels, not padded."""
    left = (scene.canvas - scene.width) // 2
    top = (scene.canvas - scene.height) // 2
    square = Image.new("RGB", (scene.canvas, scene.canvas))
    square.paste(_background(rng, scene.width, scene.height), (left, top))
    draw = ImageDraw.Draw(square)
    if scene.sign is not None:
        dark, light = rng.integers(5, 60, 3), rng.integers(200, 250, 3)
        ink, plate = (dark, light) if rng.random() < 0.6 else (light, dark)
        _draw_sign(draw, scene.sign, tuple(map(int, ink)), tuple(map(int, plate)))
    for thing in scene.things:
        fill = np.clip(COLORS[thing.color] + rng.normal(0, 9, 3), 0, 255)
        _draw_thing(draw, thing, tuple(map(int, fill)))
    picture = square.crop((left, top, left + scene.width, top + scene.height))
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.2)))
    return _add_noise(rng, picture) if rng.random() < 0.6 else picture


def _add_noise(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture).astype(np.int16)
    height, width, _ = pixels.shape
    coarse = rng.standard_normal(((height + 1) // 2, (width + 1) // 2), np.float32)
    noise = (np.float32(rng.uniform(2, 12)) * coarse).astype(np.int16)
    pixels += np.repeat(np.repeat(noise, 2, 0), 2, 1)[:height, :width, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
