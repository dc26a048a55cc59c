"""Held-out scenes of the demo model, with seeds that no training uses."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from ..processing.image import preprocess
from .pictures import CANVAS, render, sample_scene
from .questions import KINDS, Question, ask

HELD_OUT = 9  # first number of every held-out seed; training uses 1
TRAINING = 1  # first number of every training seed
_DRAWN_AT_ONCE = 32  # scenes of a seed


def held_out(pictures: int) -> Iterator[tuple[Image.Image, list[Question | None]]]:
    """Yield pictures with one question of each kind, `None` where a kind has none."""
    for start in range(0, pictures, _DRAWN_AT_ONCE):
        size = min(_DRAWN_AT_ONCE, pictures - start)
        rng = np.random.default_rng((HELD_OUT, start))
        scenes = [sample_scene(rng, CANVAS, 5) for _ in range(size)]
        pixels = preprocess([render(rng, scene) for scene in scenes], CANVAS)
        rng = np.random.default_rng((HELD_OUT, start, 1))
        for square, scene in zip(pixels, scenes, strict=True):
            image = Image.fromarray(np.round(square * 255).astype(np.uint8))
            image = image.crop(image.getbbox())  # scenes come padded with black
            yield image, [ask(rng, scene, kind) for kind in KINDS]
