"""The stages of the demo model's training, and what a step reads, as NumPy arrays.

Nothing here needs MLX: `recipe.py` trains from it, and so does a twin in PyTorch
(`benchmarks/demo_in_torch.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..image import preprocess
from .questions import KINDS, SIDE, Question, ask_many
from .scenes import CANVAS, Scene, cell_labels, fine_labels, render, sample_scene

QUESTIONS = 8  # about each picture
TRAINING = 1  # first number of every training seed
IGNORE = -100
KEPT = (8, 8, 16, 16, 32, 64)  # oracle tokens, of which a step draws


@dataclass(frozen=True)
class Stage:
    """A part of the recipe: which loss, how long, and on what."""

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
        """Steps in which the learning rate rises."""
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
    """B scenes: pixels (B, S, S, 3), labels (B, N), fine labels (B, H, W), questions.

    Parts that the stage does not use are `None`.
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
    """`size` scenes with at most `most` things, `questions` of `kinds` about each."""
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
    """What `step` of a stage, the recipe's `number`, trains on."""
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
    """What draws the count of oracle tokens of a step."""
    return np.random.default_rng((TRAINING, number, step, 1))


def _stack(labels: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    stacked = {k: np.stack([row[k] for row in labels]) for k in labels[0]}
    return {k: v.astype(np.int32) for k, v in stacked.items()}


# Questions ----------------------------------------------------------------------------

# Token ids of a question, and of its answer.
Pair = tuple[Sequence[int], Sequence[int]]


def padded_arrays(
    rows: Sequence[Sequence[Pair | None]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids and targets (B, Q, L) int32 of Q questions, and where ids are the prompt's.

    targets: the next token where it belongs to the answer, else `IGNORE`. `None` leaves
    a gap.
    """
    length = max(len(p) + len(a) for row in rows for p, a in filter(None, row))
    ids = np.zeros((len(rows), len(rows[0]), length), np.int32)
    targets, prompts = np.full_like(ids, IGNORE), np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        for j, pair in enumerate(row):
            if pair is not None:
                prompt, answer = pair
                tokens = [*prompt, *answer]
                ids[i, j, : len(tokens)] = tokens
                prompts[i, j, : len(prompt)] = True
                targets[i, j, len(prompt) - 1 : len(tokens) - 1] = answer
    return ids, targets, prompts


def pairs_of(
    rows: Sequence[Sequence[Question | None]], encode, suffix: str, end: int
) -> list[list[Pair | None]]:
    """The token ids of questions with their answers."""

    def pair(asked: Question | None) -> Pair | None:
        if asked is None:
            return None
        return encode(f"\n{asked.prompt}{suffix}"), [*encode(asked.answer), end]

    return [[pair(asked) for asked in row] for row in rows]


def question_mask(
    shared: int, count: int, length: int, single: bool = False
) -> np.ndarray:
    """(T, T) bool: causal, and only within a question or towards what is shared.

    single: the last shared tokens are one for each question, which alone sees it.
    """
    numbers = np.arange(1, count + 1)
    own = numbers if single else numbers[:0]
    parts = [np.zeros(shared - len(own), int), own, np.repeat(numbers, length)]
    group = np.concatenate(parts)
    causal = np.tril(np.ones((len(group), len(group)), bool))
    same = group[:, None] == group[None]
    return causal & (same | (group[None] == 0))
