"""FAST (arXiv 2501.09747): action tokens to a chunk of actions and back.

A chunk's cosine transform over time, scaled and rounded, becomes a text with one
character per coefficient, in byte-pair code. The code is read from FAST's published
`tokenizer.json` and `processor_config.json`; FAST's own Python code is never run.
Decoding needs NumPy only; encoding uses `tokenizers`.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_MOST_TOKENS = 1 << 20


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte of each character of a byte-level code (GPT-2's alphabet)."""
    hidden = [byte for byte in range(256) if byte not in _PRINTABLE]
    shown = {chr(byte): byte for byte in _PRINTABLE}
    return shown | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTES = _bytes_of_characters()


def _piece(token: str) -> bytes:
    """Return the bytes of a token; one outside the byte alphabet is plain text."""
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode(errors="replace")


@dataclass(frozen=True)
class FastCode:
    """The byte-pair code and its scale.

    pieces: bytes by token id. scale: factor of the coefficients. least: the coefficient
    of character 0. source: the tokenizer's JSON.
    """

    pieces: Mapping[int, bytes]
    scale: float
    least: int
    source: str = field(default="", repr=False)

    @classmethod
    def read(cls, tokenizer: Path, settings: Path) -> "FastCode":
        """Read the code from two JSON files; `InputError` unless they are FAST's."""
        return cls.from_json(read_json(tokenizer), read_json(settings), tokenizer)

    @classmethod
    def from_json(
        cls, tokenizer: Mapping[str, Any], settings: Mapping[str, Any], name: object
    ) -> "FastCode":
        """Read the code from two JSON objects; `name` identifies them in errors.

        Raises `InputError` unless they are FAST's.
        """
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
        valid = type(scale) in (int, float) and 0 < scale < math.inf
        if not valid or type(least) is not int or abs(least) > 1 << 20:
            raise InputError(
                f"the settings of {name} say scale {scale!r} and min_token {least!r}; "
                "expected a positive number and a whole one"
            )
        return cls(pieces, float(scale), least, json.dumps(tokenizer))

    def encode(self, chunk: np.ndarray) -> list[int]:
        """Return the token ids of actions (horizon, size), as published."""
        text = code_text(chunk, self.scale, self.least)
        return _tokenizer(self.source).encode(text, add_special_tokens=False).ids

    def coefficients(self, ids: Sequence[int]) -> list[int]:
        """Return quantised coefficients; unknown ids are left out, as published."""
        text = b"".join(self.pieces.get(int(number), b"") for number in ids)
        return [ord(c) + self.least for c in text.decode("utf-8", errors="replace")]

    def decode(
        self, ids: Sequence[int], horizon: int, size: int, relaxed: bool = True
    ) -> tuple[np.ndarray, str | None]:
        """Return actions (horizon, size) float64, and the fault of the tokens.

        The fault is `None` for undamaged tokens.

        relaxed: pad too few coefficients with zeros and cut too many (lerobot);
        otherwise both give a chunk of zeros (as published). A negative id always gives
        a chunk of zeros.
        """
        expected, fault = horizon * size, None
        if any(number < 0 for number in ids):
            return np.zeros((horizon, size)), "an answer with tokens outside FAST's"
        unknown = sum(int(number) not in self.pieces for number in ids)
        if unknown:
            fault = f"an answer with {unknown} tokens that are none of FAST's"
        values = self.coefficients(ids)
        if len(values) != expected:
            fault = f"an answer with {len(values)} coefficients instead of {expected}"
            if not relaxed:
                return np.zeros((horizon, size)), fault
        values = (values + [0] * expected)[:expected]
        grid = np.array(values, np.float64).reshape(horizon, size)
        return _inverse(horizon) @ (grid / self.scale), fault


def code_text(chunk: np.ndarray, scale: float, least: int) -> str:
    """Return one character per coefficient of a chunk, clamped to `least`."""
    coefficients = np.rint(_inverse(len(chunk)).T @ chunk * scale).astype(int)
    return "".join(chr(max(value - least, 0)) for value in coefficients.flatten())


@functools.lru_cache(maxsize=4)
def _tokenizer(source: str) -> "Tokenizer":
    from tokenizers import Tokenizer  # comes with transformers

    return Tokenizer.from_str(source)


def _vocabulary(model: Any, added: Any) -> dict[str, int]:
    """Return token ids by token, with added tokens; empty for invalid JSON."""
    entries = added if isinstance(added, list) else [None]
    if not isinstance(model, dict) or not all(isinstance(e, dict) for e in entries):
        return {}
    vocabulary = model | {e.get("content"): e.get("id") for e in entries}
    valid = all(
        isinstance(k, str) and type(v) is int and 0 <= v < _MOST_TOKENS
        for k, v in vocabulary.items()
    )
    return vocabulary if valid else {}


def _inverse(length: int) -> np.ndarray:
    """Return the orthonormal inverse cosine transform (length, length)."""
    time = np.arange(length)[:, None] + 0.5
    waves = np.cos(np.pi * time * np.arange(length) / length)
    waves *= math.sqrt(2 / length)
    waves[:, 0] = math.sqrt(1 / length)
    return waves
