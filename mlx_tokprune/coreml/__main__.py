"""Export a model's pruned vision path as a Core ML package."""

import time
from pathlib import Path

from ..checkpoints.hub import resolve
from ..cli import (
    Parser,
    add_common,
    begin_logging,
    command,
    describe_methods,
    read_options,
)
from ..errors import InputError
from ..pruners import DEFAULT_METHOD, Pruner, get_method
from .describe import Function
from .export import COMPRESSIONS, PRECISIONS, TARGETS, ExportOptions, export_package
from .plan import check_platform, compute_plan, format_plan


def build_parser() -> Parser:
    parser = Parser(
        prog="mlx_tokprune.coreml",
        description=__doc__,
        epilog=describe_methods(),
    )
    add = parser.add_argument
    add("--model", help="demo, a folder or hub id (default: demo)")
    add("--method", default=DEFAULT_METHOD, help="pruning method (default: norm)")
    help_ = "prune at the tower, with methods of another place that can, such as dart"
    add("--at", choices=("tower",), help=help_)
    several = "several become functions of one package that shares their weights"
    keep = parser.add_mutually_exclusive_group()
    options = {"nargs": "+", "default": []}
    ratios = f"shares of visual tokens, (0, 1); {several}"
    keep.add_argument("--keep-ratio", type=float, help=ratios, **options)
    tokens = f"visual tokens to keep; {several}"
    keep.add_argument("--keep-tokens", type=int, help=tokens, **options)
    add("--output", required=True, help="the .mlpackage to write; must not exist")
    add("--seed", type=int, default=0, help="of method random")
    add(
        "--no-projector",
        dest="projector",
        action="store_false",
        help="stop before the projector, as Apple's FastVLM app expects",
    )
    add(
        "--input",
        choices=("image", "tensor"),
        default="image",
        help="an RGB image named 'image', or numbers in [0, 1] of shape (1, 3, S, S) "
        "named 'images' (default: image)",
    )
    add("--target", default="iOS18", help=f"{', '.join(TARGETS)} (default: iOS18)")
    add("--precision", default="float16", help=f"{' or '.join(PRECISIONS)}")
    add("--compress", help=f"weights: {', '.join(COMPRESSIONS)} (default: as they are)")
    plan = "say on which device Core ML means to run each operation (macOS)"
    add("--compute-plan", action="store_true", help=plan)
    add_common(parser)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
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
    model, _ = load(source, mx.float32, lazy=True)
    start = time.perf_counter()
    embedded = args.model in (None, "demo")
    name = "mlx_tokprune's demo model" if embedded else Path(args.model).name
    made = export_package(model, pruners, args.output, options, source, name)
    seconds = time.perf_counter() - start
    for path, functions in made.items():
        print(format_package(path, functions, options))
        if args.compute_plan:
            print(format_plan(compute_plan(path)))
    print(f"exported in {seconds:.1f} s")


def _pruners(args) -> list[Pruner]:
    method, ratios, tokens = args.method, args.keep_ratio, args.keep_tokens
    how = {"at": args.at, "seed": args.seed, "options": read_options(args.option)}
    if get_method(method).name == "none" and not ratios and not tokens:
        return [Pruner("none")]
    if not ratios and not tokens:
        raise InputError(
            "no keep ratio was given; say --keep-ratio 0.5, or --method none for a "
            "package without pruning"
        )
    if 1 in ratios:
        raise InputError(
            "a keep ratio of 1 drops nothing; leave it out (several keep ratios come "
            "with the function 'unpruned'), or give --method none alone"
        )
    budgets = [{"keep_ratio": ratio} for ratio in ratios]
    budgets += [{"keep_tokens": number} for number in tokens]
    return [Pruner(method, **how, **budget) for budget in budgets]


def format_package(
    path: Path, functions: list[Function], options: ExportOptions
) -> str:
    """What was written, for people."""
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
