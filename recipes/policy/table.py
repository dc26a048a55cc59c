"""Tables and plots of the logs of `success.py`."""

import json
import re
from pathlib import Path

import numpy as np

from mlx_tokprune.errors import InputError
from mlx_tokprune.files import write_picture
from mlx_tokprune.measure.intervals import wilson
from mlx_tokprune.measure.tables import Table

from .worlds import TASKS

_KEYS = {"row", "task", "success", "kept"}
_AT_BUDGET = re.compile(r"(\S+) ([\d.]+)")  # the label of a method's row


def read_log(log: Path) -> list[dict]:
    """Return the lines of a log; none if there is no file."""
    if not log.exists():
        return []
    lines = []
    for number, line in enumerate(log.read_text(errors="replace").splitlines(), 1):
        try:
            lines.append(json.loads(line))
            known = isinstance(lines[-1], dict) and _KEYS <= lines[-1].keys()
        except (ValueError, RecursionError):
            known = False
        if not known:
            raise InputError(
                f"line {number} of {log} is none of `success`; if that was stopped "
                "while it wrote, remove the line"
            )
    return lines


def _overall(lines: list[dict]) -> dict[str, tuple[float, int, int]]:
    """Return kept visual tokens, won episodes and all episodes, by row."""
    found = {}
    for label in dict.fromkeys(line["row"] for line in lines):
        mine = [line for line in lines if line["row"] == label]
        won = [success for line in mine for success in line["success"]]
        kept = float(np.mean([line["kept"] for line in mine]))
        found[label] = (kept, sum(won), len(won))
    return found


def markdown(lines: list[dict], saved: dict[str, float]) -> str:
    """Return the success of each row in percent, by task, as a Markdown table.

    saved: share of TTFT by row; without any, the table has no such column.
    """
    tasks = [task for task in TASKS if any(line["task"] == task for line in lines)]
    timed = ["TTFT saved"] if saved else []
    rows = []
    for label, (kept, won, total) in _overall(lines).items():
        mine = {line["task"]: line["success"] for line in lines if line["row"] == label}
        shown = f"{kept:.0f}{_spread(lines, label)}" if kept else ""
        savings = [f"{100 * saved[label]:.0f} %" if label in saved else ""]
        wins = [f"{100 * np.mean(mine[t]):.0f}" if t in mine else "" for t in tasks]
        rows.append([label, shown, _rate(won, total), *savings[: len(timed)], *wins])
    return Table(["", "kept", "success (95 %)", *timed, *tasks], rows).markdown()


def _rate(won: int, total: int) -> str:
    low, high = wilson(won, total)
    return f"{100 * won / total:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _spread(lines: list[dict], label: str) -> str:
    """Minimum and maximum of the kept tokens of a picture, where they differ."""
    mine = [line for line in lines if line["row"] == label and "least" in line]
    if not mine:
        return ""
    least, most = min(x["least"] for x in mine), max(x["most"] for x in mine)
    return f" ({least:.0f}-{most:.0f})" if least < most else ""


def draw(lines: list[dict], file: Path) -> None:
    """Draw success against kept visual tokens, a line per method, as a PNG.

    Needs matplotlib. Bars are 95 % intervals.
    """
    from matplotlib.figure import Figure

    rows = _overall(lines)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    curves: dict[str, list] = {}
    for label, point in rows.items():
        if match := _AT_BUDGET.fullmatch(label):
            whole = [rows["none"]] if "none" in rows else []
            curves.setdefault(match[1], whole).append(point)
        elif label.endswith("own count"):
            kept, won, total = point
            axes.plot(kept, 100 * won / total, "*", ms=13, label=label)
    for method, points in curves.items():
        _line(axes, sorted(points), method)
    _, won, total = rows.get("grey picture", (0, 0, 1))
    axes.axhline(100 * won / total, ls=":", color="grey", label="grey picture")
    axes.set(xlabel="visual tokens kept", ylabel="episodes won (%)", ylim=(-3, 103))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="lower right")
    write_picture(file, figure)


def _line(axes, points: list[tuple[float, int, int]], label: str) -> None:
    kept, won, total = np.array(points).T
    bounds = np.array([wilson(*point[1:]) for point in points]).T
    rate = won / total
    errors = 100 * np.abs(bounds - rate)
    axes.errorbar(kept, 100 * rate, errors, marker="o", ms=4, capsize=2, label=label)


def by_step(logs: dict[int, list[dict]]) -> str:
    """Return success and kept tokens of each row by training step, as Markdown."""
    steps = sorted(logs)
    overall = {step: _overall(logs[step]) for step in steps}
    labels = dict.fromkeys(label for step in steps for label in overall[step])

    def cell(step: int, label: str) -> str:
        kept, won, total = overall[step].get(label, (0, 0, 0))
        tokens = f"{kept:.1f}{_spread(logs[step], label)}"
        return f"{_rate(won, total)}, {tokens}" if total else ""

    rows = [[label, *(cell(step, label) for step in steps)] for label in labels]
    return Table(["", *(f"step {step}" for step in steps)], rows).markdown()


def draw_by_step(logs: dict[int, list[dict]], file: Path) -> None:
    """Draw success against the training step, a line per row, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes, curves = figure.subplots(), {}
    for step in sorted(logs):
        for label, (_, won, total) in _overall(logs[step]).items():
            curves.setdefault(label, []).append((step, won, total))
    for label, points in curves.items():
        _line(axes, points, label)
    axes.set(xlabel="steps of tuning", ylabel="episodes won (%)", ylim=(-3, 103))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    write_picture(file, figure)
