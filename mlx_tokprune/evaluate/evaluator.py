"""Every question, unpruned and under every row, whatever runtime answers it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from ..checkpoints.fingerprint import fingerprint
from ..measure.accuracy import SCHEMA
from ..measure.results import Row
from .items import Item


class Answer:
    """One answer, and the distributions that the unpruned answer's tokens follow from.

    logs: (T, V) log-probabilities, one row for each token of the unpruned answer. kept:
    visual tokens, mean over layers. flops: up to the first token, `None` if unknown.
    needed: the share of the tokens that the question needs which are left, `None` if
    unknown.
    """

    def __init__(
        self,
        ids: list[int],
        logs: mx.array,
        kept: float = 0,
        flops: float | None = None,
        needed: float | None = None,
    ):
        self.ids, self.logs = ids, logs
        self.kept, self.flops, self.needed = kept, flops, needed

    def divergence(self, other: "Answer") -> float:
        """Return the KL divergence of `other` from this, mean over tokens, in nats."""
        gap = mx.exp(self.logs) * (self.logs - other.logs)
        return max(0.0, mx.mean(mx.sum(gap, axis=-1)).item())


class Runtime(Protocol):
    """What answers the questions of an evaluation: ours, or mlx-vlm's."""

    def begin(self, item: Item) -> None:
        """Take the item that the next answers are about."""
        ...

    def answer(self, row: Row, item: Item, unpruned: Answer | None) -> Answer:
        """Answer under a row; the first row of an item is the unpruned one."""
        ...

    def judged(self, ids: list[int], reference: list[int], answers) -> dict:
        """The answer, its accuracy, and whether it is the unpruned one."""
        ...


class Evaluator:
    """Asks one model about pictures, under every row."""

    def __init__(self, runtime: Runtime, rows: Sequence[Row]):
        self.runtime, self.rows = runtime, rows

    def ask(self, item: Item) -> dict[str, dict]:
        """Return the record of each row, by label.

        The answer, its accuracy (`None` if unknown), whether it is the unpruned one,
        the mean KL divergence per token against it, tokens kept (mean over layers), the
        share of the needed tokens that are left after every place (`None` if unknown),
        and FLOPs up to the first token.
        """
        records, unpruned = {}, None
        self.runtime.begin(item)
        for row in self.rows:
            answer = self.runtime.answer(row, item, unpruned)
            unpruned = unpruned or answer
            records[row.label] = {
                **self.runtime.judged(answer.ids, unpruned.ids, item.answers),
                "divergence": unpruned.divergence(answer),
                "kept": answer.kept,
                "needed": answer.needed,
                "flops": answer.flops,
            }
        return records


def describe_run(model, items: Sequence[Item], rows: Sequence[Row], **options) -> dict:
    """What makes two runs the same."""
    asked, seen = hashlib.sha256(), set()
    for item in items:
        if item.is_file and item.picture not in seen:
            seen.add(item.picture)
            asked.update(Path(item.picture).read_bytes())
        about = (item.picture, item.question, item.answers, item.kind, item.needed)
        asked.update(repr(about).encode())
    return {
        "schema": SCHEMA,
        "weights": fingerprint(model),
        "questions": asked.hexdigest()[:16],
        "rows": [row.described() for row in rows],
        **options,
    }
