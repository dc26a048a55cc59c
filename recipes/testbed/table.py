"""Table and plot of several results of `mlx_tokprune.evaluate`.

    evaluate="python -m recipes.testbed.run evaluate --model testbed"
    $evaluate --data a/questions.jsonl --methods M... \
        --keep-ratios 0.25 0.11 --max-tokens 5 --output a.json
    $evaluate --data b/questions.jsonl --methods M... \
        --keep-ratios 0.5 0.05 --max-tokens 5 --output b.json
    python -m recipes.testbed.table a.json b.json --plot recipes/testbed/testbed.png

A cell gives the right answers with their 95 % interval, then the share of needed tokens
that are kept, both in percent. Results may have different numbers of questions: each
column has its own values of the unpruned model. A label is `METHOD RATIO`.

    python -m recipes.testbed.table a.json scorers.json --against norm

compares labels on the questions that all results share: the right answers of each, and
the paired difference, in points, from the method of `--against` at the same ratio.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlx_tokprune.evaluate.accuracy_table import draw
from mlx_tokprune.files import PICTURE, check_output, read_json
from mlx_tokprune.measure.intervals import bootstrap
from mlx_tokprune.measure.tables import Table

Rows = dict[tuple[str, float], dict]


def by_label(results: Sequence[list[dict]]) -> Rows:
    """Return rows by method and ratio, the unpruned row at each ratio of its result."""
    found: Rows = {}
    for none, *rows in results:
        for row in rows:
            method, ratio = row["label"].split()
            found["none", float(ratio)] = none
            found[method, float(ratio)] = row
    return found


def table(rows: Rows) -> str:
    """Return accuracy and kept needed tokens by method and ratio, as Markdown."""
    ratios = sorted({ratio for _, ratio in rows}, reverse=True)
    heads = [f"{100 * r:g} %, n={_accuracy(rows['none', r])['n']}" for r in ratios]
    cells = [
        [f"`{method}`", *(_cell(rows.get((method, ratio))) for ratio in ratios)]
        for method in dict.fromkeys(method for method, _ in rows)
    ]
    return Table(["method", *heads], cells).markdown()


def _accuracy(row: dict) -> dict:
    return row["accuracy"]["all"]


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    value, low, high = (100 * _accuracy(row)[name] for name in ("value", "low", "high"))
    needed = 100 * row["needed"]["all"]["value"]
    return f"{value:.1f} ({low:.0f}-{high:.0f}); {needed:.0f}"


def paired(results: Sequence[list[dict]], against: str) -> str:
    """Return the right answers of each label on the shared questions, as Markdown.

    against: method to compare with at the same ratio. Intervals are over pictures.
    """
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for answer in (answer for answers in results for answer in answers):
        scores.setdefault(_question(answer), {}).update(answer["scores"])
    shared = set.intersection(*(set(map(_question, answers)) for answers in results))
    asked = sorted(shared)
    pictures = [picture for picture, _ in asked]
    rows = []
    for label in dict.fromkeys(label for key in asked for label in scores[key]):
        ratio = label.partition(" ")[2]
        base = f"{against} {ratio}" if ratio else against
        mine = [scores[key][label] for key in asked]
        theirs = [scores[key].get(base) for key in asked]
        known = None not in theirs and base != label
        more = _difference(mine, theirs, pictures) if known else ""
        rows.append([f"`{label}`", f"{100 * sum(mine) / len(mine):.1f}", more])
    head = f"{len(asked)} questions, {len(set(pictures))} pictures"
    columns = [head, "right, %", f"more than `{against}`, points"]
    return Table(columns, rows).markdown()


def _question(answer: dict) -> tuple[str, str]:
    return answer["picture"], answer["question"]


def _difference(mine: list[float], theirs: list[float], pictures: list[str]) -> str:
    """Return the mean difference in points, with its 95 % interval over pictures."""
    more = [one - other for one, other in zip(mine, theirs, strict=True)]
    low, high = bootstrap(more, pictures)
    mean = sum(more) / len(more)
    return f"{100 * mean:+.1f} ({100 * low:+.0f} to {100 * high:+.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--against", metavar="METHOD")
    args = parser.parse_args()
    if args.plot:
        check_output(args.plot, PICTURE)
    found = [read_json(file) for file in args.results]
    if args.against:
        if len({result["model"] for result in found}) > 1:
            parser.error("the results are of several models; expected one's")
        print(paired([result["answers"] for result in found], args.against))
        return
    results = [result["rows"] for result in found]
    print(table(by_label(results)))
    if args.plot:
        first, *others = results
        rows = [*first, *(row for result in others for row in result[1:])]
        draw(rows, args.plot, over_tokens=True)


if __name__ == "__main__":
    main()
