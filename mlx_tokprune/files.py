"""Atomic writes of files and folders, locks, and JSON."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError, note

# Weights and pictures of the installed package.
DEMO = Path(__file__).parent / "demo"

# Kinds of files that commands write, besides the schemas of results (JSON).
PICTURE, PAGE, _LOCK = "PNG picture", "HTML page", "lock"
SOFTWARE = "mlx_tokprune"  # in the metadata of pictures and pages
_STARTS = {
    PICTURE: rb"\x89PNG\r\n\x1a\n.{,1000}tEXtSoftware\0" + SOFTWARE.encode(),
    PAGE: rb'<!doctype html>.{,1000}<meta name="generator" content="mlx_tokprune',
    _LOCK: rb"(?!)",  # locks are empty
}


@contextlib.contextmanager
def replacing(path: str | Path, kind: str | None = None) -> Iterator[BinaryIO]:
    """Yield a file beside `path` that replaces it if the block raises nothing.

    kind: see `is_replaced`; `None` for a file in a folder of our own. Raises
    `InputError` if `path` exists and may not be replaced.
    """
    is_replaced(path, kind)
    _sweep(path)
    folder, prefix = os.path.dirname(os.path.abspath(path)), _partial_prefix(path)
    number, partial = tempfile.mkstemp("", prefix, folder)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except OSError as error:  # a full disk has no name
        error.filename = os.fspath(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def read_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank, with their numbers from 1.

    Only a line feed ends a line: JSON strings may contain Unicode's other line ends.
    """
    lines = enumerate(text.split("\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


def check_output(path: str | Path, kind: str | None) -> None:
    """Raise `InputError` unless `path` can become a file; note that it is replaced.

    For use before any work. kind: see `is_replaced`.
    """
    if is_replaced(path, kind) and kind:
        note(f"{path} is there, from an earlier run, and will be replaced")


def is_replaced(path: str | Path, kind: str | None) -> bool:
    """Return whether a file at `path` would be replaced; decide whether it may be.

    kind: `PICTURE`, `PAGE` or the schema of a result. A file is replaced only if it is
    empty or a command of this package wrote it as the same kind; `None` allows any.
    Raises `InputError` for another file, and where no file can be written.
    """
    check_name(path)
    parent = Path(path).absolute().parent
    if not Path(path).name:
        raise InputError(f"{str(path)!r} names no file; expected the name of a file")
    if not parent.is_dir():
        raise InputError(
            f"{path} is in {parent}, which does not exist; expected the name of a file "
            "in an existing folder"
        )
    if not os.access(parent, os.W_OK):
        raise InputError(f"{path} cannot be written: {parent} is read-only")
    if not os.path.lexists(path):
        return False
    if not os.path.isfile(path):
        raise InputError(f"{path} is there and no regular file; choose another name")
    if kind is None or os.path.getsize(path) == 0:
        return True
    with open(path, "rb") as file:
        head = file.read(4096)
    schema = rb'\s*\{\s*"schema":\s*"' + re.escape(kind).encode() + b'"'
    if not re.match(_STARTS.get(kind, schema), head, re.DOTALL):
        expected = kind if kind in _STARTS else f"result ({kind})"
        raise InputError(
            f"{path} exists and is no {expected} of this command; choose another name"
        )
    return True


def check_pictures(folder: str | Path, names: Iterable[str]) -> None:
    """Raise `InputError` unless pictures can be written to a folder, or a new one."""
    check_name(folder)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise InputError(f"{folder} is there and no folder; choose another name")
    for name in names if os.path.isdir(folder) else ():
        check_output(Path(folder) / name, PICTURE)


def note_shadowed(name: str) -> None:
    """Note that a file or folder has the name of something embedded, which is used."""
    if os.path.exists(name):
        note(f"{name} is the embedded one; write ./{name} for the file or folder here")


def check_name(path: str | Path) -> None:
    """Raise `InputError` for a name that is not UTF-8, which libraries cannot open."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"a file or folder has a name, not {path!r:.40}")
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path} is no name in UTF-8; choose another") from None


def check_apart(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise `InputError` for an output that would overwrite one of `inputs`."""
    for path in inputs:
        if os.path.realpath(output) == os.path.realpath(path):
            raise InputError(f"{output} would overwrite {path}; choose another name")


def _partial_prefix(target: str | Path) -> str:
    """Return the name prefix of unfinished output, with machine and process."""
    return f".{Path(target).name}.partial-{_machine()}-{os.getpid()}-"


@functools.lru_cache(maxsize=1)
def _machine() -> str:
    """Return an identity of host and container, in which process ids are unique."""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
        return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _sweep(target: str | Path) -> None:
    """Remove unfinished parts of `target` that no living process owns."""
    start = f".{Path(target).name}.partial-{_machine()}-"
    with contextlib.suppress(OSError):
        for path in Path(target).absolute().parent.iterdir():
            owner = path.name.removeprefix(start).partition("-")[0]
            if not path.name.startswith(start) or _is_alive(owner):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(process: str) -> bool:
    """Return whether a process runs on this machine; true in doubt."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the only lock of `path` inside a `with` block.

    Raises `InputError` if another process holds it.
    """
    import fcntl

    lock = Path(f"{path}.lock")
    is_replaced(lock, _LOCK)
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another run may have removed the file between the two steps.
            mine = os.path.samestat(os.fstat(stream.fileno()), lock.stat())
        except OSError:
            mine = False
        if not mine:
            raise InputError(
                f"another run is writing {path}; wait for it, or choose another output"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, kind: str | None = None) -> None:
    """Write `text` as UTF-8, or leave the old file unchanged on an error.

    kind: see `is_replaced`.
    """
    with replacing(path, kind) as file:
        file.write(text.encode(errors="replace"))


def write_arrays(path: str | Path, arrays: Mapping[str, Any], **metadata: str) -> None:
    """Write MLX arrays as safetensors, or leave the old file unchanged on an error."""
    import mlx.core as mx

    # MLX reports a full disk for Python's files only.
    with replacing(path) as file:
        mx.save_safetensors(file, dict(arrays), metadata=metadata)


def write_picture(path: str | Path, image: Any) -> None:
    """Write a PIL image or a matplotlib figure as a PNG that a later run may replace.

    Raises `InputError` for a file that is not from an earlier run.
    """
    with replacing(path, PICTURE) as file:
        if hasattr(image, "savefig"):
            image.savefig(file, format="png", metadata={"Software": SOFTWARE})
            return
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("Software", SOFTWARE)
        image.save(file, format="PNG", pnginfo=info)


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yield a folder to fill that becomes `target` if the block raises nothing.

    It is made beside `target`; on any error it is removed and `target` never exists.
    Raises `InputError` when `target` exists or the disk is full.
    """
    check_name(target)
    target = Path(target)
    if os.path.lexists(target) or target.name in ("", ".."):
        raise InputError(
            f"{target} already exists; choose a new folder or remove it first"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        prefix = _partial_prefix(target)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    except OSError as error:
        raise InputError(
            f"cannot write in {target.parent} ({error.strerror})"
        ) from None
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(target)
    except Exception as error:  # libraries raise their own types for a full disk
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if not full and (isinstance(error, InputError) or _has_room(target)):
            raise
        raise InputError(_full_disk(target)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _has_room(target: Path) -> bool:
    return shutil.disk_usage(target.parent).free > 1 << 20


def _full_disk(target: Path) -> str:
    free = shutil.disk_usage(target.parent).free >> 20
    return f"the disk of {target.parent} is full ({free} MB free); nothing was written"


# JSON -------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """Return the JSON object of a file; `InputError` names the fault of the file."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no regular file; expected JSON")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(
            f"{path.parent} has no {path.name}; expected a checkpoint folder with "
            "config.json and safetensors files"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def object_of(config: Mapping, name: str) -> dict:
    """Return the object under `name` of a config, empty if there is none.

    Raises `InputError` for any other value.
    """
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"config.json says {name} {value!r}; expected an object")
    return value


def _umask() -> int:
    """Return the user's umask: files of `mkstemp` are private without it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
