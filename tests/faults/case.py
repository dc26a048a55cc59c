"""Calls of commands in this process, and their outcomes.

Only kills and limits need a process of their own; a new interpreter for each case would
take a hundred times as long.
"""

import contextlib
import gc
import importlib
import logging
import os
import re
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .whole import Listing, leftovers

SECONDS, MEMORY = 60, 4 << 30
# badly: neither success nor a one-line refusal; wrong: success with a false result.
KINDS = (
    *("refused", "succeeded", "badly", "traceback", "hang"),
    *("memory", "half-written", "wrong", "skipped"),
)
FINE = ("refused", "succeeded", "skipped")
MODULES = {
    "convert": "mlx_tokprune.convert.__main__",
    "generate": "mlx_tokprune.generate.__main__",
    "chat": "mlx_tokprune.generate.chat_command",
    "act": "mlx_tokprune.act.__main__",
    "report": "mlx_tokprune.report.__main__",
    "bench": "mlx_tokprune.bench.__main__",
    "evaluate": "mlx_tokprune.evaluate.__main__",
    "coreml": "mlx_tokprune.coreml.__main__",
    "attach": "mlx_tokprune.attach.__main__",
    # Subcommands of `mlx_tokprune.train`.
    **dict.fromkeys(("prune", "lora", "fuse"), "mlx_tokprune.train.__main__"),
}
_SAID = re.compile(r"(?:mlx_tokprune(?: \w+)*: )?error: .*\S.*\n")
_NO_MEMORY = re.compile(r"allocate|bad_alloc|Cannot create thread", re.I)


class Hang(BaseException):
    """Timeout of a call; not an `Exception`, which a command may catch."""


@dataclass(frozen=True)
class Place:
    """Folders of one case.

    out: the working folder, where every new file counts. base: files of `prepare`, only
    read.
    """

    folder: Path
    out: Path
    base: Path

    @classmethod
    def make(cls, folder: Path, base: Path) -> "Place":
        (folder / "out").mkdir(parents=True)
        return cls(folder, folder / "out", base)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a case.

    kind: one of `KINDS`. told: details for a person.
    """

    kind: str
    told: str = ""


@dataclass(frozen=True)
class Ended:
    """End of a call.

    code: the exit status, unless `error` (also a `Hang`) ended the call.
    """

    code: object
    error: BaseException | None
    trace: str
    out: str
    err: str
    peak: int = 0


def module_of(command: str):
    return importlib.import_module(MODULES[command])


def flags_of(command: str) -> list:
    """Return the flags of a command from its parser."""
    actions = module_of(command).build_parser()._actions
    inner = [a.choices[command] for a in actions if command in (a.choices or ())]
    return inner[0]._actions if inner else actions


def perform(
    command: str,
    argv: list[str],
    place: Place,
    check: Callable[[str], str | None] | None = None,
) -> Outcome:
    """Call the command's `main` and judge it.

    check: returns an error of a successful command's stdout, or `None`.
    """
    main = module_of(command).main
    before = Listing.of(place.out)
    ended = call(lambda: main(argv), place)
    outcome = judge(ended, leftovers(place.out, before))
    if outcome.kind == "succeeded" and check and (wrong := check(ended.out)):
        outcome = Outcome("wrong", wrong)
    return Outcome(outcome.kind, f"{outcome.told}\n  {shown(command, argv)}")


def shown(command: str, argv: list[str]) -> str:
    short = [word if len(word) < 90 else f"{word[:40]}...{word[-40:]}" for word in argv]
    return f"{command} {short!r}"


def call(work: Callable[[], object], place: Place) -> Ended:
    """Run `work` with its own stdout, stderr, folder, time limit and memory count."""
    code, error, trace = 0, None, ""
    _forget_peak()
    with redirected(place.folder), unchanged(place.out):
        try:
            with alarm(SECONDS):
                work()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException as found:
            error, trace = found, traceback.format_exc(limit=-6)
    texts = [
        (place.folder / name).read_bytes().decode("utf-8", "surrogateescape")
        for name in ("stdout", "stderr")
    ]
    return Ended(code, error, trace, *texts, _peak())


def judge(ended: Ended, left: list[str]) -> Outcome:
    """Return the worst outcome of a call."""
    error, err = ended.error, ended.err
    if isinstance(error, Hang):
        return Outcome("hang", ended.trace)
    over = ended.peak > MEMORY or isinstance(error, MemoryError)
    if over or (error is not None and _NO_MEMORY.search(str(error))):
        return Outcome("memory", f"{ended.peak >> 20} MB {ended.trace}")
    if error is not None or "Traceback (most recent call last)" in err:
        return Outcome("traceback", ended.trace or err[-1500:])
    if left:
        return Outcome("half-written", f"exit {ended.code}; {'; '.join(left)}; {err}")
    if ended.code == 0:
        return Outcome("succeeded")
    if ended.code == 2 and said_well(err):
        return Outcome("refused", err.strip())
    return Outcome("badly", f"exit {ended.code!r}, stderr {err[:1500]!r}")


def said_well(err: str) -> bool:
    """Return whether stderr is one short, printable line with `error: ...`.

    Notes about the inputs may come before it, a line each.
    """
    err = re.sub(r"\A(note: .*\n)+", "", err)
    whole = _SAID.fullmatch(err) is not None
    return whole and len(err) <= 701 and err[:-1].isprintable()


# Around a call ----------------------------------------------------------------------


@contextlib.contextmanager
def redirected(folder: Path) -> Iterator[None]:
    """Redirect stdout and stderr to files, also those of C libraries."""
    kept = sys.stdout, sys.stderr, os.dup(1), os.dup(2)
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(folder / name, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (
        open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2)
    )
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = kept[:2]
        for number, saved in ((1, kept[2]), (2, kept[3])):
            os.dup2(saved, number)
            os.close(saved)


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Work in `folder` and restore what commands set for their process."""
    here, paths, hooks = os.getcwd(), list(sys.path), list(warnings.filters)
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    signals = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        sys.path[:] = paths
        warnings.filters[:] = hooks
        root.handlers[:] = handlers
        logging.getLogger("mlx_tokprune").setLevel(logging.NOTSET)
        for number, handler in signals.items():
            signal.signal(number, handler)
        gc.collect()


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def late(*_):
        raise Hang(f"over {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Return the peak bytes of this process, on Linux since `_forget_peak`."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
