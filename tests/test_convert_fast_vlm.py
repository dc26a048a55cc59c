"""Conversion of transformers' own FastVLM (`fast_vlm`): names and config.

`benchmarks/parity_fast_vlm.py` compares with transformers, and wrote the manifest.
"""

import json

import mlx.core as mx
import pytest
from conftest import DATA, read_manifest, write_headers

from mlx_tokprune import load
from mlx_tokprune.checkpoints.opening import open_checkpoint
from mlx_tokprune.convert import convert
from mlx_tokprune.convert.fastvlm import FASTVLM
from mlx_tokprune.errors import InputError

IDS = mx.array([[1, 2, 3, 4]])


def test_every_tensor_of_the_manifest_becomes_one_of_ours(tmp_path):
    manifest = read_manifest(DATA / "manifests" / "fast_vlm-0.5B.json.gz")
    write_headers(tmp_path / "theirs", manifest["tensors"], manifest["config"])
    family, opened, config = open_checkpoint(tmp_path / "theirs")
    assert family is FASTVLM
    ours = FASTVLM.shapes(opened)
    apple = read_manifest(DATA / "manifests" / "FastVLM-0.5B.json.gz")
    write_headers(tmp_path / "apple", apple["tensors"], apple["config"])
    expected = FASTVLM.shapes(open_checkpoint(tmp_path / "apple").checkpoint)
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    expected.pop("vision_tower.vision_model.head.proj")
    for name in ("model.embed_tokens", "lm_head"):  # one more token, and padding
        expected[f"language_model.{name}.weight"] = (vocabulary, hidden)
    assert ours == expected
    assert config["model_type"] == "llava_qwen2"
    assert config["tie_word_embeddings"] is False
    assert config["rope_theta"] == 1000000.0
    assert config["eos_token_id"] == [151643, 151645]  # of texts, and of answers


def test_it_computes_the_same_under_both_names(fast_vlm, tmp_path, tiny):
    pixels = mx.random.uniform(shape=(1, 512, 512, 3), key=mx.random.key(0))
    for folder in (fast_vlm, convert(str(fast_vlm), str(tmp_path / "mlx"))):
        model, processor = load(folder)
        assert mx.array_equal(model(IDS), tiny[0](IDS))
        assert mx.array_equal(
            model.encode(pixels).tokens, tiny[0].encode(pixels).tokens
        )
        assert processor.tokenizer.eos_token_ids == {258}


def change(folder, part=None, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_the_frequency_of_positions_is_transformers_default(fast_vlm):
    change(fast_vlm, "text_config", rope_parameters=None)
    assert open_checkpoint(fast_vlm).config["rope_theta"] == 10000.0
    change(fast_vlm, "text_config", rope_theta=7.0)  # before transformers 5
    assert open_checkpoint(fast_vlm).config["rope_theta"] == 7.0


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (None, {"vision_feature_layer": -2}, "vision_feature_layer -2; expected -1"),
        (None, {"projector_hidden_act": "relu"}, "'relu'; expected 'gelu'"),
        (None, {"text_config": [1]}, r"text_config \[1\]; expected an object"),
        (
            "vision_config",
            {"architecture": "fastvit_s12"},
            "'fastvit_s12'; expected timm",
        ),
        ("vision_config", {"model_args": {}}, "inference_mode false .*; expected a"),
        ("vision_config", {"model_args": {"pos": 1}}, "with pos; expected timm's"),
    ],
)
def test_what_is_no_fastvlm_is_refused(fast_vlm, part, changes, message):
    change(fast_vlm, part, **changes)
    with pytest.raises(InputError, match=message):
        load(fast_vlm)
