"""Train the demo model, or measure one: `python -m mlx_tokprune.train run|accuracy`."""

import json
from pathlib import Path

from ..errors import InputError, Parser, command
from ..pipeline import POSITIONS


def build_parser() -> Parser:
    parser = Parser(prog="mlx_tokprune.train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, resuming what is in the folder")
    run.add_argument("--folder", required=True, help="where training state is kept")
    run.add_argument("--output", required=True, help="checkpoint folder to write")
    run.add_argument(
        "--scale", type=float, default=1.0, help="of the steps (default 1)"
    )
    accuracy = commands.add_parser("accuracy", help="measure on held-out pictures")
    accuracy.add_argument("--model", default="demo")
    accuracy.add_argument("--pictures", type=int, default=512)
    accuracy.add_argument("--positions", choices=POSITIONS, default="original")
    accuracy.add_argument("--output", help="also write the table as JSON")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        import matplotlib  # noqa: F401  (its fonts draw the signs)
    except ImportError:
        raise InputError(
            "the fonts of the generated pictures come with matplotlib; "
            "pip install 'mlx-tokprune[train]'"
        ) from None
    if args.command == "run":
        _train(args)
    else:
        _measure(args)


def _train(args) -> None:
    import dataclasses

    from .export import export
    from .recipe import STAGES, Trainer

    if Path(args.output).exists():
        raise InputError(f"{args.output} already exists; choose a new folder")
    stages = [
        dataclasses.replace(s, steps=max(1, int(s.steps * args.scale))) for s in STAGES
    ]
    trainer = Trainer(Path(args.folder), stages)
    trainer.run()
    export(trainer.student, trainer.tokenizer, Path(args.output))
    print(f"wrote {args.output}")


def _measure(args) -> None:
    from ..loading import load
    from .accuracy import markdown, measure

    if args.pictures < 1:
        raise InputError(f"cannot measure on {args.pictures} pictures; the least is 1")
    model, processor = load(args.model)
    table = measure(model, processor, args.pictures, positions=args.positions)
    print(
        f"{args.pictures} held-out pictures, {args.positions} positions, exact match %"
    )
    print(markdown(table))
    if args.output:
        Path(args.output).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
