"""Padded NumPy arrays of questions with their answers, and their attention mask.

The module does not need MLX: the PyTorch forms of the recipes import it, too.
"""

from collections.abc import Sequence

import numpy as np

IGNORE = -100  # target of a token without a loss
# Token ids of a question, and of its answer.
Pair = tuple[Sequence[int], Sequence[int]]


def padded_arrays(
    rows: Sequence[Sequence[Pair | None]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, targets and prompt mask, each (B, Q, L), of Q questions a row.

    ids: int32, 0 for padding. targets: int32, the next token where it belongs to the
    answer, else `IGNORE`. prompt mask: bool, true for tokens of the prompt. `None` in
    `rows` leaves a gap.
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


def question_mask(
    shared: int, count: int, length: int, single: bool = False
) -> np.ndarray:
    """Return the mask (T, T) bool: causal, within a question or to the shared tokens.

    shared: tokens before the questions. count, length: questions, and tokens of each;
    T = shared + count * length. single: the last `count` shared tokens belong to one
    question each, and only that question attends to its token.
    """
    numbers = np.arange(1, count + 1)
    own = numbers if single else numbers[:0]
    parts = [np.zeros(shared - len(own), int), own, np.repeat(numbers, length)]
    group = np.concatenate(parts)
    causal = np.tril(np.ones((len(group), len(group)), bool))
    same = group[:, None] == group[None]
    return causal & (same | (group[None] == 0))
