"""Graph of an MLX function: constants, and one `Node` per primitive.

`mx.export_function` passes every primitive of a traced function to a callback and
evaluates nothing, so the exported graph is the graph that runs. (Conversion from these
callbacks is the idea of mlx2coreml, https://pypi.org/project/mlx2coreml.) Functions are
traced on the CPU with MLX's own operations, so that a Mac and a Linux machine get the
same graph.
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
    """One MLX primitive.

    kind, arguments: name and attributes of the primitive. inputs, outputs: names of
    arrays. shapes, dtypes: one per output.
    """

    kind: str
    arguments: tuple
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]


@dataclass(frozen=True)
class Graph:
    """Nodes in an order of execution, constants by name, input and output names."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, np.ndarray]
    nodes: tuple[Node, ...]

    def reaches(self) -> tuple[bool, ...]:
        """Return for each output whether it depends on an input."""
        live = set(self.inputs)
        for node in self.nodes:
            if live.intersection(node.inputs):
                live.update(node.outputs)
        return tuple(name in live for name in self.outputs)


def capture(function: Callable[..., list[mx.array]], *arrays: mx.array) -> Graph:
    """Trace `function(*arrays)`, which returns a list of arrays, into a `Graph`."""
    events: list[dict] = []
    with plain_operations(), _whole_layer_norm(), mx.stream(mx.cpu):
        mx.export_function(events.append, function, *arrays)
    nodes, arrays_by_type = [], {"constants": [], "inputs": [], "outputs": []}
    for event in events:
        if event["type"] == "primitive":
            nodes.append(_node(event))
        elif event["type"] in arrays_by_type:
            arrays_by_type[event["type"]] += event[event["type"]]
    return Graph(
        tuple(name for name, *_ in arrays_by_type["inputs"]),
        tuple(name for name, *_ in arrays_by_type["outputs"]),
        {name: np.asarray(array) for name, array in arrays_by_type["constants"]},
        tuple(nodes),
    )


def _node(event: dict) -> Node:
    names, shapes, dtypes = zip(*event["outputs"], strict=True)
    inputs = tuple(name for name, *_ in event["inputs"])
    # `_whole_layer_norm` marks layer norms with `mx.depends`, which nothing else uses.
    kind = LAYER_NORM if event["name"] == "Depends" else event["name"]
    return Node(kind, tuple(event["arguments"]), inputs, names, shapes, dtypes)


@contextlib.contextmanager
def _whole_layer_norm() -> Iterator[None]:
    """Trace each layer norm as one node with the inputs (x, weight, bias, eps).

    On the CPU, MLX traces it as a dozen nodes, whose sums of squares overflow in
    float16; Core ML has the whole operation. `mx.depends` stands in for it: a
    primitive that keeps its inputs and computes nothing.
    """
    fused = mx.fast.layer_norm

    def stand_in(
        x: mx.array,
        weight: mx.array | None,
        bias: mx.array | None,
        eps: float,
        **_: object,
    ) -> mx.array:
        channels = x.shape[-1:]
        weight = mx.ones(channels) if weight is None else weight
        bias = mx.zeros(channels) if bias is None else bias
        return mx.depends([x], [weight, bias, mx.array(eps)])[0]

    mx.fast.layer_norm = stand_in
    try:
        yield
    finally:
        mx.fast.layer_norm = fused
