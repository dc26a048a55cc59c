"""Run the cases of every group and print their outcomes."""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

from .case import FINE, KINDS, Outcome
from .crew import Crew, Task

# Cases of each group out of 2480; slow groups come first.
SHARES = {"kills": 30, "together": 5, "threads": 15, "outputs": 80}
SHARES |= {"checkpoints": 640, "pictures": 400, "flags": 400, "data": 310}
SHARES |= {"learned": 120, "packed": 120, "trainers": 120}
SHARES |= {"urls": 150, "chats": 150}
_SHOWN = 2  # printed faults per key of `_where`
_LINE = re.compile(r'File "[^"]*/((?:mlx_tokprune|convert|faults)/[^"]*)", line (\d+)')


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    add = parser.add_argument
    add("--cases", type=int, default=2000)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=os.cpu_count())
    add("--minutes", type=float, default=14, help="no case begins later")
    add("--only", nargs="+", help="a group, and numbers of its cases")
    add("--verbose", action="store_true", help="print what came of every case")
    return parser


def tasks_of(args) -> list[Task]:
    """Return case 0 of each group, then the other cases, shuffled.

    A run whose time ends early then has cases of every group.
    """
    if args.only:
        group, *numbers = args.only
        chosen = map(int, numbers or range(args.cases))
        return [Task(group, number, args.seed) for number in chosen]
    whole, tasks = sum(SHARES.values()), []
    for group, share in SHARES.items():
        count = max(1, round(args.cases * share / whole))
        tasks += [Task(group, number, args.seed) for number in range(count)]
    Random(args.seed).shuffle(tasks)
    groups = list(SHARES)
    return sorted(tasks, key=lambda t: groups.index(t.group) if not t.number else 99)


def table(found: list[tuple[Task, Outcome]]) -> str:
    groups = list(dict.fromkeys(task.group for task, _ in found))
    groups = [group for group in SHARES if group in groups]
    heads = ("group", "cases", *KINDS)
    lines = []
    for group in [*groups, "all"]:
        kinds = Counter(o.kind for t, o in found if group in (t.group, "all"))
        lines.append([group, kinds.total(), *(kinds[kind] for kind in KINDS)])
    widths = [max(11, len(head)) for head in heads]
    return "\n".join(
        "  ".join(str(cell).rjust(w) for cell, w in zip(line, widths, strict=True))
        for line in [heads, *lines]
    )


def _where(outcome: Outcome) -> tuple:
    """Return a key that faults of one cause share: the kind and our innermost line."""
    lines = _LINE.findall(outcome.told)
    return (outcome.kind, *(lines[-1] if lines else outcome.told[:60].splitlines()))


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    tasks = tasks_of(args)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        crew = Crew(Path(folder), args.workers)
        found, alike = [], Counter()
        for task, outcome in crew.work(tasks, 60 * args.minutes):
            found.append((task, outcome))
            alike[where := _where(outcome)] += 1
            new = alike[where] <= _SHOWN and outcome.kind not in FINE
            if args.verbose or new:
                print(f"{outcome.kind}: {task}\n{outcome.told}\n", flush=True)
    print(table(found))
    if len(found) < len(tasks):
        print(f"{len(tasks) - len(found)} cases were left out: the time was over")
    return int(any(outcome.kind not in FINE for _, outcome in found))


if __name__ == "__main__":
    sys.exit(main())
