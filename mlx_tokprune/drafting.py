"""Action tokens with a draft: the same tokens, in fewer calls of the model.

A robot's next action is often its last one in some of its numbers. The model reads the
drafted tokens along with the prompt; those that it would have chosen itself are taken,
and its first other choice corrects the draft (speculative decoding, arXiv 2211.17192,
with greedy tokens). Tokens are the same as without a draft, up to ties in float.
"""

import mlx.core as mx
import numpy as np

from .control import Sequence, extended
from .models.openvla import OpenVLA


def read_draft(
    model: OpenVLA, sequence: Sequence, draft: mx.array
) -> tuple[mx.array, list[tuple[mx.array, mx.array]]]:
    """Read the prompt and a draft (B, A) in one call. Lazy.

    Gives (B, A): the model's token after the prompt, and after each drafted token but
    the last; and keys and values of each layer.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    steps, length = draft.shape[1], sequence.embeddings.shape[1]
    positions, keys = extended(sequence, steps)
    drafted = model.embed(draft[:, :-1]).astype(sequence.embeddings.dtype)
    whole = mx.concatenate([sequence.embeddings, drafted], axis=1)
    with model.positions.using(positions):
        hidden = model.hidden_states(whole, _mask(keys, 0, whole.shape[1]), cache)
    greedy = mx.argmax(model.logits(hidden[:, length - 1 :]), axis=-1)
    return greedy, [(layer.keys, layer.values) for layer in cache]


def correct_draft(
    model: OpenVLA,
    sequence: Sequence,
    draft: mx.array,
    greedy: mx.array,
    layers: list[tuple[mx.array, mx.array]],
) -> tuple[mx.array, int]:
    """What follows the part of the draft that was right.

    The rest is as `read_draft` gave it. Returns (B, A) tokens, and how many calls they
    took besides that one.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for layer, (keys, values) in zip(cache, layers, strict=True):
        layer.keys, layer.values = keys, values
    steps, length = draft.shape[1], sequence.embeddings.shape[1]
    positions, keys = extended(sequence, steps)
    tokens, calls = _agreed(draft, greedy), 0
    with model.positions.using(positions):
        while tokens.shape[1] < steps:
            done = tokens.shape[1]
            start = length + done - 1
            for layer in cache:
                layer.offset = start
            given = mx.concatenate([tokens[:, -1:], draft[:, done:-1]], axis=1)
            mask = _mask(keys, start, given.shape[1])
            hidden = model.hidden_states(model.embed(given), mask, cache)
            greedy = mx.argmax(model.logits(hidden), axis=-1)
            more = _agreed(draft[:, done:], greedy)
            tokens, calls = mx.concatenate([tokens, more], axis=1), calls + 1
    return tokens, calls


def _agreed(draft: mx.array, greedy: mx.array) -> mx.array:
    """The model's tokens up to and with the first that no robot's draft had."""
    same = np.array(draft[:, :-1] == greedy[:, :-1])
    right = np.cumprod(same, axis=1).sum(axis=1).min(initial=same.shape[1])
    return greedy[:, : int(right) + 1]


def _mask(keys: mx.array | None, start: int, length: int):
    """Causal for tokens from `start` on, without padding where there is some."""
    if keys is None:
        return "causal" if length > 1 else None
    causal = mx.tri(length, start + length, start, mx.bool_)
    return causal[None, None] & keys[:, None, None, : start + length]
