"""What `success.py` logged, for people: a table and a picture."""

import json
import re
from pathlib import Path

import numpy as np

from mlx_tokprune.errors import InputError
from mlx_tokprune.measure.intervals import wilson
from mlx_tokprune.scenes.worlds import TASKS

_KEYS = {"row", "task", "success", "kept"}
_AT_BUDGET = re.compile(r"(\S+) ([\d.]+)")  # the label of a method's row


def read_log(log: Path) -> list[dict]:
    """What was measured so far."""
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
    """Visual tokens kept, episodes won and episodes run, by row."""
    found = {}
    for label in dict.fromkeys(line["row"] for line in lines):
        mine = [line for line in lines if line["row"] == label]
        won = [success for line in mine for success in line["success"]]
        kept = float(np.mean([line["kept"] for line in mine]))
        found[label] = (kept, sum(won), len(won))
    return found


def markdown(lines: list[dict], saved: dict[str, float]) -> str:
    """The table for people: success in percent; `saved`: share of TTFT, by row.

    Without any of those that column is left out.
    """
    tasks = [task for task in TASKS if any(line["task"] == task for line in lines)]
    timed = " TTFT saved |" if saved else ""
    head = f"| | kept | success (95 %) |{timed} " + " | ".join(tasks) + " |"
    columns = len(tasks) + 2 + bool(saved)
    table = [head, "|---|" + "---:|" * columns]
    for label, (kept, won, total) in _overall(lines).items():
        mine = {line["task"]: line for line in lines if line["row"] == label}
        low, high = wilson(won, total)
        cells = [
            f"{100 * np.mean(mine[task]['success']):.0f}" if task in mine else ""
            for task in tasks
        ]
        saving = f" {100 * saved[label]:.0f} % |" if label in saved else ""
        saving = saving or ("  |" if saved else "")
        rate = f"{100 * won / total:.1f} ({100 * low:.1f}-{100 * high:.1f})"
        shown = f"{kept:.0f}{_spread(lines, label)}" if kept else ""
        table.append(f"| {label} | {shown} | {rate} |{saving} {' | '.join(cells)} |")
    return "\n".join(table)


def _spread(lines: list[dict], label: str) -> str:
    """The least and the most tokens that a picture kept, where those differ."""
    mine = [line for line in lines if line["row"] == label and "least" in line]
    if not mine:
        return ""
    least, most = min(x["least"] for x in mine), max(x["most"] for x in mine)
    return f" ({least:.0f}-{most:.0f})" if least < most else ""


def draw(lines: list[dict], file: Path) -> None:
    """Success against visual tokens kept, a line per method, as a PNG.

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
    figure.savefig(file, format="png")


def _line(axes, points: list[tuple[float, int, int]], label: str) -> None:
    kept, won, total = np.array(points).T
    bounds = np.array([wilson(*point[1:]) for point in points]).T
    rate = won / total
    errors = 100 * np.abs(bounds - rate)
    axes.errorbar(kept, 100 * rate, errors, marker="o", ms=4, capsize=2, label=label)


def by_step(logs: dict[int, list[dict]]) -> str:
    """The table of rows by the step of their training: success, 95 %, and tokens."""
    steps = sorted(logs)
    found = {step: _overall(logs[step]) for step in steps}
    labels = dict.fromkeys(label for step in steps for label in found[step])
    head = "| | " + " | ".join(f"step {step}" for step in steps) + " |"
    table = [head, "|---|" + "---:|" * len(steps)]
    for label in labels:
        cells = []
        for step in steps:
            kept, won, total = found[step].get(label, (0, 0, 0))
            low, high = wilson(won, total) if total else (0, 0)
            rate = f"{100 * won / max(total, 1):.1f} ({100 * low:.1f}-{100 * high:.1f})"
            tokens = f"{kept:.1f}{_spread(logs[step], label)}"
            cells.append(f"{rate}, {tokens}" if total else "")
        table.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(table)


def draw_by_step(logs: dict[int, list[dict]], file: Path) -> None:
    """Success against the step of a training, a line per row, as a PNG."""
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
    figure.savefig(file, format="png")
