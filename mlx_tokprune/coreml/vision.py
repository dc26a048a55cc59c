"""Core ML packages as the vision path of `generate` (macOS only)."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import InputError
from ..features import Selection
from ..files import read_json
from ..models.protocol import VisionModel
from ..pipeline import Scene, VisualTokens, grouped
from ..pipeline.timing import NO_CLOCK, NoClock
from ..pruners import Plan
from .describe import Function, read_functions
from .export import load_coremltools


@dataclass(frozen=True)
class CoreMLVision:
    """Vision path in one function of a package: tower, pruner, optionally projector.

    Attributes:
        function: description of the function.
        predict: Core ML's `predict`, from inputs by name (arrays or images) to output
            arrays by name.
        plan: pruners of the vision path for `generate`; empty, as the package prunes.
    """

    function: Function
    predict: Callable[[Mapping], Mapping]

    plan: Plan = ()

    def __call__(
        self, model: VisionModel, scene: Scene, plan: Plan, clock: NoClock = NO_CLOCK
    ) -> VisualTokens:
        """Encode images (B, S, S, 3) in [0, 1] to kept and projected visual tokens.

        The whole call counts as the stage "vision".
        """
        with clock.stage("vision") as outputs:
            features, indices = self._encode(model, scene.pixels)
            outputs.append(features)
        selection = Selection(indices.astype(mx.int32))
        return grouped(features, selection, self.function.grid, scene.prompt.places)

    def _encode(
        self, model: VisionModel, pixels: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        size = self.function.image_size
        if pixels is None:
            raise InputError("the package takes one picture or more; none given")
        if pixels.shape[1:3] != (size, size):
            raise InputError(
                f"the package takes pictures of {size} x {size} pixels, not "
                f"{pixels.shape[2]} x {pixels.shape[1]}; leave size and padding as "
                "they are"
            )
        # A package has a batch size of 1.
        results = [self.predict(self._input(picture)) for picture in np.array(pixels)]
        features, indices = (
            mx.array(np.concatenate([np.asarray(r[name]) for r in results]))
            for name in ("image_features", "kept_indices")
        )
        if not self.function.projector:
            features = model.project(features)
        return features, indices

    def _input(self, picture: np.ndarray) -> dict[str, np.ndarray | Image.Image]:
        if not self.function.image:
            return {self.function.input: picture.transpose(2, 0, 1)[None]}
        rgb = Image.fromarray(np.round(picture * 255).astype(np.uint8))
        return {self.function.input: rgb}

    def check(self, model: VisionModel) -> None:
        """Raise `InputError` unless image size and feature size fit `model`."""
        size, expected = self.function.image_size, model.image_size
        if size != expected:
            raise InputError(
                f"the package takes pictures of {size} pixels and the model of "
                f"{expected}; export it from this model"
            )
        size, expected = self.function.channels, model.args.text["hidden_size"]
        if not self.function.projector:
            expected = model.feature_size
        if size != expected:
            raise InputError(
                f"the package gives features of size {size} and the model takes "
                f"{expected}; export it from this model"
            )


def open_vision(path: str | Path, keep_ratio: float | None = None) -> CoreMLVision:
    """Open the package at `path` as a vision path.

    keep_ratio: keep ratio of the function; the first function when `None`. Raises
    `InputError` when there is no such package or function, and on systems other than
    macOS.
    """
    ct = load_coremltools()
    if not (Path(path) / "Manifest.json").is_file():
        raise InputError(
            f"{path} is no Core ML package; expected a .mlpackage that "
            "mlx_tokprune coreml wrote"
        )
    check_manifest(Path(path))
    try:
        spec = ct.utils.load_spec(str(path))
    except Exception as error:  # coremltools' readers raise many classes of errors
        raise InputError(f"{path} is damaged ({type(error).__name__})") from None
    functions = read_functions(spec, str(path))
    function = _choose(functions, keep_ratio, path)
    name = function.name if len(functions) > 1 else None
    return CoreMLVision(function, _predict(ct, path, name))


def check_manifest(package: Path) -> None:
    """Raise `InputError` for a manifest that names a file outside its package."""
    entries = read_json(package / "Manifest.json").get("itemInfoEntries")
    entries = entries.values() if isinstance(entries, dict) else [None]
    inside = (package / "Data").resolve()
    for entry in entries:
        name = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise InputError(f"{package} is damaged: its Manifest.json names no files")
        if not (inside / name).resolve().is_relative_to(inside):
            raise InputError(
                f"Manifest.json of {package} names {name!r}, which leaves the package"
            )


def _choose(
    functions: list[Function], keep_ratio: float | None, path: str | Path
) -> Function:
    for function in functions:
        # Compare as text, so that a ratio from the message below always matches.
        if keep_ratio is None or f"{keep_ratio:g}" == f"{function.share:g}":
            return function
    ratios = ", ".join(f"{function.share:g}" for function in functions)
    raise InputError(
        f"{path} has no function that keeps {keep_ratio:g} of the visual tokens; it "
        f"has {ratios}"
    )


def _predict(
    ct: ModuleType, path: str | Path, function: str | None
) -> Callable[[Mapping], Mapping]:
    if sys.platform != "darwin":
        raise InputError("Core ML runs on macOS only; leave out --vision here")
    return ct.models.MLModel(str(path), function_name=function).predict
