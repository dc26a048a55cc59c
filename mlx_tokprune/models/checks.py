"""Config checks that every family's `ModelArgs.from_dict` uses."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from ..errors import InputError

LANGUAGE_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_LIMIT = 1 << 20  # larger sizes are mistakes, and allocating them may crash
_HUGE = 1e6  # the limit of other numbers


def expect(right: bool, name: str, value: object, expected: str) -> None:
    """Raise `InputError`, with the value and the expected one, unless `right`."""
    if not right:
        raise InputError(f"config.json says {name} {value!r}; expected {expected}")


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number, not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_size(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number from 1 to 2**20 - 1."""
    return is_whole(value) and 0 < value < _LIMIT


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a number, not a bool, below 1e6 in magnitude."""
    number = isinstance(value, int | float) and abs(value) < _HUGE
    return number and not isinstance(value, bool)


def check_token(name: str, value: object, vocabulary: int) -> None:
    """Raise `InputError` unless a value is a token id below `vocabulary`.

    MLX does not check indices: an embedding of a larger id reads other memory.
    """
    right = is_whole(value) and 0 <= value < vocabulary
    expect(right, name, value, f"a token id below vocab_size {vocabulary}")


def check_language(text: Mapping[str, Any]) -> None:
    """Raise `InputError` for missing or inconsistent sizes of a Llama-like model."""
    missing = [n for n in (*LANGUAGE_SIZES, "rms_norm_eps") if n not in text]
    if missing:
        raise InputError(f"config.json does not say {', '.join(missing)}")
    for name in LANGUAGE_SIZES:
        expect(is_size(text[name]), name, text[name], "a positive whole number")
    for name in ("rms_norm_eps", "rope_theta"):
        value = text.get(name, 1.0)
        right = type(value) in (int, float) and 0 < value < math.inf
        expect(right, name, value, "a positive number")
    length = text.get("max_position_embeddings", 1)
    expect(is_size(length), "max_position_embeddings", length, "a positive number")
    traditional = text.get("rope_traditional", False)
    right = isinstance(traditional, bool)
    expect(right, "rope_traditional", traditional, "true or false")
    heads, shared = text["num_attention_heads"], text["num_key_value_heads"]
    divide = text["hidden_size"] % heads == 0 and heads % shared == 0
    expected = f"a divisor of {text['hidden_size']}, in groups of {shared}"
    expect(divide, "num_attention_heads", heads, expected)
