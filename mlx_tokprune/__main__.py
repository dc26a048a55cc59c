"""Entry point: `mlx_tokprune COMMAND` runs `python -m mlx_tokprune.COMMAND`."""

import ast
import functools
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

from .cli import Parser, command

# Commands without a subpackage of their own, by module.
_INSIDE = {"chat": "generate.chat_command", "serve": "attach.serve_command"}


def module_of(name: str) -> str:
    """Return the name of a command's module."""
    return f"{__package__}.{_INSIDE.get(name, f'{name}.__main__')}"


@functools.cache
def commands() -> dict[str, str]:
    """Return the first docstring line of every command, by name.

    Commands are the subpackages with a `__main__`, and those inside of one; their code
    is not imported.
    """
    package = sys.modules[str(__package__)]
    names = {m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg}
    summaries = {}
    for name in sorted(names | {"convert", *_INSIDE}):  # convert: another folder
        spec = importlib.util.find_spec(module_of(name))
        if spec is not None and spec.origin is not None:
            text = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
            summaries[name] = text.partition("\n")[0].rstrip(".")
    return summaries


def build_parser() -> Parser:
    """Return the parser, whose help lists the commands."""
    width = max(map(len, commands()))
    lines = "\n".join(f"  {name:{width}}  {text}" for name, text in commands().items())
    parser = Parser(
        prog="mlx_tokprune",
        usage="COMMAND [options]",
        description="Prune the visual tokens of vision-language models, in MLX.",
        epilog=f"commands:\n{lines}\n\n`mlx_tokprune COMMAND --help` describes one.",
    )
    help_ = "name of a command, as listed below"
    parser.add_argument("command", choices=commands(), metavar="COMMAND", help=help_)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Run one command with the rest of the arguments."""
    argv = sys.argv[1:] if argv is None else argv
    parsed = build_parser().parse_args(argv[:1])
    importlib.import_module(module_of(parsed.command)).main(argv[1:])


if __name__ == "__main__":
    main()
