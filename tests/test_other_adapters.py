"""`--adapter-path` with adapters of mlx-vlm's trainer and of peft."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY, TINY_POLICY
from mlx.utils import tree_flatten
from test_convert import edit_config, edit_weights
from test_quantized_checkpoints import quantize, section

from mlx_tokprune import load
from mlx_tokprune.checkpoints.quantization import Format
from mlx_tokprune.convert import convert
from mlx_tokprune.errors import InputError
from mlx_tokprune.generate.__main__ import main as generate
from mlx_tokprune.train.lora import fuse

IDS = mx.array([[5, 17, 40, 3]])
RANK, ALPHA = 4, 6
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def logits(folder, adapter=None) -> np.ndarray:
    return np.array(load(folder, adapter_path=adapter)[0](IDS))


def near(ours, exact) -> None:
    np.testing.assert_allclose(ours, exact, atol=1e-5 * np.abs(exact).max())


def edit_settings(folder, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_factors(folder, change) -> None:
    (file,) = folder.glob("*.safetensors")
    weights = dict(mx.load(str(file)))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(file), weights)


# peft ---------------------------------------------------------------------------------


def peft_folder(folder, source, prefix="", **settings):
    """Write an adapter with random factors, under the names that peft 0.19 saves."""
    folder.mkdir(exist_ok=True)
    stored = mx.load(str(source / "model.safetensors"))
    random, factors = np.random.default_rng(0), {}
    for layer in LAYERS:
        rows, columns = stored[f"{prefix}{layer}.weight"].shape
        rank = settings.get("rank_pattern", {}).get("down_proj", RANK)
        rank = rank if layer.endswith("down_proj") else RANK
        sizes = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
        if settings.get("use_dora"):
            sizes["lora_magnitude_vector"] = (rows,)
        for part, shape in sizes.items():
            array = mx.array(random.uniform(-0.3, 1, shape).astype(np.float32))
            factors[f"base_model.model.{prefix}{layer}.{part}"] = array
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), factors)
    # The fields of peft's LoraConfig that are set in a saved folder.
    settings = {
        "base_model_name_or_path": "apple/FastVLM-0.5B",
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.19.1",
        "qalora_group_size": 16,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "down_proj"],
        "r": RANK,
        "lora_alpha": ALPHA,
    } | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def merged(target, source, adapter, prefix, scales, dora=False):
    """Write a checkpoint with the adapter in its weights, by NumPy."""
    convert(str(source), str(target), dtype="float32")
    factors = mx.load(str(adapter / "adapter_model.safetensors"))

    def change(weights):
        for layer, scale in zip(LAYERS, scales, strict=True):
            start = f"base_model.model.{prefix}{layer}"
            a, b = (np.array(factors[f"{start}.lora_{x}.weight"]) for x in "AB")
            name = f"language_model.{layer}.weight"
            weight = np.array(weights[name]) + scale * (b @ a)
            if dora:
                lengths = np.array(factors[f"{start}.lora_magnitude_vector"])
                weight *= (lengths / np.linalg.norm(weight, axis=1))[:, None]
            weights[name] = mx.array(weight)

    edit_weights(target, change)
    return target


@pytest.mark.parametrize(
    ("source", "prefix"),
    [(TINY, ""), (TINY_POLICY, "language_model.")],
    ids=["vlm", "vla"],
)
@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (ALPHA / RANK,) * 2),
        ({"use_rslora": True}, (ALPHA / math.sqrt(RANK),) * 2),
        ({"use_dora": True}, (ALPHA / RANK,) * 2),
        (
            {"alpha_pattern": {"mlp.down_proj": 3}, "rank_pattern": {"down_proj": 2}},
            (ALPHA / RANK, 3 / 2),
        ),
    ],
    ids=["lora", "rslora", "dora", "patterns"],
)
def test_a_peft_adapter_is_its_merged_weights(
    tmp_path, source, prefix, settings, scales
):
    adapter = peft_folder(tmp_path / "adapter", source, prefix, **settings)
    dora = "use_dora" in settings
    exact = logits(merged(tmp_path / "m", source, adapter, prefix, scales, dora))
    ours = logits(source, adapter)
    near(ours, exact)
    assert np.abs(ours - logits(source)).max() > 0.01 * np.abs(exact).max()
    mlx = convert(str(source), str(tmp_path / "mlx"))
    near(logits(mlx, adapter), exact)


@pytest.mark.parametrize("dora", [False, True])
def test_fused_adapters_stay_quantized(tmp_path, dora):
    """Fusing packs the sums again, of DoRA's layers and LoRA's, in their formats."""
    low, fused = tmp_path / "low", tmp_path / "fused"
    convert(str(TINY), str(low), quantize=True, q_bits=8, q_group_size=32)
    adapter = peft_folder(tmp_path / "adapter", TINY, use_dora=dora)
    fuse(low, adapter, fused)
    assert isinstance(load(fused)[0].layers[1].mlp.down_proj, nn.QuantizedLinear)
    exact, ours = logits(low, adapter), logits(fused)
    assert np.abs(ours - exact).max() < 0.1 * np.abs(exact - logits(low)).max()


def rename(old, new):
    return lambda folder: edit_factors(
        folder,
        lambda w: [w.update({n.replace(old, new): w.pop(n)}) for n in list(w)],
    )


def settings(**changes):
    return lambda folder: edit_settings(folder, **changes)


def drop(end):
    return lambda folder: edit_factors(
        folder, lambda w: [w.pop(n) for n in list(w) if n.endswith(end)]
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (settings(peft_type="LOHA"), "peft_type 'LOHA'; expected 'LORA'"),
        (settings(bias="all"), "bias 'all'; expected 'none'"),
        (settings(modules_to_save=["norm"]), "modules_to_save .*; expected it unset"),
        (settings(lora_bias=True), "lora_bias True; expected it unset"),
        (settings(layer_replication=[[0, 2]]), "layer_replication .* unset"),
        (settings(trainable_token_indices=[3]), "trainable_token_indices .* unset"),
        (settings(fan_in_fan_out=True), "fan_in_fan_out True; expected it unset"),
        (
            settings(init_lora_weights="pissa_niter_4"),
            "leaves the base model unchanged",
        ),
        (settings(r=8), "lora_A.weight .* has shape .*; expected the rank 8"),
        (settings(r="8"), "r '8'; expected a whole number"),
        (settings(lora_alpha=math.inf), "lora_alpha inf; expected a number"),
        (settings(use_rslora=1), "use_rslora 1; expected true or false"),
        (settings(rank_pattern={".*q_proj": 2}), "not by regular expressions"),
        (settings(alpha_pattern={"q_proj": "8"}), "alpha_pattern .*; expected numbers"),
        (settings(use_dora=True), "lora_magnitude_vector of 0 layers; expected 2"),
        (drop("lora_A.weight"), "has lora_B of model.layers.* but no lora_A"),
        (rename("q_proj.lora_A.weight", "q_proj.weight"), "expected only lora_A and"),
        (rename("layers.0", "layers.7"), "changes .*layers.7.*Did you mean"),
        (rename("model.layers.0.self_attn.q_proj", "mm_projector.9"), "projector.9;"),
        (
            rename(
                "layers.0.self_attn.q", "vision_tower.vision_tower.model.network.0.q"
            ),
            "merge others into their base model",
        ),
        (rename("self_attn.q_proj", "self_attn.k_proj"), "inputs and .* outputs;"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no weights; exp"),
        (
            lambda f: (f / "non_lora_trainables.bin").write_bytes(b""),
            "trained beside the adapter; expected one checkpoint",
        ),
    ],
)
def test_peft_adapters_that_cannot_be_followed(tmp_path, capsys, damage, message):
    adapter = peft_folder(tmp_path / "adapter", TINY)
    damage(adapter)
    with pytest.raises(InputError, match=message) as error:
        load(TINY, adapter_path=adapter)
    assert len(str(error.value)) < 600
    argv = ["--model", str(TINY), "--image", str(TINY / "image_0.png")]
    with pytest.raises(SystemExit) as stopped:
        generate([*argv, "--prompt", "Hi", "--adapter-path", str(adapter)])
    assert stopped.value.code == 2


# mlx-vlm ------------------------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path):
    """Return a function that adds and saves an adapter as mlx-vlm's trainer does."""
    pytest.importorskip("mlx_vlm")
    from mlx_vlm.trainer import peft

    def train(source, **options) -> np.ndarray:
        # Only names and arrays count, which are those of our model, too.
        model = load(source)[0]
        peft.get_peft_model(model, rank=4, alpha=16, verbose=False, **options)
        mx.random.seed(1)
        trained = tree_flatten(model.trainable_parameters())
        new = [(n, a + 0.1 * mx.random.normal(a.shape)) for n, a in trained]
        model.load_weights(new, strict=False)
        model.eval()
        peft.save_adapter(model, tmp_path / "adapter" / "adapters.safetensors")
        return np.array(model(IDS))

    return train


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"legacy": True},
        {"linear_layers": ["q_proj", "mm_projector.0"]},
    ],
    ids=["lora", "dora", "legacy", "projector"],
)
def test_an_adapter_of_mlx_vlm_computes_as_there(tmp_path, theirs, options):
    source = convert(str(TINY), str(tmp_path / "mlx"))
    exact = theirs(source, **options)
    ours = logits(source, tmp_path / "adapter")
    assert np.array_equal(ours, exact)
    assert np.abs(exact - logits(source)).max() > 0.1
    fuse(source, tmp_path / "adapter", tmp_path / "fused")
    near(logits(tmp_path / "fused"), exact)


def test_a_projector_trained_by_mlx_vlm_is_used(tmp_path, theirs):
    source = convert(str(TINY), str(tmp_path / "mlx"))
    theirs(source)
    adapter, random = tmp_path / "adapter", np.random.default_rng(0)
    new = {
        f"mm_projector.{n}.{part}": mx.array(random.normal(size=shape), mx.float32)
        for n, rows in ((0, 64), (2, 64))
        for part, shape in (("weight", (64, 256 if n == 0 else 64)), ("bias", (rows,)))
    }
    edit_factors(adapter, lambda w: w.update(new))
    fuse(source, adapter, tmp_path / "fused")
    quantize(source, tmp_path / "low", lambda path: Format(32, 8))
    section(tmp_path / "low", Format(32, 8))
    fuse(tmp_path / "low", adapter, tmp_path / "fused-low")
    packed = mx.load(str(tmp_path / "fused-low" / "model.safetensors"))
    assert packed["mm_projector.2.weight"].dtype == mx.uint32
    weight = load(tmp_path / "fused-low")[0].mm_projector[2].weight
    assert mx.allclose(weight, new["mm_projector.2.weight"], atol=0.05)
    for model in (load(source, adapter_path=adapter)[0], load(tmp_path / "fused")[0]):
        assert mx.allclose(model.mm_projector[2].bias, new["mm_projector.2.bias"])
        weight = new["mm_projector.0.weight"].astype(model.mm_projector[0].weight.dtype)
        assert mx.allclose(model.mm_projector[0].weight, weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            settings(fine_tune_type="full"),
            "mlx-vlm with fine_tune_type 'full'; expected",
        ),
        (settings(fine_tune_type="dora"), "has 2 tensors for .*; expected 3, as dora"),
        (
            settings(lora_parameters={"rank": 4}, rank=0),
            "no scale, or no rank and alpha",
        ),
        (
            settings(lora_parameters={"scale": math.nan}),
            "the scale nan; expected a num",
        ),
        (
            settings(base_quantization={f"language_model.{LAYERS[0]}": {"bits": 4}}),
            "was trained on .* and the checkpoint has floats; expected the checkpoint",
        ),
        (
            settings(lora_parameters={"scale": 4.0, "rank": 8}),
            "has factors of shape .*; expected the rank 8 of its settings",
        ),
        (
            lambda f: edit_factors(
                f, lambda w: w.update({n: w[n] * mx.nan for n in list(w)[:1]})
            ),
            "the adapter .* has numbers for .* that are not finite",
        ),
        (rename("layers.0", "layers.5"), "changes language_model.model.layers.5.*mean"),
        (drop("q_proj.lora_a"), "has 1 tensors for .*q_proj; expected 2"),
        (rename("lora_a", "lora_c"), "has the tensor .*lora_c; expected factors"),
        (rename("q_proj", "k_proj"), "inputs and .* outputs; expected an adapter"),
    ],
)
def test_adapters_of_mlx_vlm_that_cannot_be_followed(tmp_path, theirs, damage, message):
    theirs(convert(str(TINY), str(tmp_path / "mlx")), linear_layers=["q_proj"])
    damage(tmp_path / "adapter")
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path / "mlx", adapter_path=tmp_path / "adapter")
    assert len(str(error.value)) < 600


def test_the_base_of_an_adapter_is_compared(tmp_path, theirs):
    low = tmp_path / "low"
    convert(str(TINY), str(low), quantize=True, q_group_size=32)
    exact, path = theirs(low), f"language_model.{LAYERS[0]}"
    entry = {"group_size": 32, "bits": 4, "mode": "affine"}
    edit_settings(tmp_path / "adapter", base_quantization={path: entry})
    assert np.array_equal(logits(low, tmp_path / "adapter"), exact)
    edit_settings(tmp_path / "adapter", base_quantization={path: entry | {"bits": 8}})
    with pytest.raises(InputError, match="in 8 bits in groups of 32, mode affine, and"):
        load(low, adapter_path=tmp_path / "adapter")


def test_other_folders_are_named(tmp_path):
    edit_config(convert(str(TINY), str(tmp_path / "mlx")), torch_dtype="float32")
    with pytest.raises(InputError, match=r"no adapter_config\.json; expected an adap"):
        load(TINY, adapter_path=tmp_path / "mlx")
