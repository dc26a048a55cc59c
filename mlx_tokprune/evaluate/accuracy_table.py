"""Rows of an evaluation from the records of its questions; their table and plot."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import import_matplotlib, printable
from ..files import replacing
from ..measure.intervals import bootstrap, of_share
from ..measure.tables import Table
from .items import Item


def summarize(items: Sequence[Item], records: dict[int, dict]) -> list[dict]:
    """Return a row for each label: accuracy and agreement by kind, KL and FLOPs."""
    labels = list(next(iter(records.values())))
    return [_row(label, items, records) for label in labels]


def _row(label: str, items, records: dict[int, dict]) -> dict:
    mine = {number: rows[label] for number, rows in records.items()}
    known = {n: r for n, r in mine.items() if r["accuracy"] is not None}
    needed = {n: r["needed"] for n, r in mine.items() if r.get("needed") is not None}
    divergence = [record["divergence"] for record in mine.values()]
    flops = [record["flops"] for record in mine.values()]
    kept = [record["kept"] for record in mine.values()]
    low, high = bootstrap(divergence, [items[number].picture for number in mine])
    return {
        "label": label,
        "kept": sum(kept) / len(kept),
        "least": min(kept),
        "most": max(kept),
        "flops": None if None in flops else sum(flops) / len(flops),
        "accuracy": _by_kind({n: r["accuracy"] for n, r in known.items()}, items),
        "agreement": _by_kind({n: r["agrees"] for n, r in mine.items()}, items),
        "needed": _by_kind(needed, items),
        "divergence": {
            "value": sum(divergence) / len(divergence),
            "low": low,
            "high": high,
            "n": len(divergence),
        },
    }


def _by_kind(values: dict[int, float], items) -> dict[str, dict]:
    """`all`, then each kind of question: share, interval and number of questions."""
    kinds: dict[str, list[int]] = {"all": []} if values else {}
    for number in values:
        kinds["all"].append(number)
        if items[number].kind:
            kinds.setdefault(items[number].kind, []).append(number)
    return {
        kind: _share([float(values[n]) for n in found], [items[n] for n in found])
        for kind, found in kinds.items()
    }


def _share(values: list[float], items: list[Item]) -> dict:
    low, high = of_share(values, [item.picture for item in items])
    value = sum(values) / len(values)
    return {"value": value, "low": low, "high": high, "n": len(values)}


def most_common(items: Sequence[Item]) -> float | None:
    """Return the accuracy of the most common answer to each kind of question."""
    answers: dict[str, Counter] = {}
    for item in items:
        if item.answers:
            answers.setdefault(item.kind, Counter())[item.answers[0]] += 1
    asked = sum(sum(found.values()) for found in answers.values())
    right = sum(found.most_common(1)[0][1] for found in answers.values())
    return right / asked if asked else None


def tabulate(rows: list[dict]) -> Table:
    """Build the table: shares in percent, with 95 % intervals."""
    kinds = [kind for kind in rows[0]["accuracy"] if kind != "all"]
    accuracy = ["accuracy"] if rows[0]["accuracy"] else []
    needed = ["needed"] if rows[0]["needed"] else []
    columns = ["method", "kept", "GFLOP", *accuracy, "agreement", "KL, nats"]
    columns += [*(f"{name} kept" for name in needed), *map(printable, kinds)]

    def cells(row: dict) -> list[str]:
        return [
            *(row["label"], _kept(row)),
            "" if row["flops"] is None else f"{row['flops'] / 1e9:.2f}",
            *(_percent(row[name]["all"]) for name in [*accuracy, "agreement"]),
            f"{row['divergence']['value']:.3g}",
            *(_percent(row[name]["all"]) for name in needed),
            *(f"{100 * row['accuracy'][kind]['value']:.1f}" for kind in kinds),
        ]

    return Table(columns, [cells(row) for row in rows])


def _kept(row: dict) -> str:
    """Mean, with the minimum and the maximum where they differ."""
    kept = row["kept"]
    least, most = row.get("least", kept), row.get("most", kept)
    return f"{kept:.1f} ({least:g}-{most:g})" if least < most else f"{kept:.0f}"


def _percent(share: dict) -> str:
    value, low, high = (100 * share[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"


def draw(rows: list[dict], file: Path, over_tokens: bool = False) -> None:
    """Draw accuracy (else agreement) against FLOPs, a line per method, as a PNG.

    `over_tokens`, or unknown FLOPs: against visual tokens. Where the needed tokens are
    known, a second plot shows the kept share of them. Bars are 95 % intervals. Raises
    `InputError` without matplotlib.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    shown = ["accuracy" if rows[0]["accuracy"] else "agreement"]
    shown += ["needed"] if rows[0]["needed"] else []
    size = (8 * len(shown), 5)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    both = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, what in zip(both, shown, strict=True):
        _draw_shares(axes, rows, what, over_tokens)
    both[0].legend(fontsize=8, ncols=1 + len(rows) // 40)
    with replacing(file) as stream:
        figure.savefig(stream, format="png")


def _draw_shares(axes, rows: list[dict], what: str, over_tokens: bool) -> None:
    known = not over_tokens and all(row["flops"] is not None for row in rows)

    def cost(row: dict) -> float:
        return row["flops"] / 1e9 if known else row["kept"]

    curves: dict[str, list[dict]] = {}
    for row in rows[1:]:
        curves.setdefault(row["label"].split()[0], [rows[0]]).append(row)
    for number, (method, found) in enumerate((curves or {"none": rows}).items()):
        found = sorted(found, key=cost)
        shares = [row[what]["all"] for row in found]
        values = [100 * share["value"] for share in shares]
        below = [100 * max(0, s["value"] - s["low"]) for s in shares]
        above = [100 * max(0, s["high"] - s["value"]) for s in shares]
        costs = [cost(row) for row in found]
        axes.errorbar(
            *(costs, values, [below, above]),
            **{"marker": "o", "ms": 4, "capsize": 2, "label": method},
            **{"color": f"C{number % 10}", "ls": "-" if number < 10 else ":"},
        )
    counted = "GFLOP to the first token" if known else "visual tokens"
    label = "needed tokens that are kept (%)" if what == "needed" else f"{what} (%)"
    axes.set(xlabel=counted, ylabel=label)
    axes.grid(alpha=0.3)
