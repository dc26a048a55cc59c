"""Model families: recognition, tensor names and disk layouts of their checkpoints.

Each family file in `convert/` registers one `Family`; `identify` picks the family of a
checkpoint.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import InputError
from .quantization import FLOATS
from .shards import Checkpoint, Shape, check_shapes


@dataclass(frozen=True)
class Family:
    """Model family and its layouts on disk.

    Attributes:
        name: family name for error messages.
        reads: supported layouts, as text for error messages.
        model: constructor of the runtime module, `model(args, inference)`.
        args: class that checks the config (`args.from_dict(config)`).
        matches: whether a checkpoint belongs to this family.
        is_mlx: whether tensor names and shapes are in the MLX layout.
        keys: regexes of original names -> MLX names, tried in order; `None` drops the
            tensor.
        axes: transposition of an original tensor, from its MLX name and rank; `None`
            keeps the axes.
        complete: config with the fields that follow from the tensors.
        gather: family and checkpoint with all its files; the third argument is the
            `lora_adapter/` mode ("auto", "merge" or "ignore").
        takes_adapter: whether a `lora_adapter/` is allowed.
        unreadable: description of an unsupported layout of this family, else `None`.
        optional: names of tensors that are copied but not used by the model.
        beside: files outside the checkpoint folder, by their names in the MLX layout.
        settings: names of the `SETTINGS` that a caller can replace.
    """

    name: str
    reads: str
    model: Callable[..., Any]
    args: Any
    matches: Callable[[Checkpoint], bool]
    is_mlx: Callable[[Mapping[str, Shape]], bool]
    keys: tuple[tuple[str, str | None], ...] = ()
    axes: Callable[[str, int], tuple[int, ...] | None] = lambda name, ndim: None
    complete: Callable[[Checkpoint, dict[str, Shape]], dict] = (
        lambda checkpoint, shapes: dict(checkpoint.config)
    )
    gather: Callable[["Family", Checkpoint, str], tuple["Family", Checkpoint]] = (
        lambda family, checkpoint, adapter: (family, checkpoint)
    )
    takes_adapter: bool = False
    unreadable: Callable[[Checkpoint], str | None] = lambda checkpoint: None
    optional: re.Pattern = re.compile(r"(?!)")
    beside: Callable[[Checkpoint], Mapping[str, Path]] = lambda checkpoint: {}
    settings: tuple[str, ...] = ()

    def rename(self, name: str) -> str | None:
        """Return the MLX name of an original tensor; `None` when it is dropped."""
        for pattern, replacement in self.keys:
            if re.match(pattern, name):
                if replacement is None:
                    return None
                return re.sub(pattern, replacement, name)
        return name

    def is_original(self, checkpoint: Checkpoint) -> bool:
        """Return whether `checkpoint` is in the original layout, not the MLX layout."""
        return not self.is_mlx({n: t.shape for n, t in checkpoint.tensors.items()})

    def shapes(self, checkpoint: Checkpoint) -> dict[str, Shape]:
        """Return MLX names and shapes after `to_mlx_layout`, from the headers alone."""
        original, shapes = self.is_original(checkpoint), {}
        for name, tensor in checkpoint.tensors.items():
            new = self.rename(name) if original else name
            if new is None:
                continue
            axes = self.axes(new, len(tensor.shape)) if original else None
            shapes[new] = tuple(tensor.shape[a] for a in axes) if axes else tensor.shape
        return shapes

    def dtypes(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Return the stored safetensors type of each tensor, by its MLX name."""
        original = self.is_original(checkpoint)
        names = {n: self.rename(n) if original else n for n in checkpoint.tensors}
        return {new: checkpoint.tensors[n].dtype for n, new in names.items() if new}

    def to_mlx_layout(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Convert tensors of either layout to the MLX layout. Lazy and idempotent."""
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
        self,
        checkpoint: Checkpoint,
        shapes: Mapping[str, Shape],
        expected: dict[str, Shape],
    ) -> None:
        """Raise `InputError` unless each expected tensor exists once, with its shape.

        Args:
            checkpoint: checkpoint to check; also its dtypes are checked.
            shapes: result of `shapes(checkpoint)`, unpacked.
            expected: shapes of the runtime model's tensors.
        """
        shapes = {k: v for k, v in shapes.items() if not self.optional.match(k)}
        source = str(checkpoint.folder)
        if self.is_original(checkpoint):
            source += ", in the MLX layout,"
        formats = checkpoint.quantization.formats
        for path, format in formats.items():
            name = f"{path}.weight"
            if name in expected and name in shapes:
                origin = f"{source}, unpacked from {format},"
                check_shapes({name: shapes[name]}, {name: expected[name]}, origin)
        check_shapes(shapes, expected, source)
        for name, dtype in self.dtypes(checkpoint).items():
            path, _, part = name.rpartition(".")
            packed = path in formats and part in ("weight", "scales", "biases")
            if not packed and dtype not in FLOATS:
                raise InputError(
                    f"tensor {name} of {checkpoint.folder} has type {dtype}; expected "
                    f"{', '.join(FLOATS)}"
                )


_FAMILIES: list[Family] = []


def register_family(family: Family) -> Family:
    """Register a family for `identify`; return the family."""
    _FAMILIES.append(family)
    return family


def identify(
    checkpoint: Checkpoint, adapter: str = "auto"
) -> tuple[Family, Checkpoint]:
    """Return the family of a checkpoint, and the checkpoint with all its files.

    adapter: mode of an OpenVLA-OFT policy's `lora_adapter/`: "auto", "merge" or
    "ignore". Raises `InputError`, with the layout of the checkpoint and the supported
    layouts, when no family matches.
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
        "vision tower of a supported family"
    )
    reads = "; ".join(family.reads for family in _FAMILIES)
    raise InputError(f"{checkpoint.folder} is {layout}; this reads {reads}")
