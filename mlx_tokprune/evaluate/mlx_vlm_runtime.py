"""Answers of mlx-vlm's runtime."""

from collections.abc import Sequence

import mlx.core as mx

from ..errors import InputError
from ..measure.mlx_vlm_subject import MlxVlmSubject
from ..measure.results import Row
from .evaluator import Answer
from .items import Item, Questions
from .judge_words import judge


def readable(
    subject: MlxVlmSubject, rows: Sequence[Row], questions: Questions
) -> Questions:
    """Return the questions about pictures that mlx-vlm takes; skip the others.

    Raises `InputError` when none is left.
    """
    items, skipped, reasons = [], list(questions.skipped), {}
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
    """A model in mlx-vlm's runtime. most: tokens of an answer."""

    def __init__(self, subject: MlxVlmSubject, most: int):
        self.subject, self.most = subject, most

    def begin(self, item: Item) -> None:
        """Load the picture."""
        self._image = item.load()

    def answer(self, row: Row, item: Item, unpruned: Answer | None) -> Answer:
        """Answer greedily; if it differs, run again forced to the unpruned answer."""
        asked = (row, self._image, item.question)
        reply = self.subject.ask(*asked, self.most)
        logs = reply.logs
        if unpruned is not None and reply.ids != unpruned.ids:
            logs = self.subject.ask(*asked, self.most, unpruned.ids).logs
        cost = self.subject.cost(*asked, reply.kept)
        flops = cost and sum(part.flops for part in cost.values())
        return Answer(reply.ids, mx.stack(logs), reply.kept, flops)

    def judged(self, ids: list[int], reference: list[int], answers) -> dict:
        """The answer, its accuracy, and whether it is the unpruned one."""
        decode = self.subject.decode
        return judge(decode(ids), decode(reference), answers)
