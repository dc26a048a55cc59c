"""Pruners for policies, which choose visual tokens by the instruction.

They run at the language model's input, on projected tokens, so every token has to be
projected. Methods with their own count may keep a different number in each sample.
"""

import math
from typing import Literal

import mlx.core as mx

from ..errors import InputError
from ..features import Features, Selection
from .diversity import farthest
from .registry import Options, register
from .saliency import keep_highest, keep_marked, one_hot

Aggregation = Literal["logsumexp", "max", "mean"]


def rms_normalize(x: mx.array) -> mx.array:
    """Divide (..., D) by its root mean square, in float32, without weights."""
    return mx.fast.rms_norm(x.astype(mx.float32), None, 1e-6)


def parameter_free_norm(x: mx.array) -> mx.array:
    """Apply `rms_normalize` in the type of `x`: TrimVLA's input of the first layer."""
    return rms_normalize(x).astype(x.dtype)


def _check_trimvla(options: Options, budget: bool) -> None:
    for name in ("coverage", "min_keep_ratio"):
        value = float(options.get(name, 1))
        if not 0 < value <= 1:
            raise InputError(f"{name} {value:g} is outside (0, 1]")
        if budget and name in options:
            raise InputError(
                f"give a budget or {name}, not both: {name} chooses the number of "
                "tokens where there is no budget"
            )
    for name in ("coverage_temperature", "temperature"):
        value = float(options.get(name, 1))
        if not 0 < value < math.inf:
            raise InputError(f"{name} {value:g} is out of range; expected > 0")


@register(
    "trimvla",
    needs=("queries", "text_keys"),
    at="prompt",
    counts="either",
    counting=("coverage", "min_keep_ratio"),
    check=_check_trimvla,
    prepare=parameter_free_norm,
)
def trimvla(
    features: Features,
    *,
    keep: int | None,
    coverage: float = 0.15,
    min_keep_ratio: float = 0.1,
    coverage_temperature: float = 0.1,
    temperature: float = 1.0,
    aggregation: Aggregation = "logsumexp",
) -> Selection:
    """Keep the tokens whose first-layer queries best match the prompt's keys.

    The score of a token is the `aggregation` (log-sum-exp, max or mean) of its scaled
    products over the prompt, mean over heads. Without a budget, each sample keeps the
    fewest tokens whose softmax (of scores over `coverage_temperature`) reaches
    `coverage`, and at least `min_keep_ratio` of all tokens. `temperature` scales the
    log-sum-exp. TrimVLA (github.com/grisha0057/TrimVLA), with its defaults.
    """
    queries, keys = features.extras["queries"], features.extras["text_keys"]
    scores = prompt_scores(queries, keys, temperature, aggregation)
    if keep is not None:
        return keep_highest(scores, keep)
    order = mx.argsort(-scores, axis=1)
    shares = mx.softmax(scores / coverage_temperature, axis=1, precise=True)
    reached = mx.cumsum(mx.take_along_axis(shares, order, axis=1), axis=1)
    counts = mx.sum(reached < coverage, axis=1) + 1
    total = scores.shape[1]
    counts = mx.clip(counts, max(1, int(total * min_keep_ratio)), total)
    rank = mx.argsort(order, axis=1)
    return keep_marked(rank < counts[:, None])


def prompt_scores(
    queries: mx.array,
    keys: mx.array,
    temperature: float = 1.0,
    aggregation: Aggregation = "logsumexp",
) -> mx.array:
    """Return scores (B, N) float32 of `trimvla`.

    queries, keys: (B, heads, N, d) and (B, heads, T, d).
    """
    queries, keys = queries.astype(mx.float32), keys.astype(mx.float32)
    products = queries @ keys.swapaxes(-1, -2) * queries.shape[-1] ** -0.5
    if aggregation == "logsumexp":
        joined = mx.logsumexp(products / temperature, axis=-1) * temperature
    else:
        join = {"max": mx.max, "mean": mx.mean}[aggregation]
        joined = join(products, axis=-1)
    return mx.mean(joined, axis=1)


@register("lightvla", needs=("text",), at="prompt", counts="own")
def lightvla(features: Features, *, keep: int | None = None) -> Selection:
    """Keep every token that is the best match of at least one prompt-based query.

    Each visual token attends to the prompt without parameters; the result is a query
    that votes for the closest visual token. The votes decide the count. LightVLA
    (arXiv 2509.12594), without its training noise.
    """
    votes = mx.argmax(votes_for(features.tokens, features.extras["text"]), axis=-1)
    positions = mx.arange(features.total)
    return keep_marked(mx.any(votes[:, :, None] == positions, axis=1))


def votes_for(
    tokens: mx.array, text: mx.array, text_mask: mx.array | None = None
) -> mx.array:
    """Return products (B, N, N) of each visual token's query with every visual token.

    tokens, text: (B, N, D) and (B, T, D). text_mask: (B, T) bool, false at padding.
    """
    tokens, text = rms_normalize(tokens), rms_normalize(text)
    products = tokens @ text.swapaxes(-1, -2) * tokens.shape[-1] ** -0.5
    if text_mask is not None:
        products = mx.where(text_mask[:, None], products, -mx.inf)
    queries = rms_normalize(mx.softmax(products, axis=-1) @ text)
    return queries @ tokens.swapaxes(-1, -2)


@register(
    "vlapruner",
    needs=("queries", "text_keys"),
    wants=("scores_previous",),
    at="prompt",
    prepare=parameter_free_norm,
)
def vlapruner(features: Features, *, keep: int) -> Selection:
    """Keep diverse tokens that the prompt or the last actions attend to.

    Candidates are the `keep` tokens with the highest score of `trimvla` and the `keep`
    most attended by the last actions of the episode; `divprune` chooses among them. A
    `Policy` smooths over time (decay 0.8) and keeps every token in the first three
    steps of an episode. Without an episode, only the prompt scores tokens. VLA-Pruner
    (arXiv 2511.16449), which scores by the prompt's attention in a prefill.
    """
    extras, total = features.extras, features.total
    scores = prompt_scores(extras["queries"], extras["text_keys"])
    among = one_hot(keep_highest(scores, keep).indices, total)
    if "scores_previous" in extras:
        before = keep_highest(extras["scores_previous"], keep)
        among = among | one_hot(before.indices, total)
    return farthest(features.tokens, keep, among)
