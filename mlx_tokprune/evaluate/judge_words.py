"""VQA accuracy of answers in words, with the usual normalisation.

Source: Antol et al., 2015 (arXiv 1505.00468) and its authors' evaluation code: case,
punctuation, articles and number words do not count, and an answer is right if three of
ten people gave it.

Differences from that code, which scores such answers wrongly:

- An answer that consists of articles or punctuation keeps them: otherwise an empty
  answer equals the answer "A" of a multiple-choice question.
- A minus sign before a number counts: "-5" is not "5"; and ".5" is "0.5".
- Letters count in their composed form (NFC), full-width characters as ASCII, and the
  full stops, commas and quotation marks of other scripts as punctuation. Not NFKC,
  under which "10²" equals "102".
"""

import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

_NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_ARTICLES = {"a", "an", "the"}
_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width
_ASCII |= str.maketrans({"\u2212": "-", "\u2019": "'"})
_COMMA = re.compile(r"(?<=\d),(?=\d)")
_LEADING_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")  # no decimal point
_MARKS = re.compile(
    r"[;/\[\]\"{}()=+\\_><@`,?!:*]"
    r"|(?<=[\w)\]%])-|-(?![$€£¥]?\d)"  # a hyphen, not a minus sign
    r"|[。｡．।॥۔։።။៕…、､،؛؟¿¡“”„«»‹›「」『』《》【】]"  # noqa: RUF001
)
_ENOUGH = 3  # people who make an answer right


def normalize(answer: str) -> str:
    """Return an answer in the form for comparison; empty for blank text only."""
    text = unicodedata.normalize("NFC", answer.translate(_ASCII).lower())
    text = " ".join(text.split())
    # Contractions come with and without their apostrophe; either way counts.
    plain = _LEADING_POINT.sub("0.", _COMMA.sub("", text.replace("'", "")))
    plain = _MARKS.sub(" ", _POINT.sub("", plain))
    words = [_NUMBERS.get(word, word) for word in plain.split()]
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(kept or words) or text


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


class WordJudge:
    """Judge of a model's answers in words. stops: tokens that end an answer."""

    def __init__(self, tokenizer: Any, stops: Collection[int]):
        self._tokenizer, self.stops = tokenizer, stops

    def judge(
        self, ids: list[int], reference: list[int], answers: Sequence[str]
    ) -> dict:
        """Return the answer, its accuracy and whether it agrees with `reference`.

        The accuracy is `None` without right answers.
        """
        text, unpruned = self._text(ids), self._text(reference)
        return {
            "answer": text,
            "accuracy": accuracy(text, answers) if answers else None,
            "agrees": normalize(text) == normalize(unpruned),
        }

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self.stops])
