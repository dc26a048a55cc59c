"""Hard choice of K tokens whose gradient reaches the scores.

Gathering has no gradient to the scores. So every token is kept in the sequence, and the
logarithm of a gate is added to its attention score in every layer, as in DynamicViT
(arXiv 2106.02034). The gate is 0 or 1; its gradient is that of a sigmoid around the
threshold between the K-th score and the next.

A closed gate leaks. The first leak is large, 1e-4: scorers learn at once. But a token
with very high attention still passes through that leak, and after a number of steps
scorers drop such tokens. So the later leak is near 0, and the output is that of the
kept tokens alone. There the gradient of a closed gate has no bound; `tamed` bounds it.
"""

import mlx.core as mx

from ..pruners.saliency import above

_QUANTILE = 0.9  # of a sample's gradient sizes; bounds the larger ones
LEAKS = (1e-4, 1e-12)  # value of a closed gate: first phase, then the rest


def straight_through(scores: mx.array, keep: int, temperature: float) -> mx.array:
    """Return the gate (B, N) of scores (B, N): 1 for the `keep` highest, else 0.

    Its gradient is that of a sigmoid of the distance to the threshold.
    """
    ordered = -mx.sort(-mx.stop_gradient(scores), axis=1)
    last, following = ordered[:, keep - 1, None], ordered[:, keep, None]
    soft = mx.sigmoid((scores - (last + following) / 2) / temperature)
    order = mx.argsort(mx.argsort(-mx.stop_gradient(scores), axis=1), axis=1)
    hard = (order < keep).astype(soft.dtype)
    return hard + soft - mx.stop_gradient(soft)


def above_threshold(scores: mx.array, temperature: float) -> mx.array:
    """Return the gate (B, N) of scores (B, N): 1 above 0 and for the highest, else 0.

    Its gradient is that of a sigmoid of the scores: the count is learned, too.
    """
    soft = mx.sigmoid(scores / temperature)
    hard = mx.stop_gradient(above(scores).astype(soft.dtype))
    return hard + soft - mx.stop_gradient(soft)


def log_gate(gate: mx.array, leak: float = LEAKS[1]) -> mx.array:
    """Return the term of attention scores: 0 for an open gate, else log(leak)."""
    return mx.log(gate * (1 - leak) + leak)


@mx.custom_function
def tamed(gate: mx.array) -> mx.array:
    """Return the gate (B, N) unchanged; bound the large gradients of each sample."""
    return gate


@tamed.vjp
def _tame(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    size = mx.abs(cotangent)
    quantile = mx.sort(size, axis=1)[:, int(_QUANTILE * size.shape[1]), None]
    return cotangent / (size + quantile + 1e-9)


def annealed(start: float, end: float, step: int, steps: int) -> float:
    """Return the value at `step`: linear from `start` to `end`, then `end`."""
    return start + (end - start) * min(1.0, step / max(1, steps))
