"""Text settings of every family: rope in both spellings, and tokenizers without config.

The expected frequencies follow transformers' `modeling_rope_utils.py` (YaRN: arXiv
2309.00071), written in NumPy.
"""

import importlib
import json
import math
import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, TINY_CHUNKS
from test_convert import edit_config

from mlx_tokprune import Pruner, generate, load
from mlx_tokprune.checkpoints.opening import open_checkpoint
from mlx_tokprune.convert import convert
from mlx_tokprune.errors import InputError
from mlx_tokprune.models.positions import TokenPositions
from mlx_tokprune.models.text_config import flat_rope, read_text

IDS = mx.array([[5, 6, 7, 8, 9, 10, 11, 12]])
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320},
    **{"rms_norm_eps": 1e-6, "max_position_embeddings": 4096},
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


def frequencies(dim: int, theta: float, scaling: dict) -> tuple[np.ndarray, float]:
    """Return the rotation per position of each pair, and the factor of q and k."""
    plain = theta ** -(np.arange(0, dim, 2) / dim)
    kind, factor = scaling["rope_type"], scaling.get("factor", 1.0)
    length = scaling.get("original_max_position_embeddings", 4096)
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        share = np.clip((length * plain / (2 * np.pi) - low) / (high - low), 0, 1)
        return plain * (share + (1 - share) / factor), 1.0
    assert kind == "yarn"

    def turns(count: float) -> float:
        return dim * math.log(length / (count * 2 * np.pi)) / (2 * math.log(theta))

    low = max(math.floor(turns(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(turns(scaling.get("beta_slow", 1))), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    growth = 0.1 * math.log(factor)
    attention = growth + 1
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        attention = growth * scaling["mscale"] + 1
        attention /= growth * scaling["mscale_all_dim"] + 1
    return plain * (1 - ramp) + plain / factor * ramp, attention


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", **LLAMA3},  # of max_position_embeddings
        {"rope_type": "yarn", **YARN},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2},
        {"rope_type": "yarn", **YARN, "mscale": 0.5, "mscale_all_dim": 2.0},
        {"rope_type": "yarn", **YARN, "mscale": 0.5, "truncate": True},
    ],
)
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_mlx_lm_rotates_as_transformers_does(architecture, scaling):
    family = importlib.import_module(f"mlx_lm.models.{architecture}")
    text = SIZES | {"rope_parameters": scaling | {"rope_theta": 500.0}}
    args = family.ModelArgs.from_dict(read_text(text, architecture))
    rope = family.Model(args).layers[0].self_attn.rope
    angles, scale = frequencies(16, 500.0, scaling)
    x = np.random.default_rng(0).normal(size=(1, 1, 1, 16)).astype(np.float32)
    first, second = x[..., :8], x[..., 8:]
    cos, sin = np.cos(100 * angles), np.sin(100 * angles)
    turned = [first * cos - second * sin, second * cos + first * sin]
    expected = scale * np.concatenate(turned, axis=-1)
    np.testing.assert_allclose(np.array(rope(mx.array(x), 100)), expected, atol=2e-4)


def states(folder) -> np.ndarray:
    """Return what the language model's layers compute for some ids."""
    model = load(folder)[0]
    hidden = model.decoder.embed(IDS)
    for layer in model.layers:
        hidden = layer(hidden, "causal", None)
    return np.array(hidden)


def change(folder, section: str, **changes) -> None:
    """Change the text settings, in a section or at the top; `None` takes one out."""
    config = json.loads((folder / "config.json").read_text())
    text = config.setdefault(section, {}) if section else config
    for name, value in changes.items():
        text.pop(name, None)
        text |= {} if value is None else {name: value}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def chunk_checkpoint(tmp_path):
    folder = tmp_path / "chunks"
    shutil.copytree(TINY_CHUNKS, folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.mark.parametrize(
    ("fixture", "section"),
    [
        ("checkpoint", ""),
        ("checkpoint", "text_config"),
        ("policy_checkpoint", "text_config"),
        ("chunk_checkpoint", "text_config"),
    ],
)
def test_both_spellings_of_the_frequency_are_one(fixture, section, request, tmp_path):
    """The original checkpoint in either spelling, and after conversion."""
    folder = request.getfixturevalue(fixture)
    plain = states(folder)
    change(folder, "", rope_theta=None)
    change(folder, section, rope_theta=77.0)
    expected = states(folder)
    assert not np.allclose(plain, expected)
    inside = {"rope_theta": 77.0, "rope_type": "default"}
    change(folder, section, rope_theta=None, rope_parameters=inside)
    np.testing.assert_array_equal(states(folder), expected)
    target = convert(str(folder), str(tmp_path / "mlx"))
    np.testing.assert_array_equal(states(target), expected)
    config = json.loads((target / "config.json").read_text())
    text = config[section] if section else config
    assert text["rope_theta"] == 77.0
    assert "rope_parameters" not in text


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gemma", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "for gemma"),
        ("gemma", {"rope_parameters": {"rope_type": "yarn", **YARN}}, "for gemma"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'"),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, "type 'mrope'; expected one of"),
        ("qwen2", {"rope_scaling": {"rope_type": ["yarn"]}}, "rope type"),
        (
            "qwen2",
            {"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}},
            r"rope type \['yarn', 'linear'\]",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear"}},
            "factor .* None; expected a pos",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 0}},
            "yarn 0; expected a",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            "low_freq_factor",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "high_freq_factor 1.0; expected a number above 1.0",
        ),
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", **YARN, "truncate": False}},
            "truncate of the rope type yarn False; expected none",
        ),
        (
            "llama",
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "default"}},
            "0.5",
        ),
        ("qwen2", {"rope_parameters": {"factor": 3.0}}, "default 3.0; expected none"),
        (
            "qwen2",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "full_attention of the rope type default",
        ),
        (
            "qwen2",
            {
                "rope_parameters": {"rope_theta": 5.0},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            "expected one of them, or equal values",
        ),
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", **YARN, "attention_factor": 0.7}},
            "attention_factor of the rope type yarn 0.7; expected none",
        ),
        ("qwen2", {"rope_parameters": {"rope_theta": -1}}, "rope_theta -1; expected"),
        ("qwen2", {"rope_theta": True}, "rope_theta True; expected a positive"),
        ("qwen2", {"rope_parameters": 5}, "rope_parameters 5; expected an object"),
    ],
)
def test_positions_that_mlx_lm_does_not_compute_are_refused(
    architecture, changes, message
):
    with pytest.raises(InputError, match=message):
        read_text(SIZES | changes, architecture)


def test_two_frequencies_are_noted(checkpoint):
    edit_config(checkpoint, rope_theta=10000.0, rope_parameters={"rope_theta": 77.0})
    source = open_checkpoint(checkpoint)
    assert source.config["rope_theta"] == 77.0
    (note,) = source.checkpoint.notes
    assert "rope_theta 77.0 and 10000.0; 77.0 in the rope parameters is used" in note


def test_a_missing_frequency_is_noted(checkpoint):
    change(checkpoint, "", rope_theta=None)
    source = open_checkpoint(checkpoint)
    assert source.config["rope_theta"] == 10000.0
    assert "no rope_theta; 10000" in source.checkpoint.notes[0]


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", **YARN},
        {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 64},
        {"type": "dynamic", "factor": 2.0},
        {"type": "linear", "factor": 2.0},
    ],
)
def test_pruned_tokens_keep_their_positions_under_any_rope(checkpoint, scaling):
    plain = states(checkpoint)
    edit_config(checkpoint, rope_scaling=scaling)
    model, processor = load(checkpoint)
    assert np.allclose(plain, states(checkpoint)) == (scaling.get("type") == "dynamic")
    x = mx.random.normal((1, 4, 9, 16), key=mx.random.key(0))
    rope = model.layers[0].self_attn.rope
    places = TokenPositions(mx.arange(3, 12))
    np.testing.assert_allclose(rope(x, places), rope(x, 3), atol=1e-5)
    options = {"images": [TINY / "image_0.png"], "prompt": "Hi", "max_tokens": 4}
    generate(model, processor, pruner=Pruner("norm", 0.25), **options)


def test_what_is_beyond_dynamic_positions_is_noted(checkpoint):
    edit_config(checkpoint, rope_scaling={"type": "dynamic", "factor": 2.0})
    (note,) = open_checkpoint(checkpoint).checkpoint.notes
    assert "changes the positions of sequences beyond max_position_embeddings" in note


def test_settings_in_two_places_are_one(checkpoint):
    edit_config(checkpoint, text_config={"rms_norm_eps": 1e-5})
    with pytest.raises(InputError, match=r"text_config\.rms_norm_eps 1e-05; expected"):
        load(checkpoint)
    edit_config(checkpoint, text_config={"rms_norm_eps": 1e-6})
    load(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "yarn", **YARN}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"id2label": [1]},
        {"tokenizer_class": 7},
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_tokenizer_needs_no_config(checkpoint, tiny, changes, mark):
    edit_config(checkpoint, **changes)
    file = checkpoint / "config.json"
    file.write_text(mark + file.read_text(), encoding="utf-8")
    tokenizer, expected = load(checkpoint)[1].tokenizer, tiny[1].tokenizer
    assert tokenizer.encode("A red cup?") == expected.encode("A red cup?")
    assert tokenizer.eos_token_ids == expected.eos_token_ids
    assert type(tokenizer) is type(expected)


@pytest.mark.parametrize("fixture", ["checkpoint", "policy_checkpoint"])
def test_untied_embeddings_without_a_head_are_noted(fixture, request):
    folder = request.getfixturevalue(fixture)
    section = "" if fixture == "checkpoint" else "text_config"
    before = open_checkpoint(folder).checkpoint.notes  # a policy's pictures have one
    change(folder, section, tie_word_embeddings=False)
    weights = mx.load(str(folder / "model.safetensors"))
    heads = [name for name in weights if name.endswith("lm_head.weight")]
    if heads:
        assert open_checkpoint(folder).checkpoint.notes == before
        weights = {n: mx.array(a) for n, a in weights.items() if n not in heads}
        mx.eval(weights)
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    notes = open_checkpoint(folder).checkpoint.notes
    (note,) = [note for note in notes if note not in before]
    assert "tie_word_embeddings false, but there is no lm_head" in note


def test_flat_settings_stay_as_they_are():
    text = SIZES | {"rope_theta": 5.0, "rope_scaling": None}
    assert flat_rope(text) == text
    scaled = flat_rope(SIZES | {"rope_parameters": {"rope_type": "yarn", **YARN}})
    assert flat_rope(scaled) == scaled


def test_notes_reach_the_user_without_verbose(checkpoint):
    edit_config(checkpoint, rope_parameters={"rope_theta": 77.0})
    command = [sys.executable, "-m", "mlx_tokprune.generate", "--model", checkpoint]
    command += ["--image", TINY / "image_0.png", "--prompt", "Hi", "--max-tokens", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("77.0 in the rope parameters is used") == 1


# Types ------------------------------------------------------------------------------


def types_of(config: dict, path: str = "") -> dict:
    """Return every type that a config names, by its place."""
    types = {}
    for name, value in config.items():
        if isinstance(value, dict):
            types |= types_of(value, f"{path}{name}.")
        elif name in ("dtype", "torch_dtype"):
            types[path + name] = value
    return types


@pytest.mark.parametrize(
    ("fixture", "places"),
    [
        ("checkpoint", "dtype torch_dtype"),
        ("checkpoint", "dtype torch_dtype text_config.dtype vision_config.torch_dtype"),
        ("fast_vlm", "torch_dtype"),
        ("policy_checkpoint", "dtype torch_dtype text_config.torch_dtype"),
        ("policy_checkpoint", "torch_dtype vision_config.featurizer_config.dtype"),
        ("chunk_checkpoint", "dtype torch_dtype text_config.dtype vision_config.dtype"),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", None])
def test_a_cast_is_named_everywhere(fixture, places, dtype, request, tmp_path):
    folder = request.getfixturevalue(fixture)
    config = json.loads((folder / "config.json").read_text())
    for place in places.split():
        *sections, name = place.split(".")
        part = config
        for section in sections:
            part = part.setdefault(section, {})
        part[name] = "bfloat16"
    config |= {"dtype": "bfloat16"} if fixture == "fast_vlm" else {}
    (folder / "config.json").write_text(json.dumps(config))
    target = convert(str(folder), str(tmp_path / "mlx"), dtype=dtype)
    types = types_of(json.loads((target / "config.json").read_text()))
    assert types == dict.fromkeys(places.split(), dtype or "bfloat16")
