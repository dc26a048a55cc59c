"""Core ML packages, read back from disk and run in NumPy (`mil.py`), against MLX."""

import dataclasses
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY

import mlx_tokprune
from mlx_tokprune import Pruner, generate
from mlx_tokprune.coreml import __main__ as cli
from mlx_tokprune.coreml import export, lower, vision
from mlx_tokprune.coreml.capture import LAYER_NORM, capture
from mlx_tokprune.coreml.describe import read_functions
from mlx_tokprune.coreml.export import Options, export_package
from mlx_tokprune.coreml.plan import compute_plan, format_plan
from mlx_tokprune.demo import CHECKPOINT, PICTURES, POLICY, POLICY_FRAME
from mlx_tokprune.errors import InputError
from mlx_tokprune.generate import main as generate_command
from mlx_tokprune.image import load_image
from mlx_tokprune.pipeline import see
from mlx_tokprune.pruners import registry

machine = sys.platform == "darwin" or platform.machine() == "x86_64"
if sys.version_info >= (3, 14) or not machine:
    pytest.skip("coremltools has no wheel for this Python", allow_module_level=True)

import coremltools  # noqa: E402
from mil import Package  # noqa: E402

# coremltools leaves temporary folders to be cleaned up by the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FLOAT32 = Options(precision="float32")


@pytest.fixture(scope="module")
def demo():
    return mlx_tokprune.load(CHECKPOINT, mx.float32)


@pytest.fixture(scope="module")
def policy():
    return mlx_tokprune.load(POLICY, mx.float32)


@pytest.fixture(scope="module")
def packages(tmp_path_factory, demo):
    """Packages of the demo model by method and options, written once."""
    folder, made = tmp_path_factory.mktemp("packages"), {}

    def package(method: str, ratios=(0.5,), options=FLOAT32) -> Path:
        key = (method, ratios, options)
        if key not in made:
            made[key] = folder / f"{len(made)}.mlpackage"
            pruners = [Pruner(method, keep_ratio=ratio) for ratio in ratios]
            export_package(demo[0], pruners, made[key], options, CHECKPOINT)
        return made[key]

    return package


def pixels_of(processor, picture=PICTURES[0]) -> np.ndarray:
    return processor.pixels([load_image(picture.path)])


def run(package: Path | Package, pixels: np.ndarray, function=None) -> dict:
    package = package if isinstance(package, Package) else Package(package)
    image = np.round(pixels * 255).astype(np.float32).transpose(0, 3, 1, 2)
    return package.predict({"image": image}, function)


def relative_error(found, expected) -> float:
    expected = np.array(expected)
    return np.abs(found - expected).max() / np.abs(expected).max()


def decibels(found, expected) -> float:
    expected = np.array(expected)
    return 10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum())


# Whole packages ---------------------------------------------------------------------

METHODS = ("norm", "attention", "mean_similarity", "similarity", "spatial", "uniform")


@pytest.mark.parametrize("method", [*METHODS, "random"])
def test_a_float32_package_does_what_mlx_does(demo, packages, method):
    model, processor = demo
    pixels = pixels_of(processor)
    visual = see(model, mx.array(pixels), Pruner(method, keep_ratio=0.5))
    found = run(packages(method), pixels)
    assert relative_error(found["image_features"], visual.embeddings) < 1e-4
    assert found["kept_indices"].tolist() == visual.selection.indices.tolist()
    assert found["kept_indices"].dtype == np.int32
    merged = visual.selection.assignment()
    assert ("assignment" in found) == (merged is not None)
    if merged is not None:
        assert found["assignment"].tolist() == merged.tolist()


@pytest.mark.parametrize("method", ["norm", "attention", "similarity"])
def test_fused_towers_of_a_policy(policy, tmp_path, method):
    model, processor = policy
    pruner = Pruner(method, keep_ratio=0.25)
    export_package(model, [pruner], tmp_path / "p.mlpackage", FLOAT32)
    pixels = pixels_of(processor, POLICY_FRAME)
    visual = see(model, mx.array(pixels), pruner)
    found = run(tmp_path / "p.mlpackage", pixels)
    assert relative_error(found["image_features"], visual.embeddings) < 1e-4
    assert found["kept_indices"].tolist() == visual.selection.indices.tolist()


def test_float16_is_close_and_chooses_in_float32(demo, packages):
    model, processor = demo
    pixels = pixels_of(processor)
    visual = see(model, mx.array(pixels), Pruner("similarity", keep_ratio=0.5))
    package = Package(packages("similarity", options=Options()))
    found = run(package, pixels)
    assert found["image_features"].dtype == np.float32
    assert found["kept_indices"].tolist() == visual.selection.indices.tolist()
    assert decibels(found["image_features"], visual.embeddings) > 35
    types = {}
    for operation in package.block().operations:
        for output in operation.outputs:
            dtype = output.type.tensorType.dataType
            types.setdefault(operation.type, set()).add(dtype)
    float16, float32 = 10, 11
    assert types["conv"] == types["gelu"] == {float16}
    assert types["square"] == types["rsqrt"] == types["reduce_max"] == {float32}


@pytest.mark.parametrize(
    ("compress", "target", "least"),
    [
        ("8bit", "iOS18", 35),
        ("8bit", "iOS16", 35),
        ("6bit", "iOS17", 25),
        ("4bit", "iOS18", 12),
    ],
)
def test_compressed_weights(demo, packages, compress, target, least):
    model, processor = demo
    pixels = pixels_of(processor)
    visual = see(model, mx.array(pixels), Pruner("spatial", keep_ratio=0.5))
    path = packages("spatial", options=Options(compress=compress, target=target))
    found = run(path, pixels)
    assert decibels(found["image_features"], visual.embeddings) > least
    share = weights(path) / weights(packages("spatial", options=Options()))
    assert share < {"8bit": 0.55, "6bit": 0.45, "4bit": 0.32}[compress]


def weights(path: Path) -> int:
    (file,) = path.glob("Data/*/weights/weight.bin")
    return file.stat().st_size


def test_functions_share_weights(demo, packages):
    model, processor = demo
    pixels = pixels_of(processor)
    ratios = {"keep_50": 0.5, "keep_25": 0.25, "keep_12_5": 0.125, "unpruned": None}
    path = packages("norm", (0.5, 0.25, 0.125))
    package = Package(path)
    assert set(package.functions) == set(ratios)
    assert package.spec.description.defaultFunctionName == "keep_50"
    for name, ratio in ratios.items():
        pruner = Pruner("norm" if ratio else "none", keep_ratio=ratio)
        visual = see(model, mx.array(pixels), pruner)
        found = run(package, pixels, name)
        assert relative_error(found["image_features"], visual.embeddings) < 1e-4
        assert found["kept_indices"].tolist() == visual.selection.indices.tolist()
    assert weights(path) <= 1.05 * weights(packages("norm"))


def test_older_targets_get_a_package_each(demo, tmp_path):
    pruners = [Pruner("norm", keep_tokens=number) for number in (32, 16)]
    options = Options(target="macOS13")
    made = export_package(demo[0], pruners, tmp_path / "v.mlpackage", options)
    names = ["v-tokens_32.mlpackage", "v-tokens_16.mlpackage", "v-unpruned.mlpackage"]
    assert [path.name for path in made] == names
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    kept = [function.keep for functions in made.values() for function in functions]
    assert kept == [32, 16, 64]
    assert Package(next(iter(made))).spec.specificationVersion == 7  # iOS 16


def test_input_and_output_as_in_apples_app(demo, packages):
    model, processor = demo
    options = Options(projector=False, image=False, precision="float32")
    pixels = pixels_of(processor)
    features = model.encode(mx.array(pixels))
    selection = Pruner("norm", keep_ratio=0.5)(features)
    given = {"images": pixels.transpose(0, 3, 1, 2)}
    found = Package(packages("norm", options=options)).predict(given)
    expected = selection.apply(features.tokens)
    assert relative_error(found["image_features"], expected) < 1e-4


def test_the_comparison_sees_a_changed_weight_and_swapped_outputs(
    demo, packages, tmp_path
):
    model, processor = demo
    pixels = pixels_of(processor)
    expected = see(model, mx.array(pixels), Pruner("norm", keep_ratio=0.5)).embeddings
    path = tmp_path / "changed.mlpackage"
    shutil.copytree(packages("norm"), path)
    (file,) = path.glob("Data/*/weights/weight.bin")
    package = Package(path)
    convolutions = [o for o in package.block().operations if o.type == "conv"]
    name = convolutions[2].inputs["weight"].arguments[0].name
    (constant,) = [o for o in package.block().operations if o.outputs[0].name == name]
    offset = constant.attributes["val"].blobFileValue.offset
    start = int(np.frombuffer(package.blob, "<u8", 1, offset + 16)[0])
    blob = bytearray(file.read_bytes())
    blob[start : start + 4] = np.float32(3).tobytes()
    file.write_bytes(blob)
    found = run(path, pixels)
    assert relative_error(found["image_features"], expected) > 1e-4
    package = Package(packages("norm"))
    first, second = package.block().outputs
    package.block().outputs[:] = [second, first]
    swapped = list(run(package, pixels).values())
    assert swapped[0].shape != expected.shape


def test_equal_tokens_are_chosen_as_in_mlx(tmp_path):
    """Padding makes equal tokens; which of them stays must not depend on the device."""
    model = Equal()
    for method in ("norm", "similarity"):
        pruner = Pruner(method, keep_tokens=6)
        path = tmp_path / f"{method}.mlpackage"
        options = Options(projector=False, image=False, precision="float32")
        export_package(model, [pruner], path, options)
        pixels = mx.zeros((1, 4, 4, 3)).at[0, 1:3].add(0.5).at[0, 2, 1].add(0.25)
        selection = pruner(model.encode(pixels))
        given = {"images": np.array(pixels).transpose(0, 3, 1, 2)}
        found = Package(path).predict(given)
        assert found["kept_indices"].tolist() == selection.indices.tolist()


class Equal(nn.Module):
    """A tower whose visual tokens are the pixels."""

    image_size = 4
    args = None

    def encode(self, pixels, needs=()):
        tokens = pixels.reshape(pixels.shape[0], -1, 3)
        return mlx_tokprune.Features(tokens, (4, 4))


# What a package says ----------------------------------------------------------------


def test_a_package_describes_itself(demo, packages, tmp_path):
    spec = Package(packages("norm", (0.5, 0.25, 0.125))).spec
    functions = read_functions(spec, "it")
    assert [f.name for f in functions] == [
        "keep_50",
        "keep_25",
        "keep_12_5",
        "unpruned",
    ]
    assert [f.keep for f in functions] == [32, 16, 8, 64]
    assert [f.share for f in functions] == [0.5, 0.25, 0.125, 1]
    about = spec.description.metadata
    assert "norm, 32 tokens" in about.shortDescription
    assert about.versionString == mlx_tokprune.__version__
    assert about.userDefined["precision"] == "float32"
    for described in spec.description.functions:
        for feature in [*described.input, *described.output]:
            assert feature.shortDescription
        image = described.input[0].type.imageType
        assert (image.width, image.height) == (512, 512)
        assert image.colorSpace == image.ColorSpace.Value("RGB")
    source = tmp_path / "source"
    source.mkdir()
    (source / "LICENSE").write_text("The code.")
    (source / "LICENSE_MODEL").write_text("Only on Sundays.")
    path = tmp_path / "p.mlpackage"
    export_package(demo[0], [Pruner("none")], path, Options(), source)
    about = Package(path).spec.description.metadata
    assert about.license == "The code.\n\nOnly on Sundays."
    assert "source" in about.shortDescription


# The table --------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def ints(*shape: int) -> mx.array:
    return mx.random.randint(0, 5, shape, key=mx.random.key(1))


W, BIAS, SCALE = random(6, 5, seed=2), random(6), random(4, seed=3)
GROUPED, WHOLE = random(8, 3, 3, 1), random(8, 3, 3, 4)
mx.eval(W, BIAS, SCALE, GROUPED, WHOLE)  # or they would be part of what is traced
CASES = {
    "Add": (lambda x, y: x + y[:, None], random(2, 3, 4), random(2, 4)),
    "AddMM": (lambda x: mx.addmm(BIAS, x, W.T), random(2, 3, 4, 5)),
    "Arange": (lambda x: x * mx.arange(4), random(3, 4)),
    "ArgReduce": (lambda x: mx.argmax(x, 1) + mx.argmin(x, 1), ints(2, 6, 3) * 1.0),
    "ArgSort": (lambda x: mx.argsort(x, 1).astype(mx.int32), ints(1, 9) * 1.0),
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
    "Erf": (mx.erf, random(3, 4)),
    "ExpandDims": (lambda x: mx.expand_dims(x, (0, 2)), random(2, 3)),
    "Flatten": (lambda x: x.flatten(1, 2), random(2, 3, 4)),
    "Full": (lambda x: x + mx.ones_like(x), random(2, 3)),
    "GatherAxis": (
        lambda x, i: (
            mx.take_along_axis(x, i[..., None], 1)
            + mx.take_along_axis(x, mx.zeros((1, 3, 4), mx.int32) + i[..., None], 1)
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
    "Matmul": (lambda x, y: (x @ y) @ W.T, random(2, 3, 4), random(2, 4, 5)),
    "Maximum": (lambda x: mx.maximum(x, 0.1), random(3, 4)),
    "Minimum": (lambda x: mx.minimum(x, 0.1), random(3, 4)),
    "Multiply": (lambda x: x * x[:1] * 2, random(3, 4)),
    "Negative": (lambda x: -x, random(3, 4)),
    "Reduce": (
        lambda x: mx.sum(x, 1) + mx.max(x, 1) + mx.min(x, 1) + mx.mean(x, 1),
        random(2, 3, 4),
    ),
    "Reshape": (lambda x: x.reshape(4, -1).reshape(2, 2, 6), random(2, 3, 4)),
    "Select": (lambda x: mx.where(x[:1] > 0, x, x[:, :1]), random(3, 4)),
    "Sigmoid": (mx.sigmoid, random(3, 4)),
    "Slice": (lambda x: x[:, 1:-1, ::2], random(2, 5, 6)),
    "Softmax": (lambda x: mx.softmax(x, -1, precise=True), random(2, 3, 4)),
    "Sort": (lambda x: mx.sort(x, 1), ints(1, 9)),
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
    """The function's result from a package, and which primitives it has."""
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
    with pytest.raises(InputError, match=r"Cos .* of \(3, 4\) has no counterpart"):
        through_core_ml(None, mx.cos, random(3, 4))


@pytest.mark.parametrize(
    ("function", "array", "message"),
    [
        (lambda x: mx.sort(x, 0), random(3, 4), "Sort along axis 0"),
        (lambda x: mx.prod(x, 1), random(3, 4), "Reduce 3 of"),
        (lambda x: mx.addmm(x, x, x), random(3, 3), "AddMM is known for constant"),
        (lambda x: x | 1, ints(3, 4), "BitwiseBinary 1 is known for bools"),
        (lambda x: mx.conv1d(x, WHOLE[0]), random(1, 8, 4), "Convolution"),
    ],
)
def test_forms_that_are_not_known_are_refused(function, array, message):
    with pytest.raises(InputError, match=message):
        through_core_ml(None, function, array)


# Bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no keep ratio was given; say --keep-ratio 0.5"),
        (["--keep-ratio", "1"], "a keep ratio of 1 drops nothing"),
        (["--keep-ratio", "0"], "outside (0, 1]"),
        (["--keep-tokens", "64"], "all 64 visual tokens would stay"),
        (["--keep-tokens", "65"], "the most is 64"),
        (["--keep-ratio", ".5", "--method", "nrom"], "Did you mean 'norm'?"),
        (["--keep-ratio", ".5", ".5"], "keep_50 was asked for more than once"),
        (
            ["--keep-ratio", ".5", "--method", "trimvla"],
            "does not see; the nearest that can be exported is 'attention'",
        ),
        (["--method", "lightvla", "--keep-ratio", ".5"], "decides itself how many"),
        (["--keep-ratio", ".5", "--target", "iOS15"], "Did you mean 'iOS18'?"),
        (["--keep-ratio", ".5", "--precision", "int8"], "expected one of float16"),
        (["--keep-ratio", ".5", "--compress", "5bit"], "expected one of 8bit"),
        (
            ["--keep-ratio", ".5", "--compress", "4bit", "--precision", "float32"],
            "palettes of float16",
        ),
        (["--keep-ratio", ".5", "--compute-plan"], "only Core ML on macOS")
        if sys.platform != "darwin"
        else (["--keep-ratio", "2"], "outside (0, 1]"),
        (["--keep-ratio", ".5", "--model", "nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--output", str(tmp_path / "v.mlpackage")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not os.listdir(tmp_path)


def test_output_names_and_output_that_exists(tmp_path, capsys):
    taken = tmp_path / "v.mlpackage"
    taken.mkdir()
    for path, message in ((taken, "already exists"), (tmp_path / "v", ".mlpackage")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["--keep-ratio", "0.5", "--output", str(path)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["v.mlpackage"]


def test_python_callers_get_a_sentence_too(demo, tmp_path):
    path = tmp_path / "v.mlpackage"
    with pytest.raises(InputError, match="no pruner was given"):
        export_package(demo[0], [], path)
    half = mlx_tokprune.load(CHECKPOINT, mx.bfloat16)[0]
    with pytest.raises(InputError, match=r"bfloat16; load it with dtype=mx.float32"):
        export_package(half, [Pruner("none")], path)
    with pytest.raises(InputError, match="unknown compression ''"):
        Options(compress="")
    assert not os.listdir(tmp_path)


def test_a_damaged_package_is_refused(core_ml, packages, tmp_path):
    path = tmp_path / "damaged.mlpackage"
    path.mkdir()
    (path / "Manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        vision.open_vision(path)
    spec = Package(packages("norm")).spec
    about = spec.description.metadata.userDefined
    about["mlx_tokprune"] = '[{"name": "main"}]'
    with pytest.raises(InputError, match="another version of mlx_tokprune"):
        read_functions(spec, "it")


def test_a_package_can_be_read_by_all(packages):
    for part in packages("norm").rglob("*"):
        assert part.stat().st_mode & 0o777 == (0o755 if part.is_dir() else 0o644)


def test_without_coremltools(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--keep-ratio", "0.5", "--output", str(tmp_path / "v.mlpackage")])
    assert stopped.value.code == 2
    assert "pip install 'mlx-tokprune[coreml]'" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_a_tower_that_reads_the_instruction_is_refused(oft_policy, tmp_path):
    model = oft_policy[0]
    film = dataclasses.replace(model.args.oft, film=True)
    args = dataclasses.replace(model.args, oft=film)
    stand_in = type("Model", (), {"args": args})
    with pytest.raises(InputError, match="FiLM"):
        export_package(stand_in, [Pruner("none")], tmp_path / "v.mlpackage")


def test_a_failure_leaves_nothing(demo, tmp_path, monkeypatch):
    monkeypatch.delitem(lower.TABLE, "Softmax")
    with pytest.raises(InputError, match="Softmax"):
        export_package(demo[0], [Pruner("none")], tmp_path / "v.mlpackage")
    assert not os.listdir(tmp_path)


def test_the_command(tmp_path, capsys):
    path = tmp_path / "v.mlpackage"
    cli.main(["--model", str(TINY), "--keep-ratio", "0.5", "--output", str(path)])
    shown = capsys.readouterr().out
    assert "norm, 32 of 64 visual tokens -> image_features (1, 32, 64)" in shown
    assert os.listdir(tmp_path) == ["v.mlpackage"]


# As a vision path -------------------------------------------------------------------


class Stand:
    """Core ML's `predict`, played by the interpreter."""

    def __init__(self, path, function):
        self.package, self.function = Package(path), function

    def __call__(self, inputs):
        ((name, value),) = inputs.items()
        if name == "image":
            value = np.asarray(value, np.float32).transpose(2, 0, 1)[None]
        return self.package.predict({name: value}, self.function)


@pytest.fixture
def core_ml(monkeypatch):
    monkeypatch.setattr(vision, "_predict", lambda ct, path, name: Stand(path, name))


@pytest.mark.parametrize("apple", [False, True])
def test_generate_with_a_package(core_ml, packages, capsys, apple):
    if apple:
        options = Options(projector=False, image=False, precision="float32")
        path, ratio = packages("norm", options=options), 0.5
    else:
        path, ratio = packages("norm", (0.5, 0.25, 0.125)), 0.25
    records = []
    for arguments in (["--vision", str(path)], ["--method", "norm"]):
        generate_command(["--json", "--keep-ratio", str(ratio), *arguments])
        records.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    same = ("text", "token_ids", "kept_indices", "visual_tokens", "method", "keep")
    assert [records[0][key] for key in same] == [records[1][key] for key in same]
    assert records[0]["stages_ms"]["prune"] == 0


def test_a_package_must_fit_question_and_model(core_ml, packages, demo, tiny, policy):
    path = packages("norm", (0.5, 0.25, 0.125))
    with pytest.raises(InputError, match=r"0.4 of the visual tokens; it has 0.5, 0.25"):
        vision.open_vision(path, 0.4)
    package = vision.open_vision(path)
    with pytest.raises(InputError, match="gives features of size 192"):
        package.check(tiny[0])
    with pytest.raises(InputError, match="pictures of 512 pixels"):
        package.check(policy[0])
    with pytest.raises(InputError, match="is no Core ML package"):
        vision.open_vision(path.parent)
    model, processor = demo
    wide = (model, processor.at(512, "skip"), [PICTURES[0].path], "What?")
    with pytest.raises(InputError, match="512 x 512 pixels, not 512 x 320"):
        generate(*wide, vision=package)


def test_a_package_of_someone_else_is_refused(core_ml, packages, tmp_path):
    path = tmp_path / "other.mlpackage"
    shutil.copytree(packages("norm"), path)
    (file,) = path.glob("Data/*/*.mlmodel")
    spec = Package(path).spec
    del spec.description.metadata.userDefined["mlx_tokprune"]
    file.write_bytes(spec.SerializeToString())
    with pytest.raises(InputError, match="was not written by mlx_tokprune"):
        vision.open_vision(path)


@pytest.mark.skipif(sys.platform == "darwin", reason="says what other systems say")
def test_core_ml_is_macos_only(packages, capsys):
    with pytest.raises(SystemExit):
        generate_command(["--vision", str(packages("norm"))])
    assert "Core ML runs on macOS only" in capsys.readouterr().err


def test_vision_and_method_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        generate_command(["--vision", "v", "--method", "norm"])
    assert "a package has its own method" in capsys.readouterr().err


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only")
def test_core_ml_itself(demo, packages):
    """On each compute unit: published packages have been wrong on one only."""
    for method in ("norm", "attention", "similarity", "spatial"):
        for units in ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL"):
            compare_with_core_ml(demo, packages, method, units)


def compare_with_core_ml(demo, packages, method, units):
    model, processor = demo
    pixels = pixels_of(processor)
    visual = see(model, mx.array(pixels), Pruner(method, keep_ratio=0.5))
    package = coremltools.models.MLModel(
        str(packages(method, options=Options())),
        compute_units=coremltools.ComputeUnit[units],
    )
    found = package.predict({"image": load_image(PICTURES[0].path)})
    kept = found["kept_indices"].astype(int)
    assert np.isin(kept, np.array(visual.selection.indices)).mean() > 0.9
    if kept.tolist() == visual.selection.indices.tolist():
        assert decibels(found["image_features"], visual.embeddings) > 35


def test_compute_plan_counts_operations_by_device(core_ml_plan, packages):
    plan = compute_plan(packages("norm"))
    assert plan == {"CPU": {"argsort": 1}, "Neural Engine": {"conv": 2}}
    shown = format_plan(plan).splitlines()
    assert shown[1] == "  Neural Engine: 2 operations (conv 2)"


@pytest.fixture
def core_ml_plan(monkeypatch):
    """Core ML's plan as coremltools gives it, with three operations and a constant."""
    units = {"conv": "MLNeuralEngineComputeDevice", "argsort": "MLCPUComputeDevice"}

    def usage(operation):
        kind = units.get(operation.operator_name.split(".")[-1])
        device = type(kind, (), {})() if kind else None
        return SimpleNamespace(preferred_compute_device=device) if kind else None

    names = ("const", "ios18.conv", "ios18.argsort", "ios18.conv")
    operations = [SimpleNamespace(operator_name=name) for name in names]
    block = SimpleNamespace(operations=operations)
    program = SimpleNamespace(functions={"main": SimpleNamespace(block=block)})
    plan = SimpleNamespace(
        model_structure=SimpleNamespace(program=program),
        get_compute_device_usage_for_mlprogram_operation=usage,
    )
    import coremltools.models.compute_plan as module

    loads = SimpleNamespace(load_from_path=lambda path: plan)
    monkeypatch.setattr(module, "MLComputePlan", loads)
    utils = coremltools.models.utils
    monkeypatch.setattr(utils, "compile_model", lambda package, path: path)


def test_methods_are_all_known_here():
    """A new vision method must be exported in these tests, too."""
    known = {*METHODS, "random", "none"}
    assert set(registry.list_pruners("vision")) == known
