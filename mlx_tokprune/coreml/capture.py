"""The graph of an MLX function: constants, and one `Node` per primitive.

MLX hands every primitive of a traced function to a callback; nothing is evaluated, so
what is exported is what runs. (That this makes a converter is the idea of mlx2coreml,
https://pypi.org/project/mlx2coreml.) Traced on the CPU with MLX's own operations, so
that a Mac and a Linux machine get the same graph.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..models.layers import plain_operations

LAYER_NORM = "LayerNorm"


@dataclass(frozen=True)
class Node:
    """One primitive. inputs, outputs: names of arrays. shapes, dtypes: of outputs."""

    kind: str
    arguments: tuple
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can run, and constants by name."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, np.ndarray]
    nodes: tuple[Node, ...]

    def reaches(self) -> tuple[bool, ...]:
        """Whether each output depends on any input."""
        live = set(self.inputs)
        for node in self.nodes:
            if live.intersection(node.inputs):
                live.update(node.outputs)
        return tuple(name in live for name in self.outputs)


def capture(function: Callable, *arrays: mx.array) -> Graph:
    """The graph of `function(*arrays)`, which returns a list of arrays."""
    events: list[dict] = []
    with plain_operations(), _whole_layer_norm(), mx.stream(mx.cpu):
        mx.export_function(events.append, function, *arrays)
    nodes, found = [], {"constants": [], "inputs": [], "outputs": []}
    for event in events:
        if event["type"] == "primitive":
            nodes.append(_node(event))
        elif event["type"] in found:
            found[event["type"]] += event[event["type"]]
    return Graph(
        tuple(name for name, *_ in found["inputs"]),
        tuple(name for name, *_ in found["outputs"]),
        {name: np.asarray(array) for name, array in found["constants"]},
        tuple(nodes),
    )


def _node(event: dict) -> Node:
    names, shapes, dtypes = zip(*event["outputs"], strict=True)
    inputs = tuple(name for name, *_ in event["inputs"])
    # The only use of `mx.depends` here; see below.
    kind = LAYER_NORM if event["name"] == "Depends" else event["name"]
    return Node(kind, tuple(event["arguments"]), inputs, names, shapes, dtypes)


@contextlib.contextmanager
def _whole_layer_norm() -> Iterator[None]:
    """Trace layer norms as one node of (x, weight, bias, eps).

    On the CPU they would come as a dozen nodes, whose sums of squares overflow in
    float16; Core ML has the whole operation.
    """
    fused = mx.fast.layer_norm

    def stand_in(x, weight, bias, eps, **_):
        channels = x.shape[-1:]
        weight = mx.ones(channels) if weight is None else weight
        bias = mx.zeros(channels) if bias is None else bias
        return mx.depends([x], [weight, bias, mx.array(eps)])[0]

    mx.fast.layer_norm = stand_in
    try:
        yield
    finally:
        mx.fast.layer_norm = fused
