"""A hard choice of K tokens with a gradient to the scores that made it.

Gathering has none. Backward, every token is there, and the logarithm of a gate is
added to its score in every layer, as in DynamicViT (arXiv 2106.02034): the gate is 0 or
1, its gradient that of a sigmoid around the threshold between the K-th score and the
next. A closed gate leaks, or no gradient would reach dropped tokens, and a language
model that attends to one of them very much sees it through the leak. So forward, what
counts are the tokens that are kept, alone: `as_if`.
"""

import mlx.core as mx

CLOSED = 1e-4  # what a closed gate lets through


def straight_through(scores: mx.array, keep: int, temperature: float) -> mx.array:
    """(B, N) scores -> (B, N) gate: 1 for the `keep` highest, else 0.

    Its gradient is that of a sigmoid of the distance to the threshold.
    """
    ordered = -mx.sort(-mx.stop_gradient(scores), axis=1)
    last, following = ordered[:, keep - 1, None], ordered[:, keep, None]
    soft = mx.sigmoid((scores - (last + following) / 2) / temperature)
    order = mx.argsort(mx.argsort(-mx.stop_gradient(scores), axis=1), axis=1)
    hard = (order < keep).astype(soft.dtype)
    return hard + soft - mx.stop_gradient(soft)


def log_gate(gate: mx.array) -> mx.array:
    """What is added to attention scores: 0 where open, far below where not."""
    return mx.log(gate * (1 - CLOSED) + CLOSED)


def as_if(hard: mx.array, soft: mx.array) -> mx.array:
    """The value of `hard` with the gradient of `soft`."""
    return soft + mx.stop_gradient(hard - soft)


def schedule(start: float, end: float, step: int, steps: int) -> float:
    """From `start` to `end` in a straight line; `end` from `steps` on."""
    return start + (end - start) * min(1.0, step / max(1, steps))
