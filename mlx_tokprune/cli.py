"""What the commands share: flags of methods and budgets, overlays, and logging."""

import argparse
import functools
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence

from PIL import Image

from .errors import InputError, printable
from .files import replacing
from .pipeline import DEFAULT_POSITIONS, POSITIONS, VisualTokens
from .processing.overlay import draw_overlay, stack
from .pruners import Plan, Pruner, get_method, list_pruners, read_place, read_plan
from .pruners.registry import Depths, Options, Place

RUNTIMES = ("own", "mlx-vlm")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence and exit code 2.

    Numbers such as -1e-3 are values, not flags; argparse knows them since Python 3.14.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._negative_number_matcher = re.compile(
            r"-(\d+\.?|\.\d)\d*(e[-+]?\d+)?$", re.I
        )

    def _get_values(self, action, arg_strings):
        # Python 3.11 makes an empty list of `--name=--`.
        if action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "expected one value, not '--'")
        return super()._get_values(action, arg_strings)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)} (see --help)\n")


def command(main: Callable[[list[str] | None], None]):
    """Wrap a `main(argv)`: `InputError` and `OSError` become one line and exit 2.

    A termination signal unwinds like any exit, so that nothing half-written stays.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            main(argv)
        except InputError as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            raise SystemExit(2) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise SystemExit(141) from None
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            said = printable(f"{error.strerror or error}{where}")
            print(f"error: {said}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return run


def add_common(parser: Parser) -> None:
    """`--option` and `--verbose`, which every command that prunes has."""
    add_option(parser)
    help_ = "log places, counts and times to stderr"
    parser.add_argument("--verbose", action="store_true", help=help_)


def add_option(parser: Parser) -> None:
    """`--option`, of methods."""
    help_ = "an option of a method, such as coverage=0.2; repeat for several"
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help=help_
    )


def add_adapter(parser: Parser) -> None:
    """`--adapter-path`, as in mlx-lm."""
    help_ = "folder of an adapter (LoRA, DoRA) for the language model"
    parser.add_argument("--adapter-path", metavar="FOLDER", help=help_)


def begin_logging(verbose: bool) -> None:
    """The package's one logger, at DEBUG where that is asked for."""
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("mlx_tokprune").setLevel(logging.DEBUG)


def read_options(texts: Sequence[str]) -> dict[str, float | str]:
    """`name=value` texts as numbers or words by name."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise InputError(f"--option is NAME=VALUE, not {text!r}")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = value
    return found


def options_by_method(
    methods: Iterable[str], options: Options
) -> dict[str, dict[str, float | str]]:
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


def options_of(methods: Iterable[str], args) -> dict[str, dict[str, float | str]]:
    """`--option`s of methods and of those in `--plans`, each as far as it has them."""
    planned = (p.method for text in args.plans for p in read_plan(text))
    return options_by_method([*methods, *planned], read_options(args.option))


def add_method(parser: Parser, default: str) -> None:
    """`--method`, which also takes somebody's own, `--at`, its place, and `--prune`."""
    help_ = f"see below, or package.module:function (default: {default})"
    parser.add_argument("--method", help=help_)
    help_ = "where it prunes: tower, prompt, or after so many layers (default: its own)"
    parser.add_argument("--at", metavar="PLACE", help=help_)
    add_prune(parser, "prune at several places instead, such as norm:0.5@tower")


def add_prune(parser: Parser, help_: str) -> None:
    """`--prune`, a place of a plan each time."""
    metavar = "METHOD[:BUDGET][@PLACE]"
    parser.add_argument(
        "--prune", action="append", default=[], metavar=metavar, help=f"{help_}; repeat"
    )


def add_plans(parser: Parser) -> None:
    """`--plans`, each a row of the table."""
    help_ = "pruners at several places, such as norm:0.5@tower+attention:0.5@2"
    parser.add_argument("--plans", nargs="+", default=[], metavar="PLAN", help=help_)


def add_budget(parser: Parser) -> None:
    """`--keep-ratio` or `--keep-tokens`, and `--positions`."""
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--keep-ratio", type=float, help="share of visual tokens, (0, 1]")
    tokens = "visual tokens, per picture where it prunes at the tower"
    keep.add_argument("--keep-tokens", type=int, help=tokens)
    parser.add_argument("--positions", choices=POSITIONS, default=DEFAULT_POSITIONS)


def where(place: Place | Depths) -> str:
    """A place of pruning, in words."""
    if isinstance(place, str):
        return f"at the {place}"
    if isinstance(place, tuple):
        return f"at {len(place)} layers"
    return f"after {place} layer{'s' * (place > 1)}"


def describe_methods() -> str:
    """A line on every method, for `--help`."""
    methods = [get_method(name) for name in list_pruners()]
    lines = [f"{m.name} ({where(m.at)}): {m.summary}" for m in methods]
    return f"Pruning methods. {'; '.join(lines)}"


def make_pruners(args, default: str, own: Options | None = None) -> Plan | None:
    """What prunes, from command line options; `own`: options with their own flags.

    `None` where nobody says, which leaves it to the checkpoint.
    """
    alone = ("method", "at", "keep_ratio", "keep_tokens")
    unsaid = all(getattr(args, name) is None for name in alone)
    if not args.prune:
        if unsaid and not args.option and not own:
            return None
        return (_make_pruner(args, default, own or {}),)
    if not unsaid:
        raise InputError(
            "--prune says method, budget and place; leave out --method, --at, "
            "--keep-ratio and --keep-tokens"
        )
    options = read_options(args.option) | dict(own or {})
    return read_plans(args.prune, options, args.seed)


def read_plans(texts: Sequence[str], options: Options, seed: int = 0) -> Plan:
    """The places of one plan; `InputError` for an option that none of them takes."""
    plan = tuple(p for text in texts for p in read_plan(text, options, seed))
    options_by_method([pruner.method for pruner in plan], options)
    return plan


def _make_pruner(args, default: str, own: Options) -> Pruner:
    """One pruner. No method means `default`, or `none` when nothing is dropped."""
    ratio, tokens = args.keep_ratio, args.keep_tokens
    options = read_options(args.option) | dict(own)
    method, unset = args.method, ratio is None and tokens is None
    if method is None:
        full = not options and (unset or ratio == 1)
        if full and args.at:
            raise InputError("--at says where to prune; give --keep-ratio, too")
        method = "none" if full else default
    if unset and get_method(method).lacks_budget(options):
        raise InputError(
            f"method {method!r} needs a budget: give --keep-ratio or --keep-tokens"
        )
    at = read_place(args.at) if args.at else args.at
    return Pruner(method, ratio, tokens, at=at, seed=args.seed, options=options)


def methods(plan: Plan) -> str:
    """What prunes, in words: its name, or with several their places, too."""
    if len(plan) > 1:
        return ", ".join(f"{p.method} {where(p.at)}" for p in plan)
    return plan[0].method if plan else "none"


def places(visual: VisualTokens) -> list[dict]:
    """As JSON: each place of pruning, and what was left of each group after it."""
    return [{"at": place, "kept_indices": kept} for place, kept in visual.by_place()]


def write_overlay(
    path: str, images: list, visual: VisualTokens, padded: bool = True
) -> None:
    """Write the picture of what was kept as a PNG, a row for each place of pruning."""
    with replacing(path) as file:
        draw_choices(images, visual, padded).save(file, format="PNG")


def draw_choices(images: list, visual: VisualTokens, padded: bool) -> Image.Image:
    """The pictures with what was kept of them, a row for each place of pruning."""
    selection, places = visual.selection, visual.by_place()
    inside = any(isinstance(place, int) for place, _ in places)
    if len(places) < 2 and not inside and len(selection.indices) == len(images):
        return draw_overlay(images, selection, visual.grid, padded)
    rows = [
        draw_overlay(images, visual.per_picture(kept), visual.grid, padded)
        for _, kept in places or [("", visual.left())]
    ]
    titles = [where(place) for place, _ in places] if len(rows) > 1 else [""]
    return stack(rows, titles)


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


def add_drafts(parser: Parser, words: Sequence[str], help_: str) -> None:
    """`--draft`, and another model that drafts, with pruners of its own."""
    parser.add_argument("--draft", nargs="?", const=words[0], choices=words, help=help_)
    help_ = "a smaller model of the same family, which drafts; output stays the same"
    parser.add_argument("--draft-model", metavar="MODEL", help=help_)
    metavar = "METHOD[:BUDGET][@PLACE]"
    help_ = "how what drafts is pruned, such as norm:0.25; repeat"
    parser.add_argument(
        "--draft-prune", action="append", default=[], metavar=metavar, help=help_
    )


def draft_plan(args) -> Plan | None:
    """What prunes a draft; `None` where nobody says."""
    if args.draft and args.draft_model:
        raise InputError("--draft and --draft-model both draft; give one of them")
    if args.draft_prune and not (args.draft_model or args.draft == "self"):
        raise InputError(
            "--draft-prune prunes what a model drafts from; say --draft-model, too, "
            "or, of a model that answers, --draft self"
        )
    return read_plans(args.draft_prune, {}) if args.draft_prune else None
