"""Pruners that keep the most attended tokens and add dropped tokens to them.

The papers add without averaging, so rows of `weights` do not sum to 1. A token that
no kept token absorbs is dropped.
"""

import mlx.core as mx

from ..features import Features, Selection, place_marked
from .registry import in_ranges, register
from .saliency import keep_highest, keep_marked, normalize, one_hot

_CONTEXTUAL = 10 / 64  # VisionZip's share of the budget
_NEIGHBOURS = 32  # tokens that each kept token of PruMerge absorbs


@register("visionzip", needs=("attention", "keys"))
def visionzip(features: Features, *, keep: int) -> Selection:
    """Keep the most attended tokens, and evenly spread ones that absorb the rest.

    54 of every 64 kept tokens receive most attention. The rest of the budget (10 of
    64, rounded down) is every s-th of the remaining tokens; each other token joins the
    one with the most similar key (cosine). As published, a group becomes its token
    plus the mean of the tokens that joined, so these rows of `weights` sum to 2.
    VisionZip (arXiv 2412.04467), which averages keys over heads; here the heads are
    concatenated.
    """
    contextual = int(keep * _CONTEXTUAL)
    attention, total = features.extras["attention"], features.total
    dominant = one_hot(keep_highest(attention, keep - contextual).indices, total)
    if not contextual:
        return Selection(place_marked(dominant, keep))
    remaining = place_marked(~dominant, total - keep + contextual)
    step = remaining.shape[1] // contextual
    targets = remaining[:, : step * contextual : step]
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
    """Return one-hot weights (B, K, N) float32 of indices (B, K)."""
    return (indices[..., None] == mx.arange(total)).astype(mx.float32)


def _outliers(attention: mx.array) -> mx.array:
    """Mark (B, N) attention above Q3 + 1.5 IQR, and always the highest."""
    ordered = mx.sort(attention, axis=1)
    low, high = (_quantile(ordered, share) for share in (0.25, 0.75))
    above = attention > high + 1.5 * (high - low)
    places = mx.arange(attention.shape[1])
    return above | (places == mx.argmax(attention, axis=1, keepdims=True))


def _quantile(ordered: mx.array, share: float) -> mx.array:
    """Return a quantile (B, 1) of ascending values (B, N), linearly interpolated."""
    place = share * (ordered.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[1] - 1)
    part = place - below
    return ordered[:, below, None] * (1 - part) + ordered[:, above, None] * part


def _absorb(features: Features, selection: Selection, rest: bool) -> Selection:
    """Add to each kept token the tokens with the most similar keys.

    rest: also add one token that sums all dropped tokens.
    """
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
    """Append the sum of all dropped tokens, at the most attended one of them."""
    mask, own, batch = selection.mask, selection.weights, attention.shape[0]
    if own is None:
        raise ValueError("the selection has no weights; expected one that merges")
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
    """Keep the tokens with outlying attention; each absorbs its 32 most similar.

    Without a budget, keep the tokens with attention above Q3 + 1.5 IQR of the picture,
    and at least one; with a budget, keep the most attended. Each adds the 32 other
    tokens (or all, if fewer) with the most similar keys (cosine), kept or not, times
    their attention. Attention is not normalised: rows of `weights` sum to more than 1.
    With `rest` 1 (as published) and a budget of two or more, one token is the sum of
    all dropped tokens times their attention, in the place of the most attended of
    them. LLaVA-PruMerge (arXiv 2403.15388).
    """
    attention = features.extras["attention"]
    if keep is None:
        return _absorb(features, keep_marked(_outliers(attention)), bool(rest))
    more = int(rest) if keep > 1 else 0
    return _absorb(features, keep_highest(attention, keep - more), bool(more))


@register("prumerge_plus", needs=("attention", "keys"), counts="either")
def prumerge_plus(features: Features, *, keep: int | None) -> Selection:
    """Keep the most attended tokens and twice as many spread ones; each absorbs others.

    A third of the budget has most attention (without a budget: the outliers of
    `prumerge`, and the budget is three times their number). The other tokens are
    spread over the M remaining ones: the i-th of n at place (2 i + 1) M // (2 n). Each
    kept token absorbs as in `prumerge`. LLaVA-PruMerge+ (arXiv 2403.15388), whose
    published steps assume 576 tokens.
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
    """Mark evenly spread tokens besides `leading` (B, N), until `count` (B, 1) are."""
    marked = mx.sum(leading, axis=1, keepdims=True)
    places, left = count - marked, mx.maximum(leading.shape[1] - marked, 1)
    rank = mx.cumsum((~leading).astype(mx.int32), axis=1)  # counts the token itself

    def below(rank: mx.array) -> mx.array:
        """Count the places (2 i + 1) left // (2 places) below a rank."""
        number = ((2 * places * rank - 1) // left + 1) // 2
        return mx.minimum(number, places)

    return leading | (below(rank) > below(rank - 1))
