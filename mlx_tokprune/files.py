"""Files that are there whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import InputError


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when the block ends well."""
    folder = os.path.dirname(os.path.abspath(path))
    number, partial = tempfile.mkstemp(".partial", "", folder)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, or leave what was there."""
    with replacing(path) as file:
        file.write(text.encode())


def read_result(file: str | Path, schema: str) -> dict:
    """The JSON of a result file; `InputError` unless it has this `schema`."""
    try:
        result = json.loads(Path(file).read_text())
    except (OSError, ValueError):
        raise InputError(
            f"{file} is no JSON file that can be read; expected a result of schema "
            f"{schema!r}"
        ) from None
    found = result.get("schema") if isinstance(result, dict) else None
    if found != schema:
        raise InputError(f"{file} has schema {found!r}; expected {schema!r}")
    return result


def _umask() -> int:
    """Files of `mkstemp` are private; others are as the user wants them."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
