"""Token ids of the demo's questions; the module does not need MLX."""

from collections.abc import Callable, Sequence

from mlx_tokprune.scenes.questions import Question
from mlx_tokprune.train.layout import Pair


def pairs_of(
    rows: Sequence[Sequence[Question | None]],
    encode: Callable[[str], Sequence[int]],
    suffix: str,
    end: int,
) -> list[list[Pair | None]]:
    """Return the token ids of questions with their answers; `None` leaves a gap.

    encode: text -> token ids. suffix: text between question and answer. end: token id
    after the answer.
    """

    def pair(question: Question | None) -> Pair | None:
        if question is None:
            return None
        ids = encode(f"\n{question.prompt}{suffix}")
        return ids, [*encode(question.answer), end]

    return [[pair(question) for question in row] for row in rows]
