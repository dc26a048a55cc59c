"""Time to first token and speed by method, budget and resolution, honestly measured."""

from pathlib import Path

from ..commands import DEFAULT_POSITIONS
from ..demo import EMBEDDED, PICTURES, POLICY_FRAME
from ..errors import InputError, Parser, command
from ..image import load_image
from ..loading import load
from ..pipeline import POSITIONS
from ..pruners import get_method, list_pruners
from .measure import Benchmark, make_rows
from .plots import Accuracy, draw_all
from .subjects import Acting, Answering, subject_of
from .table import markdown

RATIOS = (1.0, 0.5, 0.25, 0.11)


def build_parser() -> Parser:
    parser = Parser(prog="mlx_tokprune.bench", description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        action="append",
        default=[],
        help="folder, hub id, demo or demo-policy; repeat for several (default: demo)",
    )
    add("--image", help="a picture (default: that of the demo)")
    add("--prompt", action="append", default=[], help="a question; repeat for several")
    add("--methods", nargs="+", help="default: all that take a budget")
    add("--keep-ratios", nargs="+", type=float, default=RATIOS, metavar="R")
    add(
        "--image-sizes",
        nargs="+",
        type=int,
        default=[],
        metavar="PX",
        help="input sizes to prune at besides the model's own; FastVLM only",
    )
    add("--positions", choices=POSITIONS, default=DEFAULT_POSITIONS)
    add("--tokens", type=int, default=16, help="generated in each run (default: 16)")
    add("--runs", type=int, default=5, help="of each row (default: 5)")
    add("--output", default="bench.json", help="result file; resumed when it is there")
    add("--plots", help="draw pictures to this folder")
    help_ = "results of mlx_tokprune.evaluate, for the Pareto plot"
    add("--accuracy", nargs="+", default=[], metavar="FILE", help=help_)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    _check(args)
    subjects = _load(args.model or ["demo"])
    if len({subject.method_stages for subject in subjects}) > 1:
        raise InputError("give models that answer or models that act, not both")
    for size in args.image_sizes:
        subjects[0].at(size)
    methods = args.methods or _methods(subjects[0])
    _check_methods(methods, subjects[0])
    acts = "prompt" in subjects[0].method_stages
    example = POLICY_FRAME if acts else PICTURES[0]
    images = [load_image(args.image or example.path)]
    prompts = args.prompt or [example.question]
    how = (args.keep_ratios, args.image_sizes, prompts, args.positions)
    rows = make_rows(subjects, methods, *how)
    output = Path(args.output)
    result = Benchmark(output, subjects, rows, images, args.tokens).run(args.runs)
    print(markdown(result))
    print(f"\nwrote {output}")
    if args.plots:
        for path in draw_all(result, Path(args.plots), _accuracy(args.accuracy)):
            print(f"wrote {path}")


def _methods(subject: Answering | Acting) -> list[str]:
    """Those that take a budget."""
    methods = map(get_method, list_pruners())
    return [
        m.name
        for m in methods
        if m.stage in subject.method_stages and m.counts != "own" and m.name != "none"
    ]


def _load(names: list[str]) -> list[Answering | Acting]:
    """Under their last names in the table, where those tell them apart."""
    shown = [name if name in EMBEDDED else Path(name).name for name in names]
    shown = shown if len(set(shown)) == len(shown) else names
    return [
        subject_of(label, *load(EMBEDDED.get(name, name)))
        for label, name in zip(shown, names, strict=True)
    ]


def _check_methods(methods: list[str], subject: Answering | Acting) -> None:
    for name in methods:
        if name not in _methods(subject):
            raise InputError(
                f"method {name!r} cannot be given a budget with {subject.name}; choose "
                f"one of {', '.join(_methods(subject))}"
            )


def _check(args) -> None:
    if args.runs < 1 or args.tokens < 1:
        raise InputError("runs and tokens are whole numbers from 1")
    for ratio in args.keep_ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"keep ratio {ratio:g} is outside (0, 1]")
    places = [str(Path(name).resolve()) for name in args.model]
    for name, place in zip(args.model, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"model {name} was given twice; each is measured once")
    for name in args.methods or []:
        get_method(name)
    parent = Path(args.output).absolute().parent
    if not parent.is_dir():
        raise InputError(f"--output is in {parent}, which does not exist")


def _accuracy(files: list[str]) -> Accuracy:
    """Accuracies in results of `mlx_tokprune.evaluate`."""
    from ..evaluate.measure import accuracies, read_result

    found: Accuracy = {}
    for file in files:
        found |= accuracies(read_result(Path(file)))
    return found


if __name__ == "__main__":
    main()
