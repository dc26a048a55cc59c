"""Published recipes with places of their own inside the language model.

What a method of another place does there is `Pruner(method, ratio, at=k)`; these are
those that people know by a name. A budget is that of each place: a ratio of what is
left there. Mean tokens over the layers are what to compare them at. What they read is
made by `models/language.py`, which also drops what they do not choose.
"""

import mlx.core as mx

from ..features import Features, Selection
from .registry import register
from .saliency import attention, keep_highest


@register("fastv", needs=("attention",), at=2)
def fastv(features: Features, *, keep: int) -> Selection:
    """Keep the tokens that the prompt's last one attends to, after two layers.

    FastV (arXiv 2403.06764) with K = 2.
    """
    return attention(features, keep=keep)


@register("pyramiddrop", needs=("attention",), at=(0.25, 0.5, 0.75))
def pyramiddrop(features: Features, *, keep: int) -> Selection:
    """The same after a quarter, a half and three quarters of the layers.

    PyramidDrop (arXiv 2410.17247), published with a keep ratio of 0.5.
    """
    return attention(features, keep=keep)


@register("sparsevlm", needs=("text", "text_attention"), at=(2 / 32, 6 / 32, 15 / 32))
def sparsevlm(features: Features, *, keep: int) -> Selection:
    """Keep the tokens that the prompt's raters attend to, at three of the layers.

    Raters are the tokens of the prompt that the picture is like at least the mean: by
    the softmax of products over the prompt, mean over visual tokens. The score of a
    visual token is its mean attention from them. SparseVLM (arXiv 2410.04417) after
    layers 2, 6 and 15 of 32; it chooses raters once, at the input, here they are chosen
    at each place, and what is dropped is not recycled.
    """
    tokens = features.tokens.astype(mx.float32)
    text = features.extras["text"].astype(mx.float32)
    like = mx.softmax(tokens @ text.swapaxes(1, 2), axis=-1, precise=True)
    like = mx.mean(like, axis=1)
    raters = like >= mx.mean(like, axis=1, keepdims=True)
    received = features.extras["text_attention"] * raters[..., None]
    return keep_highest(mx.sum(received, axis=1), keep)
