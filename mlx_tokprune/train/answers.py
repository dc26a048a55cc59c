"""The loss of answers about pruned pictures, wherever it is that they are pruned.

Questions about one picture share a sequence where none of them can change what is kept.
Elsewhere each has a sequence of its own, which goes the way that a prompt does.
"""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..pipeline import Scene, prune_at_prompt, prune_at_tower, run
from ..processing.prompt import Prompt
from ..pruners import Plan
from .batches import Batch, Batches
from .packing import (
    Questions,
    answer_logits,
    answer_losses,
    divergence,
    unpruned_logits,
)

# What a pruner at the prompt reads that is not the same for every question.
_ASKED = {"text", "text_keys", "scores_previous"}
# Logits of answers, and which part of (B, Q, L) they are.
Part = tuple[mx.array, tuple]


def check_trainable(plan: Plan) -> None:
    """Raise `InputError` for a plan under which no adapter can be trained."""
    for pruner in plan:
        if pruner.has_own_count:
            raise InputError(
                f"adapters are trained under a budget, and method {pruner.method!r} "
                "decides itself how many visual tokens to keep; give it a keep ratio, "
                "or choose another method, such as 'norm'"
            )


def is_shared(plan: Plan) -> bool:
    """Whether questions about one picture can share a sequence under this plan."""

    def asks(pruner) -> bool:
        return pruner.place == "prompt" and bool(_ASKED & set(pruner.reads))

    return not any(pruner.place == "layer" or asks(pruner) for pruner in plan)


def answers(model, batch: Batch, plan: Plan, positions: str) -> Iterator[Part]:
    """(..., V) logits of every answer of a batch, in one part or in several."""
    if is_shared(plan):
        # One sample of as many places as there are pictures: each by itself.
        scene = Scene(None, Prompt(((),) * (len(batch.features.tokens) + 1)))
        visual = prune_at_tower(model, scene, plan, batch.features)
        visual = prune_at_prompt(model, scene, plan, visual)
        seen = (visual.embeddings, visual.indices)
        asked = (batch.questions, batch.features.total, positions)
        yield answer_logits(model, batch.prefix, *seen, *asked), (...,)
        return
    for pictures, numbers, begin, end in _of_one_length(batch):
        ids = batch.questions.ids[pictures, numbers]
        features = batch.features.each(lambda array, rows=pictures: array[rows])
        prompt = Prompt((batch.prefix, ids[:, :begin]))
        read, _ = run(
            *(model, Scene(None, prompt, len(ids)), plan),
            positions=positions,
            vision=lambda *asked, given=features: prune_at_tower(*asked[:3], given),
            after=ids[:, begin : end - 1] if begin < end - 1 else None,
        )
        # A token's logits stand one place before it.
        where = (pictures, numbers, slice(begin - 1, end - 1))
        yield model.decoder.logits(read.hidden), where


def _of_one_length(batch: Batch) -> Iterator[tuple[mx.array, mx.array, int, int]]:
    """Questions whose prompts have one length, which need no padding in between.

    Of each (G,) numbers of pictures and of questions, where their answers begin, and
    where the longest of these ends.
    """
    begins = np.array(mx.sum(batch.prompt, axis=-1))
    ends = begins + np.array(mx.sum(batch.questions.targets >= 0, axis=-1))
    for begin in np.unique(begins):
        some = np.nonzero(begins == begin)
        pictures, numbers = (mx.array(part.astype(np.int32)) for part in some)
        yield pictures, numbers, int(begin), int(ends[some].max())


class AnswerLoss:
    """The language model's loss on answers about pruned pictures; a `LossOf`.

    sizes: pictures of a batch, and questions about each. distill: weight of the
    divergence from the answers of `teacher`, which sees every token, at its place.
    """

    def __init__(
        self,
        model,
        batches: Batches,
        plan: Plan,
        positions: str,
        sizes: tuple[int, int],
        distill: float = 0.0,
        teacher=None,
    ):
        self._model, self._batches, self._plan = model, batches, plan
        self._positions, self._sizes = positions, sizes
        self._distill, self._teacher = distill, teacher

    def __call__(self, module: nn.Module, seed: tuple[int, ...], step: int):
        batch = self._batches.draw(seed, *self._sizes)
        if self._distill:
            known = (batch.prefix, batch.features.tokens, batch.questions)
            whole = mx.stop_gradient(unpruned_logits(self._teacher, *known))
        total, count = mx.array(0.0), mx.array(0)
        for logits, at in answers(self._model, batch, self._plan, self._positions):
            asked = Questions(batch.questions.ids[at], batch.questions.targets[at])
            losses, used = answer_losses(logits, asked)
            if self._distill:
                losses = losses + self._distill * divergence(whole[at], logits)
            total, count = total + mx.sum(losses * used), count + mx.sum(used)
        return total, count
