"""Sweep keep ratios: does the answer stay the same, and how soon does it begin?

    python examples/sweep.py [--methods norm attention] [--ratios 0.75 0.5 0.25 0.11]

One picture and one question, without pruning and with each method at each ratio. Prints
a table and draws it to `--output`. Needs matplotlib (extra `bench`). One question shows
how a sweep is made, not how good a method is: `mlx_tokprune.evaluate` asks many.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from mlx_tokprune import InputError, Pruner, load, stream_generate
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.cli import Parser, command
from mlx_tokprune.errors import import_matplotlib
from mlx_tokprune.files import PICTURE, check_output, write_picture
from mlx_tokprune.processing.image import load_image


@dataclass
class Row:
    """One way to ask. times: TTFT of each run in ms."""

    pruner: Pruner
    answer: str = ""
    kept: int = 0
    same: bool = True
    times: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return statistics.median(self.times)


def build_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="demo", help="demo, a folder or hub id (default: demo)")
    add("--image", default=str(PICTURES[0].path), help="default: one of the demo's")
    add("--prompt", default=PICTURES[0].question)
    add("--methods", nargs="+", default=["norm", "attention", "uniform"])
    add("--ratios", nargs="+", type=float, default=[0.75, 0.5, 0.25, 0.11])
    add("--runs", type=int, default=5, help="timed runs of each row (default: 5)")
    add("--output", default="sweep.png", help="the picture (default: sweep.png)")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import_matplotlib()
    check_output(args.output, PICTURE)
    if args.runs < 1:
        raise InputError(f"cannot time {args.runs} runs; the least is 1")
    rows = [Row(Pruner("none"))]
    rows += [Row(Pruner(m, ratio)) for m in args.methods for ratio in args.ratios]
    # A decoded picture: TTFT does not count reading its file.
    asked = (*load(args.model), [load_image(args.image)], args.prompt)
    answer_all(rows, asked)
    measure(rows, asked, args.runs)
    print(f"{args.prompt} Without pruning: {rows[0].answer}")
    print(table(rows))
    draw(rows, Path(args.output), args.prompt)
    print(f"drawn to {args.output}")


def answer_all(rows: list[Row], asked: tuple) -> None:
    """The whole answers, which also warm up every shape."""
    for row in rows:
        pieces = list(stream_generate(*asked, pruner=row.pruner, max_tokens=64))
        row.answer = "".join(piece.text for piece in pieces)
        row.kept = pieces[-1].visual.keep
        row.same = row.answer == rows[0].answer


def measure(rows: list[Row], asked: tuple, runs: int) -> None:
    """TTFT of every row in each round, so that a machine that slows down slows all."""
    for number in range(runs):
        first = number % len(rows)
        for row in rows[first:] + rows[:first]:
            piece = next(stream_generate(*asked, pruner=row.pruner, max_tokens=1))
            row.times.append(piece.ttft_ms)


def table(rows: list[Row]) -> str:
    """Medians of n runs, with the least and the most beside them."""
    lines = [f"{'method':18}{'ratio':>6}{'kept':>6}  same{'n':>4}{'TTFT ms':>9}  range"]
    for row in rows:
        ratio, same = row.pruner.keep_ratio or 1, "yes" if row.same else "no"
        spread = f"{min(row.times):.1f}-{max(row.times):.1f}"
        lines.append(
            f"{row.pruner.method:18}{ratio:6g}{row.kept:6}  {same:4}{len(row.times):4}"
            f"{row.ttft:9.1f}  {spread}" + ("" if row.same else f"  ({row.answer})")
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path, prompt: str) -> None:
    """TTFT by kept tokens; a hollow mark is another answer than the unpruned one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    whole, pruned = rows[0], rows[1:]
    axes.axhline(whole.ttft, color="grey", linestyle="--", label="no pruning")
    for number, method in enumerate(dict.fromkeys(r.pruner.method for r in pruned)):
        mine = sorted(
            (r for r in pruned if r.pruner.method == method), key=lambda r: r.kept
        )
        colour = f"C{number}"
        kept, times = [r.kept for r in mine], [r.ttft for r in mine]
        axes.plot(kept, times, color=colour, label=method)
        faces = [colour if r.same else "white" for r in mine]
        axes.scatter(kept, times, c=faces, edgecolors=colour, zorder=3)
    axes.set(xlabel=f"visual tokens kept of {whole.kept}", ylabel="TTFT, ms (median)")
    axes.set_title(f"{prompt}\nfilled: the unpruned answer", fontsize=9)
    axes.set(xlim=(0, 1.03 * whole.kept), ylim=(0, 1.2 * max(r.ttft for r in rows)))
    axes.legend()
    write_picture(path, figure)


if __name__ == "__main__":
    main()
