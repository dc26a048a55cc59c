"""Core ML packages, read from disk and run in NumPy (`mil.py`), equal MLX."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import COREMLTOOLS_WARNINGS, needs_coremltools

import mlx_tokprune
from mlx_tokprune import Pruner
from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME
from mlx_tokprune.coreml.describe import read_functions
from mlx_tokprune.coreml.export import ExportOptions, export_package
from mlx_tokprune.coreml.plan import compute_plan, format_plan
from mlx_tokprune.pipeline import Scene, VisualTokens, look
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.pruners import as_plan, registry

needs_coremltools()

import coremltools  # noqa: E402
from mil import Package  # noqa: E402

pytestmark = COREMLTOOLS_WARNINGS
FLOAT32 = ExportOptions(precision="float32")


@pytest.fixture(scope="module")
def demo():
    return mlx_tokprune.load("demo", mx.float32)


@pytest.fixture(scope="module")
def policy():
    return mlx_tokprune.load("demo-policy", mx.float32)


def pixels_of(processor, picture=PICTURES[0]) -> np.ndarray:
    return processor.pixels([load_image(picture.path)])


def see(model, pixels: mx.array, pruner: Pruner) -> VisualTokens:
    """Return the visual tokens of the model's own tower for one image."""
    return look(model, Scene(pixels, Prompt(((), ()))), as_plan(pruner))


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

SELECTORS = ("norm", "attention", "hiprune", "mean_similarity", "uniform", "divprune")
METHODS = (*SELECTORS, "similarity", "spatial", "visionzip", "prumerge")
METHODS += ("prumerge_plus",)
# Forms of methods with primitives that their defaults do not have.
FORMS = (
    Pruner("hiprune", keep_ratio=0.5, options={"alpha": 1}),
    Pruner("prumerge", keep_ratio=0.5, options={"rest": 1}),
    Pruner("prumerge_plus", keep_tokens=2),
    Pruner("visionzip", keep_tokens=5),
    Pruner("dart", keep_ratio=0.25, at="tower"),
    Pruner("demo-adaptive", keep_ratio=0.25),
    Pruner("demo-inside", keep_ratio=0.25),
)


def compare(found: dict, model, pixels, pruner: Pruner) -> None:
    """Compare the outputs of a float32 package with MLX."""
    visual = see(model, mx.array(pixels), pruner)
    assert relative_error(found["image_features"], visual.embeddings) < 1e-4
    compare_choice(found, visual.selection)


def compare_choice(found: dict, selection: mlx_tokprune.Selection) -> None:
    assert found["kept_indices"].tolist() == selection.indices.tolist()
    assert found["kept_indices"].dtype == np.int32
    merged = selection.assignment()
    assert ("assignment" in found) == (merged is not None)
    if merged is not None:
        assert found["assignment"].tolist() == merged.tolist()


@pytest.mark.parametrize("method", [*METHODS, "random"])
def test_a_float32_package_does_what_mlx_does(demo, packages, method):
    model, processor = demo
    pixels = pixels_of(processor)
    found = run(packages(method), pixels)
    compare(found, model, pixels, Pruner(method, keep_ratio=0.5))


@pytest.mark.parametrize("pruner", FORMS, ids=lambda pruner: pruner.method)
def test_forms_of_methods_do_what_mlx_does(demo, tmp_path, pruner):
    model, processor = demo
    pixels = pixels_of(processor)
    export_package(model, [pruner], tmp_path / "p.mlpackage", FLOAT32)
    compare(run(tmp_path / "p.mlpackage", pixels), model, pixels, pruner)


@pytest.mark.parametrize(
    "method", ["norm", "attention", "similarity", "hiprune", "prumerge_plus"]
)
def test_fused_towers_of_a_policy(policy, tmp_path, method):
    model, processor = policy
    pruner = Pruner(method, keep_ratio=0.25)
    export_package(model, [pruner], tmp_path / "p.mlpackage", FLOAT32)
    pixels = pixels_of(processor, POLICY_FRAME)
    compare(run(tmp_path / "p.mlpackage", pixels), model, pixels, pruner)


def test_float16_is_close_and_chooses_in_float32(demo, packages):
    model, processor = demo
    pixels = pixels_of(processor)
    visual = see(model, mx.array(pixels), Pruner("similarity", keep_ratio=0.5))
    package = Package(packages("similarity", options=ExportOptions()))
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
    path = packages("spatial", options=ExportOptions(compress=compress, target=target))
    found = run(path, pixels)
    assert decibels(found["image_features"], visual.embeddings) > least
    share = weights(path) / weights(packages("spatial", options=ExportOptions()))
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


@pytest.mark.parametrize("target", ["iOS18", "iOS16"])
def test_the_tower_is_traced_and_converted_once(tmp_path, monkeypatch, target):
    """A package of several functions traces and converts the tower once."""
    calls = []

    def count(owner, name):
        original = getattr(owner, name)

        def counted(*args, **options):
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    count(Equal, "encode")
    count(coremltools, "convert")
    pruners = [Pruner("attention", keep_ratio=ratio) for ratio in (0.5, 0.25, 0.125)]
    options = ExportOptions(projector=False, image=False, target=target)
    export_package(Equal(), pruners, tmp_path / "p.mlpackage", options)
    assert calls == ["encode", "convert"]


def test_functions_of_several_methods_share_a_tower(demo, tmp_path):
    """One package holds methods with different extras and with equal choices."""
    model, processor = demo
    pixels = pixels_of(processor)
    pruners = {
        "keep_50": Pruner("attention", keep_ratio=0.5),
        "tokens_32": Pruner("attention", keep_tokens=32),
        "keep_25": Pruner("visionzip", keep_ratio=0.25),
        "tokens_8": Pruner("spatial", keep_tokens=8),
        "unpruned": Pruner("none"),
    }
    path = tmp_path / "p.mlpackage"
    export_package(model, list(pruners.values()), path, FLOAT32)
    package = Package(path)
    assert set(package.functions) == set(pruners)
    for name, pruner in pruners.items():
        compare(run(package, pixels, name), model, pixels, pruner)


def test_older_targets_get_a_package_each(demo, tmp_path):
    pruners = [Pruner("norm", keep_tokens=number) for number in (32, 16)]
    options = ExportOptions(target="macOS13")
    made = export_package(demo[0], pruners, tmp_path / "v.mlpackage", options)
    names = ["v-tokens_32.mlpackage", "v-tokens_16.mlpackage", "v-unpruned.mlpackage"]
    assert [path.name for path in made] == names
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    kept = [function.keep for functions in made.values() for function in functions]
    assert kept == [32, 16, 64]
    assert Package(next(iter(made))).spec.specificationVersion == 7  # iOS 16


def test_input_and_output_as_in_apples_app(demo, packages):
    model, processor = demo
    options = ExportOptions(projector=False, image=False, precision="float32")
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


@pytest.mark.parametrize("method", [*METHODS, "dart"])
def test_equal_tokens_are_chosen_as_in_mlx(tmp_path, method):
    """Equal tokens, as in padding, are chosen in the same order as in MLX."""
    model, path = Equal(), tmp_path / "p.mlpackage"
    pruner = Pruner(method, keep_tokens=7, at="tower")
    options = ExportOptions(projector=False, image=False, precision="float32")
    export_package(model, [pruner], path, options)
    pixels = mx.zeros((1, 4, 4, 3)).at[0, 1:3].add(0.5).at[0, 2, 1].add(0.25)
    features = model.encode(pixels, pruner.reads)
    selection = pruner(features)
    found = Package(path).predict({"images": np.array(pixels).transpose(0, 3, 1, 2)})
    expected = selection.apply(features.tokens)
    np.testing.assert_allclose(found["image_features"], expected, atol=1e-6)
    compare_choice(found, selection)


class Equal(nn.Module):
    """Tower whose visual tokens and extras are the pixels."""

    image_size = 4
    reads_prompt = False
    provides: ClassVar = {"tower": ("grid", "attention", "attention_middle", "keys")}
    args = None
    decoder = SimpleNamespace(layers=())

    def encode(self, pixels, needs=()):
        tokens = pixels.reshape(pixels.shape[0], -1, 3)
        size = mx.max(tokens, axis=-1)
        known = {"attention": size, "attention_middle": 1 - size, "keys": tokens}
        extras = {name: known[name] for name in needs if name in known}
        return mlx_tokprune.Features(tokens, (4, 4), extras=extras)


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
    settings = (ExportOptions(), source, None, demo[1])
    export_package(demo[0], [Pruner("none")], path, *settings)
    about = Package(path).spec.description.metadata
    assert json.loads(about.userDefined["mlx_tokprune_prompt"])["turn"] == demo[1].turn
    assert about.license == "The code.\n\nOnly on Sundays."
    assert "source" in about.shortDescription


# Core ML itself --------------------------------------------------------------------


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only")
def test_core_ml_itself(demo, packages):
    """Core ML equals MLX on each compute unit."""
    methods = ("norm", "attention", "similarity", "spatial", "divprune")
    for method in (*methods, "visionzip", "prumerge_plus"):
        for units in ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL"):
            compare_with_core_ml(demo, packages, method, units)


def compare_with_core_ml(demo, packages, method, units):
    model, processor = demo
    pixels = pixels_of(processor)
    visual = see(model, mx.array(pixels), Pruner(method, keep_ratio=0.5))
    package = coremltools.models.MLModel(
        str(packages(method, options=ExportOptions())),
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
    """Replace coremltools' compute plan by one of three operations and a constant."""
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
    """The tests of this file export every vision method."""
    known = {*METHODS, "random", "none"}
    assert set(registry.list_pruners("tower")) == known
