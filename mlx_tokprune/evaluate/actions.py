"""The same for policies: actions under pruning beside the unpruned and the right ones.

One action at a time, so it is no measure of success: small mistakes add up in a closed
loop, or are made good. `mlx_tokprune.train.policy success` measures that.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .. import control
from ..errors import InputError
from ..features import Features
from .data import Item
from .measure import Reference, Row

TOLERANCE = 0.1  # of the range [-1, 1] within which a number is right


def accuracy(values: np.ndarray, answers: Sequence[str]) -> float:
    """The share of numbers within `TOLERANCE` of the first answer's, normalised."""
    try:
        right = np.array([float(word) for word in answers[0].split()])
    except ValueError:
        raise InputError(
            f"the answer {answers[0]!r} is no action; expected numbers in [-1, 1]"
        ) from None
    if right.shape != values.shape:
        raise InputError(
            f"the answer {answers[0]!r} has {len(right)} numbers; the policy's actions "
            f"have {len(values)}"
        )
    return float(np.mean(np.abs(values - right) <= TOLERANCE))


class ActionEvaluator:
    """Acts on pictures with one policy, keeping its last picture."""

    def __init__(self, model, processor, rows: Sequence[Row], positions: str):
        if model.args.oft:
            raise InputError(
                "OpenVLA-OFT's actions are no tokens that could be compared; measure "
                "its success in closed loop"
            )
        self.model, self.processor = model, processor
        self.rows, self.positions = rows, positions
        self._needs = tuple(
            {
                name
                for row in rows
                for name in row.pruner.needs
                if row.pruner.stage == "vision"
            }
        )
        key = next(iter(processor.norm_stats), None)
        self._steps = len(processor.bounds("action", key).low)
        self._last: tuple[str, Features] | None = None

    def ask(self, item: Item) -> dict[str, dict]:
        """As `Evaluator.ask`; answers are normalised actions."""
        images = [item.load()]
        observation = control.observe(self.processor, images, item.question)
        features, records, reference = self._features(item, observation), {}, None
        for row in self.rows:
            patches = control.see(self.model, observation, row.pruner, features)
            sequence = control.assemble(
                self.model, observation, patches, self.positions
            )
            if reference is None:
                ids = self._decode(sequence)
                reference = Reference(ids, self._forced(sequence, ids))
                given, divergence = ids, 0.0
            else:
                logits = self._forced(sequence, reference.ids)
                divergence = reference.divergence(logits)
                same = np.array(mx.argmax(logits, axis=-1)).tolist() == reference.ids
                given = reference.ids if same else self._decode(sequence)
            values = self.processor.values(np.array(given))
            records[row.label] = {
                "answer": " ".join(f"{value:+.3f}" for value in values),
                "accuracy": accuracy(values, item.answers) if item.answers else None,
                "agrees": given == reference.ids,
                "divergence": divergence,
                "kept": patches.indices.shape[1],
            }
        return records

    def _features(self, item: Item, observation: control.Observation) -> Features:
        if self._last and self._last[0] == item.picture:
            return self._last[1]
        features = control.encode(self.model, observation, self._needs)
        mx.eval([a for a in (features.tokens, features.attention) if a is not None])
        self._last = (item.picture, features)
        return features

    def _decode(self, sequence: control.Sequence) -> list[int]:
        tokens = control.decode(self.model, sequence, self._steps)
        return [int(token) for token in mx.concatenate(tokens)]

    def _forced(self, sequence: control.Sequence, ids: list[int]) -> mx.array:
        """Logits (A, V) from which each of `ids` follows, given those before."""
        model = self.model
        told = model.embed(mx.array([ids[:-1]]))
        whole = mx.concatenate([sequence.embeddings, told], axis=1)
        positions, _ = control.extended(sequence, len(ids) - 1)
        with model.positions.using(positions):
            hidden = model.hidden_states(whole, "causal", None)
        return model.logits(hidden[:, -len(ids) :])[0]
