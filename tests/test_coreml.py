"""Core ML packages, read back from disk and run in NumPy (`mil.py`), against MLX."""

import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import COREMLTOOLS_WARNINGS, TINY, needs_coremltools

import mlx_tokprune
from mlx_tokprune import Pruner
from mlx_tokprune.coreml import __main__ as cli
from mlx_tokprune.coreml import export, lower
from mlx_tokprune.coreml.describe import read_functions
from mlx_tokprune.coreml.export import Options, export_package
from mlx_tokprune.coreml.plan import compute_plan, format_plan
from mlx_tokprune.demo import PICTURES, POLICY_FRAME
from mlx_tokprune.errors import InputError
from mlx_tokprune.image import load_image
from mlx_tokprune.pipeline import Scene, VisualTokens, look
from mlx_tokprune.prompt import Prompt
from mlx_tokprune.pruners import as_plan, registry

needs_coremltools()

import coremltools  # noqa: E402
from mil import Package  # noqa: E402

pytestmark = COREMLTOOLS_WARNINGS
FLOAT32 = Options(precision="float32")


@pytest.fixture(scope="module")
def demo():
    return mlx_tokprune.load("demo", mx.float32)


@pytest.fixture(scope="module")
def policy():
    return mlx_tokprune.load("demo-policy", mx.float32)


def pixels_of(processor, picture=PICTURES[0]) -> np.ndarray:
    return processor.pixels([load_image(picture.path)])


def see(model, pixels: mx.array, pruner: Pruner) -> VisualTokens:
    """What the model's own tower makes of one picture, whatever the prompt."""
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
    """What a float32 package gave, with MLX."""
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


@pytest.mark.parametrize("method", [*METHODS, "dart"])
def test_equal_tokens_are_chosen_as_in_mlx(tmp_path, method):
    """Padding makes equal tokens; which of them stays must not depend on the device."""
    model, path = Equal(), tmp_path / "p.mlpackage"
    pruner = Pruner(method, keep_tokens=7, at="tower")
    options = Options(projector=False, image=False, precision="float32")
    export_package(model, [pruner], path, options)
    pixels = mx.zeros((1, 4, 4, 3)).at[0, 1:3].add(0.5).at[0, 2, 1].add(0.25)
    features = model.encode(pixels, pruner.wants)
    selection = pruner(features)
    found = Package(path).predict({"images": np.array(pixels).transpose(0, 3, 1, 2)})
    expected = selection.apply(features.tokens)
    np.testing.assert_allclose(found["image_features"], expected, atol=1e-6)
    compare_choice(found, selection)


class Equal(nn.Module):
    """A tower whose visual tokens are the pixels, and so is all else."""

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
    export_package(demo[0], [Pruner("none")], path, Options(), source)
    about = Package(path).spec.description.metadata
    assert about.license == "The code.\n\nOnly on Sundays."
    assert "source" in about.shortDescription


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
        (
            ["--method", "dart", "--keep-ratio", ".5"],
            "'dart' prunes at the prompt, which comes after a vision package, but can "
            "prune at the tower; say --at tower",
        ),
        (
            ["--method", "fastv", "--keep-ratio", ".5"],
            "'fastv' prunes inside the language model, which a vision package does not "
            "hold; expected a pruner at the tower, such as 'attention'",
        ),
        (
            ["--method", "trimvla", "--keep-ratio", ".5", "--at", "tower"],
            "needs queries, text_keys, which this model does not have at 'tower'",
        ),
        (["--keep-ratio", ".5", "--at", "prompt"], "choose from"),
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


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        (Pruner("prumerge"), "'prumerge' without a budget decides for each picture"),
        (Pruner("prumerge_plus"), "'prumerge_plus' without a budget decides"),
        (
            Pruner("similarity", options={"threshold": 0.9}),
            "'similarity' with a threshold decides for each picture how many visual "
            "tokens to keep, and a package has fixed shapes; expected a keep ratio",
        ),
        (Pruner("lightvla"), "'lightvla' looks at the prompt"),
        (Pruner("cdpruner", keep_ratio=0.5), "'cdpruner' looks at the prompt"),
        (Pruner("norm", 0.5, at="prompt"), "'norm' prunes at the prompt"),
        (Pruner("attention", 0.5, at=2), "inside the language model, which a vision"),
        (Pruner("pyramiddrop", 0.5), "'pyramiddrop' prunes inside the language model"),
        (Pruner("sparsevlm", 0.5), "'sparsevlm' prunes inside the language model"),
    ],
    ids=lambda value: value.method if isinstance(value, Pruner) else "",
)
def test_what_a_package_cannot_hold_is_refused(
    demo, tmp_path, monkeypatch, pruner, message
):
    monkeypatch.setattr(export, "capture", None)  # refused before anything is traced
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        export_package(demo[0], [pruner], tmp_path / "v.mlpackage")
    assert len(str(raised.value).splitlines()) == 1
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
    half = mlx_tokprune.load("demo", mx.bfloat16)[0]
    with pytest.raises(InputError, match=r"bfloat16; load it with dtype=mx.float32"):
        export_package(half, [Pruner("none")], path)
    with pytest.raises(InputError, match="unknown compression ''"):
        Options(compress="")
    assert not os.listdir(tmp_path)


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
    known = {"args": args, "reads_prompt": type(model).reads_prompt}
    stand_in = type("Model", (), known)()
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


def test_the_command_for_a_method_of_another_place(tmp_path, capsys):
    path = tmp_path / "v.mlpackage"
    budget = ["--method", "dart", "--at", "tower", "--keep-tokens", "8"]
    cli.main(["--model", str(TINY), *budget, "--output", str(path)])
    assert "dart, 8 of 64 visual tokens" in capsys.readouterr().out


# Core ML itself --------------------------------------------------------------------


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only")
def test_core_ml_itself(demo, packages):
    """On each compute unit: published packages have been wrong on one only."""
    methods = ("norm", "attention", "similarity", "spatial", "divprune")
    for method in (*methods, "visionzip", "prumerge_plus"):
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
    assert set(registry.list_pruners("tower")) == known
