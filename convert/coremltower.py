"""FastVLM in the layout of Apple's app: the vision tower is a Core ML package.

Language model and projector are MLX tensors. coremltools converted the tower from
Apple's PyTorch module: the layers keep their order, and batch norms and most layer
scales are folded into them. So weights are read in the order of the program. A constant
that kept its PyTorch name must have the name of its layer, and shapes are checked as in
any checkpoint. A program with another structure is refused.
"""

import io
import logging
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from ..checkpoints.shards import TYPES, Checkpoint
from ..errors import InputError
from ..files import object_of, read_json
from ..models.checks import expect

# Messages of coremltools.proto, whose classes have no types.
Operation = Any
MILValue = Any
Model = Any
TOWER = "vision_tower.vision_model"
_PROJECTOR = "multi_modal_projector."
_INSTEAD = (
    "download the PyTorch checkpoint (such as apple/FastVLM-0.5B) and convert that"
)
_LAYERS = (2, 12, 24, 4, 2)  # blocks per stage of FastViTHD; the last two: attention
# Operations of a layer, by its kind; of other kinds a convolution.
_OPERATIONS = {"norm": ("batch_norm", "layer_norm"), "scale": ("mul",)}
_OPERATIONS |= {"bare": ("linear",), "linear": ("linear",)}
_NORM_EPS = 1e-5  # of PyTorch's batch norms, before coremltools folded them
_FLOATS = {10: np.dtype("<f2"), 11: np.dtype("<f4")}  # by MIL's DataType
_STORED = {1: np.dtype("<f2"), 2: np.dtype("<f4")}  # by weight.bin's own type numbers
_MARK = 0xDEADBEEF  # begins each entry of weight.bin


def is_app(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is in the layout of Apple's app."""
    packages = list(checkpoint.folder.glob("*.mlpackage"))
    projector = any(name.startswith(_PROJECTOR) for name in checkpoint.tensors)
    return bool(packages) and projector


def add_tower(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint in the MLX layout, with the tower of its Core ML package.

    Raises `InputError` unless the folder has one package, which holds a FastViTHD.
    """
    packages = sorted(checkpoint.folder.glob("*.mlpackage"))
    if len(packages) > 1:
        names = ", ".join(path.name for path in packages)
        raise InputError(
            f"{checkpoint.folder} has {names}; expected one package, the vision tower"
        )
    sizes = object_of(checkpoint.config, "vision_config")
    extra = _projector(checkpoint) | read_tower(packages[0], _depths(sizes))
    return checkpoint.with_extra(extra, (_PROJECTOR,))


def _depths(sizes: Mapping) -> tuple[int, ...]:
    layers = sizes.get("layers", _LAYERS)
    right = isinstance(layers, (list, tuple)) and len(layers) == 5
    right = right and all(type(depth) is int and 0 < depth < 1000 for depth in layers)
    expect(right, "layers", layers, "5 whole numbers from 1 to 999")
    return tuple(layers)


def _projector(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """Return the projector's tensors, packed ones included, under MLX names."""
    weights, tensors = checkpoint.load(), {}
    for name in (n for n in checkpoint.tensors if n.startswith(_PROJECTOR)):
        array = weights[name]
        if array.dtype not in TYPES:
            raise InputError(
                f"tensor {name} of {checkpoint.folder} is no float; {_INSTEAD}"
            )
        tensors[name.replace(f"{_PROJECTOR}linear_", "mm_projector.")] = array
    return tensors


# The package -------------------------------------------------------------------------


def read_tower(package: Path, layers: tuple[int, ...]) -> dict[str, mx.array]:
    """Return the tensors of a package's FastViTHD tower, in the MLX layout.

    layers: number of blocks in each of the five stages. Raises `InputError` for a
    program with other layers.
    """
    operations, tensors = _Layers(_Program(package)), {}
    for kind, path in _places(layers):
        for name, array in operations.take(kind, path).items():
            place = path.replace("patch_embed.", "patch_embed.blocks.")
            axes = (0, 2, 3, 1) if array.ndim == 4 else range(array.ndim)
            array = np.ascontiguousarray(array.transpose(*axes))
            tensors[".".join(filter(None, (TOWER, place, name)))] = mx.array(array)
    operations.finish()
    return tensors


def _places(layers: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Yield kind and name of every layer with weights, in the order of execution."""
    yield from (("conv", f"patch_embed.{i}.reparam_conv") for i in range(3))
    place = 0
    for stage, depth in enumerate(layers):
        if stage > 0:
            yield "conv", f"network.{place}.proj.0.lkb_reparam"
            yield "conv", f"network.{place}.proj.1.reparam_conv"
            place += 1
        if stage > 2:
            yield "conv", f"network.{place}.reparam_conv"
            place += 1
        for block in range(depth):
            yield from _block(f"network.{place}.{block}", attention=stage > 2)
        place += 1
    yield "conv", "conv_exp.reparam_conv"
    yield "conv", "conv_exp.se.reduce"
    yield "conv", "conv_exp.se.expand"


def _block(path: str, attention: bool) -> Iterator[tuple[str, str]]:
    if attention:
        yield "norm", f"{path}.norm"
        yield "bare", f"{path}.token_mixer.qkv"
        yield "linear", f"{path}.token_mixer.proj"
        yield "scale", f"{path}.layer_scale_1"
    else:
        yield "conv", f"{path}.token_mixer.reparam_conv"
    yield "folded", f"{path}.convffn.conv"
    yield "conv", f"{path}.convffn.fc1"
    yield "conv", f"{path}.convffn.fc2"
    yield "scale", f"{path}.layer_scale_2" if attention else f"{path}.layer_scale"


class _Layers:
    """Program operations with weights, consumed in order.

    position: index of the next operation. bias: bias of the last convolution or linear
    layer, which has the shape of a layer scale that was folded into it.
    """

    def __init__(self, program: "_Program") -> None:
        self.program = program
        self.operations = [op for op in program.operations if self._has_weights(op)]
        self.position, self.bias = 0, np.zeros(0, np.float32)

    def _has_weights(self, operation: Operation) -> bool:
        kind = operation.type
        if kind != "mul":
            return kind in ("conv", "linear", "batch_norm", "layer_norm")
        # A layer scale is a vector; a product with one number has no weights.
        return any(self.program.size(name) > 1 for name in _inputs(operation, "x", "y"))

    def take(self, kind: str, path: str) -> dict[str, np.ndarray]:
        """Return the weights of the next layer, by name.

        Raises `InputError` unless the layer has this kind and its names this path.
        """
        expected = _OPERATIONS.get(kind, ("conv",))
        rest = self.operations[self.position :]
        operation = rest[0] if rest else None
        if operation is None or operation.type not in expected:
            if kind == "scale":  # folded into the layer before it, so 1 is left
                return {"": np.ones_like(self.bias).reshape(1, 1, -1)}
            actual = operation.type if operation is not None else "its end"
            self.program.refuse(f"{path} is {actual} and not {expected[0]}")
        self.position += 1
        return getattr(self, f"_{kind}")(operation, path)

    def finish(self) -> None:
        """Raise `InputError` when operations with weights are left."""
        left = len(self.operations) - self.position
        if left:
            self.program.refuse(f"{left} layers follow the last one")

    def _conv(self, operation: Operation, path: str) -> dict[str, np.ndarray]:
        self.bias = self._value(operation, "bias", path)
        return {"weight": self._value(operation, "weight", path), "bias": self.bias}

    _linear = _conv

    def _bare(self, operation: Operation, path: str) -> dict[str, np.ndarray]:
        """Return a linear layer without bias; coremltools stores zeros for it."""
        arrays = self._conv(operation, path)
        if np.any(arrays["bias"]):
            self.program.refuse(f"{path} has a bias")
        return {"weight": arrays["weight"]}

    def _folded(self, operation: Operation, path: str) -> dict[str, np.ndarray]:
        """Split a folded convolution: a batch norm adds its bias and scales by 1.

        The MLX layout needs the batch norm. Its variance is 1 - eps, as the norm
        divides by sqrt(variance + eps).
        """
        arrays = self._conv(operation, path)
        bias = arrays["bias"]
        ones, zeros = np.ones_like(bias), np.zeros_like(bias)
        variance = (ones.astype(np.float32) - np.float32(_NORM_EPS)).astype(bias.dtype)
        return {
            **{"conv.weight": arrays["weight"], "bn.weight": ones, "bn.bias": bias},
            **{"bn.running_mean": zeros, "bn.running_var": variance},
        }

    def _norm(self, operation: Operation, path: str) -> dict[str, np.ndarray]:
        """Return a layer norm's weights.

        coremltools may have turned its affine step into a batch norm, whose mean and
        variance are then folded into weight and bias.
        """
        weight, bias = (self._value(operation, p, path) for p in ("gamma", "beta"))
        if operation.type == "batch_norm":
            eps, mean, variance = (
                self._value(operation, part, path).astype(np.float32)
                for part in ("epsilon", "mean", "variance")
            )
            scale = 1 / np.sqrt(variance + eps)
            bias = (bias - mean * scale * weight).astype(weight.dtype)
            weight = (weight * scale).astype(weight.dtype)
        return {"weight": weight, "bias": bias}

    def _scale(self, operation: Operation, path: str) -> dict[str, np.ndarray]:
        names = _inputs(operation, "x", "y")
        name = next(n for n in names if self.program.size(n) > 1)
        self._check_name(name, path)
        return {"": self.program.value(name).reshape(1, 1, -1)}

    def _value(self, operation: Operation, part: str, path: str) -> np.ndarray:
        names = _inputs(operation, part)
        if len(names) != 1:
            self.program.refuse(f"{path} has no {part}")
        self._check_name(names[0], path)
        return self.program.value(names[0])

    def _check_name(self, name: str, path: str) -> None:
        """Raise `InputError` for a constant with the PyTorch name of another layer.

        coremltools keeps PyTorch's names where it folds nothing.
        """
        parts = ("network_", "patch_embed_", "conv_exp_")
        is_named = any(part in name for part in parts)
        if is_named and f"_{path.replace('.', '_')}_" not in f"_{name}_":
            self.program.refuse(f"{path} is called {name}")


def _inputs(operation: Operation, *parts: str) -> list[str]:
    """Return the names of the variables that an operation has as inputs `parts`."""
    return [
        argument.name
        for part in parts
        if part in operation.inputs
        for argument in operation.inputs[part].arguments
    ]


class _Program:
    """Operations of a package's function `main`, and its constants by name."""

    def __init__(self, package: Path) -> None:
        self.package = package
        file = _model_file(package)
        self.weights = file.parent / "weights" / "weight.bin"
        model = _parse(file, package)
        functions = model.mlProgram.functions
        if "main" not in functions:
            self.refuse("it has no program with a function main")
        main = functions["main"]
        if main.opset not in main.block_specializations:
            self.refuse("its function main is empty")
        operations = main.block_specializations[main.opset].operations
        self.operations = [op for op in operations if op.type != "const"]
        self.constants = {
            op.outputs[0].name: op.attributes["val"]
            for op in operations
            if op.type == "const" and op.outputs and "val" in op.attributes
        }

    def size(self, name: str) -> int:
        """Return the number of elements of a constant; 0 for another variable."""
        value = self.constants.get(name)
        return math.prod(_shape(value)) if value is not None else 0

    def value(self, name: str) -> np.ndarray:
        """Return a constant of 16- or 32-bit floats; else raise `InputError`."""
        value = self.constants.get(name)
        kind = value.type.tensorType.dataType if value is not None else None
        if value is None or kind not in _FLOATS:
            self.refuse(f"{name} is no constant of 16- or 32-bit floats")
        shape, dtype = _shape(value), _FLOATS[kind]
        if value.HasField("blobFileValue"):
            array = self._stored(value.blobFileValue.offset, dtype, name)
        else:
            tensor = value.immediateValue.tensor
            array = np.array(tensor.floats.values, np.float32)
            if tensor.HasField("bytes"):
                array = np.frombuffer(tensor.bytes.values, dtype)
        if array.size != math.prod(shape):
            self.refuse(f"{name} has {array.size} numbers for the shape {shape}")
        return array.reshape(shape)

    def _stored(self, offset: int, dtype: np.dtype, name: str) -> np.ndarray:
        """Read a constant from weight.bin, by the header entry at `offset`.

        An entry holds mark, type, bytes and position of the numbers.
        """
        try:
            size = self.weights.stat().st_size if self.weights.is_file() else 0
            with self.weights.open("rb") if size else io.BytesIO() as stream:
                stream.seek(offset)
                mark, kind, count, start = struct.unpack("<IIQQ", stream.read(24))
                is_valid = mark == _MARK and _STORED.get(kind) == dtype
                if is_valid and start + count <= size and count % dtype.itemsize == 0:
                    stream.seek(start)
                    return np.frombuffer(stream.read(count), dtype)
        except (OSError, struct.error, OverflowError, ValueError):
            pass
        self.refuse(f"{name} is not in its weights/weight.bin")

    def refuse(self, problem: str) -> NoReturn:
        """Raise `InputError` with the problem of the package."""
        raise InputError(
            f"{self.package} is no FastViTHD as Apple exports it ({problem}); "
            f"{_INSTEAD}"
        )


def _shape(value: MILValue) -> tuple[int, ...]:
    dimensions: Iterable = value.type.tensorType.dimensions
    return tuple(dimension.constant.size for dimension in dimensions)


def _model_file(package: Path) -> Path:
    """Return the model file that the manifest names; refuse one outside the package."""
    manifest = read_json(package / "Manifest.json")
    try:
        name = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        parts = PurePosixPath(name[:256]).parts
    except (LookupError, TypeError):
        name, parts = "", ()
    if not parts or parts[0] == "/" or ".." in parts:
        raise InputError(
            f"Manifest.json of {package} names no model inside the package; {_INSTEAD}"
        )
    file = package.joinpath("Data", *parts)
    if not file.is_file():
        raise InputError(f"{package} lacks its {name}; {_INSTEAD}")
    return file


def _parse(file: Path, package: Path) -> Model:
    # coremltools warns on Linux about its macOS libraries, which are not needed here.
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        from coremltools.proto import Model_pb2
    except ImportError:
        raise InputError(
            f"the vision tower {package} is a Core ML package, and coremltools, which "
            "reads it, is not installed; install it with pip install "
            "'mlx-tokprune[coreml]'"
        ) from None
    messages: Any = Model_pb2
    model = messages.Model()
    try:
        model.ParseFromString(file.read_bytes())
    except Exception:  # the class of protobuf's error depends on its version
        raise InputError(f"{file} is damaged; {_INSTEAD}") from None
    return model
