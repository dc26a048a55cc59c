"""Lowering of MLX primitives to Core ML's model intermediate language (MIL).

`TABLE` has one small entry per kind of primitive. A `Value` pairs a MIL variable with
the shape that MLX gives it, so that broadcasts and merged leading dimensions become
operations only where an entry needs them. MLX's images are channels-last and MIL's
convolutions channels-first; coremltools cancels the transposes between layers.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import InputError
from .capture import LAYER_NORM, Graph, Node
from .values import Builder, Value

if TYPE_CHECKING:  # coremltools is an extra
    from coremltools.converters.mil.mil import Var

# MIL types; indices are int32 in Core ML, uint32 in MLX.
_DTYPES = {mx.float32: "fp32", mx.bool_: "bool"} | dict.fromkeys(
    (mx.int32, mx.int64, mx.uint32), "int32"
)


Entry = Callable[[Builder, Node, list[Value]], list[Value]]
TABLE: dict[str, Entry] = {}


def lower(part: str, graph: Graph, inputs: "Sequence[Var]") -> "list[Var]":
    """Add `graph` to the current MIL function; return its outputs.

    part: prefix of the operations' names. inputs: MIL variables, as are the outputs.
    Raises `InputError` for a primitive without an entry in `TABLE`.
    """
    build = Builder(part)
    values_by_name = {n: build.constant(a) for n, a in graph.constants.items()}
    for name, var in zip(graph.inputs, inputs, strict=True):
        values_by_name[name] = Value(var, tuple(var.shape))
    for node in graph.nodes:
        values = [values_by_name[name] for name in node.inputs]
        if node.kind not in TABLE:
            shapes = ", ".join(str(value.shape) for value in values)
            raise InputError(
                f"MLX's primitive {node.kind} {node.arguments} of {shapes} has no "
                f"counterpart in Core ML; expected one of {', '.join(sorted(TABLE))}"
            )
        results = TABLE[node.kind](build, node, values)
        values_by_name |= zip(node.outputs, results, strict=True)
    return [build.dense(values_by_name[name]) for name in graph.outputs]


def _entry(*kinds: str) -> Callable[[Callable], Callable]:
    """Register `function(build, node, *values)`, which returns one value."""

    def add(function: Callable) -> Callable:
        for kind in kinds:
            TABLE[kind] = lambda build, node, values: [function(build, node, *values)]
        return function

    return add


# Elementwise ------------------------------------------------------------------------

_UNARY = {
    **{
        "Abs": "abs",
        "Cos": "cos",
        "Erf": "erf",
        "Sigmoid": "sigmoid",
        "Sin": "sin",
        "Square": "square",
    },
    "LogicalNot": "logical_not",
}
_BINARY = {
    **{"Add": "add", "Subtract": "sub", "Multiply": "mul", "Divide": "real_div"},
    **{"FloorDivide": "floor_div", "Maximum": "maximum", "Minimum": "minimum"},
    **{"Greater": "greater", "Less": "less", "Equal": "equal"},
}
_LOGICAL = ("logical_and", "logical_or")  # in the order of MLX's BitwiseBinary codes


@_entry(*_UNARY)
def _unary(build: Builder, node: Node, x: Value) -> Value:
    return build.elementwise(_UNARY[node.kind], node.shapes[0], x=x)


@_entry(*_BINARY)
def _binary(build: Builder, node: Node, x: Value, y: Value) -> Value:
    return build.elementwise(_BINARY[node.kind], node.shapes[0], x=x, y=y)


@_entry("BitwiseBinary")
def _bitwise(build: Builder, node: Node, x: Value, y: Value) -> Value:
    kind = node.arguments[0]
    if node.dtypes[0] != mx.bool_ or kind >= len(_LOGICAL):
        raise InputError(
            f"MLX's BitwiseBinary {kind} is supported for bools only; expected 'and' "
            "or 'or' of two of them"
        )
    return build.elementwise(_LOGICAL[kind], node.shapes[0], x=x, y=y)


@_entry("Sqrt")
def _sqrt(build: Builder, node: Node, x: Value) -> Value:
    reciprocal = node.arguments[0]  # MLX's `rsqrt` is `Sqrt` with this flag
    return build.elementwise("rsqrt" if reciprocal else "sqrt", node.shapes[0], x=x)


@_entry("Negative")
def _negative(build: Builder, node: Node, x: Value) -> Value:
    # MIL has no negation.
    return build.elementwise("mul", node.shapes[0], x=x, y=build.constant(-1.0))


@_entry("Select")
def _select(build: Builder, node: Node, cond: Value, a: Value, b: Value) -> Value:
    # Core ML does not specify that `select` broadcasts.
    var = build("select", cond=build.dense(cond), a=build.dense(a), b=build.dense(b))
    return Value(var, node.shapes[0])


@_entry("AsType")
def _cast(build: Builder, node: Node, x: Value) -> Value:
    dtype = _DTYPES[node.dtypes[0]]
    if _type(x.var) == dtype:
        return x
    return Value(build("cast", x=build.dense(x), dtype=dtype), x.shape)


def _type(var: "Var") -> str:
    """Return the name of a variable's type, such as `fp32`."""
    from coremltools.converters.mil.mil import types

    return types.builtin_to_string(var.dtype)


# Core ML gathers, pads and reduces numbers only: bools become 0 and 1 for these.


def _as_numbers(build: Builder, x: Value) -> "Var":
    """Return a dense variable of `x`, int32 for bools."""
    var = build.dense(x)
    return build("cast", x=var, dtype="int32") if _type(var) == "bool" else var


def _as_traced(build: Builder, node: Node, var: "Var") -> Value:
    """Return a node's result `var` as a value, cast to bool where MLX has bools."""
    if node.dtypes[0] == mx.bool_:
        var = build("cast", x=var, dtype="bool")
    return Value(var, node.shapes[0])


# Shapes -----------------------------------------------------------------------------


@_entry("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze")
def _reshape(build: Builder, node: Node, x: Value) -> Value:
    shape = node.shapes[0]
    if tuple(x.var.shape) == shape:  # nothing changes, or a merge is undone
        return Value(x.var, shape)
    # MLX flattens (B, H, W, C) to (B * H * W, C) before a matmul. Keep the variable, so
    # that `_linear` gets the image and no reshape separates the convolutions.
    merges = len(shape) == 2 and len(x.shape) > 2 and shape[1] == x.shape[-1]
    if merges and tuple(x.var.shape) == x.shape and x.constant is None:
        return Value(x.var, shape)
    return Value(build("reshape", x=build.dense(x), shape=shape), shape)


@_entry("Broadcast", "Full")
def _broadcast(build: Builder, node: Node, x: Value) -> Value:
    shape = node.shapes[0]
    if x.is_merged:  # its additional dimensions do not align with `shape`
        return Value(build.dense(x), shape)
    if x.constant is not None and x.shape:
        # coremltools' pass that cancels transposes requires constants of full rank.
        aligned = (1,) * (len(shape) - x.constant.ndim) + x.constant.shape
        return Value(build.constant(x.constant.reshape(aligned)).var, shape)
    return Value(x.var, shape)  # MIL's operations broadcast on their own


@_entry("Transpose")
def _transpose(build: Builder, node: Node, x: Value) -> Value:
    axes = list(node.arguments[0])
    return Value(build("transpose", x=build.dense(x), perm=axes), node.shapes[0])


@_entry("Slice")
def _slice(build: Builder, node: Node, x: Value) -> Value:
    begin, end, stride = map(list, node.arguments)
    var = build("slice_by_index", x=build.dense(x), begin=begin, end=end, stride=stride)
    return Value(var, node.shapes[0])


def _split(build: Builder, node: Node, values: list[Value]) -> list[Value]:
    axis = node.arguments[1]
    sizes = [shape[axis] for shape in node.shapes]
    parts = build("split", x=build.dense(values[0]), split_sizes=sizes, axis=axis)
    return [Value(var, shape) for var, shape in zip(parts, node.shapes, strict=True)]


TABLE["Split"] = _split  # not by `_entry`: it returns several values


@_entry("Concatenate")
def _concatenate(build: Builder, node: Node, *values: Value) -> Value:
    parts = [build.dense(value) for value in values]
    return Value(build("concat", values=parts, axis=node.arguments[0]), node.shapes[0])


@_entry("Pad")
def _pad(build: Builder, node: Node, x: Value, value: Value) -> Value:
    # Concatenation with constants pads any axis, for every type of numbers.
    var = _as_numbers(build, x)
    for axis, low, high in zip(*node.arguments, strict=True):
        edges = []
        for size in filter(None, (low, high)):
            shape = (*var.shape[:axis], size, *var.shape[axis + 1 :])
            # `+ 0` turns a bool into a number, as `_as_numbers` does for x.
            edges.append(build.constant(np.full(shape, value.fixed + 0)).var)
        if edges:
            values = [*edges[: low > 0], var, *edges[low > 0 :]]
            var = build("concat", values=values, axis=axis)
    return _as_traced(build, node, var)


@_entry("Scatter")
def _scatter(build: Builder, node: Node, x: Value, *rest: Value) -> Value:
    """Evaluate a scatter of constants, by which MLX builds `mx.eye`."""
    kind, axes = node.arguments  # kind 4: replace, not add or multiply
    is_constant = all(value.constant is not None for value in (x, *rest))
    if kind != 4 or len(axes) != len(x.shape) or not is_constant:
        raise InputError(
            f"MLX's Scatter {node.arguments} of {x.shape} is supported only for single "
            "numbers that replace numbers of constants"
        )
    array, *index, updates = (np.broadcast_to(v.fixed, v.shape) for v in (x, *rest))
    array = array.copy()
    array[tuple(index)] = updates.reshape(index[0].shape)
    return build.constant(array)


@_entry("Arange")
def _arange(build: Builder, node: Node) -> Value:
    start, stop, step = node.arguments
    return build.constant(np.arange(start, stop, step).astype(_numpy(node)))


def _numpy(node: Node) -> type:
    return np.int32 if _DTYPES[node.dtypes[0]] == "int32" else np.float32


# Products, convolutions, norms ------------------------------------------------------


@_entry("Matmul")
def _matmul(build: Builder, node: Node, x: Value, y: Value) -> Value:
    if y.constant is not None and len(y.shape) == 2:
        return _linear(build, node, x, y.constant, None)
    return Value(build("matmul", x=build.dense(x), y=build.dense(y)), node.shapes[0])


@_entry("AddMM")
def _addmm(build: Builder, node: Node, x: Value, y: Value, bias: Value) -> Value:
    is_unscaled = tuple(node.arguments) == (1, 1)
    if not is_unscaled or y.constant is None or bias.constant is None:
        raise InputError(
            f"MLX's AddMM {node.arguments} of {x.shape} and {y.shape} is not "
            "supported; expected constant weights and biases with factors of 1"
        )
    return _linear(build, node, x, y.constant, bias.constant.reshape(-1))


def _linear(
    build: Builder, node: Node, x: Value, weight: np.ndarray, bias: np.ndarray | None
) -> Value:
    """Multiply (..., C) by (C, D); on images as a 1x1 convolution.

    Apple's hardware prefers the convolution, and the transposes around it cancel with
    those of its neighbours.
    """
    source = x.var if x.is_merged else build.dense(x)
    weights = {"weight": np.ascontiguousarray(weight.T)}
    if bias is not None:
        weights["bias"] = bias
    if len(source.shape) != 4:
        return Value(build("linear", x=source, **weights), node.shapes[0])
    weights["weight"] = weights["weight"][:, :, None, None]
    return Value(_channels_first(build, source, **weights), node.shapes[0])


def _channels_first(build: Builder, x: "Var", **options: Any) -> "Var":
    """Convolve a channels-last image (B, H, W, C) with MIL's channels-first `conv`."""
    x = build("transpose", x=x, perm=[0, 3, 1, 2])
    x = build("conv", x=x, **options)
    return build("transpose", x=x, perm=[0, 2, 3, 1])


@_entry("Convolution")
def _convolution(build: Builder, node: Node, x: Value, weight: Value) -> Value:
    stride, low, high, dilation, input_dilation, groups, flip = node.arguments
    if set(input_dilation) != {1} or flip or len(x.shape) != 4:
        raise InputError(
            f"MLX's Convolution {node.arguments} of {x.shape} is not supported; "
            "expected two dimensions, without input dilation or flipping"
        )
    # MLX's weights are (out, H, W, in), MIL's (out, in, H, W).
    pad = [p for pair in zip(low, high, strict=True) for p in pair]
    var = _channels_first(
        build,
        build.dense(x),
        weight=np.ascontiguousarray(weight.constant.transpose(0, 3, 1, 2)),
        strides=list(stride),
        pad_type="custom",
        pad=pad,
        dilations=list(dilation),
        groups=groups,
    )
    return Value(var, node.shapes[0])


@_entry(LAYER_NORM)
def _layer_norm(
    build: Builder, node: Node, x: Value, weight: Value, bias: Value, eps: Value
) -> Value:
    channels = x.shape[-1:]  # a weight may be stored as one number
    var = build(
        "layer_norm",
        x=build.dense(x),
        axes=[-1],
        gamma=np.broadcast_to(weight.fixed, channels).copy(),
        beta=np.broadcast_to(bias.fixed, channels).copy(),
        epsilon=eps.constant,
    )
    return Value(var, node.shapes[0])


@_entry("Softmax")
def _softmax(build: Builder, node: Node, x: Value) -> Value:
    return Value(build("softmax", x=build.dense(x), axis=-1), node.shapes[0])


@_entry("Reduce")
def _reduce(build: Builder, node: Node, x: Value) -> Value:
    code, axes = node.arguments  # codes: 0 all, 1 any, 2 sum, 3 product, 4 min, 5 max
    kinds = {2: "reduce_sum", 4: "reduce_min", 5: "reduce_max"}
    if _type(x.var) == "bool":
        kinds |= {0: "reduce_min", 1: "reduce_max"}
    if code not in kinds:
        raise InputError(
            f"MLX's Reduce {code} of {x.shape} is not supported; expected sum, min or "
            "max, or all or any of bools"
        )
    numbers = _as_numbers(build, x)
    # MLX's primitive keeps the reduced axes; a `Squeeze` follows where needed.
    var = build(kinds[code], x=numbers, axes=list(axes), keep_dims=True)
    return _as_traced(build, node, var)


@_entry("Scan")
def _scan(build: Builder, node: Node, x: Value) -> Value:
    code, axis, reverse, inclusive = node.arguments  # code 2: sum
    if code != 2 or not inclusive:
        raise InputError(
            f"MLX's Scan {node.arguments} of {x.shape} is not supported; expected an "
            "inclusive sum"
        )
    numbers = _as_numbers(build, x)
    var = build("cumsum", x=numbers, axis=axis, reverse=reverse)
    return Value(var, node.shapes[0])


# Order ------------------------------------------------------------------------------
# Core ML does not specify the order of equal numbers in its sort, top-k and argmax, and
# equal tokens are common: image padding gives them. Counting the smaller numbers fixes
# the order as in MLX, has static shapes, and needs only comparisons and sums.


def _places(build: Builder, x: Value) -> "Var":
    """Return the position of each number of (B, N) in ascending order, (B, N, 1) int32.

    The order is stable: a number's position is the count of smaller numbers, plus that
    of equal numbers with a lower index.
    """
    batch, total = x.shape
    dense = build.dense(x)
    number = build("reshape", x=dense, shape=(batch, total, 1))
    other = build("reshape", x=dense, shape=(batch, 1, total))
    earlier = build.constant(np.tri(total, k=-1, dtype=bool)[None]).var
    tied = build("logical_and", x=build("equal", x=other, y=number), y=earlier)
    before = build("logical_or", x=build("less", x=other, y=number), y=tied)
    before = build("cast", x=before, dtype="int32")
    return build("reduce_sum", x=before, axes=[2], keep_dims=True)


def _put(build: Builder, places: "Var", numbers: "Var") -> "Var":
    """Move numbers (B, N, 1) to their places (B, N, 1); return (B, N) int32.

    A product with one-hot rows and a sum do this without a scatter.
    """
    slots = build.constant(np.arange(tuple(places.shape)[1])[None, None]).var
    here = build("cast", x=build("equal", x=places, y=slots), dtype="int32")
    placed = build("mul", x=here, y=numbers)
    return build("reduce_sum", x=placed, axes=[1], keep_dims=False)


def _check_rows(node: Node, x: Value) -> None:
    if len(x.shape) != 2 or node.arguments[0] not in (1, -1):
        raise InputError(
            f"MLX's {node.kind} along axis {node.arguments[0]} of {x.shape} is not "
            "supported; expected the last axis of two"
        )


@_entry("ArgSort")
def _argsort(build: Builder, node: Node, x: Value) -> Value:
    _check_rows(node, x)
    numbers = build.constant(np.arange(x.shape[1])[None, :, None]).var
    return Value(_put(build, _places(build, x), numbers), node.shapes[0])


@_entry("Sort")
def _sort(build: Builder, node: Node, x: Value) -> Value:
    _check_rows(node, x)
    numbers = build("reshape", x=build.dense(x), shape=(*x.shape, 1))
    return Value(_put(build, _places(build, x), numbers), node.shapes[0])


@_entry("ArgReduce")
def _argreduce(build: Builder, node: Node, x: Value) -> Value:
    # As MLX: the lowest index among those of the best number.
    largest, axis = node.arguments
    kind = "reduce_max" if largest else "reduce_min"
    dense, total = _as_numbers(build, x), x.shape[axis]
    best = build(kind, x=dense, axes=[axis], keep_dims=True)
    across = [total if i == axis % len(x.shape) else 1 for i in range(len(x.shape))]
    numbers = np.broadcast_to(np.arange(total).reshape(across), x.shape)
    first = build(
        "select",
        cond=build("equal", x=dense, y=best),
        a=build.constant(numbers.copy()).var,
        b=build.constant(np.full(x.shape, total)).var,
    )
    var = build("reduce_min", x=first, axes=[axis], keep_dims=True)
    return Value(var, node.shapes[0])


@_entry("GatherAxis")
def _gather(build: Builder, node: Node, x: Value, indices: Value) -> Value:
    axis, rows = node.arguments[0], indices.var  # not dense: one list of indices may do
    shape = tuple(rows.shape)
    # Indices of one row, broadcast over all others, need only MIL's plain `gather`.
    is_one_list = len(shape) == len(x.shape) and math.prod(shape) == shape[axis]
    source = _as_numbers(build, x)
    if is_one_list and x.shape[0] == 1:
        rows = build("reshape", x=rows, shape=(-1,))
        var = build("gather", x=source, indices=rows, axis=axis)
    else:
        rows = build.dense(indices)
        var = build("gather_along_axis", x=source, indices=rows, axis=axis)
    return _as_traced(build, node, var)
