"""Packed questions of the demo, their loss and their exact matches."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_tokprune.scenes.questions import Question
from mlx_tokprune.train.layout import IGNORE
from mlx_tokprune.train.packing import Questions, answer_losses, padded

from .pairs import pairs_of


def pack(
    rows: Sequence[Sequence[Question | None]],
    encode: Callable[[str], Sequence[int]],
    suffix: str,
    end: int,
) -> Questions:
    """Return `Questions` of a row for each picture; `None` leaves a gap.

    Parameters are those of `pairs_of`.
    """
    return padded(pairs_of(rows, encode, suffix, end))[0]


def answer_loss(logits: mx.array, questions: Questions) -> mx.array:
    """Return the mean cross entropy of the answers' tokens, in nats."""
    losses, used = answer_losses(logits, questions)
    return mx.sum(losses * used) / mx.maximum(mx.sum(used), 1)


def exact_matches(logits: mx.array, questions: Questions) -> tuple[mx.array, mx.array]:
    """Return two (B, Q) masks: the greedy answer is correct; there is an answer.

    Greedy decoding gives the correct answer exactly when each of its tokens is the most
    likely one after the correct tokens before it.
    """
    used = questions.targets != IGNORE
    correct = (mx.argmax(logits, axis=-1) == questions.targets) | ~used
    return mx.all(correct, axis=-1), mx.any(used, axis=-1)
