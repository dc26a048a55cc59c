"""Command line: parsers, error reports, and flags that several commands share.

Only the `__main__` of a command imports this module.
"""

import argparse
import functools
import io
import logging
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from .errors import InputError, nearest, printable
from .files import PICTURE, check_apart, check_output, write_picture
from .pipeline import DEFAULT_POSITIONS, POSITIONS, VisualTokens
from .processing.actions import NORMS
from .processing.image import RESIZES
from .processing.overlay import draw_overlay, stack
from .pruners import Plan, Pruner, get_method, read_place, read_plan
from .pruners.registry import Depths, Options, Place

RUNTIMES = ("own", "mlx-vlm")
# Flags whose values are no paths.
_TEXTS = ("prompt", "system_prompt", "prefill_response", "instruction", "title")
PLAN = "PLAN"  # METHOD[:BUDGET][@PLACE], places joined by +
_MODELS = {"model", "hf_path"}  # flags of the model that a command works on
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Flags = argparse._ActionsContainer  # a parser or a group of one


# Parsers and commands ---------------------------------------------------------------


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Return a formatter for the terminal's width, at most 100 columns."""
    width = min(shutil.get_terminal_size().columns, 100) - 2
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=width)


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one sentence and exit code 2.

    usage: what follows the command in its usage line, with every required argument.
    example: a command line, shown at the end of `--help`. A mistyped flag names the
    nearest one. Numbers such as -1e-3 are values, not flags, as in argparse since
    Python 3.14.
    """

    def __init__(
        self, *args: Any, usage: str = "[options]", example: str = "", **options: Any
    ):
        options["usage"] = f"%(prog)s {usage}"
        options.setdefault("formatter_class", _formatter)
        if example:
            options["epilog"] = f"example:\n  {example}"
        super().__init__(*args, **options)
        version = f"mlx-tokprune {metadata.version('mlx-tokprune')}"
        help_ = "show the version and exit"
        self.add_argument("--version", action="version", version=version, help=help_)
        self._negative_number_matcher = re.compile(
            r"-(\d+\.?|\.\d)\d*(e[-+]?\d+)?$", re.I
        )

    def add_argument(self, *args: Any, **options: Any) -> argparse.Action:
        """Add an argument; a flag of a model gets `--revision` beside it."""
        action = super().add_argument(*args, **options)
        if action.dest in _MODELS:
            help_ = "branch, tag or commit; also --model ID@REVISION"
            help_ = help_.replace("--model", action.option_strings[0])
            super().add_argument("--revision", metavar="REVISION", help=help_)
        return action

    def _at_revision(self, name: str | None, revision: str) -> str:
        if not name or os.path.exists(name) or not _HUB_ID.fullmatch(name):
            self.error(
                "--revision is a branch, tag or commit of a hub id such as "
                f"apple/FastVLM-0.5B, not of {name or 'the default model'}"
            )
        return f"{name}@{revision}"

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """Return the arguments; an unknown flag exits and names the nearest flag.

        A `--revision` becomes part of the model's name.
        """
        parsed, unknown = self.parse_known_args(*args, **options)
        if unknown:
            flag = unknown[0].partition("=")[0]
            hint = nearest(flag, self._option_string_actions, 0.75)
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")
        revision = vars(parsed).pop("revision", None)
        for dest in _MODELS & vars(parsed).keys() if revision is not None else ():
            value = getattr(parsed, dest)
            several = isinstance(value, list)
            names: Any = (value or [None]) if several else [value]
            names = [self._at_revision(name, str(revision)) for name in names]
            setattr(parsed, dest, names if several else names[0])
        return parsed

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Python 3.11 reads `--name=--` as an empty list.
        if action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "expected one value, not '--'")
        return super()._get_values(action, arg_strings)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # Shells leave the home folder in `--flag=~/x` to the program.
        if action.dest not in _TEXTS:
            name, path = re.fullmatch(
                r"([\w.-]+=(?=~))?(.*)", arg_string, re.S
            ).groups()
            arg_string = (name or "") + os.path.expanduser(path)
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> NoReturn:
        """Print the message as one sentence to stderr and exit with 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)} (see --help)\n")


def command(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """Wrap a `main(argv)`: `InputError` and `OSError` become one line and exit 2.

    A termination signal unwinds like any exit, so that no half-written file is kept.
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
            reason = printable(f"{error.strerror or error}{where}")
            print(f"error: {reason}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return run


def begin_logging(verbose: bool) -> None:
    """Log the package at DEBUG to stderr where `--verbose` was given."""
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("mlx_tokprune").setLevel(logging.DEBUG)


# Flags ------------------------------------------------------------------------------


def add_verbose(parser: Flags) -> None:
    """Add `--verbose`."""
    help_ = "log places, counts and times to stderr"
    parser.add_argument("--verbose", action="store_true", help=help_)


def add_upload(parser: Flags) -> None:
    """Add `--upload-repo`, as in mlx-lm."""
    help_ = "hub repository to upload the result to (default: none)"
    parser.add_argument("--upload-repo", metavar="ORG/NAME", help=help_)


def add_adapter(parser: Flags) -> None:
    """Add `--adapter-path`, as in mlx-lm."""
    help_ = "folder of a LoRA or DoRA adapter"
    parser.add_argument("--adapter-path", metavar="FOLDER", help=help_)


def add_option(parser: Flags) -> None:
    """Add `--option`, the options of methods."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="method option, such as alpha=0.2; repeatable",
    )


def add_seed(parser: Flags) -> None:
    """Add `--seed`, the seed of the method `random`."""
    help_ = "seed of the method random (default: 0)"
    parser.add_argument("--seed", type=int, metavar="N", default=0, help=help_)


def add_prune(parser: Flags, help_: str) -> None:
    """Add `--prune`, plans of methods, budgets and places in one grammar."""
    parser.add_argument(
        "--prune", action="append", default=[], metavar=PLAN, help=help_
    )


def add_pruning(parser: Flags, default: str) -> None:
    """Add the flags of one plan: `--prune`, its short form, and `--positions`.

    default: the method without `--method`, for its help.
    """
    group = parser.add_argument_group("pruning (methods: mlx_tokprune methods)")
    add = group.add_argument
    help_ = "METHOD:SHARE or METHOD:N, then @PLACE; + joins: norm:0.5+fastv:12@2"
    add_prune(group, help_)
    keep = group.add_mutually_exclusive_group()
    help_ = "share of tokens to keep, in (0, 1] (default: all)"
    keep.add_argument("--keep-ratio", type=float, metavar="RATIO", help=help_)
    help_ = "tokens to keep of each image (with --at N: in all)"
    keep.add_argument("--keep-tokens", type=int, metavar="N", help=help_)
    help_ = f"name or module:function (default: {default})"
    add("--method", help=help_)
    help_ = "tower, prompt, or N for after N layers"
    add("--at", metavar="PLACE", help=help_)
    add_option(group)
    help_ = f"token positions: {POSITIONS[0]} (default) or {POSITIONS[1]}"
    choices = {"choices": POSITIONS, "metavar": "WHICH"}
    add("--positions", default=DEFAULT_POSITIONS, help=help_, **choices)


def add_settings(parser: Flags) -> Flags:
    """Add the flags of `checkpoints.policy_settings.SETTINGS`; return their group."""
    group = parser.add_argument_group("robot policies (default: as trained)")
    add = group.add_argument
    help_ = "share of the image area to encode (OpenVLA, OFT)"
    add("--crop", type=float, metavar="SHARE", help=help_)
    help_ = "bicubic or lanczos (OpenVLA, OFT)"
    add("--resize", choices=tuple(RESIZES), metavar="FILTER", help=help_)
    help_ = "JPEG quality, 0: no JPEG (OpenVLA, OFT)"
    add("--jpeg", type=int, metavar="N", help=help_)
    help_ = "quantiles, min_max or mean_std (OFT, pi0-FAST)"
    add("--norm", choices=tuple(NORMS), metavar="RULE", help=help_)
    help_ = "actions per forward pass (OFT)"
    add("--actions-per-chunk", type=int, metavar="N", help=help_)
    add("--pictures", type=int, metavar="N", help="number of input images (OFT)")
    return group


def add_rows(parser: Flags, ratios: Sequence[float], budgets: bool = False) -> None:
    """Add the flags of a table's rows: plans, and every method at every ratio.

    ratios: the default keep ratios. budgets: also add `--eval-budgets`.
    """
    group = parser.add_argument_group("rows (methods: mlx_tokprune methods)")
    add = group.add_argument
    add_prune(group, "row of the table, such as norm:0.5@tower; repeatable")
    add("--plans", nargs="+", default=[], metavar="PLAN", help="older name of --prune")
    help_ = "methods at every ratio (default: all; with --prune: none)"
    add("--methods", nargs="+", metavar="METHOD", help=help_)
    keep = group.add_mutually_exclusive_group()
    help_ = f"keep ratios (default: {' '.join(f'{ratio:g}' for ratio in ratios)})"
    many: dict[str, Any] = {"nargs": "+", "help": help_}
    keep.add_argument("--keep-ratios", type=float, default=ratios, metavar="R", **many)
    if budgets:
        many = {"nargs": "+", "default": [], "help": "tokens to keep, not ratios"}
        keep.add_argument("--eval-budgets", type=int, metavar="K", **many)
    add_option(group)
    help_ = "positions of kept tokens (default: original, or what mlx-vlm has)"
    add("--positions", choices=POSITIONS, help=help_)


def add_drafts(parser: Flags, words: Sequence[str], help_: str) -> None:
    """Add `--draft`, and `--draft-model` with its own `--draft-prune`.

    words: values of `--draft`; the first is the default of a bare flag.
    """
    add = parser.add_argument
    add("--draft", nargs="?", const=words[0], choices=words, help=help_)
    help_ = "smaller model of the same family that drafts"
    add("--draft-model", metavar="MODEL", help=help_)
    many = {"action": "append", "default": [], "metavar": PLAN}
    add("--draft-prune", help="pruning of the draft; repeatable", **many)


def add_output(parser: Flags, overlay: str, line: str) -> None:
    """Add `--overlay`, `--json`, `--stages` and `--verbose`.

    overlay, line: help of `--overlay` and of `--json`.
    """
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--overlay", metavar="PNG", help=overlay)
    add("--json", action="store_true", help=line)
    help_ = "time the stages one by one, a little slower"
    add("--stages", action="store_true", help=help_)
    add_verbose(group)


# Reading flags ----------------------------------------------------------------------


def draft_plan(args: argparse.Namespace) -> Plan | None:
    """Return the plan of a draft, or `None` without `--draft-prune`.

    Raises `InputError` for flags that exclude each other.
    """
    if args.draft and args.draft_model:
        raise InputError("--draft and --draft-model both draft; give one of them")
    if args.draft_prune and not (args.draft_model or args.draft == "self"):
        raise InputError(
            "--draft-prune prunes the input of a drafting model; give --draft-model, "
            "too, or, for a model that answers, --draft self"
        )
    return read_plans(args.draft_prune, {}) if args.draft_prune else None


def read_options(texts: Sequence[str]) -> dict[str, float | str]:
    """Return `name=value` texts as numbers, or else words, by name.

    Raises `InputError` for a text without name or value.
    """
    options: dict[str, float | str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise InputError(f"--option is NAME=VALUE, not {text!r}")
        try:
            options[name] = float(value)
        except ValueError:
            options[name] = value
    return options


def options_by_method(
    methods: Iterable[str], options: Options
) -> dict[str, dict[str, float | str]]:
    """Return the options that each method takes, by method.

    Raises `InputError` for an option that none of the methods takes.
    """
    names_of = {name: get_method(name).options for name in methods}
    for option in options:
        if not any(option in names for names in names_of.values()):
            every = sorted({name for names in names_of.values() for name in names})
            takes = f"they take {', '.join(every)}" if every else "they take none"
            raise InputError(
                f"none of the methods {', '.join(names_of)} has an option {option!r}; "
                + takes
            )
    return {
        method: {name: value for name, value in options.items() if name in names}
        for method, names in names_of.items()
    }


def row_plans(args: argparse.Namespace) -> list[str]:
    """Return the texts of the plans; each plan is one row."""
    return [*args.prune, *args.plans]


def check_rows(args: argparse.Namespace) -> None:
    """Raise `InputError` for a method, plan or keep ratio that no row can have."""
    for name in args.methods or ():
        get_method(name)
    for text in row_plans(args):
        read_plan(text)
    for ratio in args.keep_ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"keep ratio {ratio:g} is outside (0, 1]")


def options_of(
    methods: Iterable[str], args: argparse.Namespace
) -> dict[str, dict[str, float | str]]:
    """Return the `--option`s by method, methods of plans included."""
    planned = (p.method for text in row_plans(args) for p in read_plan(text))
    return options_by_method([*methods, *planned], read_options(args.option))


def read_plans(texts: Sequence[str], options: Options, seed: int = 0) -> Plan:
    """Return one plan from the texts of its places.

    Raises `InputError` for an option that none of its methods takes.
    """
    plan = tuple(p for text in texts for p in read_plan(text, options, seed))
    options_by_method([pruner.method for pruner in plan], options)
    return plan


def plan_of(
    args: argparse.Namespace, default: str, own: Options | None = None
) -> Plan | None:
    """Return the plan of the flags; `None` without any, for the checkpoint's plan.

    default: the method without `--method`. own: options that have their own flags.
    Raises `InputError` for flags that exclude each other or a budget that is missing.
    """
    options = read_options(args.option) | dict(own or {})
    names = ("method", "at", "keep_ratio", "keep_tokens")
    short = any(getattr(args, name, None) is not None for name in names)
    if args.prune and short:
        raise InputError(
            "--prune has method, budget and place; leave out --method, --at, "
            "--keep-ratio and --keep-tokens"
        )
    if args.prune:
        return read_plans(args.prune, options, args.seed)
    return (_pruner_of(args, default, options),) if short or options else None


def _pruner_of(args: argparse.Namespace, default: str, options: Options) -> Pruner:
    """Return one pruner: of `default`, or of `none` if all tokens are kept."""
    ratio, tokens, at = args.keep_ratio, args.keep_tokens, getattr(args, "at", None)
    method, unset = args.method, ratio is None and tokens is None
    if method is None:
        full = not options and (unset or ratio == 1)
        if full and at:
            raise InputError("--at is a place to prune at; give --keep-ratio, too")
        method = "none" if full else default
    if unset and get_method(method).lacks_budget(options):
        raise InputError(
            f"method {method!r} needs a budget: give --keep-ratio or --keep-tokens"
        )
    place: dict[str, Any] = {"at": read_place(at)} if at else {}
    return Pruner(method, ratio, tokens, seed=args.seed, options=options, **place)


# Text and overlays ------------------------------------------------------------------


def where(place: Place | Depths) -> str:
    """Return a place of pruning in words: `after 2 layers`."""
    if isinstance(place, str):
        return f"at the {place}"
    if isinstance(place, tuple):
        return f"at {len(place)} layers"
    return f"after {place} layer{'s' * (place > 1)}"


def methods(plan: Plan) -> str:
    """Return the methods of a plan, with their places where there are several."""
    if len(plan) > 1:
        return ", ".join(f"{p.method} {where(p.at)}" for p in plan)
    return plan[0].method if plan else "none"


def places(visual: VisualTokens) -> list[dict]:
    """Return each place of pruning and the tokens left after it, for JSON."""
    return [{"at": place, "kept_indices": kept} for place, kept in visual.by_place()]


def write_overlay(
    path: str, images: list, visual: VisualTokens, padded: bool = True
) -> None:
    """Write the overlay of the kept tokens as a PNG, a row for each place.

    padded: the model pads pictures to a square.
    """
    write_picture(path, draw_choices(images, visual, padded))


def draw_choices(images: list, visual: VisualTokens, padded: bool) -> Image.Image:
    """Draw the kept tokens on the images, a row for each place of pruning.

    padded: the model pads pictures to a square.
    """
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


def check_overlay(path: str | None, pictures: Sequence[str | Path]) -> None:
    """Raise `InputError` for an overlay that cannot be written.

    For use before any work. pictures: files that the overlay must not replace.
    """
    if path is not None:
        check_output(path, PICTURE)
        check_apart(path, pictures)
