"""Published pruners with fixed places inside the language model.

`Pruner(method, ratio, at=k)` runs any method there; this module holds the recipes with
a published name. A budget applies at each place, as a ratio of the tokens that are
left there. Compare recipes at an equal mean number of tokens over the layers.
`models/language.py` computes the extras and drops the tokens.
"""

import mlx.core as mx

from ..features import Features, Selection
from .registry import register
from .saliency import attention, keep_highest


@register("fastv", needs=("attention",), at=2)
def fastv(features: Features, *, keep: int) -> Selection:
    """Keep the tokens most attended by the last prompt token, after two layers.

    FastV (arXiv 2403.06764) with K = 2.
    """
    return attention(features, keep=keep)


@register("pyramiddrop", needs=("attention",), at=(0.25, 0.5, 0.75))
def pyramiddrop(features: Features, *, keep: int) -> Selection:
    """Keep the tokens most attended by the last prompt token, at 3 depths in turn.

    The depths are a quarter, a half and three quarters of the layers. PyramidDrop
    (arXiv 2410.17247), published with a keep ratio of 0.5.
    """
    return attention(features, keep=keep)


@register("sparsevlm", needs=("text", "text_attention"), at=(2 / 32, 6 / 32, 15 / 32))
def sparsevlm(features: Features, *, keep: int) -> Selection:
    """Keep the tokens most attended by picture-related prompt tokens, at 3 depths.

    The raters are the prompt tokens with at least the mean similarity to the picture:
    the softmax of products over the prompt, mean over visual tokens. The score of a
    visual token is its mean attention from the raters. SparseVLM (arXiv 2410.04417)
    after layers 2, 6 and 15 of 32. The paper chooses raters once, at the input, and
    recycles dropped tokens; here each place chooses raters, and nothing is recycled.
    """
    tokens = features.tokens.astype(mx.float32)
    text = features.extras["text"].astype(mx.float32)
    similarity = mx.softmax(tokens @ text.swapaxes(1, 2), axis=-1, precise=True)
    similarity = mx.mean(similarity, axis=1)
    raters = similarity >= mx.mean(similarity, axis=1, keepdims=True)
    received = features.extras["text_attention"] * raters[..., None]
    return keep_highest(mx.sum(received, axis=1), keep)
