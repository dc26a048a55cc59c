"""Time to first token and speed by method, budget and resolution, honestly measured."""

import itertools
from pathlib import Path

from ..checkpoints.embedded import PICTURES, POLICY_FRAME
from ..checkpoints.hub import resolve
from ..checkpoints.loading import load
from ..cli import (
    RUNTIMES,
    Parser,
    add_adapter,
    add_common,
    add_plans,
    begin_logging,
    command,
    options_of,
)
from ..errors import InputError, import_matplotlib
from ..files import check_name, check_output
from ..generate.drafts import Drafts
from ..generate.flags import add_answer_drafts, make_drafts
from ..measure.accuracy import accuracies, read_result
from ..measure.subject import Subject, default_methods, subject_of
from ..pipeline import DEFAULT_POSITIONS, POSITIONS
from ..pipeline.planning import plan_for
from ..processing.image import list_pictures, load_image
from ..pruners import get_method, read_plan
from .benchmark import Benchmark, make_cases
from .plots import Accuracy, draw_all
from .speed_table import markdown

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
    help_ = "a picture or a folder of them, each timed alone; repeat"
    add("--image", action="append", default=[], help=f"{help_} (default: the demo's)")
    add("--prompt", action="append", default=[], help="a question; repeat for several")
    add("--methods", nargs="+", help="default: all that take a budget")
    add_plans(parser)
    add("--keep-ratios", nargs="+", type=float, default=RATIOS, metavar="R")
    add(
        "--image-sizes",
        nargs="+",
        type=int,
        default=[],
        metavar="PX",
        help="input sizes to prune at besides the model's own; FastVLM only",
    )
    add("--positions", choices=POSITIONS, help="(default: original; see mlx-vlm's)")
    help_ = "what runs the model; mlx-vlm's takes whatever that loads"
    add("--runtime", choices=RUNTIMES, default=RUNTIMES[0], help=help_)
    add("--tokens", type=int, default=16, help="generated in each run (default: 16)")
    add("--runs", type=int, default=5, help="of each row (default: 5)")
    help_ = "result file; resumed when it is there, but for mlx-vlm's runtime"
    add("--output", default="bench.json", help=help_)
    add("--plots", help="draw pictures to this folder")
    help_ = "results of mlx_tokprune.evaluate, for the Pareto plot"
    add("--accuracy", nargs="+", default=[], metavar="FILE", help=help_)
    add_answer_drafts(parser)
    add_adapter(parser)
    add_common(parser)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    begin_logging(args.verbose)
    _check(args)
    if args.runtime == "mlx-vlm":
        _measure_guest(args)
        return
    args.positions = args.positions or DEFAULT_POSITIONS
    subjects = _load(args.model or ["demo"], args.adapter_path)
    subject = subjects[0]
    if len({subject.kind for subject in subjects}) > 1:
        raise InputError("give models that answer or models that act, not both")
    for one, size in itertools.product(subjects, args.image_sizes):
        one.at(size)
    methods = args.methods
    if methods is None:
        methods = [] if args.plans else default_methods(subject)
    options = options_of(methods, args)
    example = POLICY_FRAME if subject.kind == "acting" else PICTURES[0]
    images = _images(args, example.path)
    prompts = args.prompt or [example.question]
    drafts = _drafts(args, subject)
    cases = make_cases(
        *(subjects, methods, args.keep_ratios, args.image_sizes, prompts),
        *(args.positions, len(images), options, args.plans, list(drafts)),
    )
    for one, case in itertools.product(subjects, cases):  # refuse any before measuring
        plan = plan_for(one.model, case.pruners)
        if case.draft:
            drafts[case.draft].check(one.model, one.processor, plan)
    output, asked = Path(args.output), (images, args.tokens, drafts)
    result = Benchmark(output, subjects, cases, *asked).run(args.runs)
    print(markdown(result))
    print(f"\nwrote {output}")
    if args.plots:
        drawn = draw_all(result, Path(args.plots), _accuracy(args.accuracy))
        for path in drawn:
            print(f"wrote {path}")
        if args.accuracy and not any(path.name == "pareto.png" for path in drawn):
            print("no accuracy is of these weights, rows and positions: no Pareto plot")


def _drafts(args, subject: Subject) -> dict[str, Drafts]:
    """What drafts, under its name in the table."""
    drafts = make_drafts(args)
    if drafts is None:
        return {}
    if subject.kind == "acting":
        raise InputError(
            "drafts of a policy are by its last action, which one picture has not; "
            "benchmarks/speculative.py measures them in closed loop"
        )
    name = args.draft or Path(args.draft_model).name
    return {"+".join([name, *args.draft_prune]): drafts}


def _images(args, example) -> list:
    paths = args.image or [example]
    return [load_image(file) for path in paths for file in list_pictures(path)]


def _measure_guest(args) -> None:
    """A model that mlx-vlm runs."""
    from ..measure.guest import Guest, check_guest
    from . import guest as bench_guest

    names = ("plans", "image_sizes", "adapter_path", "plots", "accuracy")
    names += ("draft", "draft_model", "draft_prune", "num_draft_tokens")
    check_guest(**{name: getattr(args, name) for name in names})
    if len(args.model) != 1:
        raise InputError("mlx-vlm's runtime measures one model; give one --model")
    guest = Guest(args.model[0], args.positions)
    methods = guest.methods() if args.methods is None else args.methods
    rows = guest.rows(methods, args.keep_ratios, options_of(methods, args))
    images, prompts = _images(args, PICTURES[0].path), args.prompt
    for image in images:
        guest.check(image, rows)
    asked = (images, prompts or [PICTURES[0].question], args.tokens, args.runs)
    result = bench_guest.measure(guest, rows, *asked, Path(args.output))
    print(bench_guest.markdown(result))
    print(f"\nwrote {args.output}")


def _load(names: list[str], adapter: str | None) -> list[Subject]:
    """Under their last names in the table, where those tell them apart."""
    shown = [Path(name).name for name in names]
    shown = shown if len(set(shown)) == len(shown) else names
    return [
        subject_of(label, *load(name, adapter_path=adapter))
        for label, name in zip(shown, names, strict=True)
    ]


def _check(args) -> None:
    if args.runs < 1 or args.tokens < 1:
        raise InputError("runs and tokens are whole numbers from 1")
    for ratio in args.keep_ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"keep ratio {ratio:g} is outside (0, 1]")
    places = [str(resolve(name).resolve()) for name in args.model]
    for name, place in zip(args.model, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"model {name} was given twice; each is measured once")
    for name in args.methods or []:
        get_method(name)
    for text in args.plans:
        read_plan(text)
    check_output(args.output)
    if args.plots:
        check_name(args.plots)
        import_matplotlib()
    if args.accuracy and not args.plots:
        raise InputError("--accuracy is for the Pareto plot; say --plots FOLDER, too")
    _accuracy(args.accuracy)


def _accuracy(files: list[str]) -> Accuracy:
    """Accuracies in results of `mlx_tokprune.evaluate`."""
    found: Accuracy = {}
    for file in files:
        found |= accuracies(read_result(Path(file)))
    return found


if __name__ == "__main__":
    main()
