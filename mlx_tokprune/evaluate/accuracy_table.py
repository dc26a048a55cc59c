"""Rows of an evaluation from records of its questions, their table and plot."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import import_matplotlib, printable
from ..files import write_picture
from ..measure.intervals import bootstrap, of_share
from ..measure.tables import Table
from .items import Item

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes


def summarize(items: Sequence[Item], records: dict[int, dict]) -> list[dict]:
    """Return a row for each label: accuracy and agreement by kind, KL and FLOPs.

    records: by item number, the record of each row by its label.
    """
    labels = list(next(iter(records.values())))
    return [_row(label, items, records) for label in labels]


def _row(label: str, items: Sequence[Item], records: dict[int, dict]) -> dict:
    own = {number: rows[label] for number, rows in records.items()}
    right = {n: r["accuracy"] for n, r in own.items() if r["accuracy"] is not None}
    needed = {n: r["needed"] for n, r in own.items() if r.get("needed") is not None}
    divergence = [record["divergence"] for record in own.values()]
    flops = [record["flops"] for record in own.values()]
    kept = [record["kept"] for record in own.values()]
    low, high = bootstrap(divergence, [items[number].picture for number in own])
    return {
        "label": label,
        "kept": sum(kept) / len(kept),
        "least": min(kept),
        "most": max(kept),
        "flops": None if None in flops else sum(flops) / len(flops),
        "accuracy": _by_kind(right, items),
        "agreement": _by_kind({n: r["agrees"] for n, r in own.items()}, items),
        "needed": _by_kind(needed, items),
        "divergence": _with_interval(divergence, low, high),
    }


def _by_kind(values: dict[int, float], items: Sequence[Item]) -> dict[str, dict]:
    """Return share, interval and count of `all` questions, then of each kind."""
    kinds: dict[str, list[int]] = {"all": []} if values else {}
    for number in values:
        kinds["all"].append(number)
        if items[number].kind:
            kinds.setdefault(items[number].kind, []).append(number)
    return {
        kind: _share([float(values[n]) for n in numbers], [items[n] for n in numbers])
        for kind, numbers in kinds.items()
    }


def _share(values: list[float], items: list[Item]) -> dict:
    low, high = of_share(values, [item.picture for item in items])
    return _with_interval(values, low, high)


def _with_interval(values: list[float], low: float, high: float) -> dict:
    value = sum(values) / len(values)
    return {"value": value, "low": low, "high": high, "n": len(values)}


def most_common(items: Sequence[Item]) -> float | None:
    """Return the accuracy of the most common answer to each kind of question.

    `None` without right answers.
    """
    answers: dict[str, Counter] = {}
    for item in items:
        if item.answers:
            answers.setdefault(item.kind, Counter())[item.answers[0]] += 1
    total = sum(sum(counts.values()) for counts in answers.values())
    right = sum(counts.most_common(1)[0][1] for counts in answers.values())
    return right / total if total else None


def tabulate(rows: list[dict]) -> Table:
    """Build the table: shares in percent, with 95 % intervals."""
    kinds = [kind for kind in rows[0]["accuracy"] if kind != "all"]
    accuracy = ["accuracy"] if rows[0]["accuracy"] else []
    needed = ["needed"] if rows[0]["needed"] else []
    columns = ["method", "tokens kept (layer mean)", "GFLOP", *accuracy]
    columns += ["agreement", "KL, nats"]
    columns += [*("needed tokens kept, %" for _ in needed), *map(printable, kinds)]

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
    """Return the mean of kept tokens, with minimum and maximum if they differ."""
    kept = row["kept"]
    least, most = row.get("least", kept), row.get("most", kept)
    return f"{kept:.1f} ({least:g}-{most:g})" if least < most else f"{kept:.0f}"


def _percent(share: dict) -> str:
    value, low, high = (100 * share[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"


def draw(rows: list[dict], file: Path) -> None:
    """Draw accuracy (else agreement) against FLOPs, a line per method, as a PNG.

    Unknown FLOPs: against visual tokens. If rows have needed tokens, a second plot
    shows the kept share of them. Bars are 95 % intervals. Raises `InputError` without
    matplotlib.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    shown = ["accuracy" if rows[0]["accuracy"] else "agreement"]
    shown += ["needed"] if rows[0]["needed"] else []
    size = (8 * len(shown), 5)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    both = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, quantity in zip(both, shown, strict=True):
        _draw_shares(axes, rows, quantity)
    both[0].legend(fontsize=8, ncols=1 + len(rows) // 40)
    write_picture(file, figure)


def _draw_shares(axes: "Axes", rows: list[dict], quantity: str) -> None:
    over_flops = all(row["flops"] is not None for row in rows)

    def cost(row: dict) -> float:
        return row["flops"] / 1e9 if over_flops else row["kept"]

    curves: dict[str, list[dict]] = {}
    for row in rows[1:]:
        curves.setdefault(row["label"].split()[0], [rows[0]]).append(row)
    for number, (method, points) in enumerate((curves or {"none": rows}).items()):
        points = sorted(points, key=cost)
        shares = [row[quantity]["all"] for row in points]
        values = [100 * share["value"] for share in shares]
        below = [100 * max(0, s["value"] - s["low"]) for s in shares]
        above = [100 * max(0, s["high"] - s["value"]) for s in shares]
        costs = [cost(row) for row in points]
        axes.errorbar(
            *(costs, values, [below, above]),
            marker="o",
            ms=4,
            capsize=2,
            label=method,
            color=f"C{number % 10}",
            ls="-" if number < 10 else ":",
        )
    unit = "GFLOP to the first token" if over_flops else "visual tokens"
    needed = "needed tokens that are kept (%)"
    label = needed if quantity == "needed" else f"{quantity} (%)"
    axes.set(xlabel=unit, ylabel=label)
    axes.grid(alpha=0.3)
