"""What the commands share: budget flags, overlays, and the name of the device."""

import os
from collections.abc import Iterable, Mapping

import mlx.core as mx

from .errors import InputError, Parser
from .files import replacing
from .overlay import draw_overlay
from .pipeline import POSITIONS
from .pruners import Pruner, get_method, list_pruners

DEFAULT_POSITIONS = "original"


def add_budget(parser: Parser) -> None:
    """`--keep-ratio` or `--keep-tokens`, and `--positions`."""
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--keep-ratio", type=float, help="share of visual tokens, (0, 1]")
    tokens = "visual tokens per picture (trimvla: of all pictures)"
    keep.add_argument("--keep-tokens", type=int, help=tokens)
    parser.add_argument("--positions", choices=POSITIONS, default=DEFAULT_POSITIONS)


def describe_methods(stages: Iterable[str]) -> str:
    """A line on every method of these stages, for `--help`."""
    methods = [get_method(name) for name in list_pruners()]
    lines = [f"{m.name}: {m.summary}" for m in methods if m.stage in stages]
    return f"Pruning methods. {'; '.join(lines)}"


def make_pruner(
    method: str | None,
    keep_ratio: float | None,
    keep_tokens: int | None,
    seed: int,
    default: str,
    options: Mapping[str, float] | None = None,
) -> Pruner:
    """A `Pruner` from command line options.

    No method means `default`, or `none` when there is nothing to drop.
    """
    if method is None:
        full = keep_ratio is None and keep_tokens is None
        method = "none" if full or keep_ratio == 1 else default
    known, unset = get_method(method), keep_ratio is None and keep_tokens is None
    if unset and known.counts == "budget" and known.name != "none":
        raise InputError(
            f"method {method!r} needs a budget: give --keep-ratio or --keep-tokens"
        )
    return Pruner(method, keep_ratio, keep_tokens, seed, options or {})


def device_name() -> str:
    """The device MLX runs on, by name where it has one."""
    device = mx.default_device()
    return str(mx.device_info(device).get("device_name", device.type.name))


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
    if not path or os.path.isdir(path) or not os.access(folder, os.W_OK):
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
