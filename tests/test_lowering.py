"""Every entry of the lowering table to Core ML equals MLX on random inputs."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import COREMLTOOLS_WARNINGS, needs_coremltools

from mlx_tokprune.coreml import export, lower
from mlx_tokprune.coreml.capture import LAYER_NORM, capture
from mlx_tokprune.errors import InputError

needs_coremltools()

import coremltools  # noqa: E402
from mil import Package  # noqa: E402

pytestmark = COREMLTOOLS_WARNINGS


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def ints(*shape: int) -> mx.array:
    return mx.random.randint(0, 5, shape, key=mx.random.key(1))


W, BIAS, SCALE = random(6, 5, seed=2), random(6), random(4, seed=3)
GROUPED, WHOLE = random(8, 3, 3, 1), random(8, 3, 3, 4)
mx.eval(W, BIAS, SCALE, GROUPED, WHOLE)  # or they would be part of what is traced
CASES = {
    "Abs": (mx.abs, random(3, 4)),
    "Add": (lambda x, y: x + y[:, None], random(2, 3, 4), random(2, 4)),
    "AddMM": (lambda x: mx.addmm(BIAS, x, W.T), random(2, 3, 4, 5)),
    "Arange": (lambda x: x * mx.arange(4), random(3, 4)),
    "ArgReduce": (
        lambda x: mx.argmax(x, 1) + mx.argmin(x, 1) + mx.argmax(x > 2, 1),
        ints(2, 6, 3) * 1.0,
    ),
    "ArgSort": (lambda x: mx.argsort(x, 1).astype(mx.int32), ints(3, 9) * 1.0),
    "AsType": (lambda x: (x > 0).astype(mx.float32) + x.astype(mx.int32), random(2, 3)),
    "BitwiseBinary": (
        lambda x: mx.where((x > 0) & (x < 1) | (x < -1), x, 0.0),
        random(4, 5),
    ),
    "Broadcast": (lambda x: mx.broadcast_to(x, (2, 3, 4)).reshape(6, 4), random(3, 1)),
    "Concatenate": (lambda x, y: mx.concatenate([x, y], 1), random(2, 3), random(2, 1)),
    "Convolution": (
        lambda x: (
            mx.conv2d(x, GROUPED, 2, 1, groups=4) + mx.conv2d(x, WHOLE, (2, 2), (1, 1))
        ),
        random(1, 8, 6, 4),
    ),
    "Divide": (lambda x, y: x / y, random(2, 3), random(3)),
    "Equal": (lambda x: (x == mx.array([1, 2, 3])).astype(mx.int32), ints(4, 3)),
    "Cos": (mx.cos, random(3, 4)),
    "Erf": (mx.erf, random(3, 4)),
    "Sin": (mx.sin, random(3, 4)),
    "ExpandDims": (lambda x: mx.expand_dims(x, (0, 2)), random(2, 3)),
    "Flatten": (lambda x: x.flatten(1, 2), random(2, 3, 4)),
    "FloorDivide": (lambda x, y: (x - 2) // (y + 1), ints(3, 4), ints(4)),
    "Full": (lambda x: x + mx.ones_like(x), random(2, 3)),
    "GatherAxis": (
        lambda x, i: (
            mx.take_along_axis(x, i[..., None], 1)
            + mx.take_along_axis(x, mx.zeros((1, 3, 4), mx.int32) + i[..., None], 1)
            + mx.take_along_axis(x, i[:, :1, None] // 2, 2)[:, :3]
            + mx.take_along_axis(x > 0, i[..., None], 1).astype(mx.float32)
            + mx.take_along_axis(x, (x[:, :3] > 0).astype(mx.int32) + 2, 1)
        ),
        random(1, 6, 4),
        ints(1, 3),
    ),
    "Greater": (lambda x: mx.where(x > x[:1], 1.0, 2.0), random(3, 4)),
    LAYER_NORM: (
        lambda x: (
            mx.fast.layer_norm(x, SCALE, SCALE + 1, 1e-5)
            + mx.fast.layer_norm(x, None, None, 1e-5)
        ),
        random(2, 3, 4),
    ),
    "Less": (lambda x: mx.where(x < 0.3, x, 2.0), random(3, 4)),
    "LogicalNot": (lambda x: mx.where(~(x > 0), x, 2.0), random(3, 4)),
    "Matmul": (lambda x, y: (x @ y) @ W.T, random(2, 3, 4), random(2, 4, 5)),
    "Maximum": (lambda x: mx.maximum(x, 0.1), random(3, 4)),
    "Minimum": (lambda x: mx.minimum(x, 0.1), random(3, 4)),
    "Multiply": (lambda x: x * x[:1] * 2, random(3, 4)),
    "Negative": (lambda x: -x, random(3, 4)),
    "Pad": (
        lambda x: (
            mx.pad(x, [(0, 0), (1, 2), (0, 1)], "constant", 3.0)
            + mx.pad(x > 0, [(0, 0), (2, 1), (1, 0)]).astype(mx.float32)
        ),
        random(2, 3, 4),
    ),
    "Reduce": (
        lambda x: (
            mx.sum(x, 1)
            + mx.max(x, 1)
            + mx.min(x, 1)
            + mx.mean(x, 1)
            + mx.sum(x > 0, 1)
            + mx.where(mx.any(x > 1, 1), 1.0, 2.0)
            + mx.where(mx.all(x < 1, 1), 3.0, 5.0)
        ),
        random(2, 3, 4),
    ),
    "Reshape": (lambda x: x.reshape(4, -1).reshape(2, 2, 6), random(2, 3, 4)),
    "Scan": (
        lambda x: mx.cumsum(x, 1) + mx.cumsum(x > 0, 0) + mx.cumsum(x, 1, reverse=True),
        random(3, 4),
    ),
    "Scatter": (lambda x: mx.where(mx.eye(4, dtype=mx.bool_), x, 2.0), random(2, 4, 4)),
    "Select": (lambda x: mx.where(x[:1] > 0, x, x[:, :1]), random(3, 4)),
    "Sigmoid": (mx.sigmoid, random(3, 4)),
    "Slice": (lambda x: x[:, 1:-1, ::2], random(2, 5, 6)),
    "Softmax": (lambda x: mx.softmax(x, -1, precise=True), random(2, 3, 4)),
    "Sort": (lambda x: mx.sort(x, 1), ints(3, 9)),
    "Split": (
        lambda x: mx.split(x, 3, -1)[1] + mx.split(x, [1, 3], -1)[1],
        random(2, 5, 6),
    ),
    "Sqrt": (lambda x: mx.sqrt(x + 9) + mx.rsqrt(x + 9), random(3, 4)),
    "Square": (mx.square, random(3, 4)),
    "Squeeze": (lambda x: x.squeeze(1), random(2, 1, 3)),
    "Subtract": (lambda x, y: x - y, random(2, 3), random(3)),
    "Transpose": (lambda x: x.transpose(2, 0, 1), random(2, 3, 4)),
    "Unflatten": (lambda x: mx.unflatten(x, 1, (2, 3)), random(2, 6)),
}


def through_core_ml(path: Path, function, *arrays: mx.array) -> tuple[np.ndarray, set]:
    """Return the result of a function in a package, and its primitives."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil import mil
    from coremltools.converters.mil.mil import types

    graph = capture(lambda *arrays: [function(*arrays)], *arrays)
    kinds = {mx.float32: types.fp32, mx.int32: types.int32}
    inputs = {
        f"x{i}": mb.placeholder(a.shape, kinds[a.dtype]) for i, a in enumerate(arrays)
    }
    with mil.Function(inputs, opset_version=coremltools.target.iOS18) as body:
        (result,) = lower.lower("part", graph, list(body.inputs.values()))
        body.set_outputs([mb.identity(x=result, name="y")])
    program = mil.Program()
    program.add_function("main", body)
    with export._quiet():
        package = coremltools.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=coremltools.target.iOS18,
            compute_precision=coremltools.precision.FLOAT32,
            skip_model_load=True,
        )
    package.save(str(path))
    given = {f"x{i}": np.array(array) for i, array in enumerate(arrays)}
    return Package(path).predict(given)["y"], {node.kind for node in graph.nodes}


@pytest.mark.parametrize("kind", sorted(CASES))
def test_every_entry_of_the_table(tmp_path, kind):
    function, *arrays = CASES[kind]
    found, kinds = through_core_ml(tmp_path / "op.mlpackage", function, *arrays)
    assert kind in kinds
    expected = np.array(function(*arrays))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_every_entry_has_a_case():
    assert set(lower.TABLE) == set(CASES)


def test_a_primitive_without_an_entry_is_named():
    with pytest.raises(InputError, match=r"Tan .* of \(3, 4\) has no counterpart"):
        through_core_ml(None, mx.tan, random(3, 4))


@pytest.mark.parametrize(
    ("function", "array", "message"),
    [
        (lambda x: mx.sort(x, 0), random(3, 4), "Sort along axis 0"),
        (lambda x: mx.prod(x, 1), random(3, 4), "Reduce 3 of"),
        (
            lambda x: mx.addmm(x, x, x),
            random(3, 3),
            r"AddMM .*expected constant weights",
        ),
        (lambda x: x | 1, ints(3, 4), "BitwiseBinary 1 is supported for bools"),
        (lambda x: mx.any(x, 1), random(3, 4), "Reduce 1 of"),
        (lambda x: mx.cumprod(x, 1), random(3, 4), "Scan"),
        (lambda x: mx.cumsum(x, 1, inclusive=False), random(3, 4), "Scan"),
        (lambda x: x.at[0].add(1), random(3, 4), "Scatter"),
        (lambda x: mx.conv1d(x, WHOLE[0]), random(1, 8, 4), "Convolution"),
    ],
)
def test_forms_that_are_not_known_are_refused(function, array, message):
    with pytest.raises(InputError, match=message):
        through_core_ml(None, function, array)
