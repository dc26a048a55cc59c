"""Files and folders that are there whole or not at all, and JSON that is read."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from .errors import InputError

# Weights and pictures that are installed with the package.
DEMO = Path(__file__).parent / "demo"


def cache_folder(name: str) -> Path:
    """Return where this package keeps `name`, made from downloads.

    `~/.cache/mlx_tokprune/NAME`, or below the folder in `MLX_TOKPRUNE_CACHE`.
    """
    root = os.environ.get("MLX_TOKPRUNE_CACHE") or "~/.cache/mlx_tokprune"
    return Path(root).expanduser() / name


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when the block ends well.

    Raises `InputError` where `path` is there and no regular file.
    """
    check_output(path)
    _sweep(path)
    folder, prefix = os.path.dirname(os.path.abspath(path)), _partial_prefix(path)
    number, partial = tempfile.mkstemp("", prefix, folder)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def read_lines(text: str) -> list[tuple[int, str]]:
    """Lines of JSON with their numbers, from 1, but for blank ones.

    Only a line feed ends one: JSON's texts may hold what Unicode calls a line's end.
    """
    lines = enumerate(text.split("\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


def check_output(path: str | Path) -> None:
    """Raise `InputError` unless a file can be written there, in place of a file."""
    check_name(path)
    parent = Path(path).absolute().parent
    if not parent.is_dir():
        raise InputError(f"{path} is in {parent}, which does not exist")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is there and no regular file; choose another name")


def check_name(path: str | Path) -> None:
    """Raise `InputError` for a name that libraries below could not take."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path} is no name in UTF-8; choose another") from None


def check_apart(output: str | Path, others: Iterable[str | Path]) -> None:
    """Raise `InputError` for an output that would overwrite something else."""
    for other in others:
        if os.path.realpath(output) == os.path.realpath(other):
            raise InputError(f"{output} would overwrite {other}; choose another name")


def _partial_prefix(target: str | Path) -> str:
    """Names what this process has not finished, and whose it is."""
    return f".{Path(target).name}.partial-{_machine()}-{os.getpid()}-"


@functools.lru_cache(maxsize=1)
def _machine() -> str:
    """Where numbers of processes mean the same: this host, and container."""
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
    """Whether this machine has such a process; where in doubt, it has."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Nobody else writes what belongs to `path`, for the length of a `with` block.

    Raises `InputError` where somebody does.
    """
    import fcntl

    lock = Path(f"{path}.lock")
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another run may have taken the file away between the two steps.
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


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, or leave what was there."""
    with replacing(path) as file:
        file.write(text.encode(errors="replace"))


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends well.

    It is made beside `target`; on any error it is removed and `target` never exists.
    Raises `InputError` when `target` exists or the disk is full.
    """
    target = Path(target)
    check_name(target)
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
    except Exception as error:  # libraries say it in words of their own
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
    """A JSON object from a file; `InputError` says what is wrong with it."""
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
    """The object under `name` of a config, empty when there is none."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"config.json says {name} {value!r}; expected an object")
    return value


def _umask() -> int:
    """Files of `mkstemp` are private; others are as the user wants them."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
