"""Export the pruned vision path of a model as a Core ML package."""

import argparse
import time
from pathlib import Path

from ..checkpoints.hub import resolve
from ..cli import (
    Parser,
    add_option,
    add_prune,
    add_seed,
    add_verbose,
    begin_logging,
    command,
    read_options,
    read_plans,
)
from ..errors import InputError
from ..pruners import DEFAULT_METHOD, Pruner, get_method
from .describe import Function
from .export import COMPRESSIONS, PRECISIONS, TARGETS, ExportOptions, export_package
from .plan import check_platform, compute_plan, format_plan

_NO_BUDGET = (
    "no keep ratio was given; expected one, such as --keep-ratio 0.5, or --method none "
    "for a package without pruning"
)


def build_parser() -> Parser:
    """Return the parser of `mlx_tokprune coreml`."""
    parser = Parser(
        prog="mlx_tokprune coreml",
        usage="--model MODEL --output MLPACKAGE [options]",
        description=__doc__,
        example="mlx_tokprune coreml --model FastVLM-0.5B-mlx --prune norm:0.5 \\\n"
        "    --output fastvlm-half.mlpackage",
    )
    add = parser.add_argument
    add("--model", help="demo, folder or hub id (default: demo)")
    help_ = "package to write; must not exist"
    add("--output", required=True, metavar="MLPACKAGE", help=help_)
    group = parser.add_argument_group("pruning (methods: mlx_tokprune methods)")
    add = group.add_argument
    add_prune(group, "prune at the tower; several become functions that share weights")
    keep = group.add_mutually_exclusive_group()
    many = {"nargs": "+", "default": []}
    help_ = "shares of visual tokens to keep, in (0, 1); a function each"
    keep.add_argument("--keep-ratio", type=float, metavar="RATIO", help=help_, **many)
    help_ = "numbers of visual tokens to keep; a function each"
    keep.add_argument("--keep-tokens", type=int, metavar="N", help=help_, **many)
    add("--method", help=f"method of the keep ratios (default: {DEFAULT_METHOD})")
    help_ = "prune at the tower by a method of another place, such as dart"
    add("--at", choices=("tower",), help=help_)
    add_option(group)
    add_seed(group)
    add = parser.add_argument_group("package").add_argument
    help_ = "leave the projector out, as Apple's FastVLM app expects"
    add("--no-projector", dest="projector", action="store_false", help=help_)
    help_ = "RGB image, or tensor (1, 3, S, S) in [0, 1] (default: image)"
    add("--input", choices=("image", "tensor"), default="image", help=help_)
    add("--target", default="iOS18", help=f"{', '.join(TARGETS)} (default: iOS18)")
    help_ = f"{' or '.join(PRECISIONS)} (default: float16)"
    add("--precision", default="float16", help=help_)
    help_ = f"weights: {', '.join(COMPRESSIONS)} (default: uncompressed)"
    add("--compress", help=help_)
    help_ = "print the device that Core ML plans for each operation (macOS)"
    add("--compute-plan", action="store_true", help=help_)
    add_verbose(parser)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, or with the process's arguments when `None`."""
    args = build_parser().parse_args(argv)
    begin_logging(args.verbose)
    options = ExportOptions(
        projector=args.projector,
        image=args.input == "image",
        target=args.target,
        precision=args.precision,
        compress=args.compress,
    )
    if args.compute_plan:
        check_platform()
    pruners = _pruners(args)
    import mlx.core as mx

    from ..checkpoints.loading import load

    source = resolve("demo" if args.model is None else args.model)
    model, processor = load(source, mx.float32, lazy=True)
    pruners = pruners or list(model.carried)
    if not pruners:
        raise InputError(_NO_BUDGET)
    start = time.perf_counter()
    embedded = args.model in (None, "demo")
    name = "mlx_tokprune's demo model" if embedded else Path(str(args.model)).name
    settings = (options, source, name, processor)
    made = export_package(model, pruners, args.output, *settings)
    seconds = time.perf_counter() - start
    for path, functions in made.items():
        print(format_package(path, functions, options))
        if args.compute_plan:
            print(format_plan(compute_plan(path)))
    print(f"exported in {seconds:.1f} s")


def _pruners(args: argparse.Namespace) -> list[Pruner]:
    """Return one pruner for each function; none for those of the checkpoint."""
    method, ratios, tokens = args.method, args.keep_ratio, args.keep_tokens
    options = read_options(args.option)
    if args.prune:
        if method or args.at or ratios or tokens:
            raise InputError(
                "--prune sets method, budget and place; leave out --method, --at, "
                "--keep-ratio and --keep-tokens"
            )
        plans = [read_plans([text], options, args.seed) for text in args.prune]
        if any(len(plan) > 1 for plan in plans):
            raise InputError("Core ML packages prune at the tower only; leave out +")
        pruners = [plan[0] for plan in plans]
    elif ratios or tokens:
        settings = {"at": args.at, "seed": args.seed, "options": options}
        budgets = [{"keep_ratio": ratio} for ratio in ratios]
        budgets += [{"keep_tokens": number} for number in tokens]
        method = method or DEFAULT_METHOD
        pruners = [Pruner(method, **settings, **budget) for budget in budgets]
    elif method and get_method(method).name == "none":
        pruners = [Pruner("none")]
    elif method or args.at or options:
        raise InputError(_NO_BUDGET)
    else:
        pruners = []
    if any(pruner.keep_ratio == 1 for pruner in pruners):
        raise InputError(
            "a keep ratio of 1 drops nothing; leave it out (several keep ratios come "
            "with the function 'unpruned'), or give --method none alone"
        )
    return pruners


def format_package(
    path: Path, functions: list[Function], options: ExportOptions
) -> str:
    """Return a summary of a written package for the terminal."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    several = len(functions) > 1
    lines = [
        f"{path}: {size / 1e6:.1f} MB, {options.target}, {options.precision}"
        + (f", {options.compress} weights" if options.compress else "")
    ]
    for function in functions:
        total = function.grid[0] * function.grid[1]
        lines.append(
            f"  {function.name if several else 'main':12} {function.method}, "
            f"{function.keep} of {total} visual tokens -> image_features "
            f"(1, {function.keep}, {function.channels})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
