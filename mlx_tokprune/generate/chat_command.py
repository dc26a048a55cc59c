"""Chat about images, whose pruned cache is kept between questions."""

import argparse
import contextlib
import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Sequence

from ..checkpoints.embedded import PICTURES
from ..checkpoints.loading import load
from ..cli import (
    Parser,
    add_adapter,
    add_pruning,
    add_verbose,
    begin_logging,
    command,
    plan_of,
)
from ..errors import InputError, printable
from ..processing.processor import PADDINGS, check_answers
from ..processing.sources import named_image
from ..pruners import DEFAULT_METHOD
from .chat import Chat
from .flags import (
    add_answer_drafts,
    add_generation,
    add_images,
    add_system_prompt,
    make_drafts,
    settings_of,
)

_HELP = """\
commands: q quits, r begins a new conversation, h shows this help, and
/image FILE begins one about other pictures (files or URLs); all else is a question"""
# mlx-lm's commands, and those of mlx-vlm.
_NAMES = {"/exit": "q", "/clear": "r", "/help": "h"}


def build_parser() -> Parser:
    """Return the parser of `mlx_tokprune chat`."""
    parser = Parser(
        prog="mlx_tokprune chat",
        usage="--model MODEL --image FILE [options]",
        description=__doc__,
        example="mlx_tokprune chat --model FastVLM-0.5B-mlx --image photo.jpg \\\n"
        "    --keep-ratio 0.5",
    )
    add = parser.add_argument
    add("--model", help="demo, folder or hub id (default: demo)")
    add_adapter(parser)
    add_images(parser)
    add_system_prompt(parser)
    add_verbose(parser)
    add_pruning(parser, DEFAULT_METHOD)
    add = parser.add_argument_group("images").add_argument
    help_ = "encode or skip black padding (default: keep)"
    add("--padding", choices=PADDINGS, default="keep", help=help_)
    help_ = "longer side of the input (default: as trained)"
    add("--image-size", type=int, metavar="PX", help=help_)
    add_generation(parser)
    add_answer_drafts(parser.add_argument_group("speculative decoding"))
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Run `mlx_tokprune chat`: questions and commands are lines of standard input."""
    args = build_parser().parse_args(argv)
    begin_logging(args.verbose)
    session = _Session(args)
    print(_HELP)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing of `input`)
    while (line := _line()) is not None:
        try:
            if not session.perform(line):
                break
        except InputError as error:
            if not sys.stdin.isatty():  # a script must not go on with another answer
                raise
            print(f"error: {printable(error)}", file=sys.stderr)


def _line() -> str | None:
    """Return the next line without spaces around it; `None` at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise InputError("standard input is no UTF-8 text") from None


class _Session:
    """The command's model and chat; there is no chat before there are pictures."""

    def __init__(self, args: argparse.Namespace):
        settings, plan = settings_of(args), plan_of(args, DEFAULT_METHOD)
        pictures = args.image or ([PICTURES[0].path] if args.model is None else [])
        images = _images(pictures)
        self._model, processor = load(
            args.model or "demo", adapter_path=args.adapter_path
        )
        processor = check_answers(processor)
        size = args.image_size
        size = processor.image_size if size is None else size
        self._processor = processor.at(size, args.padding)
        self._options = dataclasses.asdict(settings)
        self._options |= {"pruner": plan, "draft": make_drafts(args)}
        self._chat = self._about(images) if images else None

    def _about(self, images: list) -> Chat:
        return Chat(self._model, self._processor, images, **self._options)

    def perform(self, line: str) -> bool:
        """Perform a command or answer a question; return whether the chat goes on."""
        word, _, rest = line.partition(" ")
        name = _NAMES.get(line, line)
        if name == "h":
            print(_HELP)
        elif word == "/image":
            self._chat = self._about(_images(_names(rest.strip())))
            print("a new conversation about other pictures")
        elif re.fullmatch(r"/\w+", word) and word not in _NAMES:
            raise InputError(f"unknown command {word}; h lists the commands")
        elif self._chat is None and name not in ("q", ""):
            raise InputError("there is no picture yet; say /image FILE")
        elif name == "r":
            self._chat.reset()
            print("a new conversation")
        elif name not in ("q", ""):
            self._answer(line)
        return name != "q"

    def _answer(self, question: str) -> None:
        """Print an answer and its times; an interrupt at a terminal ends it early."""
        piece = None
        with contextlib.closing(self._chat.stream(question)) as pieces:
            try:
                for piece in pieces:
                    print(piece.text, end="", flush=True)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
        print()
        if piece is not None:
            reused = f", {piece.reused} tokens reused" if piece.reused else ""
            print(
                f"  (TTFT {piece.ttft_ms:.1f} ms{reused}, "
                f"{piece.decode_tokens_per_second:.1f} tokens/s)"
            )


def _names(text: str) -> list[str]:
    """Return the names of pictures behind `/image`: one with spaces, or several."""
    whole = os.path.expanduser(text)
    if os.path.exists(whole):
        return [whole]
    try:
        names = [os.path.expanduser(name) for name in shlex.split(text)]
    except ValueError as error:
        raise InputError(f"/image {text}: {error}") from None
    if not names:
        raise InputError("/image needs the name of a picture, such as /image photo.jpg")
    return names


def _images(names: Sequence) -> list:
    if "-" in names:
        raise InputError("standard input has the questions of a chat; name a file")
    return [named_image(name) for name in names]


if __name__ == "__main__":
    main()
