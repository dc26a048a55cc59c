"""Batches of scenes as MLX arrays."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_tokprune.scenes.pictures import Scene
from mlx_tokprune.scenes.questions import Question

from .stages import SceneArrays, draw_scenes


@dataclass(frozen=True)
class SceneBatch:
    """Scenes with their pixels, labels and questions as MLX arrays."""

    scenes: list[Scene]
    cells: dict[str, mx.array]
    pixels: mx.array | None = None
    fine: dict[str, mx.array] | None = None
    questions: list[list[Question]] | None = None


def as_batch(drawn: SceneArrays) -> SceneBatch:
    """Return drawn scenes as MLX arrays."""

    def arrays(labels):
        return labels and {name: mx.array(array) for name, array in labels.items()}

    pixels = None if drawn.pixels is None else mx.array(drawn.pixels)
    cells, fine = arrays(drawn.cells), arrays(drawn.fine)
    return SceneBatch(drawn.scenes, cells, pixels, fine, drawn.questions)


def make_batch(*args, **options) -> SceneBatch:
    """Draw scenes with the arguments of `draw_scenes`; return them as MLX arrays."""
    return as_batch(draw_scenes(*args, **options))
