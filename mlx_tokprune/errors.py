"""The error of the whole package, and how its messages are worded.

Every message says what was wrong, what was expected, and the nearest valid choice.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one clear sentence."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, or nothing when no known word is close."""
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), names, n=1)
    return f" Did you mean {names[close[0]]!r}?" if close else ""


def import_matplotlib() -> None:
    """Raise `InputError` that says how to install it, where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "plots need matplotlib; pip install 'mlx-tokprune[bench]'"
        ) from None


_LONGEST = 600  # characters of a message


def printable(text: object) -> str:
    """A text in one line of a terminal: control characters escaped, the middle cut."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode()
        for c in str(text)
    )
    if len(shown) <= _LONGEST:
        return shown
    half = _LONGEST // 2
    return f"{shown[:half]} ... {shown[-half:]}"
