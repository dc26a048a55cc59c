"""`InputError`, the package's error, and helpers for its messages.

A message is one sentence: the error, the expected value, the nearest valid choice.
"""

import difflib
import functools
import logging
import operator
from collections.abc import Iterable
from typing import Any

log = logging.getLogger("mlx_tokprune")


class InputError(ValueError):
    """An argument, file or option that cannot be used; the message is one sentence."""


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `" Did you mean 'x'?"` for the closest choice, or an empty text.

    cutoff: least similarity in [0, 1], as difflib has it.
    """
    names = {name.lower(): name for name in choices}
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=cutoff)
    return f" Did you mean {names[close[0]]!r}?" if close else ""


def as_number(value: Any, name: str, kind: type) -> Any:
    """Return a number of Python, NumPy or MLX as an `int` or `float`, by `kind`.

    name: its name in errors. Raises `InputError` for anything else.
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return operator.index(value) if kind is int else float(value)
    except (TypeError, ValueError, OverflowError):
        whole = "whole " if kind is int else ""
        raise InputError(f"{name} is a {whole}number, not {value!r:.40}") from None


def import_matplotlib() -> None:
    """Import matplotlib; `InputError` names the command that installs it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "plots need matplotlib; pip install 'mlx-tokprune[bench]'"
        ) from None


@functools.lru_cache(maxsize=1024)
def note(text: str) -> None:
    """Print a note to stderr, once: a guess, or a decision that the user may change."""
    log.warning("note: %s", printable(text))


_LONGEST = 600  # characters of a message


def printable(text: object) -> str:
    """Return a text as one terminal line: control characters escaped, middle cut."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode()
        for c in str(text)
    )
    if len(shown) <= _LONGEST:
        return shown
    half = _LONGEST // 2
    return f"{shown[:half]} ... {shown[-half:]}"
