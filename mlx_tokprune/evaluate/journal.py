"""Keeping what was answered: a line of JSON for each question."""

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..files import write_text
from ..measure.accuracy import ANSWER
from ..measure.results import mismatch
from .items import Item


class Journal:
    """A line of JSON for each question that was answered.

    The first line says what was asked of which weights; a journal of anything else is
    begun again.
    """

    def __init__(self, file: Path, header: dict):
        self.file, self.records, self._lines = file, {}, [json.dumps(header)]
        header = json.loads(self._lines[0])  # JSON has no tuples
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        labels = [row["label"] for row in header.get("rows", [])]
        if lines and _parsed(lines[0]) == header:
            for line in map(_parsed, lines[1:]):
                if not _is_answer(line, labels):
                    continue
                self.records[line["item"]] = line["rows"]
                self._lines.append(json.dumps(line))

    def add(self, item: int, rows: dict) -> None:
        line = json.dumps({"item": item, "rows": rows})
        if self._lines:  # what was there, without a line that was cut
            write_text(self.file, "\n".join([*self._lines, line]) + "\n")
            self._lines = []
        else:
            with self.file.open("a") as stream:
                stream.write(line + "\n")
        self.records[item] = rows


def _parsed(line: str) -> dict | None:
    """The last line of a run that was killed may be cut."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_answer(line: dict | None, labels: list[str]) -> bool:
    """Whether a line holds an answer of every row; others are asked again."""
    if line is None or line.keys() != {"item", "rows"} or type(line["item"]) is not int:
        return False
    rows = line["rows"]
    return (
        isinstance(rows, dict)
        and list(rows) == labels
        and not any(mismatch(row, ANSWER, "") for row in rows.values())
        and all(_shares(rows, name) for name in ("accuracy", "needed"))
    )


def _shares(rows: dict, name: str) -> bool:
    """Whether all rows have a share, or none."""
    found = [row.get(name) for row in rows.values()]
    known = [share for share in found if share is not None]
    shares = all(type(share) in (int, float) and 0 <= share <= 1 for share in known)
    return len(known) in (0, len(found)) and shares


def answer_all(
    evaluator, items: Sequence[Item], mine: Sequence[int], journal: Journal
) -> dict[int, dict]:
    """Records of the items whose numbers are `mine`."""
    todo = [number for number in mine if number not in journal.records]
    for number in tqdm(todo, desc="questions", unit="question", disable=None):
        journal.add(number, evaluator.ask(items[number]))
    return {number: journal.records[number] for number in mine}
