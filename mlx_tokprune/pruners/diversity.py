"""Pruners that keep dissimilar tokens, chosen greedily one after another.

The loops are unrolled, with static shapes and no evaluation on the host.
"""

import mlx.core as mx

from ..errors import InputError
from ..features import Features, Selection, place_marked
from .registry import Options, in_ranges, register
from .saliency import keep_highest, normalize, one_hot

_FAR = 2.0  # the largest 1 - cosine
_LEAST = 1e-6  # smallest next factor of a determinant


def _best(scores: mx.array) -> mx.array:
    """Mark the highest score of each row (B, N), the first of equal ones."""
    places = mx.arange(scores.shape[1])
    return places == mx.argmax(scores, axis=1, keepdims=True)


def _row(matrix: mx.array, chosen: mx.array) -> mx.array:
    """Return the column (B, M) of a matrix (B, M, N) that `chosen` (B, N) marks."""
    where = mx.argmax(chosen, axis=1)[:, None, None]
    return mx.take_along_axis(matrix, where, axis=2)[..., 0]


def _cosine(tokens: mx.array) -> mx.array:
    """Return cosines (B, N, N) float32 between tokens (B, N, C)."""
    unit = normalize(tokens)
    return unit @ unit.swapaxes(1, 2)


@register("divprune")
def divprune(features: Features, *, keep: int) -> Selection:
    """Keep the most diverse tokens: the smallest 1 - cosine between them is maximised.

    The first token has the farthest nearest neighbour; each next one is the farthest
    from its nearest kept token. DivPrune (arXiv 2503.02175).
    """
    return farthest(features.tokens, keep)


def farthest(tokens: mx.array, keep: int, among: mx.array | None = None) -> Selection:
    """Select tokens of (B, N, C) as `divprune` does, `among` marked ones (B, N)."""
    distance, total = 1 - _cosine(tokens), tokens.shape[1]
    places = mx.arange(total)
    out = mx.zeros((1, total), mx.bool_) if among is None else ~among
    alone = (places[:, None] == places) | out[:, :, None]
    nearest = mx.min(mx.where(alone, mx.inf, distance), axis=1)
    gone = out
    for number in range(keep):
        best = mx.argmax(mx.where(gone, -mx.inf, nearest), axis=1, keepdims=True)
        gone = gone | (places == best)
        row = mx.take_along_axis(distance, best[..., None], axis=2)[..., 0]
        nearest = mx.minimum(nearest, row) if number else row
    return Selection(place_marked(gone & ~out, keep))


def _check_cdpruner(options: Options, budget: bool) -> None:
    sign = options.get("sign", 1)
    if sign not in (-1, 1):
        raise InputError(f"sign {sign} of cdpruner is neither 1 nor -1")


@register("cdpruner", needs=("text",), at="prompt", check=_check_cdpruner)
def cdpruner(features: Features, *, keep: int, sign: float = 1) -> Selection:
    """Keep tokens that differ from each other and match the prompt (greedy DPP).

    Relevance is the mean cosine to the prompt's embeddings, scaled to [1e-6, 1 + 1e-6]
    by its minimum and maximum. The kernel is relevance times cosine times relevance;
    the most probable set of its determinantal point process is built greedily (Chen et
    al., arXiv 1709.05135). Where no independent token is left (residuals up to 1e-6),
    relevance chooses. `sign` -1 inverts relevance, as published for CLIP's text tower.
    CDPruner (arXiv 2506.10967).
    """
    text = normalize(features.extras["text"])
    # The mean of the cosines is the product with the mean unit vector.
    mean_text = mx.mean(text, axis=1, keepdims=True)
    relevance = sign * mx.sum(normalize(features.tokens) * mean_text, axis=-1)
    least = mx.min(relevance, axis=1, keepdims=True)
    most = mx.max(relevance, axis=1, keepdims=True)
    relevance = (relevance - least) / mx.maximum(most - least, 1e-12) + 1e-6
    kernel = _cosine(features.tokens)
    kernel = relevance[:, :, None] * kernel * relevance[:, None]
    residual = mx.diagonal(kernel, axis1=1, axis2=2)
    kept, factors = mx.zeros(residual.shape, mx.bool_), []
    for _ in range(keep):
        left = mx.where(kept, -mx.inf, residual)
        best = mx.max(left, axis=1, keepdims=True)
        independent = best > _LEAST
        chosen = _best(mx.where(independent, left, mx.where(kept, -mx.inf, relevance)))
        kept = kept | chosen
        factor = _row(kernel, chosen)
        if factors:
            before = mx.stack(factors, axis=1)
            along = _row(before, chosen)
            factor = factor - mx.sum(along[..., None] * before, axis=1)
        factor = factor * mx.rsqrt(mx.maximum(best, _LEAST))
        factors.append(mx.where(independent, factor, 0))
        residual = residual - mx.square(factors[-1])
    return Selection(place_marked(kept, keep))


@register("dart", at="prompt", check=in_ranges(pivots=(1, 1 << 16)))
def dart(features: Features, *, keep: int, pivots: float = 4) -> Selection:
    """Keep a few pivots (largest L1 norm), and the tokens least similar to them.

    Each pivot in turn takes an even share (the first pivots one more) of the remaining
    tokens, those least similar (cosine) to it. DART (arXiv 2502.11494), which has as
    many pivots in the text and runs after two layers.
    """
    count = min(int(pivots), keep)
    size = mx.sum(mx.abs(features.tokens.astype(mx.float32)), axis=-1)
    leading = mx.argsort(-size, axis=1)[:, :count]
    kept = one_hot(leading, features.total)
    unit = normalize(features.tokens)
    pivot = mx.take_along_axis(unit, leading[..., None], axis=1)
    cosine = pivot @ unit.swapaxes(1, 2)
    each, more = divmod(keep - count, count)
    for number in range(count):
        share = each + (number < more)
        if share:
            left = mx.where(kept, -_FAR, -cosine[:, number])
            taken = keep_highest(left, share).indices
            kept = kept | one_hot(taken, features.total)
    return Selection(place_marked(kept, keep))
