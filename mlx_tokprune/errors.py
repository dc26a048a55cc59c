"""The error of the whole package, and how commands report it.

Every message says what was wrong, what was expected, and the nearest valid choice.
"""

import argparse
import difflib
import functools
import io
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable


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


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence and exit code 2.

    Numbers such as -1e-3 are values, not flags; argparse knows them since Python 3.14.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._negative_number_matcher = re.compile(
            r"-(\d+\.?|\.\d)\d*(e[-+]?\d+)?$", re.I
        )

    def _get_values(self, action, arg_strings):
        # Python 3.11 makes an empty list of `--name=--`.
        if action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "expected one value, not '--'")
        return super()._get_values(action, arg_strings)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)} (see --help)\n")


def command(main: Callable[[list[str] | None], None]):
    """Wrap a `main(argv)`: `InputError` and `OSError` become one line and exit 2.

    A termination signal unwinds like any exit, so that nothing half-written stays.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            main(argv)
        except InputError as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            raise SystemExit(2) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise SystemExit(141) from None
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            said = printable(f"{error.strerror or error}{where}")
            print(f"error: {said}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return run
