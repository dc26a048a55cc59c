"""Pruners that score each visual token and keep the highest."""

import mlx.core as mx
import numpy as np

from ..features import Features, Selection, place_marked
from .registry import in_ranges, register


def keep_highest(scores: mx.array, keep: int) -> Selection:
    """Select the `keep` highest of `scores` (B, N); of equal scores the earlier."""
    order = mx.argsort(-scores, axis=1)[:, :keep]
    return Selection(mx.sort(order, axis=1).astype(mx.int32))


def keep_marked(marked: mx.array) -> Selection:
    """Select the marked tokens (B, N), padded to the largest count of the batch.

    Evaluates `marked`: the count decides the shape.
    """
    total = marked.shape[1]
    keep = int(np.array(mx.max(mx.sum(marked, axis=1))))
    where = place_marked(marked, keep)
    mask = None if marked.shape[0] == 1 else where < total
    return Selection(mx.minimum(where, total - 1), mask=mask)


def one_hot(indices: mx.array, total: int, mask: mx.array | None = None) -> mx.array:
    """Mark the tokens (B, N) of indices (B, K), without those that `mask` hides."""
    here = indices[..., None] == mx.arange(total)
    return mx.any(here if mask is None else here & mask[..., None], axis=1)


def normalize(tokens: mx.array) -> mx.array:
    """Scale vectors (..., C) to length 1, in float32; zero vectors are kept."""
    tokens = tokens.astype(mx.float32)
    squares = mx.sum(mx.square(tokens), axis=-1, keepdims=True)
    return tokens * mx.rsqrt(mx.maximum(squares, 1e-12))


def squared_norm(tokens: mx.array) -> mx.array:
    """Return the squared L2 norm (B, N) float32 of tokens (B, N, C)."""
    return mx.sum(mx.square(tokens.astype(mx.float32)), axis=-1)


@register("norm", aliases=("topk_magnitude",))
def norm(features: Features, *, keep: int) -> Selection:
    """Keep the tokens with the largest L2 norm."""
    return keep_highest(squared_norm(features.tokens), keep)


@register("attention", needs=("attention",))
def attention(features: Features, *, keep: int) -> Selection:
    """Keep the tokens that receive most attention in the tower's last attention block.

    The score of VisionZip (arXiv 2412.04467) for towers without a CLS token. Inside the
    language model, after layer k: attention from the last prompt token in that layer,
    the score of FastV (arXiv 2403.06764).
    """
    return keep_highest(features.extras["attention"], keep)


@register(
    "hiprune",
    needs=("attention", "grid"),
    wants=("attention_middle",),
    check=in_ranges(alpha=(0, 1)),
)
def hiprune(features: Features, *, keep: int, alpha: float = 0.1) -> Selection:
    """Keep mid-tower anchors with their neighbours, then the most attended tokens.

    Anchors receive most attention in a middle block: alpha times the budget over 5 of
    them, rounded, each with the tokens above, below, left and right. The rest of the
    budget receives most attention in the last block, which also replaces a middle
    block that the model does not provide. HiPrune (arXiv 2508.00553), in which
    neighbours wrap over the ends of rows; here they do not.
    """
    last, total = features.extras["attention"], features.total
    anchors = round(alpha * keep / 5)
    if not anchors:
        return keep_highest(last, keep)
    middle = features.extras.get("attention_middle", last)
    marked = one_hot(keep_highest(middle, anchors).indices, total)
    squares = marked.reshape(-1, *_grid(features))
    padded = mx.pad(squares, [(0, 0), (1, 1), (1, 1)])
    rows, columns = padded[:, :, 1:-1], padded[:, 1:-1]
    near = rows[:, :-2] | rows[:, 2:] | columns[:, :, :-2] | columns[:, :, 2:]
    marked = (squares | near).reshape(marked.shape)
    most = mx.max(last, axis=1, keepdims=True)
    return keep_highest(mx.where(marked, last + most + 1, last), keep)


def _grid(features: Features) -> tuple[int, int]:
    return features.grid or (1, features.total)


@register("mean_similarity", aliases=("attention_score",))
def mean_similarity(features: Features, *, keep: int) -> Selection:
    """Keep the tokens closest (cosine) to the mean token of their picture."""
    tokens = features.tokens.astype(mx.float32)
    mean = mx.mean(tokens, axis=1, keepdims=True)
    return keep_highest(mx.sum(normalize(tokens) * normalize(mean), axis=-1), keep)


@register("learned", needs=("scores",))
def learned(features: Features, *, keep: int) -> Selection:
    """Keep the tokens with the highest scores of a trained scorer."""
    return keep_highest(features.extras["scores"], keep)


@register("threshold", needs=("scores",), counts="either")
def threshold(features: Features, *, keep: int | None) -> Selection:
    """Keep the tokens with scores above 0 of a scorer that learned the count.

    With a budget, keep the tokens with the highest scores.
    """
    scores = features.extras["scores"]
    return keep_marked(above(scores)) if keep is None else keep_highest(scores, keep)


def above(scores: mx.array) -> mx.array:
    """Mark the scores (B, N) above 0, or the highest if there are none."""
    best = keep_highest(scores, 1).indices
    return (scores > 0) | one_hot(best, scores.shape[1])
