"""List the pruning methods."""

import json

from ..cli import Parser, command
from ..pruners import get_method
from . import COLUMNS, LEGEND, method_rows


def build_parser() -> Parser:
    """Return the parser of `mlx_tokprune methods`."""
    parser = Parser(
        prog="mlx_tokprune methods",
        description=__doc__,
        example="mlx_tokprune methods",
    )
    help_ = "print JSON in place of the table"
    parser.add_argument("--json", action="store_true", help=help_)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Print the methods as a table or as JSON."""
    args = build_parser().parse_args(argv)
    rows = method_rows()
    summaries = {name: get_method(name).summary for name, *_ in rows}
    if args.json:
        entries: list[dict[str, str]] = [
            dict(zip(COLUMNS, row, strict=True)) for row in rows
        ]
        for entry in entries:
            entry["summary"] = summaries[entry["method"]]
        print(json.dumps(entries, indent=1))
        return
    table = [row[:-1] for row in (COLUMNS, *rows)]  # options: in the sentences
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print(f"\n{LEGEND}\n")
    for name, *_, options in rows:
        print(f"{name}: {summaries[name]}{options and f' [{options}]'}")


if __name__ == "__main__":
    main()
