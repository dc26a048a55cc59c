"""Group 4: damaged questions, results and journals."""

import json
import os
import shutil
from random import Random

from . import damage
from .asks import POLICY, TINY, right
from .case import Outcome, Place, perform

LINES = (
    *(b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe", b"{" * 100_000, b"\0"),
    *(b'{"image": "x"}', b'{"image": 1, "question": 2}', b"[" * 99_999, b"\x1b[2J"),
)
RESULTS = ("e.json", "b.json")
JOURNAL = "e.json.0-of-1.jsonl"


def run(rng: Random, place: Place) -> Outcome:
    kinds = (_questions, _report, _resumed, _accuracy, _journal, _cut_journal, _other)
    return rng.choices(kinds, (5, 6, 3, 1, 4, 2, 0.5))[0](rng, place)


def _questions(rng: Random, place: Place) -> Outcome:
    """Evaluate questions in a file with good and damaged lines."""
    model = rng.choice((TINY, TINY, POLICY))
    source = place.base / ("actions.jsonl" if model == POLICY else "questions.jsonl")
    lines = []
    for line in source.read_bytes().splitlines():
        how = rng.randrange(4)
        if how == 0:
            line = damage.json_bytes(rng, json.loads(line))
        elif how == 1:
            line = rng.choice((rng.choice(LINES), damage.damaged(rng, line)))
        lines.append(line)
    file = place.folder / "data.jsonl"
    file.write_bytes(rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines))
    argv = [*right("evaluate", place, model), "--data", str(file)]
    return _told(perform("evaluate", argv, place), file)


def _damaged_result(rng: Random, place: Place, name: str, target):
    data = (place.base / name).read_bytes()
    if rng.random() < 0.9:
        times = rng.choice((1, 1, 1, 2, 3))
        data = damage.as_json(damage.changed(rng, json.loads(data), times))
    else:
        data = damage.damaged(rng, data)
    target.write_bytes(data)
    return target


def _report(rng: Random, place: Place) -> Outcome:
    name = rng.choice(RESULTS)
    file = _damaged_result(rng, place, name, place.folder / name)
    files = [str(file), str(place.base / RESULTS[0])]
    argv = [*rng.choice((files[:1], files[:1], files)), "--output", "r.html"]
    argv += ["--pictures", rng.choice(("0", "0", "0", "1"))]
    return _told(perform("report", argv, place), file)


def _resumed(rng: Random, place: Place) -> Outcome:
    """Resume from a damaged file in the place of the result."""
    command, name = rng.choice((("bench", "b.json"), ("evaluate", "e.json")))
    file = _damaged_result(rng, place, name, place.out / name)
    argv = right(command, place)
    if command == "bench":
        argv += ["--runs", rng.choice(("1", "2", "3"))]
    return _told(perform(command, argv, place), file)


def _other(rng: Random, place: Place) -> Outcome:
    """Check that a benchmark of another image or model does not resume this file."""
    shutil.copy(place.base / "b.json", place.out / "b.json")
    argv = [*right("bench", place), "--runs", "3"]
    if rng.random() < 0.5:
        argv[argv.index("--image") + 1] = str(TINY / "image_0.png")
    else:
        model = place.folder / TINY.name
        shutil.copytree(place.base / "quantized", model)
        argv[argv.index("--model") + 1] = str(model)
    outcome = perform("bench", argv, place)
    if outcome.kind == "succeeded":
        return Outcome("wrong", f"samples of two are mixed: {outcome.told}")
    return outcome


def _accuracy(rng: Random, place: Place) -> Outcome:
    file = _damaged_result(rng, place, "e.json", place.folder / "e.json")
    shutil.copy(place.base / "b.json", place.out / "b.json")
    argv = [*right("bench", place), "--plots", "plots", "--accuracy", str(file)]
    return _told(perform("bench", argv, place), file)


def _journal(rng: Random, place: Place) -> Outcome:
    """Resume from a journal with damaged records."""
    lines = (place.base / JOURNAL).read_bytes().splitlines()
    for at in rng.sample(range(len(lines)), rng.choice((1, 1, 2))):
        lines[at] = damage.json_bytes(rng, json.loads(lines[at]))
        if rng.random() < 0.2:
            lines[at] = b"{}"
    file = place.out / JOURNAL
    file.write_bytes(b"\n".join(lines))
    copy = place.folder / "journal"
    shutil.copy(file, copy)
    return _told(perform("evaluate", right("evaluate", place), place), copy)


def _cut_journal(rng: Random, place: Place) -> Outcome:
    """Check that a cut journal resumes to the result of an undisturbed run."""
    data = (place.base / JOURNAL).read_bytes()
    (place.out / JOURNAL).write_bytes(damage.cut(rng, data))

    def same(_: str) -> str | None:
        found, right = (
            json.loads((folder / "e.json").read_text())
            for folder in (place.out, place.base)
        )
        names = [n for n in ("rows", "answers", "run") if found[n] != right[n]]
        return f"differs in {names}" if names else None

    return perform("evaluate", right("evaluate", place), place, same)


def _told(outcome: Outcome, file) -> Outcome:
    size = os.path.getsize(file) if os.path.exists(file) else 0
    text = file.read_bytes()[:300] if size and size < 2000 else b""
    return Outcome(outcome.kind, f"{outcome.told}\n  file {text!r}")
