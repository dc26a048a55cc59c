"""Batches of scenes as arrays, each from its own seed: resuming repeats nothing."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..image import preprocess
from .scenes import (
    KINDS,
    Question,
    Scene,
    ask_many,
    cell_labels,
    fine_labels,
    render,
    sample_scene,
)


@dataclass(frozen=True)
class SceneBatch:
    """B scenes: pixels (B, S, S, 3), labels (B, N), fine labels (B, H, W), questions.

    Parts that the stage does not use are `None`.
    """

    scenes: list[Scene]
    cells: dict[str, mx.array]
    pixels: mx.array | None = None
    fine: dict[str, mx.array] | None = None
    questions: list[list[Question]] | None = None


def make_batch(
    seed: tuple[int, ...],
    size: int,
    canvas: int,
    most: int,
    pictures: bool = True,
    questions: int = 0,
    kinds: tuple[str, ...] = KINDS,
) -> SceneBatch:
    """`size` scenes with at most `most` things, `questions` of `kinds` about each."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, canvas, most) for _ in range(size)]
    pixels = fine = asked = None
    if pictures:
        pixels = mx.array(preprocess([render(rng, s) for s in scenes], canvas))
        fine = _stack([fine_labels(s) for s in scenes])
    if questions:
        asked = [ask_many(rng, s, questions, kinds) for s in scenes]
    cells = _stack([cell_labels(s) for s in scenes])
    return SceneBatch(scenes, cells, pixels, fine, asked)


def _stack(labels: list[dict[str, np.ndarray]]) -> dict[str, mx.array]:
    stacked = {k: np.stack([row[k] for row in labels]) for k in labels[0]}
    return {k: mx.array(v.astype(np.int32)) for k, v in stacked.items()}
