"""Cut-out photographs by kind, and photographs to put them on.

The test split shares no picture with the training split: it has every third thing of a
kind, and its own backgrounds.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_tokprune.errors import InputError

from .cache import cache_folder

SPLITS = ("train", "test")
FOLDER = "pictures"
KINDS = (
    "ball",
    "bird",
    "fish",
    "flower",
    "fruit",
    "garment",
    "gravestone",
    "hat",
    "insect",
    "instrument",
    "mammal",
    "planet",
    "sign",
    "tool",
    "vegetable",
    "vehicle",
)


@dataclass(frozen=True)
class Thing:
    """Cut-out photograph of a thing.

    picture: RGBA, cropped to the thing. colour: `None` where no colour prevails.
    """

    kind: str
    name: str
    picture: Image.Image
    colour: str | None


@dataclass(frozen=True)
class Stock:
    """Things by kind, and backgrounds, of one split."""

    things: dict[str, tuple[Thing, ...]]
    backgrounds: tuple[Image.Image, ...]


@functools.cache
def stock(split: str) -> Stock:
    """Read the pictures of a split, "train" or "test".

    Raises `InputError` where the pictures are missing.
    """
    folder = cache_folder("testbed") / FOLDER / split
    if not folder.is_dir():
        raise InputError(
            f"the pictures of the test bed are not in {folder}; get them with "
            "`python -m recipes.testbed`, from a clone"
        )
    things = {kind: _things(folder / kind) for kind in KINDS}
    backgrounds = [Image.open(f).convert("RGB") for f in sorted(folder.glob("*.jpg"))]
    return Stock(things, tuple(backgrounds))


def _things(folder: Path) -> tuple[Thing, ...]:
    things = []
    for file in sorted(folder.glob("*.png")):
        picture = Image.open(file).convert("RGBA")
        things.append(Thing(folder.name, file.stem, picture, colour_of(picture)))
    return tuple(things)


# Colours by hue, in 256ths of the circle.
_HUES = (
    *((10, "red"), (28, "orange"), (46, "yellow"), (118, "green"), (180, "blue")),
    *((215, "purple"), (242, "pink"), (256, "red")),
)
COLOURS = (*(name for _, name in _HUES[:-1]), "brown", "black", "white", "grey")
_CLEAR = 0.55  # least share of pixels of the colour that names a thing


def colour_of(picture: Image.Image) -> str | None:
    """Return the name of the colour that prevails in an RGBA picture, else `None`."""
    opaque = np.asarray(picture.getchannel("A")) > 127
    pixels = np.asarray(picture.convert("RGB").convert("HSV"))[opaque].astype(int)
    if not len(pixels):
        return None
    hue, saturation, value = pixels.T
    ends = np.array([end for end, _ in _HUES])
    names = np.array([name for _, name in _HUES], dtype="<U8")[
        np.searchsorted(ends, hue, side="right").clip(max=len(_HUES) - 1)
    ]
    dark_orange = np.isin(names, ("orange", "red")) & (value < 170) & (saturation < 220)
    names[dark_orange] = "brown"
    pale = saturation < 45
    names[pale] = "grey"
    names[pale & (value > 190)] = "white"
    names[value < 50] = "black"
    colours, counts = np.unique(names, return_counts=True)
    most = counts.argmax()
    return str(colours[most]) if counts[most] >= _CLEAR * len(names) else None
