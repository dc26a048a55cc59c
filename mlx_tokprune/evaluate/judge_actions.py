"""Judging policies: actions under pruning beside the unpruned and the right ones.

One action at a time, so it is no measure of success: small mistakes add up in a closed
loop, or are made good. `recipes.policy success` measures that.
"""

from collections.abc import Sequence

import numpy as np

from ..errors import InputError
from ..measure.subject import OwnSubject

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


class Actions:
    """How a policy speaks, and how its actions are judged; chunks as one after another.

    stops: tokens that end an action. most: tokens of one.
    """

    def __init__(self, subject: OwnSubject, most: int):
        self._head = subject.head
        if not self._head.has_tokens:
            raise InputError(
                "OpenVLA-OFT's actions are no tokens that could be compared; measure "
                "its success in closed loop"
            )
        self.most, self.stops = self._head.calls, self._head.stops

    def judged(self, ids: list[int], reference: list[int], answers) -> dict:
        """The normalised action, how right it is, and whether it is the unpruned."""
        values = self._head.normalized(np.array(ids)).reshape(-1)
        return {
            "answer": " ".join(f"{value:+.3f}" for value in values),
            "accuracy": accuracy(values, answers) if answers else None,
            "agrees": ids == reference,
        }
