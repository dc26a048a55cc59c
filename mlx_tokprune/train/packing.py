"""Several questions about one picture in one sequence, for training and evaluation.

Each question sees the chat prefix, the picture and itself, but no other question, and
its positions begin where the picture ends: the answers are those of separate prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..models.fastvlm import FastVLM
from ..models.language import TokenSequence
from ..scenes.questions import Question
from .layout import IGNORE, Pair, padded_arrays, pairs_of, question_mask


@dataclass(frozen=True)
class Questions:
    """Q questions about each of B pictures, L tokens each with their answers.

    ids: (B, Q, L) int32. targets: (B, Q, L) int32, the next token where it belongs to
    the answer, else `IGNORE`; all `IGNORE` where there is no question.
    """

    ids: mx.array
    targets: mx.array


def padded(rows: Sequence[Sequence[Pair | None]]) -> tuple[Questions, mx.array]:
    """A row of questions for each picture, and where ids (B, Q, L) are the prompt's.

    `None` leaves a gap.
    """
    ids, targets, prompts = map(mx.array, padded_arrays(rows))
    return Questions(ids, targets), prompts


def pack(
    rows: Sequence[Sequence[Question | None]], encode, suffix: str, end: int
) -> Questions:
    """`Questions` from a row of questions for each picture; `None` leaves a gap."""
    return padded(pairs_of(rows, encode, suffix, end))[0]


def answer_logits(
    model: FastVLM, prefix: Sequence[int], visual, indices, questions: Questions, *how
) -> mx.array:
    """(B, Q, L, V) logits of what `packed` makes of the same."""
    batch, count, length = questions.ids.shape
    sequence = packed(model, prefix, visual, indices, questions, *how)
    read = model.decoder.read(sequence, rows=count * length)
    return model.decoder.logits(read.hidden).reshape(batch, count, length, -1)


def unpruned_logits(
    model: FastVLM,
    prefix: Sequence[int],
    tokens: mx.array,
    questions: Questions,
    gate: mx.array | None = None,
) -> mx.array:
    """(B, Q, L, V) with every token of the tower (B, N, C), each at its place."""
    visual, total = model.project(tokens), tokens.shape[1]
    every = mx.broadcast_to(mx.arange(total), visual.shape[:2])
    asked = (questions, total, "original", gate)
    return answer_logits(model, prefix, visual, every, *asked)


def packed(
    model: FastVLM,
    prefix: Sequence[int],
    visual: mx.array,
    indices: mx.array,
    questions: Questions,
    total: int,
    positions: str = "original",
    gate: mx.array | None = None,
    alone: bool = False,
) -> TokenSequence:
    """The prefix, a picture, and all its questions.

    visual: (B, K, D) tokens `indices` (B, K) of `total`. gate: (B, K), added to every
    score of a visual token in every layer. alone: of K questions, each sees only the
    visual token of its own number, and that none of the others.
    """
    batch, kept, _ = visual.shape
    _, count, length = questions.ids.shape
    start, decoder = len(prefix), model.decoder
    text = decoder.embed(mx.broadcast_to(mx.array([prefix]), (batch, start)))
    asked = decoder.embed(questions.ids.reshape(batch, -1))
    hidden = mx.concatenate([text, visual.astype(text.dtype), asked], axis=1)
    where = indices if positions == "original" else mx.arange(kept)[None]
    after = start + (total if positions == "original" else kept)
    values = mx.concatenate(
        [
            mx.broadcast_to(part.astype(mx.int32), (batch, part.shape[-1]))
            for part in (
                mx.arange(start)[None],
                start + where,
                after + mx.tile(mx.arange(length), count)[None],
            )
        ],
        axis=1,
    )
    mask = mx.array(question_mask(start + kept, count, length, alone))[None]
    if gate is not None:
        more = mx.pad(gate, [(0, 0), (start, mask.shape[-1] - start - kept)])
        mask = mx.where(mask, more[:, None].astype(hidden.dtype), -mx.inf)
    return TokenSequence(
        hidden, values, after + length, mask, (slice(start, start + kept),)
    )


def answer_losses(logits: mx.array, questions: Questions) -> tuple[mx.array, mx.array]:
    """(B, Q, L) cross entropy of each token, and which of them are the answers'."""
    used = questions.targets != IGNORE
    return nn.losses.cross_entropy(logits, mx.maximum(questions.targets, 0)), used


def divergence(whole: mx.array, logits: mx.array) -> mx.array:
    """(..., V) twice -> (...): KL of the first distributions from these, in nats."""
    known = whole - mx.logsumexp(whole, axis=-1, keepdims=True)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.sum(mx.exp(known) * (known - found), axis=-1)


def answer_loss(logits: mx.array, questions: Questions) -> mx.array:
    """Mean cross entropy of the answers' tokens."""
    losses, used = answer_losses(logits, questions)
    return mx.sum(losses * used) / mx.maximum(mx.sum(used), 1)


def exact_matches(logits: mx.array, questions: Questions) -> tuple[mx.array, mx.array]:
    """(B, Q) bool whether the greedy answer is exactly right, and whether there is one.

    Greedy decoding gives the right answer exactly when every token of it is the most
    likely one after the right tokens before it.
    """
    used = questions.targets != IGNORE
    right = (mx.argmax(logits, axis=-1) == questions.targets) | ~used
    return mx.all(right, axis=-1), mx.any(used, axis=-1)
