"""VQA accuracy of answers in words, with the usual normalisation.

Source: Antol et al., 2015 (arXiv 1505.00468) and its authors' evaluation code: case,
punctuation, articles and number words do not count, and an answer is right if three of
ten people gave it.
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
_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")  # no decimal point
_MARKS = re.compile(r"[;/\[\]\"{}()=+\\_><@`,?!:*-]")
_ENOUGH = 3  # people who make an answer right


def normalize(answer: str) -> str:
    """Return an answer in the form for comparison."""
    text = " ".join(answer.lower().split())
    # Contractions come with and without their apostrophe; either way counts.
    text = text.replace("'", "").replace("\u2019", "")
    text = _MARKS.sub(" ", _POINT.sub("", _COMMA.sub("", text)))
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def accuracy(text: str, answers: Sequence[str]) -> float:
    """Return the VQA accuracy of a text, in [0, 1].

    With four answers or more: the mean over the subsets that leave out one answer, each
    a third per equal answer, at most 1. With fewer, one equal answer gives 1.
    """
    normalized = normalize(text)
    equal = [normalize(answer) == normalized for answer in answers]
    if len(equal) <= _ENOUGH:
        return float(any(equal))
    matches = sum(equal)
    shares = [min(1.0, (matches - one) / _ENOUGH) for one in equal]
    return sum(shares) / len(shares)


def judge(text: str, unpruned: str, answers: Sequence[str]) -> dict:
    """Return an answer, its accuracy and whether it agrees with the unpruned one.

    The accuracy is `None` without right answers.
    """
    return {
        "answer": text,
        "accuracy": accuracy(text, answers) if answers else None,
        "agrees": normalize(text) == normalize(unpruned),
    }


class WordJudge:
    """Judge of a model's answers in words.

    stops: tokens that end an answer. most: tokens of an answer.
    """

    def __init__(self, subject: OwnSubject, most: int):
        self._tokenizer = subject.processor.tokenizer
        self.stops, self.most = self._tokenizer.eos_token_ids, most

    def judge(
        self, ids: list[int], reference: list[int], answers: Sequence[str]
    ) -> dict:
        """Return the answer, its accuracy and whether it agrees with `reference`.

        The accuracy is `None` without right answers.
        """
        return judge(self._text(ids), self._text(reference), answers)

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self.stops])
