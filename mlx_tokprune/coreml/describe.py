"""Descriptions of a package's functions, stored in the package's metadata."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..models.protocol import VisionModel

Model = Any  # of coremltools.proto.Model_pb2, whose classes have no types

_KEY = "mlx_tokprune"  # key in the package's user defined metadata
PROMPT_KEY = "mlx_tokprune_prompt"
OUTPUTS = {
    "image_features": "(1, K, C): kept visual tokens, in raster order",
    "kept_indices": "(1, K): indices of the kept tokens among the N visual tokens",
    "assignment": "(1, N): for each visual token the kept token (0 to K - 1) with the "
    "largest merge weight, -1 for none",
}


@dataclass(frozen=True)
class Function:
    """One function of a package, with its input and its outputs.

    Attributes:
        name: name of the function in the package.
        method: pruning method.
        keep_ratio: share of visual tokens to keep; `None` for a fixed number.
        keep: number of visual tokens in the output.
        grid: (rows, columns) of visual tokens before pruning.
        channels: size of an output token.
        image_size: pixels per side of the input.
        projector: whether the outputs went through the projector.
        image: whether the input is an RGB image, or else a tensor.
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
        """Keep ratio, or the share of tokens that a fixed number is."""
        return self.keep_ratio or self.keep / (self.grid[0] * self.grid[1])

    @property
    def input(self) -> str:
        """Name of the input."""
        return input_name(self.image)


def input_name(image: bool) -> str:
    """Return the name of a function's input: `image`, or `images` for a tensor.

    Apple's FastVLM app passes a tensor named `images`.
    """
    return "image" if image else "images"


def describe(
    spec: Model,
    functions: Sequence[Function],
    source: Path | None,
    name: str | None,
    **settings: str,
) -> None:
    """Write names, versions, licence and descriptions into a package's `spec`.

    source: checkpoint folder, for the licence. name: model name in the description, by
    default the folder's. settings: additional metadata.
    """
    entries = spec.description.metadata
    kept = ", ".join(f"{f.name}: {f.method}, {f.keep} tokens" for f in functions)
    model = name or (source.resolve().name if source else "a model")
    entries.shortDescription = (
        f"Vision path of {model} with visual-token pruning ({kept})"
    )
    entries.versionString = metadata.version("mlx-tokprune")
    entries.author = f"mlx_tokprune {entries.versionString}"
    entries.license = _license(source)
    entries.userDefined.update(settings)
    entries.userDefined["mlx"] = metadata.version("mlx")
    entries.userDefined[_KEY] = json.dumps([dataclasses.asdict(f) for f in functions])
    side = functions[0].image_size
    inputs = {
        "image": f"RGB image, {side} x {side} pixels",
        "images": f"(1, 3, {side}, {side}): RGB pixels in [0, 1]",
    }
    for described in (spec.description, *spec.description.functions):
        for feature in (*described.input, *described.output):
            feature.shortDescription = (inputs | OUTPUTS)[feature.name]


def prompt_settings(model: VisionModel, processor: Any) -> dict[str, str]:
    """Return the metadata of the prompt around a picture.

    processor: the model's. Empty for policies, and where it is `None`.
    """
    if processor is None or model.answers != "text":
        return {}
    before, after = processor.marks
    prompt = {
        "prefix": processor.prefix + before,
        "separator": after + "\n",
        "suffix": processor.suffix,
        "turn": processor.turn,
        "image_token": processor.image_token,
        "end_token_ids": sorted(processor.tokenizer.eos_token_ids),
    }
    return {PROMPT_KEY: json.dumps(prompt)}


def _license(source: Path | None) -> str:
    """Return the text of the checkpoint's licence files, or a reference to them."""
    files = sorted(source.glob("LICEN[CS]E*")) if source else []
    if files:
        return "\n\n".join(
            file.read_text(encoding="utf-8", errors="replace") for file in files
        )
    return "licence of the source checkpoint, which has no licence file"


def read_functions(spec: Model, name: str) -> list[Function]:
    """Return the functions that `describe` wrote into a package's metadata.

    name: package name for messages. Raises `InputError` for a package of another
    program, or of another version of mlx_tokprune.
    """
    text = spec.description.metadata.userDefined.get(_KEY)
    if not text:
        raise InputError(f"{name} was not written by mlx_tokprune.coreml")
    try:
        return [Function(**f | {"grid": tuple(f["grid"])}) for f in json.loads(text)]
    except (ValueError, TypeError, KeyError):
        raise InputError(
            f"{name} was written by another version of mlx_tokprune; export it again"
        ) from None
