"""Questions with their answers as padded NumPy arrays, and who sees whom in them.

Nothing here needs MLX, so that the PyTorch forms of the recipes read it, too.
"""

from collections.abc import Sequence

import numpy as np

from ..scenes.questions import Question

IGNORE = -100
# Token ids of a question, and of its answer.
Pair = tuple[Sequence[int], Sequence[int]]


def padded_arrays(
    rows: Sequence[Sequence[Pair | None]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids and targets (B, Q, L) int32 of Q questions, and where ids are the prompt's.

    targets: the next token where it belongs to the answer, else `IGNORE`. `None` leaves
    a gap.
    """
    length = max(len(p) + len(a) for row in rows for p, a in filter(None, row))
    ids = np.zeros((len(rows), len(rows[0]), length), np.int32)
    targets, prompts = np.full_like(ids, IGNORE), np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        for j, pair in enumerate(row):
            if pair is not None:
                prompt, answer = pair
                tokens = [*prompt, *answer]
                ids[i, j, : len(tokens)] = tokens
                prompts[i, j, : len(prompt)] = True
                targets[i, j, len(prompt) - 1 : len(tokens) - 1] = answer
    return ids, targets, prompts


def pairs_of(
    rows: Sequence[Sequence[Question | None]], encode, suffix: str, end: int
) -> list[list[Pair | None]]:
    """The token ids of questions with their answers."""

    def pair(asked: Question | None) -> Pair | None:
        if asked is None:
            return None
        return encode(f"\n{asked.prompt}{suffix}"), [*encode(asked.answer), end]

    return [[pair(asked) for asked in row] for row in rows]


def question_mask(
    shared: int, count: int, length: int, single: bool = False
) -> np.ndarray:
    """(T, T) bool: causal, and only within a question or towards what is shared.

    single: the last shared tokens are one for each question, which alone sees it.
    """
    numbers = np.arange(1, count + 1)
    own = numbers if single else numbers[:0]
    parts = [np.zeros(shared - len(own), int), own, np.repeat(numbers, length)]
    group = np.concatenate(parts)
    causal = np.tril(np.ones((len(group), len(group)), bool))
    same = group[:, None] == group[None]
    return causal & (same | (group[None] == 0))
