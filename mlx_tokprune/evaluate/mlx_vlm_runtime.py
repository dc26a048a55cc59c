"""Answers and costs of mlx-vlm's runtime."""

from collections.abc import Sequence

import mlx.core as mx

from ..errors import InputError
from ..measure.mlx_vlm_subject import MlxVlmSubject
from ..measure.results import Row
from .evaluator import Answer
from .items import Item, Questions
from .judge_words import WordJudge


def readable(
    subject: MlxVlmSubject, rows: Sequence[Row], questions: Questions
) -> Questions:
    """Return the questions about pictures that mlx-vlm can encode; skip the rest.

    Raises `InputError` if no question is left.
    """
    items, skipped = [], list(questions.skipped)
    reasons = {}  # by size, on which alone the check depends
    for item in questions.items:
        image = item.load()
        if image.size not in reasons:
            try:
                reasons[image.size] = subject.check(image, rows)
            except InputError as error:
                reasons[image.size] = str(error)
        if reasons[image.size] is None:
            items.append(item)
        else:
            skipped.append((item.line, reasons[image.size]))
    if not items:
        raise InputError(
            f"no question is left; line {skipped[-1][0]}: {skipped[-1][1]}"
        )
    return Questions(tuple(items), tuple(sorted(skipped)))


class MlxVlmRuntime:
    """Model in mlx-vlm's runtime. most: tokens of an answer."""

    def __init__(self, subject: MlxVlmSubject, most: int):
        self.subject, self.most = subject, most
        self.judge = WordJudge(subject.tokenizer, subject.stops).judge

    def begin(self, item: Item) -> None:
        """Load the picture."""
        self._image = item.load()

    def answer(self, row: Row, item: Item, unpruned: Answer | None) -> Answer:
        """Answer greedily; if it differs, run again forced to the unpruned answer."""
        question = (row, self._image, item.question)
        reply = self.subject.ask(*question, self.most)
        logs = reply.logs
        if unpruned is not None and reply.ids != unpruned.ids:
            logs = self.subject.ask(*question, self.most, unpruned.ids).logs
        cost = self.subject.cost(*question, reply.kept)
        flops = sum(part.flops for part in cost.values()) if cost else None
        return Answer(reply.ids, mx.stack(logs), reply.kept, flops)
