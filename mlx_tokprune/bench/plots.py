"""Plots of a benchmark. They need matplotlib (the extra `bench`)."""

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import import_matplotlib
from ..files import write_picture
from ..pipeline.timing import STAGES
from .benchmark import median
from .speed_table import describe, label, stage

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Accuracy = dict[tuple, float]  # by weights, positions, label and input size
FILES = ("ttft_by_stage.png", "ttft_by_tokens.png", "pareto.png")


def draw_all(result: dict, folder: Path, accuracy: Accuracy) -> list[Path]:
    """Write the plots to `folder` as PNG, and return their paths.

    accuracy: of rows for the Pareto plot, which is left out without a match. Rows with
    drafts are left out: the plots show TTFT, which drafts do not change. Raises
    `InputError` without matplotlib.
    """
    import_matplotlib()
    plain = [row for row in result["rows"] if not row.get("draft")]
    result = {**result, "rows": plain}
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        _save(folder / FILES[0], result, _draw_stages),
        _save(folder / FILES[1], result, _draw_tokens),
    ]
    if points := _accurate_points(result, accuracy):
        pareto = functools.partial(_draw_pareto, points)
        drawn.append(_save(folder / FILES[2], result, pareto))
    return drawn


def _save(file: Path, result: dict, draw: Callable) -> Path:
    """Write the plot that `draw(figure, result)` fills."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    draw(figure, result)
    figure.supxlabel(describe(result), fontsize=6, color="grey", wrap=True)
    write_picture(file, figure)
    return file


def _name(row: dict, rows: list[dict]) -> str:
    """Return the label, with the fields that differ between the rows."""
    parts = [label(row)]
    for key, unit in (("image_size", " px"), ("model", ""), ("prompt", "")):
        if len({other[key] for other in rows}) > 1:
            parts.append(f"{str(row[key])[:24]}{unit}")
    if len({other.get("picture", 0) for other in rows}) > 1:
        parts.append(f"picture {row.get('picture', 0) + 1}")
    return ", ".join(parts)


def _draw_stages(figure: "Figure", result: dict) -> None:
    """Draw the stages of each row, timed one by one and stacked, and the TTFT."""
    rows = result["rows"]
    figure.set_figheight(1.6 + 0.25 * len(rows))
    axes = figure.subplots()
    axes.margins(y=0.5 / len(rows))
    where = range(len(rows))
    left = [0.0] * len(rows)
    for name in STAGES:
        values = [stage(row, name) or 0 for row in rows]
        axes.barh(where, values, left=left, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    ttft = [statistics.median(row["samples"]["ttft_ms"]) for row in rows]
    axes.plot(ttft, where, "k|", ms=10, mew=2, label="TTFT")
    axes.set_yticks(where, [_name(row, rows) for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1))


def _cases(rows: list[dict]) -> dict[str, list[dict]]:
    """Return the rows of each model, size, prompt and picture, by its name."""
    cases: dict[tuple, list[dict]] = {}
    for row in rows:
        case = (row["model"], row["image_size"], row["prompt"], row.get("picture", 0))
        cases.setdefault(case, []).append(row)
    names = [_name(case[0], rows).removeprefix("none, ") for case in cases.values()]
    named = dict(zip(names, cases.values(), strict=True))
    return {name: case for name, case in named.items() if len(case) > 1} or named


def _draw_tokens(figure: "Figure", result: dict) -> None:
    """Draw TTFT against the kept visual tokens, a panel per case, a line per method.

    Bars go from the least to the most.
    """
    cases = _cases(result["rows"])
    across = min(3, len(cases))
    down = -(-len(cases) // across)
    figure.set_size_inches(max(6.4, 3.2 * across), 1.2 + 3 * down)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (name, rows) in zip(panels, cases.items(), strict=False):
        for method in dict.fromkeys(row["method"] for row in rows):
            curve = [row for row in rows if row["method"] in (method, "none")]
            if method != "none" or len(rows) == 1:
                _draw_line(axes, curve, method)
        axes.set(xlabel="visual tokens kept after the last place", ylabel="TTFT (ms)")
        axes.set_title(name, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for axes in panels[len(cases) :]:
        axes.set_visible(False)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=7, ncols=4, loc="outside upper center")


def _draw_line(axes: "Axes", rows: list[dict], name: str) -> None:
    rows = sorted(rows, key=lambda row: row["kept"])
    times = [row["samples"]["ttft_ms"] for row in rows]
    middle = [statistics.median(t) for t in times]
    below = [m - min(t) for m, t in zip(middle, times, strict=True)]
    above = [max(t) - m for m, t in zip(middle, times, strict=True)]
    kept = [row["kept"] for row in rows]
    bars = {"marker": "o", "ms": 4, "capsize": 2, "label": name}
    axes.errorbar(kept, middle, [below, above], **bars)


def _accurate_points(result: dict, accuracy: Accuracy) -> dict[str, list]:
    """Return (TTFT, accuracy, row) of the rows with an accuracy, by method."""
    methods: dict[str, list] = {}
    for row in result["rows"]:
        weights = result["options"].get("weights", {}).get(row["model"])
        key = (weights, row["positions"], label(row), row["image_size"])
        if key in accuracy:
            ttft = median(row["samples"]["ttft_ms"])
            point = (ttft, 100 * accuracy[key], row)
            methods.setdefault(row["method"], []).append(point)
    return methods


def _draw_pareto(methods: dict[str, list], figure: "Figure", _: dict) -> None:
    """Draw accuracy against TTFT."""
    axes = figure.subplots()
    for method, points in methods.items():
        points.sort(key=lambda point: point[0])
        xs, ys, _rows = zip(*points, strict=True)
        (line,) = axes.plot(xs, ys, "-", lw=1, label=method)
        sizes = [20 + 60 * row["kept"] / row["visual_tokens"] for *_, row in points]
        axes.scatter(xs, ys, sizes, color=line.get_color())
        for x, y, row in points if method == "none" else ():
            style = {"xytext": (6, -10), "textcoords": "offset points", "fontsize": 7}
            axes.annotate(f"{row['image_size']} px", (x, y), **style)
    axes.margins(x=0.1)
    axes.set(xlabel="TTFT (ms)", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, title="larger: more tokens", title_fontsize=7)
