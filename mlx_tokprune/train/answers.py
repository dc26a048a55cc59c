"""Loss of answers about pruned pictures, for pruners at every place.

Questions about one picture share a sequence where no question can change the kept
tokens. Otherwise each question has its own sequence, which `pipeline.run` prefills.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..models.protocol import VisionModel
from ..pipeline import Scene, prune_at_prompt, prune_at_tower, run
from ..processing.prompt import Prompt
from ..pruners import Plan, Pruner
from .batches import Batch, Batches
from .loop import LossOf
from .packing import (
    answer_logits,
    answer_losses,
    divergence,
    unpruned_logits,
)

# Extras of a pruner at the prompt that differ from question to question.
_PER_QUESTION = {"text", "text_keys", "scores_previous"}
# Logits of answers, and their index into (B, Q, L).
Part = tuple[mx.array, tuple]


def check_trainable(plan: Plan) -> None:
    """Raise `InputError` for a plan with a method that sets its own token count."""
    for pruner in plan:
        if pruner.has_own_count:
            raise InputError(
                f"adapters are trained under a budget, and method {pruner.method!r} "
                "decides itself how many visual tokens to keep; give it a keep ratio, "
                "or choose another method, such as 'norm'"
            )


def is_shared(plan: Plan) -> bool:
    """Return whether questions about one picture can share a sequence in this plan."""

    def reads_question(pruner: Pruner) -> bool:
        return pruner.place == "prompt" and bool(_PER_QUESTION & set(pruner.reads))

    return not any(pruner.place == "layer" or reads_question(pruner) for pruner in plan)


def answers(
    model: VisionModel, batch: Batch, plan: Plan, positions: str
) -> Iterator[Part]:
    """Yield the logits (..., V) of all answers of a batch, in one or several parts."""
    if is_shared(plan):
        # One sample with a place for each picture: each picture is pruned by itself.
        scene = Scene(None, Prompt(((),) * (len(batch.features.tokens) + 1)))
        visual = prune_at_tower(model, scene, plan, batch.features)
        visual = prune_at_prompt(model, scene, plan, visual)
        kept = (visual.embeddings, visual.indices)
        options = (batch.features.total, positions)
        logits = answer_logits(model, batch.prefix, *kept, batch.questions, *options)
        yield logits, (...,)
        return
    for pictures, numbers, begin, end in _of_one_length(batch):
        ids = batch.questions.ids[pictures, numbers]
        features = batch.features.each(lambda array, rows=pictures: array[rows])
        prompt = Prompt((batch.prefix, ids[:, :begin]))
        read, _ = run(
            *(model, Scene(None, prompt, len(ids)), plan),
            positions=positions,
            # Features are cached: the tower is replaced by its pruner alone.
            vision=lambda model, scene, plan, _, cached=features: prune_at_tower(
                model, scene, plan, cached
            ),
            after=ids[:, begin : end - 1] if begin < end - 1 else None,
        )
        # A token's logits stand one place before it.
        index = (pictures, numbers, slice(begin - 1, end - 1))
        yield model.decoder.logits(read.hidden), index


def _of_one_length(batch: Batch) -> Iterator[tuple[mx.array, mx.array, int, int]]:
    """Yield groups of G questions whose prompts have one length: no padding between.

    For each group: numbers (G,) of pictures and of questions, the place at which the
    answers begin, and the end of the longest answer.
    """
    begins = np.array(mx.sum(batch.prompt, axis=-1))
    ends = begins + np.array(mx.sum(batch.questions.targets >= 0, axis=-1))
    for begin in np.unique(begins):
        group = np.nonzero(begins == begin)
        pictures, numbers = (mx.array(part.astype(np.int32)) for part in group)
        yield pictures, numbers, int(begin), int(ends[group].max())


def answer_loss(
    model: VisionModel,
    batches: Batches,
    plan: Plan,
    positions: str,
    sizes: tuple[int, int],
    distill: float = 0.0,
    teacher: VisionModel | None = None,
) -> LossOf:
    """Return the loss of the language model on answers about pruned pictures.

    sizes: pictures of a batch, and questions about each. distill: weight of the
    divergence from `teacher`, a model that gets every token at its original position.
    """
    if distill and teacher is None:
        raise InputError("distill needs a teacher; expected a model")

    def loss(
        module: Any, seed: tuple[int, ...], step: int
    ) -> tuple[mx.array, mx.array]:
        batch, whole = batches.draw(seed, *sizes), None
        if distill and teacher is not None:
            inputs = (batch.prefix, batch.features.tokens, batch.questions)
            whole = mx.stop_gradient(unpruned_logits(teacher, *inputs))
        total, count = mx.array(0.0), mx.array(0)
        for logits, at in answers(model, batch, plan, positions):
            losses, used = answer_losses(logits, batch.questions[at])
            if whole is not None:
                losses = losses + distill * divergence(whole[at], logits)
            total, count = total + mx.sum(losses * used), count + mx.sum(used)
        return total, count

    return loss
