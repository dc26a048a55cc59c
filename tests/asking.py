"""Questions to a model that answers, shared by several tests."""

import mlx.core as mx
from conftest import TINY

from mlx_tokprune import stream_generate
from mlx_tokprune.pipeline import Scene

IMAGE = TINY / "image_0.png"
QUESTIONS = ("What does the sign say?", "How many shapes are there?", "Where is it?")


def scene_of(processor, images, text: str) -> Scene:
    pixels = mx.array(processor.pixels(images))
    return Scene(pixels, processor.prompt(text, len(images)))


def answer(model, processor, images, prompt, **options) -> tuple[list[int], int]:
    """Return the token ids, and the number of prompt tokens read from a cache."""
    pieces = list(stream_generate(model, processor, images, prompt, **options))
    return [piece.token for piece in pieces], pieces[-1].reused
