"""A hard choice of K tokens with a gradient to the scores that made it.

Gathering has none. This keeps every token and adds the logarithm of a gate to its score
in every layer, as DynamicViT does (arXiv 2106.02034): forward the gate is 0 or 1,
backward it is a sigmoid around the threshold between the K-th score and the next.
"""

import mlx.core as mx

CLOSED = 1e-6  # of a closed gate: what attention still reaches a dropped token


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
    """What is added to attention scores: next to 0 where open, far below where not."""
    return mx.log(gate + CLOSED)


def schedule(start: float, end: float, step: int, steps: int) -> float:
    """From `start` to `end` in a straight line; `end` from `steps` on."""
    return start + (end - start) * min(1.0, step / max(1, steps))
