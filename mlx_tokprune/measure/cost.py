"""What a function asks of the machine, from its MLX graph: FLOPs, bytes, launches.

Nothing is evaluated, so a model larger than memory can be counted. The graph is the
plain one, without the forms for the CPU, and operations that Metal has a kernel for
(attention, norms, rotary positions) count as one. Counted on Linux, so a model of what
Metal does, not a measurement. The tracing API of MLX is experimental; besides this file
only `coreml/capture.py` uses it.
"""

import contextlib
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..models.layers import plain_operations

# Operations that only describe their input differently.
_VIEWS = {
    *("AsStrided", "Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice"),
    *("Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "BroadcastAxes"),
}
_FUSED = ("layer_norm", "rms_norm", "rope", "scaled_dot_product_attention")


@dataclass(frozen=True)
class Cost:
    """flops: of products and convolutions, two per multiply-add. bytes: read and
    written by every launch. weights: bytes of constants, read once. launches: kernels
    without fusion.
    """

    flops: float = 0.0
    bytes: float = 0.0
    weights: float = 0.0
    launches: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.weights + other.weights,
            self.launches + other.launches,
        )


def count(function: Callable, *arrays: mx.array) -> Cost:
    """The cost of `function(*arrays)`, which returns arrays."""
    events: list[dict] = []
    with _as_on_metal() as fused:
        mx.export_function(events.append, function, *arrays)
    total = Cost(weights=_constant_bytes(events))
    for event in events:
        if event["type"] != "primitive":
            continue
        if event["name"] == "Depends":  # a stand-in, whose mark says which
            total += fused[event["inputs"][-1][1][0] - 1]
        elif event["name"] not in _VIEWS:
            total += _of_primitive(event)
    return total


def launches_compiled(function: Callable, *arrays: mx.array) -> int:
    """Kernels of `function(*arrays)` under `mx.compile`, which fuses simple ones."""
    with _as_on_metal(), tempfile.TemporaryDirectory() as folder:
        outputs = mx.compile(function)(*arrays)
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        before = _names(outputs, Path(folder) / "graph.dot")
        given = _names(arrays, Path(folder) / "given.dot")
    return len(before) - len(given)


def _names(arrays, file: Path) -> list[str]:
    """Operations that have to run for these arrays, views left out."""
    mx.export_to_dot(str(file), *arrays)
    labels = re.findall(r'label ="(\w+)"', file.read_text())
    return [name for name in labels if name not in _VIEWS]


def _size(array: tuple) -> int:
    """Bytes of a traced array `(name, shape, dtype)`."""
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
def _as_on_metal() -> Iterator[list[Cost]]:
    """Plain operations, and a stand-in for each fused one; gives what those cost."""
    found: list[Cost] = []
    before = {name: getattr(mx.fast, name) for name in _FUSED}

    def stand_in(name: str) -> Callable:
        def run(x, *args, **options):
            others = [a for a in args if isinstance(a, mx.array)]
            moved = 2 * x.nbytes + sum(a.nbytes for a in others)
            flops = 0
            if name == "scaled_dot_product_attention":
                flops = 4 * x.size * others[0].shape[-2]
            found.append(Cost(flops, moved, 0, 1))
            # Only what the result needs is exported: the mark tells which it was.
            mark = mx.array(np.zeros((len(found), 0), np.float32))
            return mx.depends([x], [*others, mark])[0]

        return run

    try:
        for name in _FUSED:
            setattr(mx.fast, name, stand_in(name))
        with plain_operations():
            yield found
    finally:
        for name, function in before.items():
            setattr(mx.fast, name, function)
