"""The small pi0-FAST: its sizes, its tokenizers, its losses, and its checkpoint.

PaliGemma's architecture in small: a SigLIP tower, one linear layer, and a Gemma under a
prefix mask that is told task and state and answers in FAST's code. It begins with
weights of the demo policy, whose tasks are the same.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_tokprune.checkpoints.shards import write_config
from mlx_tokprune.files import new_folder, read_json
from mlx_tokprune.models.language import TokenSequence
from mlx_tokprune.models.openvla import OpenVLA
from mlx_tokprune.models.pi0fast import ModelArgs, Pi0Fast
from mlx_tokprune.processing.actions import Bounds
from mlx_tokprune.processing.chunks import ChunkProcessor
from mlx_tokprune.processing.fast import FastCode, code_text
from mlx_tokprune.processing.prompt import state_prompt

from .student import trimvla_scores
from .student import vocabulary as teacher_vocabulary
from .worlds import ACTION_DIM, SIZE, STATE_DIM, TASKS

HORIZON = 8  # actions of a chunk
STEPS = 40  # tokens of an answer at most
CODES = 512  # tokens of FAST
CAMERA = "corner"
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
PAD, EOS, BOS, UNK = range(4)
_WORDS = r"-?\w+|\n|[^\w\s]"
_BINS = [str(number) for number in range(-1, 256)]
_SCALE = 10  # of coefficients, as published
_LEAST = -math.ceil(_SCALE * HORIZON**0.5)  # the coefficient of -1 all the time
_TOWER = {"image_size": SIZE, "patch_size": 14, "hidden_size": 128}
_TOWER |= {"intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
_RULES = {"action": "identity", "proprio": "bounds"}
_SILU = 1.702  # silu(x) is about gelu(x / 1.702) * 1.702
_TABLE = "language_model.model.embed_tokens.weight"
_ADDED = r"blocks\.3\.(attn\.proj|mlp\.fc2)"  # what the last block adds

# Words --------------------------------------------------------------------------------


@functools.cache
def _words() -> tuple[str, ...]:
    """Specials, then words in order of appearance."""
    tasks = " ".join(task.instruction for task in TASKS.values())
    text = state_prompt(tasks, [], False) + "Action: |"
    return (*SPECIAL, *dict.fromkeys(re.findall(_WORDS, text)))


def vocabulary() -> dict[str, int]:
    """Words, bins of the state, and at the end tokens for FAST's codes."""
    tokens = [*_words(), *_BINS, *(f"<loc{n:04d}>" for n in range(CODES))]
    return {token: number for number, token in enumerate(tokens)}


class WordTokenizer:
    """The policy's tokenizer without the tokenizers package."""

    bos_token_id, eos_token_id = BOS, EOS

    def __init__(self):
        self.known = vocabulary()
        self.vocab_size = len(self.known)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [self.known.get(word, UNK) for word in re.findall(_WORDS, text)]
        return [BOS, *ids] if add_special_tokens else ids

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.known[token]


def build_tokenizer():
    """Write the tokenizer as a file: one token a word, and <bos> first."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(_WORDS), behavior="removed", invert=True
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


@functools.cache
def _around_state(instruction: str) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt before and after the bins of the state."""
    words = WordTokenizer()
    before, after = state_prompt(instruction, [], False).split(";")
    return words.encode(before), [*words.encode(";" + after, False), BOS]


def prompt_ids(instruction: str, state: np.ndarray) -> list[int]:
    """Return what the processor's `prompt` gives; state: (p,) in [-1, 1]."""
    before, after = _around_state(instruction)
    bins = np.clip(np.floor((state + 1) * 128), -1, 255).astype(int)
    return [*before, *(len(_words()) + 1 + bins).tolist(), *after]


# FAST's code --------------------------------------------------------------------------


def learn_code(chunks: np.ndarray, folder: Path) -> FastCode:
    """Learn FAST's byte-pair code of (n, horizon, 4) chunks, and write it to `folder`.

    As it is published, but that merges do not end where a text would have words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    every = "".join(chr(number) for number in range(1 - 2 * _LEAST))
    trainer = BpeTrainer(
        vocab_size=CODES,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=list(split.pre_tokenize_str(every)[0][0]),
        max_token_length=10000,
    )
    texts = [code_text(chunk, _SCALE, _LEAST) for chunk in chunks]
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"scale": _SCALE, "min_token": _LEAST, "vocab_size": CODES}
    (folder / "processor_config.json").write_text(json.dumps(settings) + "\n")
    return read_code(folder)


def read_code(folder: Path) -> FastCode:
    return FastCode.read(folder / "tokenizer.json", folder / "processor_config.json")


# The policy ---------------------------------------------------------------------------


def text_config() -> dict:
    return {
        "model_type": "gemma",
        "vocab_size": len(vocabulary()),
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
    }


def build_policy() -> Pi0Fast:
    """Build a policy with random weights."""
    policy = {"horizon": HORIZON, "action_dim": ACTION_DIM, "state_size": STATE_DIM}
    policy |= {"steps": STEPS, "longest_prompt": 64, "skipped": 0}
    policy |= {"cameras": [CAMERA], "dialect": "lerobot", "rules": _RULES}
    config = {"text_config": text_config(), "vision_config": _TOWER, "policy": policy}
    model = Pi0Fast(ModelArgs.from_dict(config), inference=False)

    def start(name: str, array: mx.array) -> mx.array:
        if array.ndim < 2:
            return mx.full(array.shape, float(_is_layer_norm(name)))
        scale = math.prod(array.shape[1:]) ** -0.5
        scale = 0.02 if "embed" in name else min(scale, 0.05)
        return scale * mx.random.truncated_normal(-2, 2, array.shape)

    flat = tree_flatten(model.parameters())
    model.update(tree_unflatten([(name, start(name, array)) for name, array in flat]))
    return model


def _is_layer_norm(name: str) -> bool:
    """Gemma's norms hold what is added to 1."""
    return name.startswith("vision_tower") and name.endswith("weight")


def build_processor(code: FastCode, bounds: Bounds) -> ChunkProcessor:
    """Return what `load` would give for the policy's checkpoint."""
    words = WordTokenizer()
    low, high = bounds.low.tolist(), bounds.high.tolist()
    stats = {"lerobot": {"proprio": {"min": low, "max": high}}}
    sizes = (HORIZON, ACTION_DIM, 0, words.vocab_size, 64)
    return ChunkProcessor(words, SIZE, code, stats, _RULES, *sizes)


def warm_start(policy: Pi0Fast, teacher: OpenVLA) -> None:
    """Begin with the demo policy's SigLIP tower, language model and words.

    Its Llama as a Gemma: norms hold what is added to 1, embeddings are scaled, and
    GELU stands for SiLU. The tower's last block, which the demo policy does not run,
    begins as nothing.
    """
    known = dict(tree_flatten(teacher.parameters()))
    found = dict(tree_flatten(policy.parameters()))
    found |= _tower_of(known) | _language_of(known)
    table = np.array(found[_TABLE])
    words, theirs = teacher_vocabulary(), np.array(known[_TABLE])
    scale = table.shape[1] ** -0.5  # Gemma multiplies its embeddings
    for word, number in vocabulary().items():
        if word in words:
            table[number] = scale * theirs[words[word]]
        elif word in _BINS:
            table[number] = scale * _bin_embedding(int(word), table.shape[1])
    found[_TABLE] = mx.array(table)
    policy.load_weights(list(found.items()))


def _tower_of(known: Mapping[str, mx.array]) -> dict[str, mx.array]:
    root, found = "vision_backbone.fused_featurizer.", {}
    for name, array in known.items():
        name, before = name.removeprefix(root), name
        if name == before or name.startswith("norm."):
            continue
        if ".attn.qkv." in name:
            parts = zip("qkv", mx.split(array, 3), strict=True)
            found |= {name.replace("qkv", part): a for part, a in parts}
        elif re.match(_ADDED, name):
            found[name] = mx.zeros(array.shape)
        else:
            found[name] = array[0] if name == "pos_embed" else array
    return {f"vision_tower.{name}": array for name, array in found.items()}


def _language_of(known: Mapping[str, mx.array]) -> dict[str, mx.array]:
    found = {}
    for name, array in known.items():
        if not name.startswith("language_model.model.") or "embed" in name:
            continue
        if "norm" in name:
            array = array - 1
        if "gate_proj" in name:
            array = array / _SILU
        if "down_proj" in name:
            array = array * _SILU
        found[name] = array
    return found


def _bin_embedding(number: int, width: int) -> np.ndarray:
    """Bins that are near look alike."""
    waves = np.arange(1, width // 2 + 1) / (width // 2) * np.pi * 4
    angles = waves * number / 256
    return 0.3 * np.concatenate([np.sin(angles), np.cos(angles)])


# Learning -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """B frames with what is told and answered, and what drops visual tokens.

    pixels: (B, S, S, 3) in [0, 1]. prompts: (B, P) ids, padded behind, of `lengths`
    (B,). answers: (B, T) ids, padded behind by -1. keep: how many visual tokens stay.
    noise: (B, N) Gumbel noise that chooses them. scored: whether trimvla's scores
    choose, too.
    """

    pixels: mx.array
    prompts: mx.array
    lengths: mx.array
    answers: mx.array
    keep: int
    noise: mx.array
    scored: bool

    @property
    def asked(self) -> mx.array:
        """Return (B, P) bool: which of the prompts' ids are no padding."""
        return mx.arange(self.prompts.shape[1]) < self.lengths[:, None]


def losses(policy: Pi0Fast, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    """Cross-entropy of all answers' tokens, how many, and how far scores are off.

    The last teaches trimvla's scores what the answers attend to, as in the demo
    policy's training; 0 where the batch is not scored.
    """
    features = policy.encode(batch.pixels).tokens
    visual, total = policy.project(features), features.shape[1]
    indices = _choose(policy, visual, batch)
    visual = mx.take_along_axis(visual, indices[..., None], axis=1)
    sequence, rows = told(policy, visual, indices, total, batch)
    hidden, off = _read(policy, sequence, rows, visual, batch)
    at_rows = mx.take_along_axis(hidden, rows[..., None], axis=1)
    logits = policy.decoder.logits(at_rows)
    known = (batch.answers >= 0).astype(mx.float32)
    wrong = nn.losses.cross_entropy(logits, mx.maximum(batch.answers, 0))
    return mx.sum(wrong * known), mx.sum(known), off


def told(
    policy: Pi0Fast, visual: mx.array, indices: mx.array, total: int, batch: Batch
) -> tuple[TokenSequence, mx.array]:
    """Pictures, prompts and answers in one sequence, and the rows that answer.

    visual: (B, K, D) tokens `indices` (B, K) of `total`. Rows: (B, T).
    """
    count, kept = visual.shape[:2]
    ids = _with_answers(batch)
    embeddings = mx.concatenate([visual, policy.decoder.embed(ids)], axis=1)
    length = embeddings.shape[1]
    rest = mx.broadcast_to(total + mx.arange(ids.shape[1]), ids.shape)
    positions = mx.concatenate([indices, rest], axis=1).astype(mx.int32)
    prefix = (kept + batch.lengths)[:, None, None]
    mask = mx.tri(length, dtype=mx.bool_) | (mx.arange(length) < prefix)
    rows = kept + batch.lengths[:, None] - 1 + mx.arange(batch.answers.shape[1])
    end = total + ids.shape[1]
    mask = mx.broadcast_to(mask, (count, length, length))
    return TokenSequence(embeddings, positions, end, mask), rows


def _with_answers(batch: Batch) -> mx.array:
    """Return (B, P + T - 1): each prompt, followed at once by its answer."""
    answers = mx.maximum(batch.answers[:, :-1], PAD)
    room = mx.full(answers.shape, PAD, batch.prompts.dtype)
    whole = mx.concatenate([batch.prompts, room], axis=1)
    where = batch.lengths[:, None] + mx.arange(answers.shape[1])
    return mx.put_along_axis(whole, where, answers.astype(whole.dtype), axis=1)


def _choose(policy: Pi0Fast, visual: mx.array, batch: Batch) -> mx.array:
    """Return (B, K) visual tokens that stay: at random, or by noisy scores."""
    total = visual.shape[1]
    if batch.keep == total:
        return mx.broadcast_to(mx.arange(total), visual.shape[:2])
    scores = batch.noise
    if batch.scored:
        found = trimvla_scores(policy, mx.stop_gradient(visual), batch)
        scores = mx.stop_gradient(found) + 0.5 * batch.noise
    order = mx.argsort(-scores, axis=1)[:, : batch.keep]
    return mx.sort(order, axis=1)


def _read(
    policy: Pi0Fast, sequence: TokenSequence, rows: mx.array, visual, batch: Batch
):
    """Return (B, L, D) hidden states, and how far scores are from what is attended to.

    That is the mean of answers, heads and of all layers but the first, whose queries
    and keys the scores are; without gradient.
    """
    decoder, received = policy.decoder, []
    known = (batch.answers >= 0).astype(mx.float32)[..., None]

    def watch(number: int, hidden: mx.array) -> None:
        if number and batch.scored:
            about = (mx.stop_gradient(hidden), rows, sequence.positions, sequence.mask)
            attended = decoder.attention_to(number, *about)[..., : batch.keep]
            received.append(mx.sum(attended * known, axis=1))

    read = decoder.read(sequence, rows=sequence.embeddings.shape[1], watch=watch)
    if not batch.scored:
        return read.hidden, mx.array(0.0)
    seen = mx.stop_gradient(sum(received))
    target = seen / mx.sum(seen, axis=-1, keepdims=True)
    scores = nn.log_softmax(
        trimvla_scores(policy, mx.stop_gradient(visual), batch), axis=-1
    )
    alike = target * (mx.log(mx.maximum(target, 1e-9)) - scores)
    return read.hidden, mx.mean(mx.sum(alike, axis=-1))


def misaligned(policy: Pi0Fast, teacher: OpenVLA, pixels: mx.array) -> mx.array:
    """How far visual tokens are from the demo policy's, in shares of their variance."""
    wanted = teacher.project(teacher.encode(pixels).tokens)
    wanted = mx.stop_gradient(wanted)
    found = policy.project(policy.encode(pixels).tokens)
    return mx.mean(mx.square(found - wanted)) / mx.var(wanted)


# The checkpoint -----------------------------------------------------------------------

_ROOT = "model.paligemma_with_expert.paligemma.model."
_KEYS = (
    (r"^vision_tower\.blocks\.(\d+)\.attn\.proj\.", r"B\1.self_attn.out_proj."),
    (r"^vision_tower\.blocks\.(\d+)\.attn\.([qkv])\.", r"B\1.self_attn.\2_proj."),
    (r"^vision_tower\.blocks\.(\d+)\.norm([12])\.", r"B\1.layer_norm\2."),
    (r"^vision_tower\.blocks\.(\d+)\.", r"B\1."),
    (r"^vision_tower\.patch_embed\.proj\.", "Vembeddings.patch_embedding."),
    (r"^vision_tower\.pos_embed$", "Vembeddings.position_embedding.weight"),
    (r"^vision_tower\.norm\.", "Vpost_layernorm."),
    (r"^language_model\.model\.", "language_model."),
    ("^B", "Vencoder.layers."),
    ("^V", "vision_tower.vision_model."),
)


def published_name(name: str) -> str:
    """Return the name that lerobot has for one of the MLX layout."""
    for pattern, replacement in _KEYS:
        name = re.sub(pattern, replacement, name)
    return _ROOT + name


def _config() -> dict:
    picture = {"type": "VISUAL", "shape": [3, SIZE, SIZE]}
    return {
        "type": "pi0_fast",
        "chunk_size": HORIZON,
        "n_action_steps": HORIZON // 2,
        "max_decoding_steps": STEPS,
        "tokenizer_max_length": 64,
        "fast_skip_tokens": 0,
        "input_features": {
            f"observation.images.{CAMERA}": picture,
            "observation.state": {"type": "STATE", "shape": [STATE_DIM]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [ACTION_DIM]}},
        "normalization_mapping": {"STATE": "MIN_MAX", "ACTION": "IDENTITY"},
        "vision_config": {"num_attention_heads": _TOWER["num_attention_heads"]},
        "text_config": text_config(),
        "torch_dtype": "float16",
    }


_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 512,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}
_STATISTICS = "policy_preprocessor_step_0_normalizer_processor.safetensors"


def write_checkpoint(
    weights: Mapping[str, mx.array], code: Path, bounds: Bounds, folder: Path
) -> None:
    """MLX-layout tensors in float16 and the tokenizers, as lerobot saves a policy."""
    tensors = {}
    for name, array in weights.items():
        if not mx.all(mx.isfinite(array.astype(mx.float16))).item():
            raise ValueError(f"{name} is not finite in float16")
        if name.endswith("patch_embed.proj.weight"):
            array = array.transpose(0, 3, 1, 2)
        tensors[published_name(name)] = mx.contiguous(array.astype(mx.float16))
    step = {"registry_name": "normalizer_processor", "config": {}}
    step["state_file"] = _STATISTICS
    stats = {"observation.state.min": bounds.low, "observation.state.max": bounds.high}
    stats = {
        name: mx.array(values.astype(np.float32)) for name, values in stats.items()
    }
    with new_folder(folder) as partial:
        file = str(partial / "model.safetensors")
        mx.save_safetensors(file, tensors, metadata={"format": "pt"})
        mx.save_safetensors(str(partial / _STATISTICS), stats)
        write_config(partial, _config())
        named = {
            "policy_preprocessor.json": {"steps": [step]},
            "tokenizer_config.json": _TOKENIZER_CONFIG,
        }
        for name, content in named.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        build_tokenizer().save(str(partial / "tokenizer.json"))
        (partial / "fast").mkdir()
        for name in ("tokenizer.json", "processor_config.json"):
            content = json.dumps(read_json(code / name))
            (partial / "fast" / name).write_text(content + "\n")
