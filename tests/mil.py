"""Reader of Core ML packages that runs them in NumPy, independent of the exporter.

A package is a protobuf program and a file of weights. Every operation is evaluated in
float32 from its description in Apple's MIL reference, and rounded to the type that the
program declares, so that float16 programs lose the same precision.
"""

import json
import math
from pathlib import Path

import numpy as np
from coremltools.proto import Model_pb2

# MIL.DataType: numbers of the protobuf.
TYPES = {1: bool, 2: str, 10: np.float16, 11: np.float32, 23: np.int32}
TYPES |= {21: np.int8, 22: np.int16, 31: np.uint8, 32: np.uint16, 33: np.uint32}
TYPES |= dict.fromkeys((35, 36, 37, 38, 39), np.uint8)  # of 4, 2, 1, 6 and 3 bits
BITS = {9: 1, 10: 2, 11: 4, 12: 3, 13: 6}  # by the number of their type in the file
SENTINEL = 0xDEADBEEF


class Package:
    """Core ML package on disk; `predict` runs one of its functions."""

    def __init__(self, path: Path):
        data = Path(path) / "Data"
        manifest = json.loads((Path(path) / "Manifest.json").read_text())
        items = manifest["itemInfoEntries"]
        self.spec = Model_pb2.Model()
        model = data / items[manifest["rootModelIdentifier"]]["path"]
        self.spec.ParseFromString(model.read_bytes())
        (weights,) = [i for i in items.values() if i["name"] == "weights"]
        file = data / weights["path"] / "weight.bin"
        self.blob = file.read_bytes() if file.exists() else b""
        self.functions = self.spec.mlProgram.functions

    def block(self, function: str | None = None):
        name = function or self.spec.description.defaultFunctionName or "main"
        function = self.functions[name]
        return function.block_specializations[function.opset]

    def kinds(self, function: str | None = None) -> list[str]:
        """Return the types of the operations except constants, in order."""
        operations = self.block(function).operations
        return [o.type for o in operations if not o.type.startswith("const")]

    def predict(self, inputs: dict, function: str | None = None) -> dict:
        block, known = self.block(function), dict(inputs)
        # Numbers are dropped after their last use: full-size models would not fit.
        last = {}
        for number, operation in enumerate(block.operations):
            for name in _names(operation):
                last[name] = number
        for number, operation in enumerate(block.operations):
            given = {k: self._argument(v, known) for k, v in operation.inputs.items()}
            given |= {
                k: self.value(v)
                for k, v in operation.attributes.items()
                if k not in given and k != "name"
            }
            results = OPERATIONS[operation.type](**given)
            if len(operation.outputs) == 1:
                results = [results]
            for output, result in zip(operation.outputs, results, strict=True):
                known[output.name] = _typed(result, output.type)
            for name in set(_names(operation)):
                if last[name] == number and name not in block.outputs:
                    del known[name]
        return {name: known[name] for name in block.outputs}

    def _argument(self, argument, known: dict):
        found = [
            known[a.name] if a.name else self.value(a.value) for a in argument.arguments
        ]
        return found if len(found) > 1 else found[0]

    def value(self, value):
        """Return a constant from the protobuf or from the file of weights."""
        tensor = value.type.tensorType
        dtype = TYPES[tensor.dataType]
        shape = tuple(d.constant.size for d in tensor.dimensions)
        if value.HasField("blobFileValue"):
            return self._weights(value.blobFileValue.offset, dtype, shape)
        stored = value.immediateValue.tensor
        if stored.WhichOneof("value") == "bytes":
            found = np.frombuffer(stored.bytes.values, dtype)
        else:
            found = list(getattr(stored, stored.WhichOneof("value")).values)
        if dtype is str:
            return found[0]
        return np.array(found, dtype).reshape(shape)

    def _weights(self, offset: int, dtype, shape: tuple) -> np.ndarray:
        sentinel, kind = np.frombuffer(self.blob, "<u4", 2, offset)
        size, start = np.frombuffer(self.blob, "<u8", 2, offset + 8)
        assert sentinel == SENTINEL, "no weights where the program says"
        count, bits = math.prod(shape), BITS.get(int(kind))
        raw = np.frombuffer(self.blob, np.uint8, int(size), int(start))
        if bits:
            return _unpacked(raw, bits, count).reshape(shape)
        return raw.view(dtype)[:count].reshape(shape)


def _unpacked(raw: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpack `count` numbers of `bits` bits each, lowest bit first."""
    spread = np.unpackbits(raw, bitorder="little")[: count * bits]
    return (spread.reshape(count, bits) * (1 << np.arange(bits))).sum(1)


def _names(operation) -> list[str]:
    return [a.name for v in operation.inputs.values() for a in v.arguments if a.name]


def _typed(result, declared):
    tensor = declared.tensorType
    dtype = TYPES.get(tensor.dataType)
    if dtype in (None, str) or isinstance(result, str):
        return result
    result = np.asarray(result)
    shape = tuple(d.constant.size for d in tensor.dimensions)
    assert result.shape == shape, f"{result.shape} where the program says {shape}"
    return result.astype(dtype)


# Operations -------------------------------------------------------------------------


def wide(x):
    """Return float16 arrays as float32, so that only the result is rounded."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def erf(x):
    """Return erf by formula 7.1.26 of Abramowitz and Stegun, within 1.5e-7."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    terms = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
    total = sum(c * t ** (i + 1) for i, c in enumerate(terms))
    return np.sign(x) * (1 - total * np.exp(-x * x))


def gelu(x, mode):
    assert mode == "EXACT"
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def conv(x, weight, bias=None, strides=(1, 1), pad=(0,) * 4, groups=1, **rest):
    assert set(np.ravel(rest.get("dilations", 1))) == {1}
    assert rest.get("pad_type", "custom") in ("custom", "valid")
    outputs, per_group, *size = weight.shape
    x = np.pad(x, ((0, 0), (0, 0), tuple(pad[:2]), tuple(pad[2:])))
    steps = zip(x.shape[2:], size, strides, strict=True)
    height, width = ((n - k) // s + 1 for n, k, s in steps)
    total = np.zeros((x.shape[0], outputs, height, width), np.float32)
    if per_group == 1:
        x = np.repeat(x, outputs // x.shape[1], axis=1)
    else:
        assert groups == 1
    for i in range(size[0]):
        for j in range(size[1]):
            part = x[:, :, i : i + strides[0] * (height - 1) + 1 : strides[0]]
            part = part[..., j : j + strides[1] * (width - 1) + 1 : strides[1]]
            if per_group == 1:
                total += part * weight[:, 0, i, j][:, None, None]
            else:
                flat = part.reshape(*part.shape[:2], -1)
                total += (weight[:, :, i, j] @ flat).reshape(total.shape)
    return total if bias is None else total + bias[:, None, None]


def layer_norm(x, axes, gamma=None, beta=None, epsilon=1e-5):
    axes = tuple(axes)
    centred = x - x.mean(axes, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + epsilon)
    y = y if gamma is None else y * gamma
    return y if beta is None else y + beta


def softmax(x, axis):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def matmul(x, y, transpose_x=False, transpose_y=False):
    x = x.swapaxes(-1, -2) if transpose_x else x
    return x @ (y.swapaxes(-1, -2) if transpose_y else y)


def linear(x, weight, bias=None):
    y = x @ weight.T
    return y if bias is None else y + bias


def slice_by_index(x, begin, end, **rest):
    masks = {k: rest.pop(k, np.zeros(x.ndim, bool)) for k in ("begin_mask", "end_mask")}
    assert not np.any(rest.pop("squeeze_mask", False))
    stride = rest.pop("stride", np.ones(x.ndim, int))
    assert not rest
    slices = tuple(
        slice(None if mb else b, None if me else e, s)
        for b, e, s, mb, me in zip(
            begin, end, stride, masks["begin_mask"], masks["end_mask"], strict=True
        )
    )
    return x[slices]


def slice_by_size(x, begin, size):
    return x[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))]


def split(x, axis, split_sizes=None, num_splits=None):
    edges = num_splits if split_sizes is None else np.cumsum(split_sizes)[:-1]
    return np.split(x, edges, axis)


def gather(x, indices, axis, **rest):
    assert rest.get("batch_dims", 0) == 0
    return np.take(x, indices, axis)


def gather_along_axis(x, indices, axis, **rest):
    return np.take_along_axis(x, indices, int(axis))


def cumsum(x, axis, exclusive=False, reverse=False):
    assert not exclusive
    x = np.flip(x, int(axis)) if reverse else x
    total = x.cumsum(int(axis))
    return np.flip(total, int(axis)) if reverse else total


def cast(x, dtype):
    names = {"fp32": np.float32, "fp16": np.float16, "int32": np.int32}
    names |= {"bool": bool, "int16": np.int16, "uint16": np.uint16}
    return x.astype(names[dtype])


def dequantized(quantized_data, scale, zero_point, axis):
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    scale, zero = (np.reshape(v, shape) if v.ndim else v for v in (scale, zero_point))
    return scale * (quantized_data.astype(np.float32) - zero)


def shifted_scaled(data, scale, offset=None):
    """Dequantize `data` blockwise: `scale` holds one number per block."""
    for axis, (n, m) in enumerate(zip(data.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, n // m, axis)
        offset = offset if offset is None else np.repeat(offset, n // m, axis)
    data = data.astype(np.float32)
    return scale * (data if offset is None else data - offset)


def looked_up(indices, lut, shape=None):
    """Look up palette indices: packed bytes on iOS 16, plain indices on iOS 18."""
    if shape is not None:
        places = _unpacked(indices, int(math.log2(lut.size)), math.prod(shape))
        return lut[places].reshape(shape)
    assert lut.size == lut.shape[-2]
    return lut.reshape(-1)[indices]


def reduction(function):
    def reduce(x, axes, keep_dims=False):
        return function(x, axis=tuple(axes), keepdims=bool(keep_dims))

    return reduce


def floating(function):
    def run(**given):
        return function(
            **{k: wide(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
        )

    return run


def unary(function):
    return lambda x: function(x)


def binary(function):
    return lambda x, y: function(x, y)


OPERATIONS = {
    "const": lambda val: val,
    "identity": lambda x: x,
    "cast": cast,
    "transpose": lambda x, perm: x.transpose(perm),
    "reshape": lambda x, shape: x.reshape(shape),
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(axes)),
    "squeeze": lambda x, axes: np.squeeze(x, tuple(axes)),
    "tile": lambda x, reps: np.tile(x, reps),
    "concat": lambda values, axis, interleave=False: np.concatenate(values, int(axis)),
    "split": split,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "select": lambda cond, a, b: np.where(cond, a, b),
    "cumsum": cumsum,
    "floor_div": binary(np.floor_divide),
    "logical_not": lambda x: ~x,
    "logical_and": binary(np.logical_and),
    "logical_or": binary(np.logical_or),
    "greater": binary(np.greater),
    "greater_equal": binary(np.greater_equal),
    "less": binary(np.less),
    "equal": binary(np.equal),
    "constexpr_affine_dequantize": floating(dequantized),
    "constexpr_blockwise_shift_scale": floating(shifted_scaled),
    "constexpr_lut_to_dense": looked_up,
    **{
        name: floating(function)
        for name, function in {
            "conv": conv,
            "linear": linear,
            "matmul": matmul,
            "gelu": gelu,
            "abs": unary(np.abs),
            "cos": unary(np.cos),
            "erf": unary(erf),
            "sin": unary(np.sin),
            "layer_norm": layer_norm,
            "softmax": softmax,
            "sigmoid": unary(lambda x: 1 / (1 + np.exp(-x))),
            "silu": unary(lambda x: x / (1 + np.exp(-x))),
            "square": unary(np.square),
            "sqrt": unary(np.sqrt),
            "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + epsilon),
            "relu": unary(lambda x: np.maximum(x, 0)),
            "add": binary(np.add),
            "sub": binary(np.subtract),
            "mul": binary(np.multiply),
            "real_div": binary(np.divide),
            "maximum": binary(np.maximum),
            "minimum": binary(np.minimum),
            "reduce_sum": reduction(np.sum),
            "reduce_mean": reduction(np.mean),
            "reduce_max": reduction(np.max),
            "reduce_min": reduction(np.min),
        }.items()
    },
}
