"""Groups 6 and 7: killed and resumed runs, and concurrent runs."""

import json
import os
import signal
import time
from pathlib import Path
from random import Random
from subprocess import Popen, TimeoutExpired

from .asks import right
from .case import Outcome, Place, call, judge, module_of
from .prepare import LONG, RESULT, RUNS, start, undisturbed
from .whole import not_whole

_AFTER = {"convert": 0.04, "evaluate": 1.0, "bench": 1.0}  # seconds of writing
_LONGEST = 60


def run(rng: Random, place: Place) -> Outcome:
    """Kill a run once or twice, then run the command to its end."""
    command = rng.choice(list(RESULT))
    told, right_folder = [], undisturbed(place.base, command)[0]
    for _ in range(rng.choice((1, 1, 2))):
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        process, when = _killed(rng, command, place, number)
        code = process.returncode
        told.append(f"{command} {number.name} after {when}, exit {code}")
        if wrong := _after_kill(place, command, process):
            return Outcome("half-written", f"{wrong}; {told}")
    kept = _samples(place, command)
    if command == "convert" and (place.out / RESULT[command]).exists():
        return Outcome("succeeded", f"ended before it was killed; {told}")
    return _finished(place, command, kept, right_folder, told)


def _killed(rng: Random, command: str, place: Place, number) -> tuple[Popen, str]:
    seconds = undisturbed(place.base, command)[1]
    process = start(command, place, LONG[command])
    if rng.random() < 0.3:
        wait = rng.uniform(0.2, 1.1) * seconds
        when = f"{wait:.2f} s"
        time.sleep(wait)
    else:
        _wait_for_files(process, place)
        wait = rng.uniform(0, _AFTER[command])
        when = f"{wait:.3f} s of writing"
        time.sleep(wait)
    process.send_signal(number)
    process.wait(_LONGEST)
    return process, when


def _wait_for_files(process, place: Place, end_of_name: str = "") -> None:
    """Wait for a new file: a result, a journal, a partial one, or `end_of_name`."""
    known = {path.name for path in place.out.iterdir()}
    last = time.monotonic() + _LONGEST
    while process.poll() is None and time.monotonic() < last:
        new = {path.name for path in place.out.iterdir()} - known
        if any(name.endswith(end_of_name or ("jsonl", "json")) for name in new):
            return
        if not end_of_name and any(".partial-" in name for name in new):
            return
        time.sleep(0.002)


def _after_kill(place: Place, command: str, process: Popen) -> str | None:
    """Return an error unless the result is whole or absent.

    After SIGTERM, files of the killed process are an error, too.
    """
    target = place.out / RESULT[command]
    if os.path.lexists(target) and (why := not_whole(target)):
        return f"{target.name} {why}"
    own = [p.name for p in place.out.iterdir() if f"-{process.pid}-" in p.name]
    if process.returncode == 128 + signal.SIGTERM and own:
        return f"SIGTERM left {own}"
    return None


def _samples(place: Place, command: str) -> list:
    """Return the TTFT samples that a benchmark has written so far."""
    file = place.out / "b.json"
    if command != "bench" or not file.exists():
        return []
    return [row["samples"]["ttft_ms"] for row in json.loads(file.read_text())["rows"]]


def _finished(place, command: str, kept: list, right_folder: Path, told) -> Outcome:
    process = start(command, place, LONG[command])
    try:
        code = process.wait(_LONGEST)
    except TimeoutExpired:
        process.kill()
        return Outcome("hang", f"{command} after {told}")
    if code:
        err = (place.folder / "stderr").read_text()
        kind = "traceback" if "Traceback" in err else "badly"
        return Outcome(kind, f"the next run: exit {code}, {err[-900:]}; {told}")
    names = sorted(path.name for path in place.out.iterdir())
    if names != [RESULT[command]]:
        return Outcome("half-written", f"the next run leaves {names}; {told}")
    if wrong := _SAME[command](place.out, right_folder, kept):
        return Outcome("wrong", f"{wrong}; {told}")
    return Outcome("succeeded", str(told))


# Comparison with an undisturbed run -------------------------------------------------


def _same_folder(found: Path, right: Path, _) -> str | None:
    made, whole = (
        {path.name: path.read_bytes() for path in (folder / "made").iterdir()}
        for folder in (found, right)
    )
    return None if made == whole else "the checkpoint differs"


def _same_answers(found: Path, right: Path, _) -> str | None:
    one, two = (json.loads((f / "e.json").read_text()) for f in (found, right))
    wrong = [name for name in ("run", "rows", "answers") if one[name] != two[name]]
    return f"{wrong} differ" if wrong else None


def _same_rows(found: Path, right: Path, kept: list) -> str | None:
    """Return an error if rows differ in more than times, or samples are lost."""
    one, two = (json.loads((f / "b.json").read_text()) for f in (found, right))
    rows = [[{**r, "samples": 0, "limit_ms": 0} for r in x["rows"]] for x in (one, two)]
    if rows[0] != rows[1] or one["options"] != two["options"]:
        return "rows differ"
    samples = [row["samples"]["ttft_ms"] for row in one["rows"]]
    if any(len(values) != RUNS for values in samples):
        return f"samples are {[len(values) for values in samples]}, not {RUNS}"
    lost = [i for i, old in enumerate(kept) if samples[i][: len(old)] != old]
    return f"rows {lost} lost samples" if lost else None


_SAME = {"convert": _same_folder, "evaluate": _same_answers, "bench": _same_rows}


# Two at once ------------------------------------------------------------------------


def together(rng: Random, place: Place) -> Outcome:
    """Check that a second run is refused while a stopped run holds the output."""
    first = start("evaluate", place, [])
    _wait_for_files(first, place, ".lock")
    time.sleep(rng.uniform(0, 0.1))
    first.send_signal(signal.SIGSTOP)
    beside = Place.make(place.folder / "second", place.base)
    argv = [*right("evaluate", place), "--output", str(place.out / "e.json")]
    ended = call(lambda: module_of("evaluate").main(argv), beside)
    first.send_signal(signal.SIGCONT)
    code = first.wait(_LONGEST)
    outcome = judge(ended, [])
    if outcome.kind != "refused" or "another run is writing" not in ended.err:
        return Outcome("wrong", f"the second run: {outcome}, {ended.err}")
    wrong = f"exit {code}" if code else _same_answers(place.out, place.base, None)
    return Outcome("wrong", f"the first run: {wrong}") if wrong else outcome
