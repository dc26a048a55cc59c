"""Model families: how their checkpoints are recognised, named and laid out.

Each file of `convert/` registers one `Family`; `identify` picks the one of a
checkpoint.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import InputError
from .shards import FLOATS, Checkpoint, Shape, check_shapes

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # that MLX quantizes weights to
QUANTIZED = "2, 3, 4, 5, 6 or 8 bits and groups of 32, 64 or 128"


@dataclass(frozen=True)
class Family:
    """A model family and its layouts on disk.

    reads: what can be read, for people. model, args: the runtime's module, and the
    class that checks its config. matches: whether a checkpoint is of this family.
    is_mlx: whether names and shapes are those of the MLX layout, else the original one.
    keys: original names -> MLX names, tried in order; `None` drops the tensor. axes:
    the transposition of an original tensor, by its MLX name. complete: the config with
    what the tensors say. gather: the family and the checkpoint with all its files,
    given what becomes of a `lora_adapter/`. takes_adapter: whether it may have one.
    unreadable: a layout of this family that cannot be read, in words. optional: tensors
    carried along that no visual token needs. beside: files that belong to a checkpoint
    and may lie elsewhere, by the names they have in the MLX layout.
    """

    name: str
    reads: str
    model: Callable
    args: Any
    matches: Callable[[Checkpoint], bool]
    is_mlx: Callable[[Mapping[str, Shape]], bool]
    keys: tuple[tuple[str, str | None], ...]
    axes: Callable[[str, int], tuple[int, ...] | None]
    complete: Callable[[Checkpoint, dict[str, Shape]], dict]
    gather: Callable[["Family", Checkpoint, str], tuple["Family", Checkpoint]] = (
        lambda family, checkpoint, adapter: (family, checkpoint)
    )
    takes_adapter: bool = False
    unreadable: Callable[[Checkpoint], str | None] = lambda checkpoint: None
    optional: re.Pattern = re.compile(r"(?!)")
    beside: Callable[[Checkpoint], Mapping[str, Path]] = lambda checkpoint: {}

    def rename(self, name: str) -> str | None:
        """An original name in the MLX layout; `None` for tensors that are dropped."""
        for pattern, replacement in self.keys:
            if re.match(pattern, name):
                if replacement is None:
                    return None
                return re.sub(pattern, replacement, name)
        return name

    def is_original(self, checkpoint: Checkpoint) -> bool:
        return not self.is_mlx({n: t.shape for n, t in checkpoint.tensors.items()})

    def shapes(self, checkpoint: Checkpoint) -> dict[str, Shape]:
        """Names and shapes that `to_mlx_layout` will give, from the headers alone."""
        original, shapes = self.is_original(checkpoint), {}
        for name, tensor in checkpoint.tensors.items():
            new = self.rename(name) if original else name
            if new is None:
                continue
            axes = self.axes(new, len(tensor.shape)) if original else None
            shapes[new] = tuple(tensor.shape[a] for a in axes) if axes else tensor.shape
        return shapes

    def dtypes(self, checkpoint: Checkpoint) -> dict[str, str]:
        """The stored safetensors type of each tensor, by its MLX-layout name."""
        original = self.is_original(checkpoint)
        names = {n: self.rename(n) if original else n for n in checkpoint.tensors}
        return {new: checkpoint.tensors[n].dtype for n, new in names.items() if new}

    def to_mlx_layout(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Tensors of either layout -> the MLX layout. Lazy and idempotent."""
        if self.is_mlx({n: array.shape for n, array in weights.items()}):
            return weights
        renamed = {}
        for name, array in weights.items():
            new = self.rename(name)
            if new is not None:
                axes = self.axes(new, array.ndim)
                renamed[new] = array.transpose(*axes) if axes else array
        return renamed

    def check(
        self, checkpoint: Checkpoint, found: dict, config: dict, expected: dict
    ) -> None:
        """Raise `InputError` unless every tensor is there once, with its shape.

        found: `shapes`. config: of `complete`, which loses `quantization` where nothing
        is quantized. expected: the tensors of the runtime's model.
        """
        found = {k: v for k, v in found.items() if not self.optional.match(k)}
        quantized = _quantized_paths(found, expected)
        if quantized:
            bits, group = _quantization(checkpoint, config)
        else:
            config.pop("quantization", None)
            config.pop("quantization_config", None)
        for path in quantized:
            rows, columns = expected[f"{path}.weight"]
            expected[f"{path}.weight"] = (rows, columns * bits // 32)
            expected[f"{path}.scales"] = (rows, columns // group)
            expected[f"{path}.biases"] = (rows, columns // group)
        source = str(checkpoint.folder)
        if self.is_original(checkpoint):
            source += ", in the MLX layout,"
        check_shapes(found, expected, source)
        packed = {f"{path}.weight" for path in quantized}
        for name, dtype in self.dtypes(checkpoint).items():
            right = dtype == "U32" if name in packed else dtype in FLOATS
            if not right:
                wanted = "U32, as it is quantized" if name in packed else FLOATS
                wanted = wanted if isinstance(wanted, str) else ", ".join(wanted)
                raise InputError(
                    f"tensor {name} of {checkpoint.folder} has type {dtype}; expected "
                    f"{wanted}"
                )


def _quantized_paths(found: Mapping, expected: Mapping) -> list[str]:
    """Matrices of the language model that come with scales."""
    paths = (n.removesuffix(".scales") for n in found if n.endswith(".scales"))
    return [
        path
        for path in paths
        if path.startswith("language_model.")
        and len(expected.get(f"{path}.weight", ())) == 2
    ]


def _quantization(checkpoint: Checkpoint, config: dict) -> tuple[int, int]:
    """(bits, group size) that config.json gives for the language model."""
    given = config.get("quantization")
    given = given if isinstance(given, dict) else {}
    bits, group = given.get("bits"), given.get("group_size")
    affine = given.get("mode", "affine") == "affine"
    whole = type(bits) is int and type(group) is int
    right = whole and bits in BITS and group in GROUPS
    if not affine or not right:
        raise InputError(
            f"{checkpoint.folder} has quantized tensors, but its config.json gives "
            f"{bits} bits and group_size {group}; expected {QUANTIZED}, mode affine"
        )
    return bits, group


_FAMILIES: list[Family] = []


def register_family(family: Family) -> Family:
    """Have `identify` know a family; return it."""
    _FAMILIES.append(family)
    return family


def identify(
    checkpoint: Checkpoint, adapter: str = "auto"
) -> tuple[Family, Checkpoint]:
    """Return the family of a checkpoint, and the checkpoint with all its files.

    adapter: what becomes of an OpenVLA-OFT policy's `lora_adapter/`.
    Raises `InputError` that says what was found and what can be read.
    """
    for family in _FAMILIES:
        if not family.matches(checkpoint):
            continue
        if (adapter != "auto" or checkpoint.base) and not family.takes_adapter:
            raise InputError(
                f"{checkpoint.folder} is a {family.name} checkpoint; leave out "
                "--lora-adapter and --base-model, which are for OpenVLA-OFT policies"
            )
        return family.gather(family, checkpoint, adapter)
    layouts = (family.unreadable(checkpoint) for family in _FAMILIES)
    layout = next(filter(None, layouts), None) or (
        f"a checkpoint of model type {checkpoint.config.get('model_type')!r} without a "
        "vision tower that is known here"
    )
    reads = "; ".join(family.reads for family in _FAMILIES)
    raise InputError(f"{checkpoint.folder} is {layout}; this reads {reads}")
