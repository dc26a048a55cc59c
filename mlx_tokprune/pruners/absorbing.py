"""Pruners that keep what the tower attends to and let it take in some of the rest.

They publish sums that are no averages, so rows of their `weights` have other sums
than 1. Tokens that nobody takes in are gone.
"""

import mlx.core as mx

from ..features import Features, Selection, place_marked
from .registry import in_ranges, register
from .saliency import keep_highest, keep_marked, normalize, one_hot

_CONTEXTUAL = 10 / 64  # VisionZip's share of the budget
_NEIGHBOURS = 32  # tokens that a kept one of PruMerge takes in


@register("visionzip", needs=("attention", "keys"))
def visionzip(features: Features, *, keep: int) -> Selection:
    """Keep the most attended tokens, and some that stand for the rest.

    Of every 64, 54 are those that receive most attention. The rest of the budget (10 of
    64, rounded down) are every s-th of the tokens left; each other one joins the one
    whose key is most similar (cosine) to its own. What comes out of a group is, as
    published, its token plus the mean of those that joined: such rows of `weights` sum
    to 2. VisionZip (arXiv 2412.04467), whose keys are the mean over heads; here heads
    are joined.
    """
    contextual = int(keep * _CONTEXTUAL)
    attention, total = features.extras["attention"], features.total
    dominant = one_hot(keep_highest(attention, keep - contextual).indices, total)
    if not contextual:
        return Selection(place_marked(dominant, keep))
    others = place_marked(~dominant, total - keep + contextual)
    step = others.shape[1] // contextual
    targets = others[:, : step * contextual : step]
    indices = place_marked(dominant | one_hot(targets, total), keep)
    stands = mx.take_along_axis(~dominant, indices, axis=1)
    unit = normalize(features.extras["keys"])
    cosine = mx.take_along_axis(unit, indices[..., None], axis=1) @ unit.swapaxes(1, 2)
    nearest = mx.argmax(mx.where(stands[..., None], cosine, -2.0), axis=1)
    joins = nearest[:, None] == mx.arange(keep)[None, :, None]
    joins = joins & ~one_hot(indices, total)[:, None] & ~dominant[:, None]
    joins = joins.astype(mx.float32)
    mean = joins / mx.maximum(mx.sum(joins, axis=-1, keepdims=True), 1)
    return Selection(indices, _own(indices, total) + mean)


def _own(indices: mx.array, total: int) -> mx.array:
    """(B, K) -> (B, K, N) float32: each kept token alone."""
    return (indices[..., None] == mx.arange(total)).astype(mx.float32)


def _outliers(attention: mx.array) -> mx.array:
    """(B, N) bool: above the third quartile by 1.5 times the quartiles' distance.

    At least the highest.
    """
    ordered = mx.sort(attention, axis=1)
    low, high = (_quantile(ordered, share) for share in (0.25, 0.75))
    above = attention > high + 1.5 * (high - low)
    places = mx.arange(attention.shape[1])
    return above | (places == mx.argmax(attention, axis=1, keepdims=True))


def _quantile(ordered: mx.array, share: float) -> mx.array:
    """(B, N) ascending -> (B, 1), between neighbours where it falls between them."""
    place = share * (ordered.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[1] - 1)
    part = place - below
    return ordered[:, below, None] * (1 - part) + ordered[:, above, None] * part


def _absorb(features: Features, selection: Selection, rest: bool) -> Selection:
    """Each kept token takes in those whose keys are most similar to its own."""
    indices, total = selection.indices, features.total
    attention = features.extras["attention"].astype(mx.float32)
    unit, own = normalize(features.extras["keys"]), _own(indices, total)
    cosine = mx.take_along_axis(unit, indices[..., None], axis=1) @ unit.swapaxes(1, 2)
    cosine = mx.where(own > 0, -2.0, cosine).reshape(-1, total)
    near = keep_highest(cosine, min(_NEIGHBOURS, total - 1)).indices
    near = one_hot(near, total).reshape(own.shape)
    weights = own + mx.where(near, attention[:, None], 0)
    if not rest:
        return Selection(indices, weights, selection.mask)
    return _with_rest(Selection(indices, weights, selection.mask), attention)


def _with_rest(selection: Selection, attention: mx.array) -> Selection:
    """One token more: all that were dropped, in the place of the most attended."""
    mask, own, batch = selection.mask, selection.weights, attention.shape[0]
    if own is None:
        raise ValueError("a selection that merges was expected")
    kept = one_hot(selection.indices, attention.shape[1], mask)
    gone = mx.argmax(mx.where(kept, -mx.inf, attention), axis=1, keepdims=True)
    indices = mx.concatenate([selection.indices, gone.astype(mx.int32)], axis=1)
    order = mx.argsort(indices, axis=1)
    sums = mx.where(kept, 0, attention)[:, None]
    weights = mx.concatenate([own, sums], axis=1)
    if mask is not None:
        mask = mx.concatenate([mask, mx.ones((batch, 1), mx.bool_)], axis=1)
        mask = mx.take_along_axis(mask, order, axis=1)
    return Selection(
        mx.take_along_axis(indices, order, axis=1),
        mx.take_along_axis(weights, order[..., None], axis=1),
        mask,
    )


@register(
    "prumerge",
    needs=("attention", "keys"),
    counts="either",
    check=in_ranges(rest=(0, 1)),
)
def prumerge(features: Features, *, keep: int | None, rest: float = 0) -> Selection:
    """Keep the tokens whose attention stands out; each takes in its 32 most similar.

    Without a budget those are kept whose attention is above Q3 + 1.5 IQR of the
    picture's, and at least one; with one, the most attended. Each adds the 32 other
    tokens (all where there are fewer) with the most similar keys (cosine), kept or not,
    times their attention, which is not normalised: rows of `weights` sum to more than
    1. With `rest` 1 one token of a budget of two or more is the sum of all dropped ones
    times their attention, which is published; it stands in the place of the most
    attended of them.
    LLaVA-PruMerge (arXiv 2403.15388).
    """
    attention = features.extras["attention"]
    if keep is None:
        return _absorb(features, keep_marked(_outliers(attention)), bool(rest))
    more = int(rest) if keep > 1 else 0
    return _absorb(features, keep_highest(attention, keep - more), bool(more))


@register("prumerge_plus", needs=("attention", "keys"), counts="either")
def prumerge_plus(features: Features, *, keep: int | None) -> Selection:
    """PruMerge with three times the tokens: two more for each, spread evenly.

    A third of the budget (without one, as many as stand out, and the budget is three
    times that) has most attention; the others are spread over the tokens left: the
    i-th of n at place (2 i + 1) M // (2 n) of those M. Then each takes in others as
    `prumerge` does. LLaVA-PruMerge+ (arXiv 2403.15388), whose published steps assume
    576 tokens.
    """
    attention = features.extras["attention"]
    if keep is None:
        leading = _outliers(attention)
        count = 3 * mx.sum(leading, axis=1, keepdims=True)
        chosen = keep_marked(_spread(leading, mx.minimum(count, features.total)))
        return _absorb(features, chosen, False)
    most = keep_highest(attention, max(1, keep // 3)).indices
    chosen = _spread(one_hot(most, features.total), mx.array([[keep]]))
    return _absorb(features, Selection(place_marked(chosen, keep)), False)


def _spread(leading: mx.array, count: mx.array) -> mx.array:
    """(B, N) bool with others between, so that `count` (B, 1) are true."""
    some = mx.sum(leading, axis=1, keepdims=True)
    places, left = count - some, mx.maximum(leading.shape[1] - some, 1)
    rank = mx.cumsum((~leading).astype(mx.int32), axis=1)  # with the token itself

    def below(rank: mx.array) -> mx.array:
        """How many of the places (2 i + 1) left // (2 places) are smaller."""
        number = ((2 * places * rank - 1) // left + 1) // 2
        return mx.minimum(number, places)

    return leading | (below(rank) > below(rank - 1))
