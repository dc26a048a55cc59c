"""VQA accuracy with the usual normalisation of answers.

Antol et al., 2015 (arXiv 1505.00468) and the evaluation that its authors publish:
case, punctuation, articles and number words do not count, and an answer is right when
three of ten people gave it.
"""

import re
from collections.abc import Sequence

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
