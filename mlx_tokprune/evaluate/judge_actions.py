"""Accuracy of a policy's actions under pruning, and agreement with unpruned actions.

Each action is judged alone, so the accuracy is no success rate: in a closed loop small
errors add up or are corrected. `recipes.policy success` measures success.
"""

from collections.abc import Sequence

import numpy as np

from ..act.heads import Head
from ..errors import InputError

TOLERANCE = 0.1  # largest error of a right number, in the range [-1, 1]


def accuracy(values: np.ndarray, answers: Sequence[str]) -> float:
    """Return the share of numbers within `TOLERANCE` of the first answer's.

    values: (N,), normalised. Raises `InputError` for an answer that is no such action.
    """
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


class ActionJudge:
    """Judge of a policy's actions; a chunk is a sequence of actions.

    stops: tokens that end an action.
    """

    def __init__(self, head: Head):
        self._head, self.stops = head, head.stops
        if not self._head.has_tokens:
            raise InputError(
                "OpenVLA-OFT's actions are no tokens to compare; measure its success "
                "in closed loop"
            )

    def judge(
        self, ids: list[int], reference: list[int], answers: Sequence[str]
    ) -> dict:
        """Return the normalised action, its accuracy and whether it is `reference`.

        The accuracy is `None` without right answers.
        """
        values = self._head.normalized(np.array(ids)).reshape(-1)
        return {
            "answer": " ".join(f"{value:+.3f}" for value in values),
            "accuracy": accuracy(values, answers) if answers else None,
            "agrees": ids == reference,
        }
