"""Measure time to first token and generation speed of pruned models."""

import argparse
import itertools
from pathlib import Path

from PIL import Image

from ..checkpoints.embedded import PICTURES, POLICY_FRAME
from ..checkpoints.hub import resolve
from ..checkpoints.loading import load
from ..cli import (
    RUNTIMES,
    Parser,
    add_adapter,
    add_rows,
    add_verbose,
    begin_logging,
    check_rows,
    command,
    options_of,
    row_plans,
)
from ..errors import InputError, import_matplotlib
from ..files import check_output, check_pictures, is_replaced
from ..generate.drafts import Drafts
from ..generate.flags import add_answer_drafts, make_drafts
from ..measure.accuracy import accuracies, read_result
from ..measure.subject import OwnSubject, subject_of
from ..pipeline import DEFAULT_POSITIONS
from ..pipeline.planning import plan_for
from ..processing.image import load_pictures
from .benchmark import SCHEMA, Benchmark, make_cases
from .plots import FILES, Accuracy, draw_all
from .speed_table import tabulate

RATIOS = (1.0, 0.5, 0.25, 0.11)


def build_parser() -> Parser:
    """Return the parser of `mlx_tokprune bench`."""
    parser = Parser(
        prog="mlx_tokprune bench",
        description=__doc__,
        example="mlx_tokprune bench --model FastVLM-0.5B-mlx --image photo.jpg \\\n"
        "    --methods norm attention --keep-ratios 0.5 0.25 --plots plots",
    )
    add = parser.add_argument
    many = {"action": "append", "default": []}
    help_ = "folder, hub id, demo or demo-policy; repeatable (default: demo)"
    add("--model", help=help_, **many)
    add_adapter(parser)
    add(
        "--image",
        help="image or folder, each timed alone; repeatable (default: the demo's)",
        **many,
    )
    add("--prompt", help="question; repeatable (default: the demo's)", **many)
    add_rows(parser, RATIOS)
    add = parser.add_argument_group("measuring").add_argument
    help_ = "input sizes (FastVLM; default: as trained, and a smaller one unpruned)"
    add("--image-sizes", nargs="+", type=int, default=[], metavar="PX", help=help_)
    help_ = "this library (own), or mlx-vlm and its models (default: own)"
    add("--runtime", choices=RUNTIMES, default=RUNTIMES[0], help=help_)
    help_ = "tokens generated in each run (default: 16)"
    add("--tokens", type=int, metavar="N", default=16, help=help_)
    add(
        "--runs", type=int, metavar="N", default=5, help="runs of each row (default: 5)"
    )
    add_answer_drafts(parser.add_argument_group("speculative decoding"))
    add = parser.add_argument_group("output").add_argument
    help_ = "result file; resumed where it exists (default: bench.json)"
    add("--output", metavar="JSON", default="bench.json", help=help_)
    add("--plots", metavar="FOLDER", help="draw pictures to this folder")
    help_ = "results of mlx_tokprune evaluate, for the Pareto plot"
    add("--accuracy", nargs="+", default=[], metavar="FILE", help=help_)
    add_verbose(parser)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Measure the rows in either runtime, and write the result and its plots."""
    args = build_parser().parse_args(argv)
    begin_logging(args.verbose)
    _check(args)
    if args.runtime == "mlx-vlm":
        _measure_mlx_vlm(args)
        return
    args.positions = args.positions or DEFAULT_POSITIONS
    subjects = _load(args.model or ["demo"], args.adapter_path)
    subject = subjects[0]
    if len({subject.kind for subject in subjects}) > 1:
        raise InputError("give models that answer or models that act, not both")
    for one in subjects:
        for size in args.image_sizes:
            one.at(size)
    methods = args.methods
    if methods is None:
        methods = [] if row_plans(args) else subject.default_methods()
    options = options_of(methods, args)
    example = POLICY_FRAME if subject.kind == "acting" else PICTURES[0]
    images = _images(args, example.path)
    prompts = args.prompt or [example.question]
    drafts = _drafts(args, subject)
    cases = make_cases(
        *(subjects, methods, args.keep_ratios, args.image_sizes, prompts),
        *(args.positions, len(images), options, row_plans(args), list(drafts)),
    )
    # Refuse a bad case before any is measured.
    for one, case in itertools.product(subjects, cases):
        plan = plan_for(one.model, case.pruners)
        if case.draft:
            drafts[case.draft].check(one.model, one.processor, plan)
    output = Path(args.output)
    benchmark = Benchmark(output, subjects, cases, images, args.tokens, drafts)
    result = benchmark.run(args.runs)
    print(tabulate(result).markdown())
    print(f"\nwrote {output}")
    if args.plots:
        drawn = draw_all(result, Path(args.plots), _accuracy(args.accuracy))
        for path in drawn:
            print(f"wrote {path}")
        if args.accuracy and not any(path.name == "pareto.png" for path in drawn):
            print("no Pareto plot: no accuracy has these weights, rows and positions")


def _drafts(args: argparse.Namespace, subject: OwnSubject) -> dict[str, Drafts]:
    """Return the drafts by their name in the table; empty without drafts."""
    drafts = make_drafts(args)
    if drafts is None:
        return {}
    if subject.kind == "acting":
        raise InputError(
            "drafts of a policy need its last action, which one picture lacks; "
            "benchmarks/speculative.py measures them in closed loop"
        )
    name = args.draft or Path(args.draft_model).name
    return {"+".join([name, *args.draft_prune]): drafts}


def _images(args: argparse.Namespace, example: Path) -> list[Image.Image]:
    paths = args.image or [example]
    return [image for path in paths for _, image in load_pictures(path)]


def _measure_mlx_vlm(args: argparse.Namespace) -> None:
    """Measure a model in mlx-vlm's runtime."""
    from ..measure.mlx_vlm_subject import MlxVlmSubject, check_mlx_vlm
    from . import mlx_vlm_benchmark

    names = ("plans", "prune", "image_sizes", "adapter_path", "plots", "accuracy")
    names += ("draft", "draft_model", "draft_prune", "num_draft_tokens")
    check_mlx_vlm(**{name: getattr(args, name) for name in names})
    check_output(args.output, mlx_vlm_benchmark.SCHEMA)
    if len(args.model) != 1:
        raise InputError("mlx-vlm's runtime measures one model; give one --model")
    subject = MlxVlmSubject(args.model[0], args.positions)
    methods = subject.default_methods() if args.methods is None else args.methods
    rows = subject.rows(methods, args.keep_ratios, options_of(methods, args))
    images, prompts = _images(args, PICTURES[0].path), args.prompt
    for image in images:
        subject.check(image, rows)
    inputs = (images, prompts or [PICTURES[0].question])
    result = mlx_vlm_benchmark.measure(
        subject, rows, *inputs, args.tokens, args.runs, Path(args.output)
    )
    print(mlx_vlm_benchmark.tabulate(result).markdown())
    print(f"\nwrote {args.output}")


def _load(names: list[str], adapter: str | None) -> list[OwnSubject]:
    """Load the models; labels are their last names, if those are unique."""
    labels = [Path(name).name for name in names]
    labels = labels if len(set(labels)) == len(labels) else names
    return [
        subject_of(label, *load(name, adapter_path=adapter))
        for label, name in zip(labels, names, strict=True)
    ]


def _check(args: argparse.Namespace) -> None:
    """Raise `InputError` for bad flags before any model is loaded."""
    if args.runs < 1 or args.tokens < 1:
        raise InputError("runs and tokens are whole numbers from 1")
    check_rows(args)
    places = [str(resolve(name).resolve()) for name in args.model]
    for name, place in zip(args.model, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"model {name} was given twice; give each model once")
    if args.runtime == "own":
        is_replaced(args.output, SCHEMA)  # resumed, not replaced
    if args.plots:
        check_pictures(args.plots, FILES)
        import_matplotlib()
    if args.accuracy and not args.plots:
        raise InputError("--accuracy is for the Pareto plot; give --plots FOLDER, too")
    _accuracy(args.accuracy)


def _accuracy(files: list[str]) -> Accuracy:
    """Return the accuracies in results of `mlx_tokprune evaluate`."""
    merged: Accuracy = {}
    for file in files:
        merged |= accuracies(read_result(Path(file)))
    return merged


if __name__ == "__main__":
    main()
