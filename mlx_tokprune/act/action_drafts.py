"""Speculative decoding of action tokens: the same tokens, in fewer calls of the model.

A robot's next action is often its last one in some of its numbers. The model reads the
drafted tokens along with the prompt; those that it would have chosen itself are taken,
and its first other choice corrects the draft (speculative decoding, arXiv 2211.17192,
with greedy tokens). Tokens are the same as without a draft, up to ties in float.

Answers in FAST's code have no fixed length, and a change in one place moves the others:
their drafts are what followed in the last answer, wherever it went on like this one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..models.language import greedy
from ..models.positions import LayerCache
from ..models.protocol import VisionModel
from ..models.speculative import Draft, Sampling, agreed, continued, trim, verify
from ..pipeline import Scene, run
from ..pruners import Plan
from .heads import Chunks

_WIDTH = 16  # tokens that are drafted at once, after the first call


class Checked(NamedTuple):
    """What a compiled call gives back: arrays only.

    tokens: (B, A), the model's after the prompt, and after each drafted token but the
    last. layers: keys and values of each layer, which may differ in length. shifts:
    for each layer, what later tokens add to that length.
    """

    tokens: mx.array
    layers: list[tuple[mx.array, mx.array]]
    shifts: list[mx.array]


def read_draft(
    model: VisionModel, scene: Scene, plan: Plan, positions: str, draft: mx.array
) -> Checked:
    """Read the prompt and a draft (B, A) in one call. Lazy."""
    cache = model.decoder.make_cache()
    how = {"positions": positions, "after": draft[:, :-1], "cache": cache}
    read, _ = run(model, scene, plan, **how)
    _, tokens = greedy(model.decoder.logits(read.hidden))
    layers = [layer.inner.keys_and_values() for layer in read.cache]
    shifts = [mx.array(layer.shift) for layer in read.cache]
    return Checked(tokens, layers, shifts)


def correct_draft(
    model: VisionModel, draft: mx.array, checked: Checked
) -> tuple[mx.array, int]:
    """What follows the part of the draft that was right.

    Returns (B, A) tokens, and how many calls they took besides that of `read_draft`.
    """
    steps = draft.shape[1]
    cache = model.decoder.cache_of(checked.layers, checked.shifts)
    tokens, calls = _agreed(draft, checked.tokens), 0
    while tokens.shape[1] < steps:
        done = tokens.shape[1]
        for layer in cache:  # what was read of the draft from its first mistake on
            layer.inner.trim(steps - done)
        given = mx.concatenate([tokens[:, -1:], draft[:, done:-1]], axis=1)
        hidden = model.decoder.follow(given, cache)
        _, more = greedy(model.decoder.logits(hidden))
        tokens = mx.concatenate([tokens, _agreed(draft[:, done:], more)], axis=1)
        calls += 1
    return tokens, calls


def _agreed(draft: mx.array, tokens: mx.array) -> mx.array:
    """The model's tokens up to and with the first that no robot's draft had."""
    same = np.array(draft[:, :-1] == tokens[:, :-1])
    right = np.cumprod(same, axis=1).sum(axis=1).min(initial=same.shape[1])
    return tokens[:, : int(right) + 1]


def draft_chunk(
    head: Chunks,
    model: VisionModel,
    scene: Scene,
    plan: Plan,
    last: list[int],
    first: Sequence[int] | None = None,
    **how,
) -> tuple[list[int], int]:
    """One robot's answer, drafted by another, and how many calls it took.

    The first call reads the prompt and the draft `first`, the whole of `last` unless
    another is given. `how` is that of `run`.
    """
    cache = model.decoder.make_cache()
    draft = list(last if first is None else first)[: head.most]
    after = mx.array([draft[:-1]], mx.int32)
    how |= {"after": after} if len(draft) > 1 else {}
    read, _ = run(model, scene, plan, cache=cache, **how)
    # Without what the padding of others would need: there is one robot.
    parts = [LayerCache(part.inner, part.shift) for part in read.cache]
    _, found = greedy(model.decoder.logits(read.hidden))
    said, calls = agreed(draft, np.array(found[0]).tolist()), 1
    trim(parts, max(0, len(draft) - len(said)))
    while not head.ends(said):
        most = min(_WIDTH, head.most - len(said) - 1)
        following = Draft(continued(last, said)[:most])
        said += verify(model.decoder, parts, said[-1], following, Sampling())
        calls += 1
    return head.cut(said), calls
