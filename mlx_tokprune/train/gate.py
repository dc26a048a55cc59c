"""A hard choice of K tokens with a gradient to the scores that made it.

Gathering has none. Every token is there, and the logarithm of a gate is added to its
score in every layer, as in DynamicViT (arXiv 2106.02034): the gate is 0 or 1, and its
gradient that of a sigmoid around the threshold between the K-th score and the next.

A closed gate lets a little through. Much at first, 1e-4, with which scorers learn at
once. But a token that the language model attends to very much is then seen through the
leak, and after some steps scorers leave such tokens out; so then next to nothing comes
through, and the value is that of the kept tokens alone. The gradient of opening a
closed gate is of any size there, and is `tamed`.
"""

import mlx.core as mx

from ..pruners.saliency import above

_USUAL = 0.9  # quantile of a sample's gradients that others come down to
LEAKS = (1e-4, 1e-12)  # what a closed gate lets through, at first and then


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


def above_threshold(scores: mx.array, temperature: float) -> mx.array:
    """(B, N) scores -> (B, N) gate: 1 above 0, and for the highest, else 0.

    Its gradient is that of a sigmoid of the scores: the count is learned, too.
    """
    soft = mx.sigmoid(scores / temperature)
    hard = mx.stop_gradient(above(scores).astype(soft.dtype))
    return hard + soft - mx.stop_gradient(soft)


def log_gate(gate: mx.array, leak: float = LEAKS[1]) -> mx.array:
    """What is added to attention scores: 0 where open, far below where not."""
    return mx.log(gate * (1 - leak) + leak)


@mx.custom_function
def tamed(gate: mx.array) -> mx.array:
    """The gate (B, N) itself; large gradients of a sample come down to its others'."""
    return gate


@tamed.vjp
def _tame(primals, cotangent, output):
    size = mx.abs(cotangent)
    usual = mx.sort(size, axis=1)[:, int(_USUAL * size.shape[1]), None]
    return cotangent / (size + usual + 1e-9)


def annealed(start: float, end: float, step: int, steps: int) -> float:
    """From `start` to `end` in a straight line; `end` from `steps` on."""
    return start + (end - start) * min(1.0, step / max(1, steps))
