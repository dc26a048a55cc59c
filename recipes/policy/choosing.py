"""The choices of `trimvla` and `lightvla`, as gates that a policy learns through.

Forward they are the pruners' choice, with noise; backward they tell the scores which
tokens the actions would need (`mlx_tokprune/train/gate.py`).
"""

import mlx.core as mx
import numpy as np

from mlx_tokprune.models.openvla import OpenVLA
from mlx_tokprune.pruners.saliency import keep_highest
from mlx_tokprune.pruners.text import votes_for
from mlx_tokprune.train.gate import straight_through

from .student import Labelled, trimvla_scores

METHODS = ("trimvla", "lightvla")
_CANDIDATES = 3  # gates, times the tokens that are chosen
_SURE = 1 - 1e-6  # a share above has no logarithm of what it leaves


def trimvla_gate(
    policy: OpenVLA,
    visual: mx.array,
    batch: Labelled,
    keep: int,
    noise: float,
    temperature: float,
) -> tuple[mx.array, mx.array]:
    """Return (B, M): 1 for the `keep` highest scores under `noise` (Gumbel).

    And which tokens (B, M) these are and the next best: others are far from being
    chosen, where a gate has hardly a gradient, and time is saved.
    """
    scores = trimvla_scores(policy, visual, batch)
    return gate_of(scores, keep, noise, temperature)


def gate_of(
    scores: mx.array, keep: int, noise: float, temperature: float
) -> tuple[mx.array, mx.array]:
    """Return a gate and its tokens, as `trimvla_gate`, from any scores (B, N)."""
    scores = scores + noise * mx.random.gumbel(scores.shape)
    here = _first(scores, keep)
    scores = mx.take_along_axis(scores, here, axis=1)
    # Only the order matters: without the mean, all would be pushed up together.
    scores = scores - mx.mean(scores, axis=1, keepdims=True)
    return straight_through(scores, keep, temperature), here


def _first(ranks: mx.array, keep: int) -> mx.array:
    """Return (B, M) indices of the `keep` tokens that are chosen, and of some more."""
    count = min(_CANDIDATES * keep, ranks.shape[1])
    return keep_highest(mx.stop_gradient(ranks), count).indices


def lightvla_gate(
    policy: OpenVLA,
    visual: mx.array,
    batch: Labelled,
    noise: float,
    temperature: float,
) -> tuple[mx.array, mx.array]:
    """Return (B, M): 1 for each token that a query votes for, votes with `noise`.

    The gradient is that of the chance that any query votes for it, each drawn from the
    softmax of its votes. And which tokens (B, M) these are and the most likely others.
    """
    text = policy.decoder.embed(batch.prompts)
    votes = votes_for(visual, text, batch.asked) * visual.shape[-1] ** -0.5
    votes = votes + noise * mx.random.uniform(shape=votes.shape)
    best = mx.argmax(mx.stop_gradient(votes), axis=-1, keepdims=True)
    hard = mx.any(best == mx.arange(visual.shape[1]), axis=1).astype(mx.float32)
    shares = mx.minimum(mx.softmax(votes / temperature, axis=-1), _SURE)
    soft = 1 - mx.exp(mx.sum(mx.log1p(-shares), axis=1))
    known = mx.stop_gradient(soft)
    here = _first(hard + known, int(np.array(mx.max(mx.sum(hard, axis=1)))))
    return mx.take_along_axis(hard + soft - known, here, axis=1), here
