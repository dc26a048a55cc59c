"""Several questions about one picture in one sequence, for training and evaluation.

Each question attends to the chat prefix, the picture and itself, but to no other
question. Its positions begin where the picture ends. So the answers are those of
separate prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.language import TokenSequence
from ..models.protocol import VisionModel
from .layout import IGNORE, Pair, padded_arrays, question_mask


@dataclass(frozen=True)
class Questions:
    """Token ids of Q questions with their answers, for each of B pictures.

    ids: (B, Q, L) int32, prompt, then answer, then padding. targets: (B, Q, L) int32,
    the next token where it belongs to the answer, else `IGNORE`; all `IGNORE` for a gap
    without a question.
    """

    ids: mx.array
    targets: mx.array

    def __getitem__(self, at: Any) -> "Questions":
        """Return the questions at an index of both arrays."""
        return Questions(self.ids[at], self.targets[at])


def padded(rows: Sequence[Sequence[Pair | None]]) -> tuple[Questions, mx.array]:
    """Return `Questions` of a row for each picture, and the prompt mask (B, Q, L).

    The mask is true for tokens of the prompt. `None` in `rows` leaves a gap.
    """
    ids, targets, prompts = map(mx.array, padded_arrays(rows))
    return Questions(ids, targets), prompts


def answer_logits(
    model: VisionModel,
    prefix: Sequence[int],
    visual: mx.array,
    indices: mx.array,
    questions: Questions,
    *options,
) -> mx.array:
    """Return logits (B, Q, L, V) of the sequence that `packed` builds.

    options: further positional arguments of `packed`, `total` first.
    """
    batch, count, length = questions.ids.shape
    sequence = packed(model, prefix, visual, indices, questions, *options)
    read = model.decoder.read(sequence, rows=count * length)
    return model.decoder.logits(read.hidden).reshape(batch, count, length, -1)


def unpruned_logits(
    model: VisionModel,
    prefix: Sequence[int],
    tokens: mx.array,
    questions: Questions,
    gate: mx.array | None = None,
) -> mx.array:
    """Return logits (B, Q, L, V) with every token of the tower, at original positions.

    tokens: (B, N, C), before the projector. gate: see `packed`.
    """
    visual, total = model.project(tokens), tokens.shape[1]
    every = mx.broadcast_to(mx.arange(total), visual.shape[:2])
    options = (total, "original", gate)
    return answer_logits(model, prefix, visual, every, questions, *options)


def packed(
    model: VisionModel,
    prefix: Sequence[int],
    visual: mx.array,
    indices: mx.array,
    questions: Questions,
    total: int,
    positions: str = "original",
    gate: mx.array | None = None,
    alone: bool = False,
) -> TokenSequence:
    """Return the sequence of the prefix, a picture, and all its questions.

    visual: (B, K, D) projected tokens. indices: (B, K), their numbers of `total`.
    positions: "original" or "contiguous". gate: (B, K), added to the attention score of
    each visual token in every layer. alone: for K questions, question i attends to
    visual token i only.
    """
    batch, kept, _ = visual.shape
    _, count, length = questions.ids.shape
    start, decoder = len(prefix), model.decoder
    text = decoder.embed(mx.broadcast_to(mx.array([prefix]), (batch, start)))
    prompts = decoder.embed(questions.ids.reshape(batch, -1))
    hidden = mx.concatenate([text, visual.astype(text.dtype), prompts], axis=1)
    offsets = indices if positions == "original" else mx.arange(kept)[None]
    after = start + (total if positions == "original" else kept)
    values = mx.concatenate(
        [
            mx.broadcast_to(part.astype(mx.int32), (batch, part.shape[-1]))
            for part in (
                mx.arange(start)[None],
                start + offsets,
                after + mx.tile(mx.arange(length), count)[None],
            )
        ],
        axis=1,
    )
    mask = mx.array(question_mask(start + kept, count, length, alone))[None]
    if gate is not None:
        # Prefix and questions are not gated: their term is 0.
        terms = mx.pad(gate, [(0, 0), (start, mask.shape[-1] - start - kept)])
        mask = mx.where(mask, terms[:, None].astype(hidden.dtype), -mx.inf)
    return TokenSequence(
        hidden, values, after + length, mask, (slice(start, start + kept),)
    )


def answer_losses(logits: mx.array, questions: Questions) -> tuple[mx.array, mx.array]:
    """Return the cross entropy of each token and the answer mask, both (B, Q, L)."""
    used = questions.targets != IGNORE
    return nn.losses.cross_entropy(logits, mx.maximum(questions.targets, 0)), used


def divergence(whole: mx.array, logits: mx.array) -> mx.array:
    """Return KL(softmax(whole) || softmax(logits)) in nats: (..., V) twice -> (...)."""
    return nn.losses.kl_div_loss(nn.log_softmax(logits), nn.log_softmax(whole))
