"""Journal of a run: a line of JSON for each answered question."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import note
from ..files import is_replaced, write_text
from ..measure.accuracy import ANSWER
from ..measure.results import mismatch
from .items import Item


class Journal:
    """File with a line of JSON for each answered question.

    header: the description of the run, which is the first line; the journal of another
    run is replaced, which a note tells. records: by item number. Raises `InputError`
    for a file that is no journal.
    """

    def __init__(self, file: Path, header: dict):
        is_replaced(file, header.get("schema"))
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
        elif lines:
            note(f"{file} has answers of another run, which will be replaced")

    def add(self, item: int, rows: dict) -> None:
        """Append the record of an item."""
        line = json.dumps({"item": item, "rows": rows})
        if self._lines:  # the first time: rewrite the file without a truncated line
            write_text(self.file, "\n".join([*self._lines, line]) + "\n")
            self._lines = []
        else:
            with self.file.open("a") as stream:
                stream.write(line + "\n")
        self.records[item] = rows


def _parsed(line: str) -> dict | None:
    """Return the object of a line; `None` if a killed run truncated it."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _is_answer(line: dict | None, labels: list[str]) -> bool:
    """Return whether a line holds an answer of every row; else it is asked again."""
    if line is None or line.keys() != {"item", "rows"} or type(line["item"]) is not int:
        return False
    rows = line["rows"]
    return (
        isinstance(rows, dict)
        and list(rows) == labels
        and not any(mismatch(row, ANSWER, "") for row in rows.values())
        and all(_has_shares(rows, name) for name in ("accuracy", "needed"))
    )


def _has_shares(rows: dict, name: str) -> bool:
    """Return whether all rows have a share in [0, 1], or none has one."""
    values = [row.get(name) for row in rows.values()]
    shares = [share for share in values if share is not None]
    valid = all(type(share) in (int, float) and 0 <= share <= 1 for share in shares)
    return len(shares) in (0, len(values)) and valid


def answer_all(
    evaluator: Any, items: Sequence[Item], mine: Sequence[int], journal: Journal
) -> dict[int, dict]:
    """Return the records of the items numbered `mine`; ask those not in the journal."""
    todo = [number for number in mine if number not in journal.records]
    for number in tqdm(todo, desc="questions", unit="question", disable=None):
        journal.add(number, evaluator.ask(items[number]))
    return {number: journal.records[number] for number in mine}
