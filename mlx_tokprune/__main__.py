"""`mlx_tokprune COMMAND ...`, as `python -m mlx_tokprune.COMMAND ...`."""

import importlib
import sys

from .cli import Parser, command

# In the order of use; a command is the package of its name.
COMMANDS = {
    "convert": "convert a Hugging Face checkpoint to MLX format, once",
    "generate": "answer questions about images",
    "act": "print the action of a robot policy",
    "methods": "list the pruning methods",
    "attach": "write a model folder that mlx-vlm loads and that prunes",
    "coreml": "export the pruned vision path to Core ML",
    "train": "train a scorer, or an adapter under pruning",
    "bench": "measure time to first token and generation speed",
    "evaluate": "measure accuracy and agreement of pruned answers",
    "report": "write an HTML page from results of bench and evaluate",
    "demo": "run the whole path on the embedded models",
}


def build_parser() -> Parser:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="mlx_tokprune",
        description="Visual-token pruning for vision-language models in MLX.",
        epilog=f"commands:\n{lines}\n\n`mlx_tokprune COMMAND --help` describes each.",
    )
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="one below"
    )
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parsed = build_parser().parse_args(argv[:1])
    module = importlib.import_module(f".{parsed.command}.__main__", __package__)
    module.main(argv[1:])


if __name__ == "__main__":
    main()
