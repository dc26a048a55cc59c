"""Pruners that score each visual token and keep the highest."""

import mlx.core as mx

from ..features import Features, Selection
from .registry import register


def keep_highest(scores: mx.array, keep: int) -> Selection:
    """The `keep` highest of `scores` (B, N), in raster order; ties keep the earlier."""
    order = mx.argsort(-scores, axis=1)[:, :keep]
    return Selection(mx.sort(order, axis=1).astype(mx.int32))


def normalize(tokens: mx.array) -> mx.array:
    """(..., C) vectors of length 1 in float32; zero vectors stay zero."""
    tokens = tokens.astype(mx.float32)
    squares = mx.sum(mx.square(tokens), axis=-1, keepdims=True)
    return tokens * mx.rsqrt(mx.maximum(squares, 1e-12))


def squared_norm(tokens: mx.array) -> mx.array:
    """(B, N, C) -> (B, N) squared L2 norm in float32."""
    return mx.sum(mx.square(tokens.astype(mx.float32)), axis=-1)


@register("norm", aliases=("topk_magnitude",))
def norm(features: Features, *, keep: int) -> Selection:
    """Keep the tokens with the largest L2 norm."""
    return keep_highest(squared_norm(features.tokens), keep)


@register("attention", needs=("attention",))
def attention(features: Features, *, keep: int) -> Selection:
    """Keep the tokens that receive most attention in the tower's last attention block.

    The score of VisionZip (arXiv 2412.04467) for towers without a CLS token. Inside the
    language model, after layer k: attention of the prompt's last token in that layer,
    the score of FastV (arXiv 2403.06764).
    """
    return keep_highest(features.extras["attention"], keep)


@register("mean_similarity", aliases=("attention_score",))
def mean_similarity(features: Features, *, keep: int) -> Selection:
    """Keep the tokens closest (cosine) to the mean token of their picture."""
    tokens = features.tokens.astype(mx.float32)
    mean = mx.mean(tokens, axis=1, keepdims=True)
    return keep_highest(mx.sum(normalize(tokens) * normalize(mean), axis=-1), keep)


@register("learned", needs=("scores",))
def learned(features: Features, *, keep: int) -> Selection:
    """Keep the tokens that a scorer, which was trained for it, gives most."""
    return keep_highest(features.extras["scores"], keep)
