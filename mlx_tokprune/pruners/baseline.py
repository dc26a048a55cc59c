"""Pruners that do not read the picture: the full set, and controls."""

import mlx.core as mx

from ..features import Features, Selection
from .merging import cells_within, spatial
from .registry import register
from .saliency import keep_highest


@register("none")
def none(features: Features, *, keep: int) -> Selection:
    """Keep every token."""
    batch, total, _ = features.tokens.shape
    indices = mx.arange(total, dtype=mx.int32)
    return Selection(mx.broadcast_to(indices, (batch, total)))


@register("random", seeded=True)
def random(features: Features, *, keep: int, seed: int = 0) -> Selection:
    """Control: keep randomly drawn tokens, from a seed."""
    total = features.tokens.shape[1]
    drawn = mx.random.uniform(shape=(1, total), key=mx.random.key(seed))
    # Equal in every row, so that a row keeps the same tokens alone and in a batch.
    scores = mx.broadcast_to(drawn, features.tokens.shape[:2])
    return keep_highest(scores, keep)


@register("uniform", needs=("grid",), fits=cells_within)
def uniform(features: Features, *, keep: int) -> Selection:
    """Control: keep the tokens at the cell centres of the grid of `spatial`."""
    return Selection(spatial(features, keep=keep).indices)
