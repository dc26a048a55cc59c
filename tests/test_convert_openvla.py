"""Conversion of OpenVLA checkpoints: layouts, quantization, and refusals."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import DATA, TINY_POLICY, read_manifest, write_headers

from mlx_tokprune import load
from mlx_tokprune.act.predict import predict_action
from mlx_tokprune.checkpoints.opening import (
    ModelSource,
    expected_shapes,
    open_checkpoint,
)
from mlx_tokprune.checkpoints.shards import Checkpoint
from mlx_tokprune.convert import convert
from mlx_tokprune.convert.__main__ import main
from mlx_tokprune.convert.converter import INT8_WARNING
from mlx_tokprune.convert.openvla import OPENVLA
from mlx_tokprune.errors import InputError

PICTURE = TINY_POLICY / "image_0.png"
INSTRUCTION = "pick up the cup"


def edit(folder, name, **changes) -> None:
    config = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(config))


@pytest.fixture
def manifest(tmp_path):
    """Return a function that opens the headers of OpenVLA-7B after `change`."""
    read = read_manifest(DATA / "manifests" / "OpenVLA-7B.json.gz")

    def open_changed(change=lambda tensors: None) -> ModelSource:
        change(read["tensors"])
        folder = tmp_path / "full"
        write_headers(folder, read["tensors"], read["config"])
        text = json.dumps(read["preprocessor"])
        (folder / "preprocessor_config.json").write_text(text)
        return open_checkpoint(folder)

    return open_changed


def test_every_tensor_of_the_full_size_manifest_is_used_once(manifest):
    family, opened, config = manifest()
    assert family is OPENVLA
    names = [OPENVLA.rename(n) for n in opened.tensors]
    used = [n for n in names if n is not None]
    assert sorted(used) == sorted(expected_shapes(OPENVLA, config))
    dropped = [n for n in opened.tensors if OPENVLA.rename(n) is None]
    assert len(dropped) + len(used) == len(opened.tensors)
    pooling = "vision_backbone.fused_featurizer.attn_pool."
    assert dropped
    assert all(n.startswith(pooling) for n in dropped)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("projector.fc3.weight", r"lacks tensor projector\.fc3\.weight"),
        ("language_model.model.layers.31.mlp.up_proj.weight", "lacks tensor .*31"),
        ("vision_backbone.featurizer.blocks.22.ls1.scale_factor", "lacks tensor .*22"),
    ],
)
def test_a_missing_tensor_is_named(manifest, tensor, message):
    with pytest.raises(InputError, match=message):
        manifest(lambda tensors: tensors.pop(tensor))


def test_a_tensor_nobody_uses_is_named(manifest):
    with pytest.raises(InputError, match=r"projector\.fc4\.weight"):
        manifest(lambda tensors: tensors.update({"projector.fc4.weight": [4, 4]}))


def test_converting_twice_changes_nothing(tmp_path):
    once = convert(str(TINY_POLICY), str(tmp_path / "once"))
    twice = convert(str(once), str(tmp_path / "twice"))
    for name in ("model.safetensors", "preprocessor_config.json"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()
    configs = [json.loads((f / "config.json").read_text()) for f in (once, twice)]
    assert configs[0] == configs[1]
    assert "toy_robot" in configs[0]["norm_stats"]


@pytest.mark.parametrize("bits", [4, 8])
def test_towers_and_projector_stay_float(tmp_path, bits, caplog):
    target = tmp_path / "q"
    options = ["-q", "--q-bits", str(bits), "--q-group-size", "32"]
    main(["--hf-path", str(TINY_POLICY), "--mlx-path", str(target), *options])
    scales = [n for n in Checkpoint.open(target).tensors if n.endswith(".scales")]
    assert scales
    assert all(n.startswith("language_model.") for n in scales)
    assert (INT8_WARNING in caplog.text) == (bits == 8)
    action = predict_action(*load(target), [PICTURE], INSTRUCTION)
    assert len(action.token_ids) == 7


PREPROCESSOR, STATISTICS = "preprocessor_config.json", "dataset_statistics.json"
NUMBERS = {"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}


def statistics(**changes) -> dict:
    return {"robot": {"action": NUMBERS | changes}}


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"n_action_bins": 1}, "n_action_bins 1; expected .* from 2"),
        ("config.json", {"n_action_bins": 700}, "from 2 to 576"),
        ("config.json", {"pad_to_multiple_of": 700}, "below 640"),
        ("config.json", {"empty_token_id": 640}, "below vocab_size 640"),
        ("config.json", {"use_fused_vision_backbone": "false"}, "true or false"),
        ("config.json", {"image_resize_strategy": "letterbox"}, "'resize-naive'"),
        ("config.json", {"eos_token_id": 2.5}, "expected a token id"),
        (PREPROCESSOR, {"means": [[float("nan")] * 3] * 2}, "three numbers"),
        (PREPROCESSOR, {"stds": [[1e300] * 3] * 2}, "three numbers"),
        (PREPROCESSOR, {"stds": [[0.0] * 3] * 2}, "not positive"),
        (PREPROCESSOR, {"means": [[True] * 3] * 2}, "three numbers"),
        (PREPROCESSOR, {"interpolations": ["nearest"] * 2}, "'bicubic'"),
        (PREPROCESSOR, {"input_sizes": [[3, 224, 224]] * 2}, r"\[3, 112, 112\]"),
        (STATISTICS, statistics(q01=[], q99=[], mask=[]), "a list of 1 to 64"),
        (STATISTICS, statistics(q01=[0.0] * 4000), "a list of 1 to 64"),
        (STATISTICS, statistics(q01=["0"] * 7), "finite numbers"),
        (STATISTICS, statistics(q01=[None] * 7), "finite numbers"),
        (STATISTICS, statistics(q99=[10**400] * 7), "finite numbers"),
        (STATISTICS, statistics(q01=[5.0] * 7), "q01 above q99"),
        (STATISTICS, statistics(mask=["false"] * 7), "expected booleans"),
        (STATISTICS, statistics(mask=[True] * 6), "mask 6; expected lists of one"),
    ],
)
def test_damaged_policies_are_refused(policy_checkpoint, file, changes, message):
    if not (policy_checkpoint / file).exists():
        (policy_checkpoint / file).write_text("{}")
    edit(policy_checkpoint, file, **changes)
    with pytest.raises(InputError, match=message):
        predict_action(*load(policy_checkpoint), [PICTURE], INSTRUCTION)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": 10_000_000}, "below vocab_size 640"),
        ({"eos_token_id": [2, 3]}, "below vocab_size 640"),
        ({"max_position_embeddings": "x"}, "a positive number"),
        ({"max_position_embeddings": 100}, "no room for a prompt"),
        ({"rope_traditional": "x"}, "true or false"),
    ],
)
def test_damaged_language_configs_are_refused(policy_checkpoint, changes, message):
    config = json.loads((policy_checkpoint / "config.json").read_text())
    text = config["text_config"] | changes
    edit(policy_checkpoint, "config.json", text_config=text)
    with pytest.raises(InputError, match=message):
        load(policy_checkpoint)


@pytest.mark.parametrize("options", [{"actions_per_chunk": 5000}, {"pictures": 100}])
def test_overrides_that_do_not_fit_leave_nothing(oft_folder, tmp_path, options):
    target = tmp_path / "mlx"
    with pytest.raises(InputError, match=r"oft chunk 5000|no room for a prompt"):
        convert(str(oft_folder), str(target), **options)
    assert not target.exists()


@pytest.fixture
def one_tower(policy_checkpoint):
    """Return a Prismatic checkpoint with only the tiny policy's SigLIP tower."""
    file = str(policy_checkpoint / "model.safetensors")
    kept = {}
    for name, array in mx.load(file).items():
        if name.startswith(("vision_backbone.featurizer.", "projector.")):
            continue
        name = name.replace("fused_featurizer", "featurizer")
        kept[name] = mx.array(array)
    for name, shape in (("fc1", (96, 64)), ("fc2", (96, 96))):
        key = mx.random.key(shape[1])
        kept[f"projector.{name}.weight"] = 0.1 * mx.random.normal(shape, key=key)
        kept[f"projector.{name}.bias"] = mx.zeros((96,))
    mx.eval(kept)
    mx.save_safetensors(file, kept)
    config = json.loads((policy_checkpoint / "config.json").read_text())
    tower = config["vision_config"]["fused_featurizer"]
    edit(
        policy_checkpoint,
        "config.json",
        use_fused_vision_backbone=False,
        arch_specifier="no-align+gelu-mlp",
        image_sizes=[112],
        timm_model_ids=config["timm_model_ids"][1:],
        timm_override_act_layers=[None],
        vision_config={"featurizer": tower},
    )
    means = json.loads((policy_checkpoint / "preprocessor_config.json").read_text())
    edit(
        policy_checkpoint,
        "preprocessor_config.json",
        use_fused_vision_backbone=False,
        **{key: means[key][1:] for key in ("means", "stds")},
    )
    return policy_checkpoint


def test_a_single_tower_is_the_same_tower(one_tower, tmp_path, tiny_policy):
    target = convert(str(one_tower), str(tmp_path / "mlx"))
    model, processor = load(target)
    pixels = mx.random.uniform(shape=(1, 112, 112, 3), key=mx.random.key(0))
    alone = model.encode(pixels).tokens
    assert alone.shape == (1, 64, 64)
    together = tiny_policy[0].encode(pixels).tokens[..., 48:]
    assert mx.allclose(alone, together, rtol=1e-5, atol=1e-5)
    action = predict_action(model, processor, [PICTURE], INSTRUCTION)
    assert np.isfinite(action.values).all()


def test_pickles_that_are_not_plain_tensors_are_refused(policy_checkpoint, capsys):
    """A bad pickle is refused, or the error names the extra that installs torch."""
    (policy_checkpoint / "action_head--1_checkpoint.pt").write_bytes(b"\x80\x04.")
    target = policy_checkpoint.parent / "mlx"
    with pytest.raises(SystemExit) as stop:
        main(["--hf-path", str(policy_checkpoint), "--mlx-path", str(target)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "and is refused" in error or "mlx-tokprune[oft]" in error
    assert error.count("\n") == 1
    assert not target.exists()


def test_the_checkpoint_s_own_code_is_never_asked_about(policy_checkpoint, monkeypatch):
    """A checkpoint with `auto_map` loads without a question on the terminal."""
    auto_map = {"AutoConfig": "configuration_prismatic.OpenVLAConfig"}
    edit(policy_checkpoint, "config.json", auto_map=auto_map)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt))
    load(policy_checkpoint)
    assert not asked
