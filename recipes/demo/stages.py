"""Stages of the demo model's training, and the NumPy arrays of each step.

The module does not need MLX: `recipe.py` and its PyTorch form, `in_torch.py`, import
it.
"""

from dataclasses import dataclass

import numpy as np

from mlx_tokprune.processing.image import preprocess
from mlx_tokprune.scenes.held_out import TRAINING
from mlx_tokprune.scenes.pictures import (
    CANVAS,
    Scene,
    render,
    sample_scene,
)
from mlx_tokprune.scenes.questions import KINDS, SIDE, Question, ask_many

from .labels import cell_labels, fine_labels

QUESTIONS = 8  # about each picture
KEPT = (8, 8, 16, 16, 32, 64)  # numbers of oracle tokens; a step draws one


@dataclass(frozen=True)
class Stage:
    """Stage of the training: its loss, length and data."""

    name: str
    loss: str
    steps: int
    batch: int
    learning_rate: float
    canvas: int = CANVAS
    most: int = 5
    kinds: tuple[str, ...] = ()  # of questions, in turn

    @property
    def questions(self) -> int:
        return QUESTIONS if self.kinds else 0

    @property
    def warm_up(self) -> int:
        """Number of steps in which the learning rate rises."""
        return max(1, self.steps // 40)


_COMPARE = ("where",) * 5 + ("count", "color", "read")
_SIDES = (SIDE, "where", SIDE, "count", "color", "where", "read", "shape")
_MIXED = ("color", "where", "shape", "where", "count", "where", "count", "read")
STAGES = (
    Stage("tower", "tower", 8000, 16, 2e-3, canvas=256, most=2),
    Stage("language", "language", 7000, 16, 1e-3, kinds=KINDS),
    Stage("comparisons", "language", 1750, 16, 1e-3, kinds=_COMPARE),
    Stage("all questions", "language", 2200, 16, 8e-4, kinds=_MIXED),
    Stage("full pictures", "tower", 1500, 8, 1e-3),
    Stage("left or right", "language", 800, 128, 1e-3, kinds=_SIDES),
    Stage("projector", "align", 250, 16, 3e-3),
    Stage("together", "joint", 1900, 8, 3e-4, kinds=_MIXED),
)


# Pictures -----------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneArrays:
    """Arrays and questions of B scenes.

    cells: labels (B, N). pixels: (B, S, S, 3). fine: labels (B, H, W). Parts that the
    stage does not use are `None`.
    """

    scenes: list[Scene]
    cells: dict[str, np.ndarray]
    pixels: np.ndarray | None = None
    fine: dict[str, np.ndarray] | None = None
    questions: list[list[Question]] | None = None


def draw_scenes(
    seed: tuple[int, ...],
    size: int,
    canvas: int,
    most: int,
    pictures: bool = True,
    questions: int = 0,
    kinds: tuple[str, ...] = KINDS,
) -> SceneArrays:
    """Draw `size` scenes with at most `most` things each.

    pictures: whether to render pixels and fine labels. questions: number for each
    scene, of `kinds`.
    """
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, canvas, most) for _ in range(size)]
    pixels = fine = asked = None
    if pictures:
        pixels = preprocess([render(rng, s) for s in scenes], canvas)
        fine = _stack([fine_labels(s) for s in scenes])
    if questions:
        asked = [ask_many(rng, s, questions, kinds) for s in scenes]
    cells = _stack([cell_labels(s) for s in scenes])
    return SceneArrays(scenes, cells, pixels, fine, asked)


def draw_step(stage: Stage, number: int, step: int) -> SceneArrays:
    """Draw the scenes of one step of a stage. number: the stage's index."""
    return draw_scenes(
        (TRAINING, number, step),
        stage.batch,
        stage.canvas,
        stage.most,
        stage.loss != "language",
        stage.questions,
        stage.kinds,
    )


def choices_of(number: int, step: int) -> np.random.Generator:
    """Return the generator that draws the number of oracle tokens of a step."""
    return np.random.default_rng((TRAINING, number, step, 1))


def _stack(labels: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    stacked = {k: np.stack([row[k] for row in labels]) for k in labels[0]}
    return {k: v.astype(np.int32) for k, v in stacked.items()}
