"""Apple's app layout: MLX tensors beside a tower that is a Core ML package.

`benchmarks/parity_app.py` wrote the package and the values of Apple's module.
"""

import json
import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import COREMLTOOLS_WARNINGS, DATA, TINY, needs_coremltools

from mlx_tokprune import load
from mlx_tokprune.checkpoints.shards import Checkpoint
from mlx_tokprune.convert import convert, coremltower
from mlx_tokprune.errors import InputError

needs_coremltools()

from coremltools.proto import Model_pb2  # noqa: E402

pytestmark = COREMLTOOLS_WARNINGS
SOURCE = DATA / "fastvithd-tiny"
SIZES = {"layers": [1, 1, 2, 1, 1], "embed_dims": [8, 8, 16, 32, 32]}
SIZES |= {"mlp_ratios": [2, 1, 1, 1, 1], "image_size": 128}
MODEL = "Data/com.apple.CoreML/model.mlmodel"
IDS = mx.array([[1, 2, 3, 4]])


@pytest.fixture
def app(checkpoint):
    """Return the tiny language model in the layout of Apple's app, with its tower."""
    file = str(checkpoint / "model.safetensors")
    stored = mx.load(file).items()
    weights = {f"language_model.{n}": a for n, a in stored if ".mm_p" not in n}
    weights = {n: mx.array(a) for n, a in weights.items() if ".vision_tower" not in n}
    for name, columns in (("linear_0", 64), ("linear_2", 64)):
        key = mx.random.key(columns)
        weight = 0.1 * mx.random.normal((64, columns), key=key)
        weights[f"multi_modal_projector.{name}.weight"] = weight
        weights[f"multi_modal_projector.{name}.bias"] = mx.ones(64)
    mx.eval(weights)
    mx.save_safetensors(file, weights)
    edit_config(checkpoint, vision_config=SIZES, mm_hidden_size=64)
    shutil.copytree(SOURCE / "fastvithd.mlpackage", checkpoint / "fastvithd.mlpackage")
    return checkpoint


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def features_of(model) -> np.ndarray:
    pixels = np.random.default_rng(0).random((1, 128, 128, 3), np.float32)
    return np.array(model.encode(mx.array(pixels)).tokens)


def test_the_tower_computes_what_apples_module_does(app, tmp_path, tiny):
    expected = np.array(mx.load(str(SOURCE / "expected.safetensors"))["image_features"])
    target = convert(str(app), str(tmp_path / "mlx"))
    assert not list(target.glob("*.mlpackage"))
    for folder in (app, target):
        model = load(folder)[0]
        ours = features_of(model)
        assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()
        assert mx.array_equal(model(IDS), tiny[0](IDS))
        assert model.project(mx.zeros((1, 1, 64))).shape == (1, 1, 64)


def test_a_quantized_projector_is_read(app):
    """A quantized projector, as in Apple's exports, is computed in floats."""
    exact = load(app)[0]
    file = str(app / "model.safetensors")
    weights = {n: mx.array(a) for n, a in mx.load(file).items()}
    for name in [n for n in weights if n.endswith("_proj.weight") or "linear_" in n]:
        if name.endswith(".weight"):
            path = name.removesuffix(".weight")
            parts = mx.quantize(weights[name], 32, 8)
            for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
                weights[f"{path}.{part}"] = array
    mx.eval(weights)
    mx.save_safetensors(file, weights)
    edit_config(app, quantization={"group_size": 32, "bits": 8})
    model = load(app)[0]
    assert type(model.mm_projector[0]).__name__ == "Linear"
    x = mx.random.normal((1, 3, 64), key=mx.random.key(1))
    assert mx.allclose(model.project(x), exact.project(x), rtol=0.05, atol=0.05)
    assert hasattr(model.layers[0].self_attn.q_proj, "scales")
    edit_config(app, quantization={"group_size": 32})
    with pytest.raises(InputError, match="gives None bits and group_size 32"):
        load(app)


def test_without_coremltools_the_extra_is_named(app, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools.proto", None)
    with pytest.raises(InputError, match=r"pip install 'mlx-tokprune\[coreml\]'"):
        load(app)


# What is refused, each with what to download instead.


def program(change):
    """Return a function that edits the operations of the package."""

    def damage(folder):
        file = folder / "fastvithd.mlpackage" / MODEL
        model = Model_pb2.Model()
        model.ParseFromString(file.read_bytes())
        main = model.mlProgram.functions["main"]
        change(main.block_specializations[main.opset].operations)
        file.write_bytes(model.SerializeToString())

    return damage


def named(operations, end):
    return next(op for op in operations if op.outputs[0].name.endswith(end))


def of_type(operations, kind):
    return [op for op in operations if op.type == kind]


def swap(operations):
    """Swap two layers of equal shape, which only their names tell apart."""
    first, second = (
        next(
            op
            for op in of_type(operations, "conv")
            if op.inputs["weight"]
            .arguments[0]
            .name.endswith(f"{place}_reparam_conv_weight")
        )
        for place in ("network_4_0_token_mixer", "network_4_1_token_mixer")
    )
    for part in ("weight", "bias"):
        one, two = (op.inputs[part].arguments[0] for op in (first, second))
        one.name, two.name = two.name, one.name


def lose_a_layer(operations):
    operations.remove(of_type(operations, "conv")[5])


def add_a_layer(operations):
    operations.add().CopyFrom(of_type(operations, "conv")[-1])


def give_qkv_a_bias(operations):
    qkv = of_type(operations, "linear")[0]
    bias = named(operations, qkv.inputs["bias"].arguments[0].name)
    value = bias.attributes["val"]
    value.ClearField("blobFileValue")
    value.immediateValue.tensor.floats.values.extend([1.0] * 96)


def lose_a_bias(operations):
    del of_type(operations, "conv")[0].inputs["bias"]


def write_elsewhere(operations):
    value = named(operations, "patch_embed_2_reparam_conv_weight").attributes["val"]
    value.blobFileValue.offset = 1 << 40


def of_integers(operations):
    value = named(operations, "patch_embed_2_reparam_conv_weight").attributes["val"]
    value.type.tensorType.dataType = 23


def of_another_shape(operations):
    value = named(operations, "patch_embed_2_reparam_conv_weight").attributes["val"]
    value.type.tensorType.dimensions[0].constant.size = 9


def manifest(text):
    return lambda f: (f / "fastvithd.mlpackage" / "Manifest.json").write_text(text)


def leave_the_package():
    entry = {"path": "../../config.json", "name": "model.mlmodel"}
    return json.dumps({"rootModelIdentifier": "A", "itemInfoEntries": {"A": entry}})


def damaged(folder):
    (folder / "fastvithd.mlpackage" / MODEL).write_bytes(b"\xff" * 100)


def no_weights(folder):
    shutil.rmtree(folder / "fastvithd.mlpackage" / "Data/com.apple.CoreML/weights")


def no_model(folder):
    (folder / "fastvithd.mlpackage" / MODEL).unlink()


REFUSED = [
    (program(swap), r"network.4.0.token_mixer.reparam_conv is called .*_4_1_token.*"),
    (program(lose_a_layer), r"no FastViTHD as Apple exports it \(.*\)"),
    (program(add_a_layer), r"1 layers follow the last one"),
    (program(give_qkv_a_bias), "qkv has a bias"),
    (program(lose_a_bias), "patch_embed.0.reparam_conv has no bias"),
    (program(write_elsewhere), "is not in its weights/weight.bin"),
    (program(of_integers), "no constant of 16- or 32-bit floats"),
    (program(of_another_shape), r"has 64 numbers for the shape \(9, 8, 1, 1\)"),
    (manifest("{}"), "names no model inside the package"),
    (manifest(leave_the_package()), "names no model inside the package"),
    (damaged, "model.mlmodel is damaged"),
    (no_weights, "is not in its weights/weight.bin"),
    (no_model, "lacks its com.apple.CoreML/model.mlmodel"),
]


@pytest.mark.parametrize(
    ("damage", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))]
)
def test_other_packages_are_refused(app, tmp_path, damage, message):
    damage(app)
    with pytest.raises(InputError, match=message) as error:
        convert(str(app), str(tmp_path / "mlx"))
    assert "download the PyTorch checkpoint" in str(error.value)
    assert not (tmp_path / "mlx").exists()


def test_two_packages_and_other_sizes_are_refused(app):
    edit_config(app, vision_config=SIZES | {"embed_dims": [8, 8, 16, 32, 64]})
    with pytest.raises(InputError, match=r"has shape .*expected|mm_hidden_size"):
        load(app)
    edit_config(app, vision_config=SIZES | {"layers": "x"})
    with pytest.raises(InputError, match="layers 'x'; expected 5 whole numbers"):
        load(app)
    (app / "other.mlpackage").mkdir()
    with pytest.raises(InputError, match=r"fastvithd.mlpackage, other.mlpackage; exp"):
        load(app)


def test_scales_that_were_not_folded_are_read():
    """Unfolded layer scales come from the program; folded ones are 1."""
    tower = coremltower.read_tower(SOURCE / "fastvithd.mlpackage", (1, 1, 2, 1, 1))
    start = f"{coremltower.TOWER}.network"
    assert not mx.all(tower[f"{start}.7.0.layer_scale_1"] == 1).item()
    assert mx.all(tower[f"{start}.7.0.layer_scale_2"] == 1).item()
    assert tower[f"{start}.7.0.layer_scale_1"].shape == (1, 1, 32)


def test_the_embedded_tiny_checkpoint_is_no_app():
    assert not coremltower.is_app(Checkpoint.open(TINY))
