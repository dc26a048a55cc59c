"""What `trimvla` and `lightvla` choose, as gates that a policy learns through.

Forward they are the pruners' choice, with noise; backward they tell the scores which
tokens the actions would need (`train/tune/gate.py`).
"""

import mlx.core as mx

from ...models.openvla import OpenVLA
from ...pruners.text import votes_for
from ..tune.gate import straight_through
from .student import Labelled, trimvla_scores

METHODS = ("trimvla", "lightvla")
_SURE = 1 - 1e-6  # a share above has no logarithm of what it leaves


def trimvla_gate(
    policy: OpenVLA,
    visual: mx.array,
    batch: Labelled,
    keep: int,
    noise: float,
    temperature: float,
) -> tuple[mx.array, mx.array]:
    """(B, N): 1 for the `keep` highest scores with `noise` of a Gumbel distribution.

    And these scores as a rank, without gradient.
    """
    scores = trimvla_scores(policy, visual, batch)
    scores = scores + noise * mx.random.gumbel(scores.shape)
    return straight_through(scores, keep, temperature), mx.stop_gradient(scores)


def lightvla_gate(
    policy: OpenVLA,
    visual: mx.array,
    batch: Labelled,
    noise: float,
    temperature: float,
) -> tuple[mx.array, mx.array]:
    """(B, N): 1 for each token that a query votes for, with uniform `noise` on votes.

    The gradient is that of the chance that any query votes for it, each drawn from the
    softmax of its votes. And a rank, without gradient: what is voted for is above the
    rest, and what is likely above what is not.
    """
    text = policy.decoder.embed(batch.prompts)
    votes = votes_for(visual, text, batch.asked) * visual.shape[-1] ** -0.5
    votes = votes + noise * mx.random.uniform(shape=votes.shape)
    best = mx.argmax(mx.stop_gradient(votes), axis=-1, keepdims=True)
    hard = mx.any(best == mx.arange(visual.shape[1]), axis=1).astype(mx.float32)
    shares = mx.minimum(mx.softmax(votes / temperature, axis=-1), _SURE)
    soft = 1 - mx.exp(mx.sum(mx.log1p(-shares), axis=1))
    known = mx.stop_gradient(soft)
    return hard + soft - known, hard + known
