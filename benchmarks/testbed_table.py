"""One table and one plot from results of `mlx_tokprune.evaluate` on the same questions.

    mlx_tokprune.evaluate --data testbed --pictures 32 --methods M... \
        --keep-ratios 0.25 0.11 --max-tokens 5 --output a.json
    mlx_tokprune.evaluate --data testbed ... --keep-ratios 0.5 0.05 --output b.json
    python benchmarks/testbed_table.py a.json b.json --plot docs/testbed.png

Right answers in percent with the 95 % interval, and below it the share of needed tokens
that are left. A row of the results is `METHOD RATIO`.
"""

import argparse
from pathlib import Path

from mlx_tokprune.evaluate.table import draw
from mlx_tokprune.files import read_json


def merged(files: list[Path]) -> list[dict]:
    """The unpruned row, and all others; `SystemExit` where the questions differ."""
    results = [read_json(file) for file in files]
    asked = {result["run"]["questions"] for result in results}
    if len(asked) > 1:
        raise SystemExit("these results are about different questions")
    first, *rest = (result["rows"] for result in results)
    return [*first, *(row for rows in rest for row in rows if row["label"] != "none")]


def table(rows: list[dict]) -> str:
    ratios = sorted({_ratio(row) for row in rows[1:]}, reverse=True)
    methods = dict.fromkeys(row["label"].split()[0] for row in rows[1:])
    by_label = {(row["label"].split()[0], _ratio(row)): row for row in rows[1:]}
    lines = ["| method | " + " | ".join(f"{100 * r:g} %" for r in ratios) + " |"]
    lines.append("|---|" + "---:|" * len(ratios))
    lines.append(f"| none: {_cell(rows[0])} |" + " |" * len(ratios))
    for method in methods:
        cells = [_cell(by_label.get((method, ratio))) for ratio in ratios]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(row: dict) -> float:
    return float(row["label"].split()[1])


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    share, needed = row["accuracy"]["all"], row["needed"]["all"]["value"]
    value, low, high = (100 * share[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.0f}-{high:.0f}); {100 * needed:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows = merged(args.results)
    print(f"{rows[0]['accuracy']['all']['n']} questions")
    print(table(rows))
    for row in rows[:1]:
        kinds = {k: v["value"] for k, v in row["accuracy"].items() if k != "all"}
        print(", ".join(f"{k} {100 * value:.1f}" for k, value in kinds.items()))
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
