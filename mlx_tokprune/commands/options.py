"""What the commands share: flags of methods and budgets, overlays, and logging."""

import logging
import os
from collections.abc import Iterable, Sequence

from ..errors import InputError, Parser
from ..files import replacing
from ..overlay import draw_overlay
from ..pipeline import DEFAULT_POSITIONS, POSITIONS
from ..pruners import Pruner, get_method, list_pruners


def add_common(parser: Parser) -> None:
    """`--option` and `--verbose`, which every command that prunes has."""
    help_ = "an option of a method, such as coverage=0.2; repeat for several"
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help=help_
    )
    help_ = "log places, counts and times to stderr"
    parser.add_argument("--verbose", action="store_true", help=help_)


def begin_logging(verbose: bool) -> None:
    """The package's one logger, at DEBUG where that is asked for."""
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("mlx_tokprune").setLevel(logging.DEBUG)


def read_options(texts: Sequence[str]) -> dict[str, float]:
    """`name=value` texts as numbers by name."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            equals = ""
        if not name or not equals:
            raise InputError(f"--option is NAME=VALUE with a number, not {text!r}")
    return found


def options_by_method(
    methods: Iterable[str], options: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Which of the options each method takes; `InputError` for one that none takes."""
    known = {name: get_method(name).options for name in methods}
    for option in options:
        if not any(option in names for names in known.values()):
            every = sorted({name for names in known.values() for name in names})
            takes = f"they take {', '.join(every)}" if every else "they take none"
            raise InputError(
                f"none of the methods {', '.join(known)} has an option {option!r}; "
                + takes
            )
    return {
        method: {name: value for name, value in options.items() if name in names}
        for method, names in known.items()
    }


def add_method(parser: Parser, default: str) -> None:
    """`--method`, which also takes somebody's own, and `--at`, its place."""
    help_ = f"see below, or package.module:function (default: {default})"
    parser.add_argument("--method", help=help_)
    help_ = "where it prunes: tower, prompt, or after so many layers (default: its own)"
    parser.add_argument("--at", metavar="PLACE", help=help_)


def add_budget(parser: Parser) -> None:
    """`--keep-ratio` or `--keep-tokens`, and `--positions`."""
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--keep-ratio", type=float, help="share of visual tokens, (0, 1]")
    tokens = "visual tokens, per picture where it prunes at the tower"
    keep.add_argument("--keep-tokens", type=int, help=tokens)
    parser.add_argument("--positions", choices=POSITIONS, default=DEFAULT_POSITIONS)


def describe_methods() -> str:
    """A line on every method, for `--help`."""
    methods = [get_method(name) for name in list_pruners()]
    lines = [f"{m.name} (at the {m.at}): {m.summary}" for m in methods]
    return f"Pruning methods. {'; '.join(lines)}"


def make_pruner(args, default: str, own: dict[str, float] | None = None) -> Pruner:
    """A `Pruner` from command line options; `own`: options with flags of their own.

    No method means `default`, or `none` when there is nothing to drop.
    """
    ratio, tokens = args.keep_ratio, args.keep_tokens
    options = read_options(args.option) | (own or {})
    method, unset = args.method, ratio is None and tokens is None
    if method is None:
        full = (unset and not options) or ratio == 1
        if full and args.at:
            raise InputError("--at says where to prune; give --keep-ratio, too")
        method = "none" if full else default
    known = get_method(method)
    if unset and known.counts == "budget" and known.name != "none":
        raise InputError(
            f"method {method!r} needs a budget: give --keep-ratio or --keep-tokens"
        )
    place = int(args.at) if args.at and args.at.isdecimal() else args.at
    return Pruner(method, ratio, tokens, at=place, seed=args.seed, options=options)


def write_overlay(
    path: str, images: list, selection, grid: tuple[int, int], padded: bool = True
) -> None:
    """Write the picture of what was kept as a PNG."""
    with replacing(path) as file:
        draw_overlay(images, selection, grid, padded).save(file, format="PNG")


def _is_png(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def check_overlay(path: str | None, pictures: list[str]) -> None:
    """Refuse before any work what could not be written after it."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    special = os.path.lexists(path) and not os.path.isfile(path)
    if not path or special or not os.access(folder, os.W_OK):
        raise InputError(
            f"--overlay {path!r} cannot be written; expected the name of a PNG file in "
            "an existing folder"
        )
    if os.path.exists(path) and not _is_png(path):
        raise InputError(
            f"--overlay {path!r} exists and is no PNG file; choose another name"
        )
    if any(os.path.realpath(path) == os.path.realpath(p) for p in pictures):
        raise InputError(
            f"--overlay {path} would overwrite the picture; choose another"
        )
