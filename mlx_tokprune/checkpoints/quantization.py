"""Quantized matrices of a checkpoint, as mlx-lm and mlx-vlm write them.

MLX packs the rows of a matrix into uint32, with a scale for each group of weights and,
in mode affine, a bias. `quantization` in config.json gives the format of all matrices
with scales, and under a layer's name the format of that layer.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import mlx.core as mx

from ..errors import InputError, note
from ..files import object_of

GROUPS = (32, 64, 128)  # of mode affine
_AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
# Supported group sizes and bits of each mode; the first pair is MLX's default.
MODES = {
    "affine": [(64, 4), *((g, b) for g in GROUPS for b in _AFFINE_BITS)],
    "mxfp4": [(32, 4)],
    "nvfp4": [(16, 4)],
    "mxfp8": [(32, 8)],
}
_SUPPORTED = (
    "1, 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128 in mode affine, 4 bits in "
    "groups of 32 in mxfp4 or of 16 in nvfp4, or 8 bits in groups of 32 in mxfp8"
)
SECTIONS = ("quantization", "quantization_config")
FLOATS = ("F64", "F32", "F16", "BF16")
Shape = tuple[int, ...]


class Format(NamedTuple):
    """Packing of one matrix: weights per scale, bits per weight, and MLX's mode."""

    group_size: int
    bits: int
    mode: str = "affine"

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}, mode {self.mode}"

    def check(self, owner: str) -> "Format":
        """Return the format; raise `InputError` unless MLX supports it.

        owner: what has this format, for the message.
        """
        sizes = MODES.get(self.mode, ()) if isinstance(self.mode, str) else ()
        whole = type(self.bits) is int and type(self.group_size) is int
        if not whole or (self.group_size, self.bits) not in sizes:
            text = f"{owner} {self.bits!r} bits and group_size {self.group_size!r}"
            raise InputError(f"{text}, mode {self.mode!r}; expected {_SUPPORTED}")
        return self

    def pack(self, path: str, weight: mx.array) -> dict[str, mx.array]:
        """Return the packed tensors of a float matrix (rows, columns), by name."""
        names = (f"{path}.{part}" for part in ("weight", "scales", "biases"))
        return dict(zip(names, mx.quantize(weight, *self), strict=False))


@dataclass(frozen=True)
class Quantization:
    """Formats of a checkpoint's quantized matrices.

    formats: by path, the tensor name without `.weight`. default: format of paths that
    `section` does not name; `None` when nothing is quantized.
    """

    formats: Mapping[str, Format] = field(default_factory=dict)
    default: Format | None = None

    @property
    def section(self) -> dict:
        """Section `quantization` of config.json, with MLX names of layers."""
        if self.default is None:
            return {}
        named = {p: f._asdict() for p, f in self.formats.items() if f != self.default}
        return self.default._asdict() | named

    def unpacked(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shapes of the float tensors in place of the packed tensors."""
        shapes = dict(shapes)
        for path, (_, bits, _) in self.formats.items():
            rows, columns = shapes[f"{path}.weight"]
            shapes[f"{path}.weight"] = (rows, columns * 32 // bits)
            for part in ("scales", "biases"):
                shapes.pop(f"{path}.{part}", None)
        return shapes

    def unpack(
        self,
        weights: dict[str, mx.array],
        kept: Collection[str],
        dtype: mx.Dtype | None,
    ) -> None:
        """Replace packed matrices in `weights` by floats, lazily and in place.

        kept: paths that stay packed. dtype: type of the floats; that of the scales or
        of the layer's bias when `None`.
        """
        for path in self.formats.keys() - set(kept):
            packed, scales = (weights.pop(f"{path}.{n}") for n in ("weight", "scales"))
            biases = weights.pop(f"{path}.biases", None)
            like = weights.get(f"{path}.bias") if biases is None else scales
            kind = dtype or (mx.bfloat16 if like is None else like.dtype)
            weights[f"{path}.weight"] = mx.dequantize(
                packed, scales, biases, *self.formats[path], dtype=kind
            )


@dataclass(frozen=True)
class QuantizationReader:
    """Reader of the formats, from config and headers.

    shapes, dtypes: of the stored tensors, by MLX name. rename: from original tensor
    names to MLX names. source: the checkpoint, for messages.
    """

    config: Mapping
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    rename: Callable[[str], str | None]
    source: str

    def read(self) -> Quantization:
        """Return the formats of all quantized matrices.

        Raises `InputError` unless tensors and config agree on formats that MLX has.
        """
        section = self._section()
        method = None if "bits" in section else section.get("quant_method")
        for name, dtype in self.dtypes.items():
            lone = name[:-7] + ".scales" not in self.dtypes and name.endswith(".weight")
            if dtype not in FLOATS and (lone or method is not None):
                problem = f"has {name} of type {dtype}"
                problem += " without scales" if method is None else f", from {method!r}"
                self._refuse(problem, "floats, or what mlx_tokprune convert -q writes")
        scales = [n for n in self.shapes if n.endswith(".scales")]
        # Scales beside a vector are no quantization, but a tensor that no model has.
        paths = [n.removesuffix(".scales") for n in scales]
        paths = [p for p in paths if len(self.shapes.get(f"{p}.weight", ())) != 1]
        if not paths:
            return Quantization()
        if self.config.get("quantize_activations"):
            self._refuse("has quantize_activations in its config.json", "it unset")
        sizes: Any = {name: section.get(name) for name in Format._fields[:2]}
        owner = f"{self.source} has quantized tensors, and its config.json gives"
        default = Format(**sizes, mode=section.get("mode", "affine")).check(owner)
        layers, formats = self._layers(section), {}
        for path in sorted(paths):
            entry = layers.pop(path, True)
            formats[path] = default if entry is True else self._format(path, entry)
            self._check(path, formats[path])
        for path, entry in layers.items():
            if entry and f"{path}.weight" in self.shapes:
                self._refuse(f"says {path} is quantized", f"a tensor {path}.scales")
        return Quantization(formats, default)

    def _refuse(self, problem: str, expected: str) -> NoReturn:
        raise InputError(f"{self.source} {problem}; expected {expected}")

    def _section(self) -> Mapping:
        """Return the first section about quantization, as mlx-lm looks for it."""
        for owner in (self.config, object_of(self.config, "text_config")):
            named = [object_of(owner, n) for n in SECTIONS if owner.get(n) is not None]
            if len(named) > 1 and named[0] != named[1]:
                note(f"{SECTIONS[1]} of {self.source} differs and is not followed")
            if named:
                return named[0]
        return {}

    def _layers(self, section: Mapping) -> dict[str, dict | bool]:
        """Return the entries of single layers by path.

        A text model's name stands for the layer below `language_model.`, as in mlx-vlm.
        """
        layers = {}
        for name, entry in section.items():
            if name in (*Format._fields, "quant_method") or entry is None:
                continue
            if not isinstance(entry, (dict, bool)):
                self._refuse(f"has quantization with {name} {entry!r}", "it unset")
            weight = f"{name}.weight"
            names = (weight, f"language_model.{weight}", self.rename(weight))
            stored = next((n for n in names if n in self.shapes), None)
            layers[(stored or weight).removesuffix(".weight")] = entry
        return layers

    def _format(self, path: str, entry: dict | bool) -> Format:
        """Return the format of a layer; sizes that it lacks are the mode's defaults."""
        fields = Format._fields
        unknown = entry.keys() - set(fields) if isinstance(entry, dict) else {"false"}
        if not isinstance(entry, dict) or unknown:
            problem = f"says {min(unknown)} for {path}, which has scales"
            self._refuse(problem, ", ".join(fields))
        mode = entry.get("mode", "affine")
        sizes = MODES.get(mode if isinstance(mode, str) else "", MODES["affine"])[0]
        stated = {n: entry[n] for n in fields[:2] if entry.get(n) is not None}
        owner = f"config.json of {self.source} gives {path}"
        return Format(*sizes, mode)._replace(**stated).check(owner)

    def _check(self, path: str, format: Format) -> None:
        """Raise `InputError` unless the tensors of a matrix have this format."""
        weight = self.shapes.get(f"{path}.weight", ())
        reason = f"for {format}, as its config.json says"
        if len(weight) != 2:
            problem = f"has {path}.scales for a weight of shape {weight}"
            self._refuse(problem, f"a matrix {reason}; convolutions stay float")
        columns, rest = divmod(weight[1] * 32, format.bits)
        groups = (weight[0], columns // format.group_size)
        types = FLOATS if format.mode == "affine" else ("U8",)
        parts = {"weight": (weight, ("U32",)), "scales": (groups, types)}
        parts["biases"] = (groups, FLOATS) if types == FLOATS else (None, (None,))
        for part, expected in parts.items():
            name = f"{path}.{part}"
            shape, dtype = self.shapes.get(name), self.dtypes.get(name)
            if shape != expected[0] or dtype not in expected[1]:
                problem = f"has {name} of shape {shape} and type {dtype}"
                kind = "a float" if expected[1] == FLOATS else expected[1][0]
                self._refuse(problem, f"{expected[0]} and {kind} {reason}")
        if rest or columns % format.group_size:
            self._refuse(f"has {path}.weight of shape {weight}", f"groups {reason}")
