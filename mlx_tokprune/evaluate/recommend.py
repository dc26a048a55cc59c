"""Recommendation of the cheapest plan within an allowed loss of accuracy."""

import operator
from collections.abc import Sequence

from ..measure.intervals import of_loss
from ..measure.results import Row
from ..pruners import get_method
from .items import Item


def recommend(
    items: Sequence[Item], records: dict[int, dict], rows: Sequence[Row], most: float
) -> dict:
    """Return the recommended row, and the loss and FLOPs of every row, for JSON.

    most: the allowed loss, a share of the answers: of accuracy where right answers
    exist, else of answers equal to the unpruned model's. A row is fine if the upper end
    of its interval is at most that; the intervals hold for all rows together. `choice`
    is the label of the cheapest fine row by FLOPs up to the first token, or `None`;
    `closest` the row of the lowest upper end, of equal ones the cheapest. Controls are
    measured, not recommended.
    """
    candidates = [row for row in rows if not _is_control(row)]
    first, pictures = rows[0].label, [items[number].picture for number in records]
    whole = _flops(records, first)
    losses = []
    for row in candidates:
        lost = [_score(r[first]) - _score(r[row.label]) for r in records.values()]
        value, low, high = of_loss(lost, pictures, len(candidates))
        share = _flops(records, row.label) / whole
        losses.append(
            {"label": row.label, "loss": value, "low": low, "high": high}
            | {"flops": share, "fine": high <= most}
        )
    fine = [loss for loss in losses if loss["fine"] and loss["flops"] < 1]
    nearness = operator.itemgetter("high", "flops")
    return {
        "most": most,
        "choice": min(fine, key=lambda r: r["flops"])["label"] if fine else None,
        "closest": min(losses, key=nearness)["label"] if losses else None,
        "rows": losses,
    }


def _score(record: dict) -> float:
    accuracy = record["accuracy"]
    return float(record["agrees"]) if accuracy is None else accuracy


def _is_control(row: Row) -> bool:
    methods = [get_method(pruner.method) for pruner in row.pruners]
    return any(m.name == "none" or m.summary.startswith("Control") for m in methods)


def _flops(records: dict[int, dict], label: str) -> float:
    return sum(rows[label]["flops"] for rows in records.values())


def sentence(recommendation: dict) -> str:
    """Return the result of `recommend` as a sentence."""
    by_label = {row["label"]: row for row in recommendation["rows"]}
    allowed = f"{100 * recommendation['most']:.3g} points"
    if recommendation["choice"] is None:
        start = f"No plan is sure to lose at most {allowed}: "
        if recommendation["closest"] is None:
            return f"{start}none was measured."
        row = by_label[recommendation["closest"]]
        closest = f"{row['label']} comes closest and {_described(row)}"
        return f"{start}{closest}. Allow more, or ask more questions."
    row = by_label[recommendation["choice"]]
    return f"Within {allowed} the cheapest is {row['label']}: it {_described(row)}."


def _described(row: dict) -> str:
    value, low, high = (100 * row[name] for name in ("loss", "low", "high"))
    share = f"{100 * row['flops']:.0f} % of the FLOPs to the first token"
    return f"loses {value:.1f} points ({low:.1f} to {high:.1f}) at {share}"
