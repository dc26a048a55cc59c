"""Cost of a function from its MLX graph: FLOPs, bytes and kernel launches.

Nothing is evaluated, so a model larger than memory can be counted. The graph has plain
operations, without the forms for the CPU. Operations with a Metal kernel (attention,
norms, rotary positions) count as one launch. The counts model Metal and are no
measurement; they also work on Linux. The tracing API of MLX is experimental; besides
this module only `coreml/capture.py` uses it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..models.layers import plain_operations

# Operations that return a view of their input, without a launch.
VIEWS = {
    *("AsStrided", "Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice"),
    *("Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "BroadcastAxes"),
}
_FUSED = ("layer_norm", "rms_norm", "rope", "scaled_dot_product_attention")


@dataclass(frozen=True)
class Cost:
    """Cost of a computation.

    flops: FLOPs of products and convolutions, two per multiply-add. bytes: bytes that
    all launches read and write. weights: bytes of constants, read once. launches:
    kernels without fusion.
    """

    flops: float = 0.0
    bytes: float = 0.0
    weights: float = 0.0
    launches: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Cost(*(ours + theirs for ours, theirs in pairs))


def count(function: Callable, *arrays: mx.array) -> Cost:
    """Return the cost of `function(*arrays)`, which returns arrays."""
    events: list[dict] = []
    with as_on_metal() as fused:
        mx.export_function(events.append, function, *arrays)
    total = Cost(weights=_constant_bytes(events))
    for event in events:
        if event["type"] != "primitive":
            continue
        if event["name"] == "Depends":  # a stand-in; its mark's size is the number
            total += fused[event["inputs"][-1][1][0] - 1]
        elif event["name"] not in VIEWS:
            total += _of_primitive(event)
    return total


def _size(array: tuple) -> int:
    """Return the bytes of a traced array `(name, shape, dtype)`."""
    _, shape, dtype = array
    return math.prod(shape) * dtype.size


def _constant_bytes(events: list[dict]) -> int:
    constants = [e["constants"] for e in events if e["type"] == "constants"]
    return sum(array.nbytes for group in constants for _, array in group)


def _of_primitive(event: dict) -> Cost:
    inputs, outputs = event["inputs"], event["outputs"]
    moved = sum(map(_size, inputs)) + sum(map(_size, outputs))
    made = sum(math.prod(shape) for _, shape, _ in outputs)
    per_output = 0
    if event["name"] in ("Matmul", "AddMM", "QuantizedMatmul"):
        per_output = 2 * inputs[0][1][-1]
    elif event["name"] == "Convolution":
        per_output = 2 * math.prod(inputs[1][1][1:])
    return Cost(per_output * made, moved, 0, 1)


@contextlib.contextmanager
def as_on_metal() -> Iterator[list[Cost]]:
    """Use plain operations and stand-ins for fused ones; yield the stand-ins' costs.

    Without Metal, MLX builds fused operations from primitives, which would all count.
    """
    costs: list[Cost] = []
    originals = {name: getattr(mx.fast, name) for name in _FUSED}

    def stand_in(name: str) -> Callable:
        def run(x: mx.array, *args: Any, **options: Any) -> mx.array:
            inputs = [a for a in args if isinstance(a, mx.array)]
            moved = 2 * x.nbytes + sum(a.nbytes for a in inputs)
            flops = 0
            if name == "scaled_dot_product_attention":
                flops = 4 * x.size * inputs[0].shape[-2]
            costs.append(Cost(flops, moved, 0, 1))
            # The export has no calls that the result does not need, so each stand-in
            # carries its number in `costs`, as the length of an empty array.
            mark = mx.array(np.zeros((len(costs), 0), np.float32))
            return mx.depends([x], [*inputs, mark])[0]

        return run

    try:
        for name in _FUSED:
            setattr(mx.fast, name, stand_in(name))
        with plain_operations():
            yield costs
    finally:
        for name, function in originals.items():
            setattr(mx.fast, name, function)
