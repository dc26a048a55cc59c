"""Train the demo model: `python -m recipes.demo`.

`python -m recipes.demo.in_torch` trains it in PyTorch on a GPU. ACCURACY.md has the
results.
"""

import dataclasses
from pathlib import Path

from mlx_tokprune.cli import Parser, command
from mlx_tokprune.errors import InputError
from mlx_tokprune.scenes.pictures import check_fonts

from .stages import STAGES


def build_parser() -> Parser:
    parser = Parser(prog="recipes.demo", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", required=True, help="folder for the state of the training; resumed")
    add("--output", required=True, help="checkpoint folder to write; must not exist")
    help_ = "share of the steps of every stage to run (default: 1)"
    add("--scale", type=float, default=1.0, help=help_)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    from .export import export
    from .recipe import Trainer

    args = build_parser().parse_args(argv)
    check_fonts()
    if Path(args.output).exists():
        raise InputError(f"{args.output} already exists; choose a new folder")
    stages = [
        dataclasses.replace(s, steps=max(1, int(s.steps * args.scale))) for s in STAGES
    ]
    trainer = Trainer(Path(args.folder), stages)
    trainer.run()
    export(trainer.student, trainer.tokenizer, Path(args.output))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
