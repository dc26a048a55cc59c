"""A benchmark in pictures. Needs matplotlib (the extra `bench`)."""

import statistics
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from ..files import replacing
from .measure import median
from .table import describe, label, stage

STAGES = ("preprocess", "vision", "prune", "project", "prefill")


Accuracy = dict[tuple[str, int], float]  # by label and input size


def draw_all(result: dict, folder: Path, accuracy: Accuracy) -> list[Path]:
    """Writes the pictures to `folder`; the Pareto plot where accuracy is known."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "plots need matplotlib; pip install 'mlx-tokprune[bench]'"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        _save(folder / "ttft_by_stage.png", result, _draw_stages),
        _save(folder / "ttft_by_tokens.png", result, _draw_tokens),
    ]
    if accuracy:

        def draw(axes, shown):
            _draw_pareto(axes, shown, accuracy)

        drawn.append(_save(folder / "pareto.png", result, draw))
    return drawn


def _save(file: Path, result: dict, draw: Callable) -> Path:
    from matplotlib.figure import Figure

    rows = len(result["rows"])
    tall = 1.6 + 0.25 * rows if draw is _draw_stages else 4.2
    figure = Figure(figsize=(6.4, tall), dpi=150, layout="constrained")
    axes = figure.subplots()
    draw(axes, result)
    figure.supxlabel(describe(result), fontsize=6, color="grey", wrap=True)
    with replacing(file) as stream:
        figure.savefig(stream, format="png")
    return file


def _name(row: dict, rows: list[dict]) -> str:
    """The label, with what is not the same in every row."""
    parts = [label(row)]
    for key, unit in (("image_size", " px"), ("model", ""), ("prompt", "")):
        if len({other[key] for other in rows}) > 1:
            parts.append(f"{str(row[key])[:24]}{unit}")
    return ", ".join(parts)


def _draw_stages(axes, result: dict) -> None:
    """Fenced stages of each row, stacked, beside the unfenced TTFT."""
    rows = result["rows"]
    where = range(len(rows))
    left = [0.0] * len(rows)
    for name in STAGES:
        values = [stage(row, name) or 0 for row in rows]
        axes.barh(where, values, left=left, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    ttft = [statistics.median(row["samples"]["ttft_ms"]) for row in rows]
    axes.plot(ttft, where, "k|", ms=10, mew=2, label="TTFT, unfenced")
    axes.set_yticks(where, [_name(row, rows) for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1))


def _groups(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows by method within a case, each group with its unpruned row."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        case = (row["model"], row["image_size"], row["prompt"])
        if row["method"] != "none":
            groups.setdefault((*case, row["method"]), []).append(row)
    for (*case, _), found in groups.items():
        for row in rows:
            same = case == [row["model"], row["image_size"], row["prompt"]]
            if row["method"] == "none" and same:
                found.append(row)
    return groups


def _draw_tokens(axes, result: dict) -> None:
    """TTFT against the visual tokens that stay, bars from the least to the most."""
    rows = result["rows"]
    for found in _groups(rows).values():
        found.sort(key=lambda row: row["kept"])
        times = [row["samples"]["ttft_ms"] for row in found]
        middle = [statistics.median(t) for t in times]
        below = [m - min(t) for m, t in zip(middle, times, strict=True)]
        above = [max(t) - m for m, t in zip(middle, times, strict=True)]
        name = _name(found[0], rows).replace(label(found[0]), found[0]["method"])
        axes.errorbar(
            [row["kept"] for row in found],
            middle,
            [below, above],
            marker="o",
            ms=4,
            capsize=2,
            label=name,
        )
    axes.set(xlabel="visual tokens kept", ylabel="TTFT (ms)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)


def _draw_pareto(axes, result: dict, accuracy: Accuracy) -> None:
    """Accuracy against TTFT, for rows whose accuracy is known."""
    methods: dict[str, list] = {}
    for row in result["rows"]:
        key = (label(row), row["image_size"])
        if key in accuracy:
            point = (median(row["samples"]["ttft_ms"]), accuracy[key], row)
            methods.setdefault(row["method"], []).append(point)
    for method, points in methods.items():
        points.sort(key=lambda point: point[0])
        xs, ys = [p[0] for p in points], [100 * p[1] for p in points]
        axes.plot(xs, ys, "o-", ms=5, label=method)
        for x, y, row in points:
            axes.annotate(
                f"{row['keep_ratio']:g}, {row['image_size']} px",
                (x, y),
                xytext=(4, -8),
                textcoords="offset points",
                fontsize=6,
            )
    axes.set(xlabel="TTFT (ms)", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
