"""Speculative decoding of action tokens: equal tokens in fewer model calls.

A robot's next action often repeats some numbers of the previous one. The model reads
the drafted tokens along with the prompt and accepts those that it would have chosen;
its first different choice corrects the draft (speculative decoding, arXiv 2211.17192,
with greedy tokens). The tokens equal those decoded without a draft, up to float ties.

Answers in FAST's code have no fixed length, and one changed token moves the rest. Their
drafts are n-gram continuations: the tokens that followed in the previous answer,
wherever it has the current answer's latest tokens.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..models.language import greedy
from ..models.positions import LayerCache
from ..models.protocol import VisionModel
from ..models.speculative import Draft, Sampling, agreed, continued, trim, verify
from ..pipeline import Scene, run
from ..pruners import Plan
from .heads import Chunks

_WIDTH = 16  # drafted tokens per call, after the first call


def read_draft(
    model: VisionModel, scene: Scene, plan: Plan, positions: str, draft: mx.array
) -> tuple[mx.array, list, list[mx.array]]:
    """Read the prompt and a draft (B, A) in one call, which may be compiled. Lazy.

    Returns the model's tokens (B, A) after the prompt and after each drafted token but
    the last, keys and values of each layer, which may differ in length, and the offset
    of each layer that later positions add to its cached length.
    """
    cache = model.decoder.make_cache()
    options = {"positions": positions, "after": draft[:, :-1], "cache": cache}
    read, _ = run(model, scene, plan, **options)
    _, tokens = greedy(model.decoder.logits(read.hidden))
    layers = [layer.inner.keys_and_values() for layer in read.cache]
    shifts = [mx.array(layer.shift) for layer in read.cache]
    return tokens, layers, shifts


def correct_draft(
    model: VisionModel, draft: mx.array, check: tuple[mx.array, list, list[mx.array]]
) -> tuple[mx.array, int]:
    """Complete an action after the accepted part of its draft.

    check: result of `read_draft`. Returns (B, A) tokens, and the number of calls
    besides that of `read_draft`.
    """
    steps = draft.shape[1]
    chosen, layers, shifts = check
    cache = model.decoder.cache_of(layers, shifts)
    tokens, calls = _agreed(draft, chosen), 0
    while tokens.shape[1] < steps:
        done = tokens.shape[1]
        for layer in cache:  # forget the draft from its first mismatch on
            layer.inner.trim(steps - done)
        inputs = mx.concatenate([tokens[:, -1:], draft[:, done:-1]], axis=1)
        hidden = model.decoder.follow(inputs, cache)
        _, more = greedy(model.decoder.logits(hidden))
        tokens = mx.concatenate([tokens, _agreed(draft[:, done:], more)], axis=1)
        calls += 1
    return tokens, calls


def _agreed(draft: mx.array, tokens: mx.array) -> mx.array:
    """Return the model's tokens up to and including the batch's first mismatch.

    The robots of a batch share one cache length, so the shortest match counts for all.
    """
    matches = np.array(draft[:, :-1] == tokens[:, :-1])
    length = np.cumprod(matches, axis=1).sum(axis=1).min(initial=matches.shape[1])
    return tokens[:, : int(length) + 1]


def draft_chunk(
    head: Chunks,
    model: VisionModel,
    scene: Scene,
    plan: Plan,
    last: list[int],
    first: Sequence[int] | None = None,
    **options: Any,
) -> tuple[list[int], int]:
    """Decode one robot's answer with drafts from a previous answer.

    last: token ids of the previous answer. first: the draft that the first call reads
    along with the prompt (default: all of `last`). options: keyword arguments of
    `pipeline.run`. Returns the answer's token ids and the number of calls.
    """
    cache = model.decoder.make_cache()
    draft = list(last if first is None else first)[: head.calls]
    after = mx.array([draft[:-1]], mx.int32)
    options |= {"after": after} if len(draft) > 1 else {}
    read, _ = run(model, scene, plan, cache=cache, **options)
    # A single robot has no batch padding, so the new caches leave out its mask.
    parts = [LayerCache(part.inner, part.shift) for part in read.cache]
    _, tokens = greedy(model.decoder.logits(read.hidden))
    answer, calls = agreed(draft, np.array(tokens[0]).tolist()), 1
    trim(parts, max(0, len(draft) - len(answer)))
    while not head.ends(answer):
        most = min(_WIDTH, head.calls - len(answer) - 1)
        following = Draft(continued(last, answer)[:most])
        answer += verify(model.decoder, parts, answer[-1], following, Sampling())
        calls += 1
    return head.cut(answer), calls
