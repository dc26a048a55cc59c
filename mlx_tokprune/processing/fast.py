"""FAST (arXiv 2501.09747): action tokens -> a chunk of actions. NumPy only.

A chunk's cosine transform over time, times a scale and rounded, is a text: a character
for each coefficient, in byte-pair code. Read from the `tokenizer.json` that FAST is
published with and the `processor_config.json` beside it; its own code is never run.
Chunks are put into code by `tokenizers`.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import read_json

_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_MOST_TOKENS = 1 << 20


def _bytes_of_characters() -> dict[str, int]:
    """What stands for each byte in a byte-level code: itself where it can be shown."""
    hidden = [byte for byte in range(256) if byte not in _PRINTABLE]
    shown = {chr(byte): byte for byte in _PRINTABLE}
    return shown | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTES = _bytes_of_characters()


def _piece(token: str) -> bytes:
    """The bytes of a token; one that is not of the byte alphabet is plain text."""
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode(errors="replace")


@dataclass(frozen=True)
class FastCode:
    """The byte-pair code and its scale.

    pieces: bytes by token id. scale: what coefficients were multiplied by. least: the
    coefficient of character 0. source: the tokenizer's JSON.
    """

    pieces: Mapping[int, bytes]
    scale: float
    least: int
    source: str = field(default="", repr=False)

    @classmethod
    def read(cls, tokenizer: Path, settings: Path) -> "FastCode":
        """From two JSON files. Raises `InputError` unless they are FAST's."""
        return cls.from_json(read_json(tokenizer), read_json(settings), tokenizer)

    @classmethod
    def from_json(
        cls, tokenizer: Mapping[str, Any], settings: Mapping[str, Any], name: Any
    ) -> "FastCode":
        model, decoder = tokenizer.get("model"), tokenizer.get("decoder")
        kinds = [x.get("type") for x in (model, decoder) if isinstance(x, dict)]
        if kinds != ["BPE", "ByteLevel"]:
            raise InputError(
                f"{name} has model and decoder of type {kinds}; expected FAST's, BPE "
                "and ByteLevel"
            )
        pieces = {}
        added = tokenizer.get("added_tokens") or []
        vocabulary = _vocabulary(model.get("vocab"), added)
        if not vocabulary:
            raise InputError(f"{name} has no vocabulary of tokens and their numbers")
        for token, number in vocabulary.items():
            pieces[number] = _piece(token)
        scale, least = settings.get("scale", 10), settings.get("min_token", 0)
        right = type(scale) in (int, float) and 0 < scale < math.inf
        if not right or type(least) is not int or abs(least) > 1 << 20:
            raise InputError(
                f"the settings of {name} say scale {scale!r} and min_token {least!r}; "
                "expected a positive number and a whole one"
            )
        return cls(pieces, float(scale), least, json.dumps(tokenizer))

    def encode(self, chunk: np.ndarray) -> list[int]:
        """(horizon, size) actions -> token ids, as published."""
        text = code_text(chunk, self.scale, self.least)
        return _tokenizer(self.source).encode(text, add_special_tokens=False).ids

    def coefficients(self, ids: Sequence[int]) -> list[int]:
        """Quantised coefficients; ids that are no tokens are left out, as published."""
        text = b"".join(self.pieces.get(int(number), b"") for number in ids)
        return [ord(c) + self.least for c in text.decode("utf-8", errors="replace")]

    def decode(
        self, ids: Sequence[int], horizon: int, size: int, relaxed: bool = True
    ) -> tuple[np.ndarray, str | None]:
        """(horizon, size) float64 actions, and what was wrong with the tokens.

        relaxed: too few coefficients are padded with zeros and too many cut (lerobot);
        else both give a chunk of zeros (as published). So does a negative id in both.
        """
        wanted, wrong = horizon * size, None
        if any(number < 0 for number in ids):
            return np.zeros((horizon, size)), "an answer with tokens outside FAST's"
        unknown = sum(int(number) not in self.pieces for number in ids)
        if unknown:
            wrong = f"an answer with {unknown} tokens that are none of FAST's"
        found = self.coefficients(ids)
        if len(found) != wanted:
            wrong = f"an answer with {len(found)} coefficients instead of {wanted}"
            if not relaxed:
                return np.zeros((horizon, size)), wrong
        found = (found + [0] * wanted)[:wanted]
        grid = np.array(found, np.float64).reshape(horizon, size)
        return _inverse(horizon) @ (grid / self.scale), wrong


def code_text(chunk: np.ndarray, scale: float, least: int) -> str:
    """A character for each coefficient of a chunk; those below `least` are raised."""
    found = np.rint(_inverse(len(chunk)).T @ chunk * scale).astype(int)
    return "".join(chr(max(value - least, 0)) for value in found.flatten())


@functools.lru_cache(maxsize=4)
def _tokenizer(source: str):
    from tokenizers import Tokenizer  # comes with transformers

    return Tokenizer.from_str(source)


def _vocabulary(model: Any, added: Any) -> dict[str, int]:
    """Numbers by token; empty where they are none."""
    entries = added if isinstance(added, list) else [None]
    if not isinstance(model, dict) or not all(isinstance(e, dict) for e in entries):
        return {}
    found = model | {e.get("content"): e.get("id") for e in entries}
    right = all(
        isinstance(k, str) and type(v) is int and 0 <= v < _MOST_TOKENS
        for k, v in found.items()
    )
    return found if right else {}


def _inverse(length: int) -> np.ndarray:
    """(length, length): the orthonormal inverse cosine transform."""
    time = np.arange(length)[:, None] + 0.5
    waves = np.cos(np.pi * time * np.arange(length) / length)
    waves *= math.sqrt(2 / length)
    waves[:, 0] = math.sqrt(1 / length)
    return waves
