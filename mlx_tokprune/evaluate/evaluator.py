"""Evaluation of every question, unpruned and under every row, in any runtime."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx

from ..checkpoints.fingerprint import fingerprint
from ..measure.accuracy import SCHEMA
from ..measure.results import Row
from .items import Item


@dataclass(frozen=True)
class Answer:
    """Answer of one row, with its distributions at the unpruned answer's tokens.

    logs: (T, V) log-probabilities, one row for each token of the unpruned answer. kept:
    visual tokens, mean over layers. flops: up to the first token, `None` if unknown.
    needed: kept share of the tokens that the question needs, `None` if unknown.
    """

    ids: list[int]
    logs: mx.array
    kept: float = 0
    flops: float | None = None
    needed: float | None = None

    def divergence(self, other: "Answer") -> float:
        """Return the KL divergence of `other` from this, mean over tokens, in nats."""
        gap = mx.exp(self.logs) * (self.logs - other.logs)
        return max(0.0, cast(float, mx.mean(mx.sum(gap, axis=-1)).item()))


class Runtime(Protocol):
    """Runtime that answers the questions of an evaluation: ours, or mlx-vlm's."""

    def begin(self, item: Item) -> None:
        """Load the item of the next answers."""
        ...

    def answer(self, row: Row, item: Item, unpruned: Answer | None) -> Answer:
        """Answer under a row; the first row of an item is the unpruned one."""
        ...

    def judge(
        self, ids: list[int], reference: list[int], answers: Sequence[str]
    ) -> dict:
        """Return the answer, its accuracy, and whether it agrees with the unpruned."""
        ...


class Evaluator:
    """Evaluator of one model on questions about pictures, under every row."""

    def __init__(self, runtime: Runtime, rows: Sequence[Row]):
        self.runtime, self.rows = runtime, rows

    def ask(self, item: Item) -> dict[str, dict]:
        """Return the record of each row, by label.

        A record has the answer, its accuracy (`None` if unknown), whether it agrees
        with the unpruned one, the mean KL divergence per token against that in nats,
        tokens kept (mean over layers), the share of the needed tokens that are left
        after every place (`None` if unknown), and FLOPs up to the first token.
        """
        records, unpruned = {}, None
        self.runtime.begin(item)
        for row in self.rows:
            answer = self.runtime.answer(row, item, unpruned)
            unpruned = unpruned or answer
            records[row.label] = {
                **self.runtime.judge(answer.ids, unpruned.ids, item.answers),
                "divergence": unpruned.divergence(answer),
                "kept": answer.kept,
                "needed": answer.needed,
                "flops": answer.flops,
            }
        return records


def describe_run(
    model: Any, items: Sequence[Item], rows: Sequence[Row], **options: Any
) -> dict:
    """Return the identity of a run: runs with equal descriptions give equal answers."""
    digest, hashed_pictures = hashlib.sha256(), set()
    for item in items:
        if item.is_file and item.picture not in hashed_pictures:
            hashed_pictures.add(item.picture)
            digest.update(Path(item.picture).read_bytes())
        fields = (item.picture, item.question, item.answers, item.kind, item.needed)
        digest.update(repr(fields).encode())
    return {
        "schema": SCHEMA,
        "weights": fingerprint(model),
        "questions": digest.hexdigest()[:16],
        "rows": [row.described() for row in rows],
        **options,
    }
