"""Write one HTML page from results of `bench` and `evaluate`."""

from collections.abc import Sequence
from pathlib import Path

from ..bench import benchmark as bench
from ..bench import mlx_vlm_benchmark
from ..cli import Parser, command
from ..errors import InputError, import_matplotlib
from ..files import PAGE, check_apart, check_output, write_text
from ..measure import accuracy as evaluation
from ..measure.results import read_any
from .page import (
    bench_section,
    evaluation_section,
    mlx_vlm_section,
    page,
    picture_sections,
)


def build_parser() -> Parser:
    """Return the parser of `mlx_tokprune report`."""
    parser = Parser(
        prog="mlx_tokprune report",
        usage="JSON [JSON ...] [options]",
        description=__doc__,
        example="mlx_tokprune report bench.json evaluate.json --output report.html",
    )
    add = parser.add_argument
    add("results", nargs="+", metavar="JSON", help="results of bench and evaluate")
    help_ = "HTML file (default: report.html)"
    add("--output", metavar="HTML", default="report.html", help=help_)
    help_, title = "title of the page", "Visual tokens, pruned"
    add("--title", metavar="TEXT", default=title, help=help_)
    help_ = "number of questions to show with their pictures (default: 4)"
    add("--pictures", type=int, metavar="N", default=4, help=help_)
    help_ = "custom method of the results to import, as package.module:function"
    add("--method", action="append", default=[], help=help_)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Write the page of the result files."""
    args = build_parser().parse_args(argv)
    if args.pictures < 0:
        raise InputError("pictures is a whole number from 0")
    import_matplotlib()
    check_apart(args.output, args.results)
    check_output(args.output, PAGE)
    speeds, mlx_vlm_speeds, answers = _read(args.results)
    accuracy = {}
    for result in answers:
        accuracy |= evaluation.accuracies(result)
    sections = [bench_section(result, accuracy) for result in speeds]
    sections += [mlx_vlm_section(result) for result in mlx_vlm_speeds]
    for result in answers:
        sections.append(evaluation_section(result))
        if args.pictures:
            sections += picture_sections(result, args.pictures, args.method)
    write_text(args.output, page(args.title, sections), PAGE)
    print(f"wrote {args.output}")


def _read(files: Sequence[str]) -> tuple[list[dict], list[dict], list[dict]]:
    """Return the results of `bench`, of `bench` in mlx-vlm, and of `evaluate`."""
    speeds, mlx_vlm_speeds, answers = [], [], []
    for name in map(Path, files):
        schema = read_any(name).get("schema")
        if schema == bench.SCHEMA:
            speeds.append(bench.read_bench(name))
        elif schema == mlx_vlm_benchmark.SCHEMA:
            mlx_vlm_speeds.append(mlx_vlm_benchmark.read_mlx_vlm(name))
        else:
            answers.append(evaluation.read_result(name))
    return speeds, mlx_vlm_speeds, answers


if __name__ == "__main__":
    main()
