"""FAST (arXiv 2501.09747): action tokens to a chunk of actions and back.

A chunk's cosine transform over time, scaled and rounded, becomes a text with one
character per coefficient, in byte-pair code. The code is read from FAST's published
`tokenizer.json` and `processor_config.json`; FAST's own Python code is never run.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class FastCode:
    """The byte-pair code and its scale.

    tokenizer: FAST's code between texts and ids. scale: factor of the coefficients.
    least: the coefficient of character 0.
    """

    tokenizer: "Tokenizer"
    scale: float
    least: int

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
        from tokenizers import Tokenizer  # comes with transformers

        parts = [tokenizer.get(part) for part in ("model", "decoder")]
        kinds = [x.get("type") for x in parts if isinstance(x, dict)]
        if kinds != ["BPE", "ByteLevel"]:
            raise InputError(
                f"{name} has model and decoder of type {kinds}; expected FAST's, BPE "
                "and ByteLevel"
            )
        try:
            code = Tokenizer.from_str(json.dumps(tokenizer))
        except Exception as error:  # the class that tokenizers raises
            raise InputError(
                f"{name} has no vocabulary of tokens and their numbers ({error})"
            ) from None
        scale, least = settings.get("scale", 10), settings.get("min_token", 0)
        valid = type(scale) in (int, float) and 0 < scale < math.inf
        if not valid or type(least) is not int or abs(least) > 1 << 20:
            raise InputError(
                f"the settings of {name} say scale {scale!r} and min_token {least!r}; "
                "expected a positive number and a whole one"
            )
        return cls(code, float(scale), least)

    def encode(self, chunk: np.ndarray) -> list[int]:
        """Return the token ids of actions (horizon, size), as published."""
        text = code_text(chunk, self.scale, self.least)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def coefficients(self, ids: Sequence[int]) -> list[int]:
        """Return quantised coefficients; unknown ids are left out, as published."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return [ord(character) + self.least for character in text]

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
        unknown = sum(self.tokenizer.id_to_token(number) is None for number in ids)
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


def _inverse(length: int) -> np.ndarray:
    """Return the orthonormal inverse cosine transform (length, length)."""
    time = np.arange(length)[:, None] + 0.5
    waves = np.cos(np.pi * time * np.arange(length) / length)
    waves *= math.sqrt(2 / length)
    waves[:, 0] = math.sqrt(1 / length)
    return waves
