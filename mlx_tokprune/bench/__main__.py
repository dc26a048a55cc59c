"""Time to first token and speed by method, budget and resolution, honestly measured."""

from pathlib import Path

from ..commands import DEFAULT_POSITIONS
from ..demo import CHECKPOINT, PICTURES, POLICY, POLICY_FRAME
from ..errors import InputError, Parser, command
from ..image import load_image
from ..loading import load
from ..pipeline import POSITIONS
from ..pruners import get_method, list_pruners
from .measure import Benchmark, Subject, check_size, make_rows
from .plots import Accuracy, draw_all
from .table import markdown

RATIOS = (1.0, 0.5, 0.25, 0.11)


def build_parser() -> Parser:
    parser = Parser(prog="mlx_tokprune.bench", description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        action="append",
        default=[],
        help="folder or hub id; repeat for several (default: the embedded demo model)",
    )
    add("--demo-policy", action="store_true", help="also the embedded demo policy")
    add("--image", help="a picture (default: that of the demo)")
    add("--prompt", action="append", default=[], help="a question; repeat for several")
    add("--methods", nargs="+", help="default: all of the vision stage")
    add("--keep-ratios", nargs="+", type=float, default=RATIOS, metavar="R")
    add(
        "--image-sizes",
        nargs="+",
        type=int,
        default=[],
        metavar="PX",
        help="input sizes besides the model's own; FastVLM only",
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
    folders = list(args.model) or ([] if args.demo_policy else [str(CHECKPOINT)])
    subjects = [_load(folder) for folder in folders]
    if args.demo_policy:
        subjects.append(_load(str(POLICY)))
    acts = all(subject.acts for subject in subjects)
    example = POLICY_FRAME if acts else PICTURES[0]
    images = [load_image(args.image or example.path)]
    sizes = _sizes(subjects, args.image_sizes)
    rows = make_rows(
        subjects,
        args.methods or _methods(),
        args.keep_ratios,
        sizes,
        args.prompt or [example.question],
        args.positions,
    )
    output = Path(args.output)
    result = Benchmark(output, subjects, rows, images, args.tokens).run(args.runs)
    print(markdown(result))
    print(f"\nwrote {output}")
    if args.plots:
        for path in draw_all(result, Path(args.plots), _accuracy(args.accuracy)):
            print(f"wrote {path}")


def _methods() -> list[str]:
    return [name for name in list_pruners("vision") if name != "none"]


def _load(folder: str) -> Subject:
    known = {str(CHECKPOINT): "demo", str(POLICY): "demo policy"}
    model, processor = load(folder)
    name = known.get(folder, Path(folder).name)
    return Subject(name, model, processor)


def _sizes(subjects: list[Subject], given: list[int]) -> list[int]:
    """The given sizes, with the models' own; empty for each model its own."""
    own = {s.processor.image_size for s in subjects if not s.acts}
    for size in given:
        check_size(size)
    return sorted({*given, *own}) if given else []


def _check(args) -> None:
    if args.runs < 1 or args.tokens < 1:
        raise InputError("runs and tokens are whole numbers from 1")
    for ratio in args.keep_ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"keep ratio {ratio:g} is outside (0, 1]")
    twice = [m for m in args.model if args.model.count(m) > 1]
    if twice:
        raise InputError(f"model {twice[0]} was given twice; each is measured once")
    for name in args.methods or []:
        method = get_method(name)
        if method.stage != "vision" and not args.demo_policy:
            raise InputError(
                f"method {name!r} looks at the prompt of a policy; choose one of "
                f"{', '.join(_methods())}"
            )
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
