"""What a package says about itself: `Function`, written to and read from metadata."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from ..errors import InputError

_KEY = "mlx_tokprune"  # key in the package's user defined metadata
OUTPUTS = {
    "image_features": "(1, K, C): the visual tokens that were kept, in raster order",
    "kept_indices": "(1, K): which of the N visual tokens they are",
    "assignment": "(1, N): the kept token (0 to K - 1) that most of each token was "
    "merged into, -1 where none",
}


@dataclass(frozen=True)
class Function:
    """One function of a package, and the input and outputs it has.

    keep: how many of the visual tokens on `grid` it gives, each with `channels`
    numbers. projector: whether they went through it. image: whether the input is an
    RGB picture, or else numbers.
    """

    name: str
    method: str
    keep_ratio: float | None
    keep: int
    grid: tuple[int, int]
    channels: int
    image_size: int
    projector: bool
    image: bool

    @property
    def share(self) -> float:
        """The keep ratio, or what comes to the same."""
        return self.keep_ratio or self.keep / (self.grid[0] * self.grid[1])

    @property
    def input(self) -> str:
        """The name of the input."""
        return input_name(self.image)


def input_name(image: bool) -> str:
    """The name of a function's input; Apple's FastVLM app calls numbers `images`."""
    return "image" if image else "images"


def describe(
    spec,
    functions: Sequence[Function],
    source: Path | None,
    name: str | None,
    **settings: str,
) -> None:
    """Write names, versions, licence and descriptions into a package's `spec`."""
    about = spec.description.metadata
    kept = ", ".join(f"{f.name}: {f.method}, {f.keep} tokens" for f in functions)
    model = name or (source.resolve().name if source else "a model")
    about.shortDescription = (
        f"Vision path of {model} with visual-token pruning ({kept})"
    )
    about.versionString = metadata.version("mlx-tokprune")
    about.author = f"mlx_tokprune {about.versionString}"
    about.license = _license(source)
    about.userDefined.update(settings)
    about.userDefined["mlx"] = mx.__version__
    about.userDefined[_KEY] = json.dumps([dataclasses.asdict(f) for f in functions])
    side = functions[0].image_size
    inputs = {
        "image": f"the picture in RGB, {side} x {side} pixels",
        "images": f"(1, 3, {side}, {side}): the picture's pixels in [0, 1], RGB",
    }
    for described in (spec.description, *spec.description.functions):
        for feature in (*described.input, *described.output):
            feature.shortDescription = (inputs | OUTPUTS)[feature.name]


def _license(source: Path | None) -> str:
    """The text of the checkpoint's licences, or where to look for them."""
    files = sorted(source.glob("LICEN[CS]E*")) if source else []
    if files:
        return "\n\n".join(
            file.read_text(encoding="utf-8", errors="replace") for file in files
        )
    return "that of the source checkpoint, which came without a licence file"


def read_functions(spec, name: str) -> list[Function]:
    """What `describe` wrote; `InputError` when the package `name` has none of it."""
    text = spec.description.metadata.userDefined.get(_KEY)
    if not text:
        raise InputError(f"{name} was not written by mlx_tokprune.coreml")
    try:
        return [Function(**f | {"grid": tuple(f["grid"])}) for f in json.loads(text)]
    except (ValueError, TypeError, KeyError):
        raise InputError(
            f"{name} was written by another version of mlx_tokprune; export it again"
        ) from None
