"""Tables of results in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of text cells under named columns, and the notes around them.

    columns: names; the first one may be empty. rows: cells in the order of the columns;
    a row may end early. before, after: lines of text around the table. left: positions
    of the columns that are aligned left; the rest is aligned right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    before: Sequence[str] = ()
    after: Sequence[str] = ()
    left: Sequence[int] = (0,)

    def markdown(self) -> str:
        """Return the table and its notes as Markdown."""
        marks = ["---" if n in self.left else "---:" for n in range(len(self.columns))]
        head = _line(self.columns).replace("|  |", "| |", 1)  # an empty first name
        lines = [head, f"|{'|'.join(marks)}|", *map(_line, self.rows)]
        return "\n\n".join([*self.before, "\n".join(lines), *self.after])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
