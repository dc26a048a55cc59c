"""Answers in words: VQA accuracy with the usual normalisation.

Antol et al., 2015 (arXiv 1505.00468) and the evaluation that its authors publish:
case, punctuation, articles and number words do not count, and an answer is right when
three of ten people gave it.
"""

import re
from collections.abc import Sequence

from ..measure.subject import OwnSubject

_NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_ARTICLES = {"a", "an", "the"}
_COMMA = re.compile(r"(?<=\d),(?=\d)")
_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")  # not that of a decimal number
_MARKS = re.compile(r"[;/\[\]\"{}()=+\\_><@`,?!:*-]")
_ENOUGH = 3  # people who make an answer right


def normalize(answer: str) -> str:
    """The form in which answers are compared."""
    text = " ".join(answer.lower().split())
    # Contractions come with and without their apostrophe; either way counts.
    text = text.replace("'", "").replace("\u2019", "")
    text = _MARKS.sub(" ", _POINT.sub("", _COMMA.sub("", text)))
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def accuracy(given: str, answers: Sequence[str]) -> float:
    """How right `given` is, in [0, 1].

    With four answers or more: the mean over all but one of them, of a third for each
    that is equal, at most 1. With fewer, any equal one is enough.
    """
    given = normalize(given)
    equal = [normalize(answer) == given for answer in answers]
    if len(equal) <= _ENOUGH:
        return float(any(equal))
    found = sum(equal)
    shares = [min(1.0, (found - one) / _ENOUGH) for one in equal]
    return sum(shares) / len(shares)


def judge(text: str, unpruned: str, answers: Sequence[str]) -> dict:
    """An answer, how right it is (`None` if nobody knows), and whether both agree."""
    return {
        "answer": text,
        "accuracy": accuracy(text, answers) if answers else None,
        "agrees": normalize(text) == normalize(unpruned),
    }


class Words:
    """How a model that answers speaks, and how its answers are judged.

    stops: tokens that end an answer. most: tokens of one.
    """

    def __init__(self, subject: OwnSubject, most: int):
        self._tokenizer = subject.processor.tokenizer
        self.stops, self.most = self._tokenizer.eos_token_ids, most

    def judged(self, ids: list[int], reference: list[int], answers) -> dict:
        """The answer, how right it is, and whether it is the unpruned one."""
        return judge(self._text(ids), self._text(reference), answers)

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self.stops])
