"""Conversion of pi0-FAST checkpoints: layouts, statistics, tokenizers, refusals."""

import json
import re
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import DATA, TINY_CHUNKS, read_manifest, write_headers

from mlx_tokprune import load
from mlx_tokprune.act.predict import predict_action
from mlx_tokprune.checkpoints.opening import expected_shapes, open_checkpoint
from mlx_tokprune.checkpoints.shards import Checkpoint
from mlx_tokprune.convert import convert
from mlx_tokprune.convert.pi0fast import PI0FAST
from mlx_tokprune.errors import InputError

ROOT = "model.paligemma_with_expert.paligemma."
CONFIG = json.loads((TINY_CHUNKS / "config.json").read_text())
PICTURES = {"base": TINY_CHUNKS / "image_0.png", "left": TINY_CHUNKS / "image_1.png"}
STATISTICS = CONFIG["statistics"]


def act(folder, **asked):
    asked = {"proprio": CONFIG["state"]} | asked
    return predict_action(*load(folder), PICTURES, "pick up the cup", **asked)


@pytest.fixture
def copy(tmp_path):
    """Return a writable copy of the tiny policy."""
    return shutil.copytree(TINY_CHUNKS, tmp_path / "policy")


def edit(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder, change) -> None:
    """Replace the checkpoint's tensors by `change(tensors)`."""
    file = str(folder / "model.safetensors")
    tensors = change({k: mx.array(v) for k, v in mx.load(file).items()})
    mx.eval(tensors)
    mx.save_safetensors(file, tensors)


@pytest.fixture
def manifest(tmp_path):
    """Return a function that opens full-size headers after `change`."""
    read = read_manifest(DATA / "manifests" / "pi0_fast.json.gz")

    def open_changed(change=lambda tensors: tensors):
        tensors = change(dict(read["tensors"]))
        write_headers(tmp_path / "full", tensors, read["config"])
        return open_checkpoint(tmp_path / "full")

    return open_changed


def without_model(tensors: dict) -> dict:
    """Return the names of openpi's torch export, without the prefix `model.`."""
    return {name.removeprefix("model."): shape for name, shape in tensors.items()}


def without(*patterns: str):
    def change(tensors: dict) -> dict:
        return {
            name: value
            for name, value in tensors.items()
            if not any(re.search(pattern, name) for pattern in patterns)
        }

    return change


@pytest.mark.parametrize("change", [dict, without_model], ids=["lerobot", "openpi"])
def test_every_tensor_of_full_size_is_used_once(manifest, change):
    family, opened, config = manifest(change)
    used = [family.rename(name) for name in opened.tensors]
    assert sorted(used) == sorted(expected_shapes(family, config))
    assert config["policy"]["horizon"] == 50
    assert config["vision_config"]["num_attention_heads"] == 16
    assert config["text_config"]["num_attention_heads"] == 8


@pytest.mark.parametrize("gone", ["lm_head", "embed_tokens"])
def test_a_table_that_is_stored_once_is_both(manifest, gone):
    family, _, config = manifest(without(gone))
    assert config["text_config"]["tie_word_embeddings"]
    assert "language_model.lm_head.weight" not in expected_shapes(family, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(r"layers\.17\.mlp\.up_proj"), "lacks tensor .*17.mlp.up_proj"),
        (without("projector.linear.bias"), "lacks tensor .*linear.bias"),
        (without("post_layernorm.weight"), r"lacks tensor vision_tower\.norm\.weight"),
        (without("patch_embedding.weight"), "which gives its sizes"),
        (lambda t: t | {ROOT + "model.x.weight": [4]}, "unknown tensor"),
        (
            lambda t: t | {"model.action_in_proj.weight": [4, 4]},
            "has an action expert, as pi0",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(manifest, change, message):
    with pytest.raises(InputError, match=message):
        manifest(change)


def test_converted_acts_the_same_and_converting_twice_changes_nothing(tmp_path):
    once = convert(str(TINY_CHUNKS), str(tmp_path / "once"))
    twice = convert(str(once), str(tmp_path / "twice"))
    for name in ("model.safetensors", "config.json", "fast_tokenizer.json"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()
    assert act(once).values.tolist() == act(TINY_CHUNKS).values.tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_tower_and_projector_stay_float(copy, tmp_path, bits):
    def widen(tensors: dict) -> dict:  # to whole groups of 32
        grown = {}
        for name, array in tensors.items():
            text = "language_model" in name or "lm_head" in name
            if text or "multi_modal" in name:
                wide = [64 if n == 48 else n for n in array.shape]
                if "multi_modal" in name:
                    wide = [wide[0], *array.shape[1:]]
                pads = [(0, w - n) for w, n in zip(wide, array.shape, strict=True)]
                array = mx.pad(array, pads)
            grown[name] = array
        return grown

    rewrite(copy, widen)
    target = tmp_path / "quantized"
    convert(str(copy), str(target), quantize=True, q_bits=bits, q_group_size=32)
    scales = [n for n in Checkpoint.open(target).tensors if n.endswith(".scales")]
    assert len(scales) == 7 * 3 + 2
    assert all(n.startswith("language_model.") for n in scales)
    assert np.isfinite(act(target).values).all()


@pytest.mark.parametrize("kept", ["lm_head", "embed_tokens"])
def test_a_table_that_is_stored_once_acts_as_both(copy, kept):
    head, table = ROOT + "lm_head.weight", ROOT + "model.language_model.embed_tokens"
    table += ".weight"
    rewrite(copy, lambda t: t | {table: t[head]})
    both = act(copy)
    rewrite(copy, without(table if kept == "lm_head" else head))
    assert act(copy).token_ids == both.token_ids


def test_names_without_model_are_openpi_s(copy, tmp_path):
    """An openpi export has statistics under `assets/`, and answers end at <eos>."""
    rewrite(copy, without_model)
    (copy / "config.json").write_text(
        json.dumps(
            {
                **{"action_dim": 3, "action_horizon": 4, "precision": "float32"},
                "vision_config": CONFIG["vision_config"],
            }
        )
    )
    assets = copy / "assets" / "toy"
    assets.mkdir(parents=True)
    part = {"mean": [0.0], "std": [1.0], "q01": [-1.0], "q99": [1.0]}
    stats = {"actions": {k: v * 3 for k, v in part.items()}}
    stats["state"] = {k: v * 2 for k, v in part.items()}
    (assets / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    target = convert(str(copy), str(tmp_path / "mlx"))
    model, processor = load(target)
    assert model.gap == 1
    assert processor.stop == processor.tokenizer.eos_token_id
    assert model.cameras == ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
    images = {"wrist": TINY_CHUNKS / "image_0.png"}
    action = predict_action(model, processor, images, "pick", proprio=[0.1, -0.4])
    assert action.values.shape == (4, 3)
    assert not action.normalized.any()  # it does not answer "Action: "
    assert action.wrong == "an answer without 'Action: '"


@pytest.mark.parametrize(
    ("kind", "mode", "names"),
    [
        ("ACTION", "MEAN_STD", ("mean", "std")),
        ("ACTION", "MIN_MAX", ("min", "max")),
        ("ACTION", "QUANTILE10", ("q10", "q90")),
        ("ACTION", "IDENTITY", None),
        ("STATE", "MEAN_STD", ("mean", "std")),
        ("STATE", "IDENTITY", None),
    ],
)
def test_rules_of_normalisation_are_the_checkpoint_s(copy, kind, mode, names):
    """Each normalisation mode of the config follows lerobot's formula."""
    file = copy / "policy_preprocessor.json"
    steps = json.loads(file.read_text())
    steps["steps"][0]["config"]["norm_map"][kind] = mode
    file.write_text(json.dumps(steps))
    part = {"ACTION": "action", "STATE": "observation.state"}[kind]
    size = {"ACTION": 3, "STATE": 5}[kind]
    first, second = np.linspace(-1, 1, size), np.linspace(2, 0.5, size)
    if names:
        stats = {k: mx.array(v) for k, v in mx.load(str(copy / STATISTICS)).items()}
        stats |= {
            f"{part}.{n}": mx.array(v.astype(np.float32))
            for n, v in zip(names, (first, second), strict=True)
        }
        if mode != "MEAN_STD":  # the second is the higher one
            stats[f"{part}.{names[1]}"] = mx.array((first + second).astype(np.float32))
        mx.eval(stats)
        mx.save_safetensors(str(copy / STATISTICS), stats)
    values = np.array([0.3, -0.8, 0.9, 0.0, -1.5])[:size]
    _, processor = load(copy)
    scale = processor.bounds("proprio" if kind == "STATE" else "action", None)
    if kind == "STATE" and mode == "IDENTITY":
        assert not len(scale.low)
        return
    if mode == "MEAN_STD":
        inverse, forward = values * second + first, (values - first) / second
    elif mode == "IDENTITY":
        inverse = forward = values
    else:
        inverse = (values + 1) * second / 2 + first
        forward = 2 * (values - first) / second - 1
    np.testing.assert_allclose(scale.to_units(values), inverse, atol=1e-6)
    np.testing.assert_allclose(scale.from_units_unclipped(values), forward, atol=1e-5)
    assert np.isfinite(act(copy).values).all()


def test_statistics_that_nobody_reads_say_no_size(copy):
    """The frame counts in lerobot's statistics do not set the state size."""
    stats = {k: mx.array(v) for k, v in mx.load(str(copy / STATISTICS)).items()}
    stats |= {f"{n}.count": mx.ones((1,)) for n in ("action", "observation.state")}
    mx.eval(stats)
    mx.save_safetensors(str(copy / STATISTICS), stats)
    opened = open_checkpoint(copy)
    assert opened.config["policy"]["state_size"] == 5
    assert "count" not in opened.config["norm_stats"]["lerobot"]["proprio"]


def test_a_constant_state_is_in_the_middle_bin(copy):
    """A state with zero deviation is normalised to 0 at its mean."""
    file = copy / "policy_preprocessor.json"
    steps = json.loads(file.read_text())
    steps["steps"][0]["config"]["norm_map"]["STATE"] = "MEAN_STD"
    file.write_text(json.dumps(steps))
    stats = {k: mx.array(v) for k, v in mx.load(str(copy / STATISTICS)).items()}
    stats["observation.state.std"] = mx.zeros((5,))
    mean = np.array(stats["observation.state.mean"])
    mx.eval(stats)
    mx.save_safetensors(str(copy / STATISTICS), stats)
    _, processor = load(copy)
    assert not processor.bounds("proprio", None).from_units_unclipped(mean).any()


def set_statistics(name):
    def change(folder) -> None:
        file = folder / "policy_preprocessor.json"
        steps = json.loads(file.read_text())
        steps["steps"][0]["state_file"] = name
        file.write_text(json.dumps(steps))

    return change


def set_config(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


def remove(*names: str):
    def change(folder) -> None:
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).unlink(missing_ok=True)

    return change


def lose_fast(**changes):
    def change(folder) -> None:
        remove("fast")(folder)
        set_config(**changes)(folder)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_statistics("../stats.safetensors"), "expected a file in the folder"),
        (set_statistics("/etc/stats.safetensors"), "expected a file in the folder"),
        (set_statistics("other.safetensors"), "is not a file"),
        (remove("policy_preprocessor.json"), "no norm_stats, so actions have no units"),
        (set_config(use_relative_actions=True), "relative to its state"),
        (set_config(chunk_size=0), "policy horizon 0; expected a whole number from 1"),
        (set_config(max_decoding_steps=1 << 20), "policy steps 1048576"),
        (set_config(output_features={}), "policy action_dim None"),
        (set_config(input_features={}), "policy cameras \\[\\]; expected 1 to 16"),
        (set_config(fast_skip_tokens="128"), "policy skipped '128'"),
        (set_config(vision_config={}), "num_attention_heads None"),
        (set_config(vision_config={"num_attention_heads": 5}), "multiple of num_heads"),
        (set_config(text_config={"head_dim": 15}), "head_dim 15"),
        (set_config(validate_action_token_prefix=1), "policy strict 1"),
        (lose_fast(action_tokenizer_name="/tmp/fast"), "no hub id; put its files into"),
        (lose_fast(action_tokenizer_name="../fast"), "no hub id; put its files into"),
        (lose_fast(action_tokenizer_name="../../x/y"), "no hub id; put its files into"),
    ],
)
def test_damaged_checkpoints_are_refused(copy, change, message):
    change(copy)
    with pytest.raises(InputError, match=message):
        act(copy)


def test_a_rule_that_is_not_known_is_refused(copy):
    file = copy / "policy_preprocessor.json"
    steps = json.loads(file.read_text())
    steps["steps"][0]["config"]["norm_map"]["ACTION"] = "LOG"
    file.write_text(json.dumps(steps))
    with pytest.raises(InputError, match="normalises ACTION by 'LOG'; expected one of"):
        load(copy)


def test_tokenizers_may_lie_in_folders_of_their_own(copy, tmp_path):
    """A tokenizer in `tokenizer/` is found and copied into the converted folder."""
    (copy / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).rename(copy / "tokenizer" / name)
    target = convert(str(copy), str(tmp_path / "mlx"))
    shutil.rmtree(copy)
    assert act(target).token_ids == act(TINY_CHUNKS).token_ids


def test_a_tokenizer_that_the_hub_does_not_give_says_where_to_put_it(
    copy, monkeypatch, tmp_path
):
    """A failed download of FAST's tokenizer names the folder for its files."""
    remove("fast")(copy)
    asked = []

    def nothing(name, files):
        assert not any("safetensors" in pattern for pattern in files)
        asked.append(name)
        raise InputError(f"{name} cannot be fetched")

    monkeypatch.setattr("mlx_tokprune.convert.pi0fast.fetch", nothing)
    with pytest.raises(InputError, match=r"put its files into .*fast"):
        convert(str(copy), str(tmp_path / "mlx"))
    assert asked == ["lerobot/fast-action-tokenizer"]
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("place", [".", "params"])
def test_an_orbax_checkpoint_is_told_how_to_get_safetensors(tmp_path, place):
    (tmp_path / "jax" / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / "jax" / place / "_METADATA").write_text("{}")
    with pytest.raises(InputError, match=r"Orbax checkpoint.*lerobot/pi0fast-base"):
        convert(str(tmp_path / "jax"), str(tmp_path / "mlx"))


def test_flags_of_openvla_are_refused(copy, tmp_path):
    with pytest.raises(InputError, match="is a pi0-FAST checkpoint; leave out"):
        convert(str(copy), str(tmp_path / "mlx"), lora_adapter="merge")
    with pytest.raises(InputError, match="options for OpenVLA-OFT policies"):
        convert(str(copy), str(tmp_path / "mlx"), actions_per_chunk=4)


def test_names_are_renamed_whatever_transformers_wrote():
    """All layouts of PaliGemma in transformers' versions map to one name."""
    for middle in ("", "model."):
        for inner in ("", "vision_model."):
            name = f"paligemma_with_expert.paligemma.{middle}vision_tower.{inner}"
            found = PI0FAST.rename(f"{name}encoder.layers.3.self_attn.q_proj.weight")
            assert found == "vision_tower.blocks.3.attn.q.weight"
    old = "paligemma_with_expert.paligemma.language_model."
    assert (
        PI0FAST.rename(f"{old}model.norm.weight") == "language_model.model.norm.weight"
    )
    assert PI0FAST.rename(f"{old}lm_head.weight") == "language_model.lm_head.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_stats": 1e300}, r"norm_stats 1e\+300; expected an object"),
        ({"policy": {}}, "policy horizon None; expected a whole number"),
        ({"text_config": {"head_dim": 8}}, "has shape"),
        ({"vision_config": {"image_size": 28}}, "has shape"),
    ],
)
def test_damaged_converted_configs_are_refused(tmp_path, changes, message):
    target = convert(str(TINY_CHUNKS), str(tmp_path / "mlx"))
    config = json.loads((target / "config.json").read_text())
    parts = {k: config[k] | v for k, v in changes.items() if k.endswith("_config")}
    edit(target / "config.json", **(changes | parts))
    with pytest.raises(InputError, match=message):
        act(target)
