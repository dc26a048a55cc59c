"""Conversion of checkpoints: layouts, streaming, and refusals."""

import hashlib
import json
import shutil

import mlx.core as mx
import pytest
from conftest import MANIFESTS, TINY, read_manifest, write_headers

from mlx_tokprune import load
from mlx_tokprune.checkpoints import shards as folders
from mlx_tokprune.checkpoints.opening import expected_shapes, open_checkpoint
from mlx_tokprune.checkpoints.shards import INDEX, Checkpoint, write_shards
from mlx_tokprune.convert import convert
from mlx_tokprune.convert import converter as command
from mlx_tokprune.convert.__main__ import main
from mlx_tokprune.convert.fastvlm import FASTVLM
from mlx_tokprune.errors import InputError

IDS = mx.array([[1, 2, 3, 4]])


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change) -> None:
    weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def digest(folder) -> dict:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()
    }


def test_converted_model_computes_the_same(checkpoint, tmp_path, tiny):
    before = digest(checkpoint)
    target = convert(str(checkpoint), str(tmp_path / "mlx"))
    assert digest(checkpoint) == before  # the user's files are never edited
    ours, pixels = load(target)[0], mx.full((1, 512, 512, 3), 0.5)
    assert mx.array_equal(ours(IDS), tiny[0](IDS))
    assert mx.array_equal(ours.encode(pixels).tokens, tiny[0].encode(pixels).tokens)
    again = convert(str(target), str(tmp_path / "again"))
    assert (again / "model.safetensors").read_bytes() == (
        target / "model.safetensors"
    ).read_bytes()


def test_output_has_the_community_layout(checkpoint, tmp_path):
    target = convert(str(checkpoint), str(tmp_path / "mlx"))
    names = Checkpoint.open(target).tensors
    roots = {name.split(".")[0] for name in names}
    assert roots == {"vision_tower", "mm_projector", "language_model"}
    stem = names["vision_tower.vision_model.patch_embed.blocks.0.reparam_conv.weight"]
    assert stem.shape == (16, 3, 3, 3)
    depthwise = "vision_tower.vision_model.patch_embed.blocks.1.reparam_conv.weight"
    assert names[depthwise].shape == (16, 3, 3, 1)  # channels-last
    scale = names["vision_tower.vision_model.network.0.0.layer_scale"]
    assert scale.shape == (1, 1, 16)
    # Batch norms stay on disk: folding is for the runtime only.
    assert any(".bn.running_var" in name for name in names)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name.split(".json")[0])
def test_full_size_manifests_convert_structurally(path, tmp_path):
    manifest = read_manifest(path)
    write_headers(tmp_path / "full", manifest["tensors"], manifest["config"])
    family, opened, config = open_checkpoint(tmp_path / "full")
    assert family is FASTVLM
    shapes = FASTVLM.shapes(opened)
    dropped = [n for n in manifest["tensors"] if FASTVLM.rename(n) is None]
    assert all(n.endswith("num_batches_tracked") for n in dropped)
    assert len(shapes) + len(dropped) == len(manifest["tensors"])
    unused = shapes.keys() - expected_shapes(FASTVLM, config).keys()
    assert unused == {"vision_tower.vision_model.head.proj"}


def test_a_manifest_with_one_tensor_renamed_is_refused(tmp_path):
    manifest = read_manifest(MANIFESTS[0])
    tensors = manifest["tensors"]
    tensors["model.norm.weigh"] = tensors.pop("model.norm.weight")
    write_headers(tmp_path / "full", tensors, manifest["config"])
    with pytest.raises(InputError, match=r"lacks tensor language_model\.model\.norm"):
        open_checkpoint(tmp_path / "full")


def test_dtype_is_what_was_asked_for(checkpoint, tmp_path):
    target = convert(str(checkpoint), str(tmp_path / "half"), dtype="bfloat16")
    assert {t.dtype for t in Checkpoint.open(target).tensors.values()} == {"BF16"}


def test_presence_of_the_head_decides_about_tying(checkpoint, tmp_path):
    """A head in the weights overrides `tie_word_embeddings` of the config."""

    def untie(weights):
        weights["lm_head.weight"] = 2 * weights["model.embed_tokens.weight"]

    edit_weights(checkpoint, untie)
    tied = load(TINY)[0](IDS)
    assert mx.allclose(load(checkpoint)[0](IDS), 2 * tied, rtol=1e-4, atol=1e-4)
    target = convert(str(checkpoint), str(tmp_path / "mlx"))
    assert Checkpoint.open(target).config["tie_word_embeddings"] is False
    assert mx.allclose(load(target)[0](IDS), 2 * tied, rtol=1e-4, atol=1e-4)


def split(folder, parts: int = 3) -> None:
    """Turn the single file of a folder into shards with an index."""
    weights = mx.load(str(folder / "model.safetensors"))
    names = sorted(weights)
    size = sum(weights[n].nbytes for n in names) // parts
    stream = ((n, weights[n]) for n in names)
    target = folder / "shards"
    target.mkdir()
    write_shards(target, stream, 0, shard_bytes=size)
    (folder / "model.safetensors").unlink()
    for path in target.iterdir():
        path.rename(folder / path.name)
    target.rmdir()


def test_stop_tokens_of_the_configs_count(checkpoint):
    edit_config(checkpoint, eos_token_id=7)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert load(checkpoint)[1].tokenizer.eos_token_ids == {7, 8, 9, 258}


def test_shards_are_read_and_written(checkpoint, tmp_path, monkeypatch, tiny):
    split(checkpoint)
    assert len(list(checkpoint.glob("model-*.safetensors"))) >= 3
    monkeypatch.setattr(folders.write_shards, "__defaults__", (400_000,))
    target = convert(str(checkpoint), str(tmp_path / "mlx"))
    shards = sorted(p.name for p in target.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert mx.array_equal(load(target)[0](IDS), tiny[0](IDS))


def test_licence_and_tokenizer_travel_and_code_does_not(checkpoint, tmp_path):
    for name in ("LICENSE", "README.md", "llava_qwen.py", "notes.bin"):
        (checkpoint / name).write_text(name)
    edit_config(checkpoint, auto_map={"AutoModel": "llava_qwen.Model"})
    target = convert(str(checkpoint), str(tmp_path / "mlx"))
    names = {p.name for p in target.iterdir()}
    assert {"LICENSE", "README.md", "tokenizer.json"} <= names
    assert not {"llava_qwen.py", "notes.bin"} & names
    assert "auto_map" not in Checkpoint.open(target).config


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space")])
def test_an_interrupted_run_leaves_nothing(checkpoint, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(mx, "save_safetensors", fail)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        convert(str(checkpoint), str(tmp_path / "mlx"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


# What is refused, each with the message it must give.


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def torch_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def truncated_header(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:100])


def not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"12345678")


def missing_shard(folder):
    split(folder)
    sorted(folder.glob("model-*"))[0].unlink()


def leaving_index(folder):
    split(folder)
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def wrong_shape(folder):
    def change(weights):
        weights["model.norm.weight"] = mx.zeros((63,))

    edit_weights(folder, change)


def missing_tensor(folder):
    edit_weights(folder, lambda w: w.pop("model.mm_projector.2.bias"))


def extra_tensor(folder):
    edit_weights(folder, lambda w: w.update({"model.extra": mx.zeros(3)}))


def apple_mlx_export(folder):
    edit_weights(folder, _keep_language)
    (folder / "fastvithd.mlpackage").mkdir()


def transformers_layout(folder):
    edit_weights(folder, _keep_language)
    edit_config(folder, model_type="fast_vlm")


def language_model_only(folder):
    edit_weights(folder, _keep_language)
    edit_config(folder, model_type="qwen2")


def openvla(folder):
    edit_weights(folder, lambda w: (w.clear(), w.update(_OPENVLA)))


def wrong_sizes(folder):
    edit_config(folder, mm_hidden_size=3072)


def no_sizes(folder):
    (folder / "config.json").write_text('{"model_type": "llava_qwen2"}')


_OPENVLA = {"vision_backbone.featurizer.patch_embed.proj.weight": mx.zeros((1,))}


def _keep_language(weights) -> None:
    for name in [n for n in weights if "vision_tower" in n]:
        del weights[name]


REFUSED = [
    (no_config, "has no config.json; expected a checkpoint folder"),
    (broken_config, "cannot be read as JSON"),
    (no_weights, "has no weights; expected safetensors files"),
    (torch_pickle, "has only pytorch_model.bin, a torch pickle; expected safetensors"),
    (truncated, "model.safetensors is truncated or not a safetensors file"),
    (truncated_header, "truncated or not a safetensors file .invalid header length"),
    (not_safetensors, "is truncated or not a safetensors file"),
    (missing_shard, "the shard 'model-00001-of-00004.safetensors', which is missing"),
    (leaving_index, "'../model.safetensors', which is missing from"),
    (
        wrong_shape,
        r"tensor language_model.model.norm.weight .* has shape \(63,\); "
        r"expected \(64,\)",
    ),
    (missing_tensor, "lacks tensor mm_projector.2.bias"),
    (extra_tensor, "has the unknown tensor language_model.model.extra"),
    (apple_mlx_export, "vision tower is a Core ML package; this reads .*FastVLM as"),
    (transformers_layout, "a transformers fast_vlm checkpoint.*; this reads"),
    (language_model_only, "model type 'qwen2' without a vision tower .*; this reads"),
    (openvla, r"config.json says timm_model_ids None; expected a list of 1"),
    (wrong_sizes, "mm_hidden_size 3072, but the tower .* has features of size 256"),
    (no_sizes, "config.json does not say hidden_size"),
]


@pytest.mark.parametrize(
    ("damage", "message"), REFUSED, ids=lambda v: getattr(v, "__name__", "")
)
def test_damaged_checkpoints_are_refused(checkpoint, tmp_path, capsys, damage, message):
    damage(checkpoint)
    with pytest.raises(InputError, match=message):
        load(checkpoint)
    target = tmp_path / "mlx"
    with pytest.raises(SystemExit) as stop:
        main(["--hf-path", str(checkpoint), "--mlx-path", str(target)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not target.exists()


def vision(**changes):
    config = json.loads((TINY / "config.json").read_text())
    return {"vision_config": config["vision_config"] | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size '64'; expected a positive whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads 0; expected a positive"),
        ({"num_attention_heads": 5}, "num_attention_heads 5; expected a divisor of 64"),
        ({"vocab_size": 10**15}, "vocab_size 1000000000000000; expected"),
        ({"vocab_size": True}, "vocab_size True; expected"),
        ({"rms_norm_eps": None}, "rms_norm_eps None; expected a positive number"),
        ({"rope_theta": "x"}, "rope_theta 'x'; expected a positive number"),
        ({"rope_scaling": {"type": "foo"}}, "rope type 'foo'; expected one of default"),
        (
            {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "does not describe a FastVLM",
        ),
        ({"text_config": [1]}, r"text_config \[1\]; expected an object"),
        ({"vision_config": "x"}, "vision_config 'x'; expected an object"),
        (vision(layers=[1, 1]), "expected 5 values, one per stage"),
        (vision(embed_dims=[16, 32, 32, 64, "x"]), "expected 5 values"),
        (vision(head_dim=48), "head_dim 48; expected a divisor of 64"),
        (vision(image_size=500), "image_size 500; expected one size, a multiple"),
        (vision(cls_ratio="2"), "cls_ratio '2'; expected a number"),
        (vision(pos_embs_shapes=[None] * 4 + [[7, 5]]), "expected 5 values"),
        (vision(token_mixers=["conv"] * 5), "expected 5 values"),
        (vision(token_mixers=["repmixer"] * 5), "attention in the last stage"),
    ],
)
def test_impossible_configs_are_refused(checkpoint, tmp_path, changes, message):
    edit_config(checkpoint, **changes)
    for use in (load, lambda folder: convert(str(folder), str(tmp_path / "mlx"))):
        with pytest.raises(InputError, match=message):
            use(checkpoint)
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w, n: w.update({f"{n}.scales": w[f"{n}.scales"][:, :1]}), "of shape"),
        (lambda w, n: w.pop(f"{n}.biases"), "biases of shape None"),
        (
            lambda w, n: w.update({f"{n}.weight": w[f"{n}.weight"].view(mx.float32)}),
            "type F32; expected .* and U32",
        ),
        (
            lambda w, n: w.update({"mm_projector.0.bias": mx.zeros(64, mx.int32)}),
            "mm_projector.0.bias .* has type I32",
        ),
    ],
    ids=["scales", "biases", "float weight", "integer bias"],
)
def test_damaged_quantized_tensors_are_refused(checkpoint, tmp_path, damage, message):
    target = tmp_path / "q"
    convert(str(checkpoint), str(target), quantize=True, q_group_size=32)
    name = "language_model.model.layers.0.mlp.up_proj"
    edit_weights(target, lambda weights: damage(weights, name))
    with pytest.raises(InputError, match=message):
        load(target)


@pytest.mark.parametrize("text", ["[]", "null", "{}", "not json"])
def test_a_damaged_tokenizer_is_refused(checkpoint, tmp_path, text):
    (checkpoint / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="has no usable tokenizer"):
        convert(str(checkpoint), str(tmp_path / "mlx"))
    assert not (tmp_path / "mlx").exists()


def test_a_target_inside_the_source_is_refused(checkpoint):
    with pytest.raises(InputError, match="which is only read; choose a folder"):
        convert(str(checkpoint), str(checkpoint / "mlx"))


def weights_size(folder) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("quantize", [False, True])
def test_the_disk_space_asked_for_is_what_is_written(
    checkpoint, tmp_path, monkeypatch, dtype, quantize
):
    """The predicted size of a half-precision source is the size written."""

    def halve(weights):
        for name, array in weights.items():
            if mx.issubdtype(array.dtype, mx.floating):
                weights[name] = array.astype(mx.float16)

    edit_weights(checkpoint, halve)
    asked = []
    original = command.write_shards

    def spy(folder, tensors, total_bytes):
        asked.append(total_bytes)
        original(folder, tensors, total_bytes)

    monkeypatch.setattr(command, "write_shards", spy)
    target = convert(str(checkpoint), str(tmp_path / "mlx"), dtype, quantize, 4, 32)
    header = 40_000  # names and offsets
    assert asked[0] <= weights_size(target) <= asked[0] + header


@pytest.mark.parametrize("value", ["nan", "inf", "3e38"])
def test_a_weight_that_is_not_finite_is_named(checkpoint, value):
    """A NaN or infinite weight is named; finite weights of infinite sum load."""

    def change(weights):
        weights["model.norm.weight"] = mx.full((64,), float(value))

    edit_weights(checkpoint, change)
    if value == "3e38":
        load(checkpoint)
        return
    with pytest.raises(InputError, match=r"tensor .*\.model\.norm\.weight has numbers"):
        load(checkpoint)


def test_stray_scales_are_unknown_tensors(checkpoint):
    edit_weights(
        checkpoint, lambda w: w.update({"model.norm.scales": mx.zeros((64, 1))})
    )
    with pytest.raises(InputError, match=r"unknown tensor .*model\.norm\.scales"):
        load(checkpoint)


def test_an_existing_target_is_kept(checkpoint, tmp_path):
    (tmp_path / "mlx").mkdir()
    with pytest.raises(InputError, match="already exists; choose a new folder"):
        convert(str(checkpoint), str(tmp_path / "mlx"))


def test_unknown_places_are_refused(tmp_path):
    with pytest.raises(
        InputError, match="does not exist; expected a checkpoint folder"
    ):
        convert("no such/place/here", str(tmp_path / "mlx"))
    shutil.copy(TINY / "config.json", tmp_path / "file")
    with pytest.raises(InputError, match="is not a folder"):
        convert(str(tmp_path / "file"), str(tmp_path / "mlx"))
