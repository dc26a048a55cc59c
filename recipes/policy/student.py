"""The demo policy: its sizes, its tokenizer, its losses, and its checkpoint.

A small OpenVLA of the real architecture: two ViTs joined on channels, a three-layer
projector, and a Llama whose last 256 tokens are action bins.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_tokprune.checkpoints.shards import write_config
from mlx_tokprune.files import new_folder
from mlx_tokprune.models.language import TokenSequence
from mlx_tokprune.models.openvla import ModelArgs, OpenVLA
from mlx_tokprune.processing.processor import ActionProcessor
from mlx_tokprune.processing.prompt import action_prompt
from mlx_tokprune.pruners.text import parameter_free_norm

from .worlds import ACTION_DIM, SIZE, TASKS

BINS = 256
TEXT_TOKENS = 64  # words and specials; the action bins follow
PADDING = 64
SPECIAL = ("<unk>", "<s>", "</s>", "<PAD>", "\u2581")
START, STOP, PAD, EMPTY = 1, 2, 3, 4
_WORDS = r"\w+|\n|[^\w\s]"
_SPREAD = 2.5  # bins by which a label is blurred, since neighbours are nearly right

_TOWER = {"patch_size": 14, "embed_dim": 128, "depth": 4, "num_heads": 4}
_DINOV2 = {"class_token": True, "reg_tokens": 4, "layer_scale": True}
CONFIG = {
    "architectures": ["OpenVLAForActionPrediction"],
    "model_type": "openvla",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "use_fused_vision_backbone": True,
    "image_resize_strategy": "resize-naive",
    "image_sizes": [SIZE, SIZE],
    "n_action_bins": BINS,
    "pad_to_multiple_of": PADDING,
    "pad_token_id": PAD,
    "empty_token_id": EMPTY,
    "timm_model_ids": ["vit_demo_dinov2", "vit_demo_siglip"],
    "timm_override_act_layers": [None, None],
    "vision_config": {"featurizer": _TOWER | _DINOV2, "fused_featurizer": _TOWER},
    "text_config": {
        "model_type": "llama",
        "vocab_size": TEXT_TOKENS + BINS + PADDING,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "bos_token_id": START,
        "eos_token_id": STOP,
        "pad_token_id": PAD,
    },
    "torch_dtype": "float16",
    "image_processing": {"crop": 1.0, "resize": "bicubic", "jpeg": 0},
    "norm_stats": {
        "metaworld": {
            "action": {
                "q01": [-1.0] * ACTION_DIM,
                "q99": [1.0] * ACTION_DIM,
                "mask": [True] * ACTION_DIM,
            }
        }
    },
}
PREPROCESSOR = {
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, SIZE, SIZE]] * 2,
    "interpolations": ["bicubic"] * 2,
    "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
    "use_fused_vision_backbone": True,
}


def vocabulary() -> dict[str, int]:
    """Specials, then the words of every instruction's prompt in order of appearance."""
    words = list(SPECIAL)
    for task in TASKS.values():
        for word in re.findall(_WORDS, action_prompt(task.instruction)):
            if word not in words:
                words.append(word)
    assert len(words) <= TEXT_TOKENS
    return {word: number for number, word in enumerate(words)}


def prompt_ids(instruction: str) -> list[int]:
    """Return the ids that follow the pictures, as the tokenizer gives them."""
    return [*WordTokenizer().encode(action_prompt(instruction)), EMPTY]


class WordTokenizer:
    """The demo policy's tokenizer without the tokenizers package."""

    bos_token_id = START

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        known = vocabulary()
        return [known.get(word, 0) for word in re.findall(_WORDS, text)]


def build_processor() -> ActionProcessor:
    """Return what `load` would give for the demo policy's checkpoint."""
    return ActionProcessor(
        WordTokenizer(),
        SIZE,
        TEXT_TOKENS + BINS,
        BINS,
        EMPTY,
        256,
        CONFIG["norm_stats"],
    )


def action_classes(actions: np.ndarray) -> np.ndarray:
    """(..., A) in [-1, 1] -> bins 0..254, the lowest action first."""
    edges = np.linspace(-1, 1, BINS)
    return np.clip(np.digitize(np.clip(actions, -1, 1), edges) - 1, 0, BINS - 2)


def action_ids(classes):
    """Bins -> token ids: the last tokens of the vocabulary, in reverse."""
    return TEXT_TOKENS + BINS - 1 - classes


def build_policy() -> OpenVLA:
    """Build a policy with random weights that holds every tensor of its file."""
    args = ModelArgs.from_dict(CONFIG | {"preprocessor": PREPROCESSOR})
    policy = OpenVLA(args, inference=False)

    def draw(name: str, array: mx.array) -> mx.array:
        if array.ndim < 2 or "norm" in name:
            return array
        fan_in = math.prod(array.shape[1:])
        scale = 0.02 if "embed" in name or "token" in name else fan_in**-0.5
        return min(scale, 0.05) * mx.random.truncated_normal(-2, 2, array.shape)

    def start(name: str, array: mx.array) -> mx.array:
        if name.endswith("scale_factor"):
            return mx.full(array.shape, 0.5)
        return mx.zeros(array.shape) if name.endswith("bias") else draw(name, array)

    flat = tree_flatten(policy.parameters())
    policy.update(tree_unflatten([(name, start(name, array)) for name, array in flat]))
    return policy


@dataclass(frozen=True)
class Labelled:
    """B frames with the expert's actions.

    pixels: (B, S, S, 3) in [0, 1]. prompts: (B, P) ids, padded behind. lengths: (B,).
    classes: (B, A) bins. before: (B, A) what each robot did last, where somebody knows.
    """

    pixels: mx.array
    prompts: mx.array
    lengths: mx.array
    classes: mx.array
    before: mx.array | None = field(default=None, kw_only=True)

    @property
    def asked(self) -> mx.array:
        """Return (B, P) bool: which of the prompts' ids are no padding."""
        return mx.arange(self.prompts.shape[1]) < self.lengths[:, None]


@dataclass(frozen=True)
class Batch(Labelled):
    """A batch of the policy, and what drops visual tokens.

    keep: how many stay. noise: (B, N) Gumbel noise that chooses them. scored: whether
    trimvla's scores choose too.
    """

    keep: int
    noise: mx.array
    scored: bool


def losses(policy: OpenVLA, batch: Batch) -> tuple[mx.array, mx.array]:
    """Cross-entropy of the action bins, and how far trimvla's scores are off.

    The second teaches the first layer's queries and keys, which a causal model never
    uses from picture to prompt, to tell what the action tokens attend to.
    """
    features = policy.encode(batch.pixels).tokens
    indices = _choose(policy, features, batch)
    kept = mx.take_along_axis(features, indices[..., None], axis=1)
    visual = policy.project(kept)
    sequence, rows = told(policy, visual, indices, features.shape[1], batch)
    hidden, received = read_and_attend(policy, sequence, rows)
    log_shares = action_log_shares(policy, hidden, rows)
    loss = -mx.mean(mx.sum(blurred(batch.classes) * log_shares, axis=-1))
    seen = received[..., 1 : 1 + batch.keep]
    target = mx.stop_gradient(seen / mx.sum(seen, axis=-1, keepdims=True))
    scores = trimvla_scores(policy, mx.stop_gradient(visual), batch)
    alike = target * (
        mx.log(mx.maximum(target, 1e-9)) - nn.log_softmax(scores, axis=-1)
    )
    return loss, mx.mean(mx.sum(alike, axis=-1))


def told(
    policy: OpenVLA,
    visual: mx.array,
    indices: mx.array,
    total: int,
    batch: Labelled,
    gate: mx.array | None = None,
) -> tuple[TokenSequence, mx.array]:
    """Pictures, prompts and actions in one sequence, and the rows that tell actions.

    visual: (B, K, D) tokens `indices` (B, K) of `total`. gate: (B, K), added to every
    score of a visual token in every layer. Rows: (B, A).
    """
    ids, embed, kept = _with_actions(batch), policy.decoder.embed, visual.shape[1]
    first = embed(mx.full((len(ids), 1), START))
    embeddings = mx.concatenate([first, visual, embed(ids)], axis=1)
    start = mx.zeros((len(ids), 1), mx.int32)
    rest = mx.broadcast_to(1 + total + mx.arange(ids.shape[1]), ids.shape)
    positions = mx.concatenate([start, 1 + indices, rest], axis=1).astype(mx.int32)
    mask: mx.array | str = "causal"
    if gate is not None:
        length = embeddings.shape[1]
        added = mx.pad(gate, [(0, 0), (1, length - 1 - kept)])[:, None]
        mask = mx.where(mx.tri(length, dtype=mx.bool_), added, -mx.inf)
    rows = kept + batch.lengths[:, None] + mx.arange(ACTION_DIM)
    end = 1 + total + ids.shape[1]
    return TokenSequence(embeddings, positions, end, mask), rows


def action_log_shares(policy: OpenVLA, hidden: mx.array, rows: mx.array) -> mx.array:
    """Return log shares of bins (B, A, 255) from `rows` of `hidden` (B, T, D)."""
    at_rows = mx.take_along_axis(hidden, rows[..., None], axis=1)
    logits = policy.decoder.logits(at_rows)[..., TEXT_TOKENS + 1 : TEXT_TOKENS + BINS]
    return nn.log_softmax(logits[..., ::-1].astype(mx.float32), axis=-1)


def trimvla_scores(policy: OpenVLA, visual: mx.array, batch: Labelled) -> mx.array:
    """trimvla's scores (B, K), with padding of the prompts left out."""
    text = mx.stop_gradient(policy.decoder.embed(batch.prompts))
    prepared = parameter_free_norm(visual), parameter_free_norm(text)
    queries, keys = policy.decoder.queries_and_keys(*prepared)
    # A key of padding must not count: one that no query likes does not.
    products = queries @ keys.swapaxes(-1, -2) * queries.shape[-1] ** -0.5
    products = mx.where(batch.asked[:, None, None], products, -1e9)
    return mx.mean(mx.logsumexp(products, axis=-1), axis=1)


def _choose(policy: OpenVLA, features: mx.array, batch: Batch) -> mx.array:
    """Return (B, K) visual tokens that stay: at random, or by noisy scores."""
    total = features.shape[1]
    if batch.keep == total:
        return mx.broadcast_to(mx.arange(total), features.shape[:2])
    scores = batch.noise
    if batch.scored:
        found = trimvla_scores(policy, policy.project(features), batch)
        scores = mx.stop_gradient(found) + 0.5 * batch.noise
    order = mx.argsort(-scores, axis=1)[:, : batch.keep]
    return mx.sort(order, axis=1)


def _with_actions(batch: Labelled) -> mx.array:
    """Return (B, P + A - 1): each prompt, followed at once by its first actions."""
    ids = action_ids(batch.classes[:, : ACTION_DIM - 1])
    room = mx.full((len(ids), ACTION_DIM - 1), PAD)
    whole = mx.concatenate([batch.prompts, room], axis=1)
    where = batch.lengths[:, None] + mx.arange(ACTION_DIM - 1)
    return mx.put_along_axis(whole, where, ids.astype(whole.dtype), axis=1)


def read_and_attend(
    policy: OpenVLA,
    sequence: TokenSequence,
    rows: mx.array,
    layers: Iterable[int] | None = None,
) -> tuple[mx.array, mx.array]:
    """Hidden states (B, T, D), and attention (B, T) that tokens receive from `rows`.

    The mean of rows, heads and `layers`, without gradient; of all but the first when
    `None`, whose scores learn from it.
    """
    decoder, received = policy.decoder, []
    wanted = range(1, len(decoder.layers)) if layers is None else set(layers)

    def watch(number: int, hidden: mx.array) -> None:
        if number in wanted:
            attended = decoder.attention_to(
                number, mx.stop_gradient(hidden), rows, sequence.positions
            )
            received.append(mx.mean(attended, axis=1))

    length = sequence.embeddings.shape[1]
    read = decoder.read(sequence, rows=length, watch=watch)
    return read.hidden, sum(received) / len(received)


def blurred(classes: mx.array) -> mx.array:
    """Map bins (B, A) to shares (B, A, 255), a bell around each label."""
    distance = (mx.arange(BINS - 1) - classes[..., None]) / _SPREAD
    return mx.softmax(-0.5 * mx.square(distance), axis=-1)


def write_checkpoint(weights: dict[str, mx.array], folder: Path) -> None:
    """MLX-layout tensors in float16 and the tokenizer, as OpenVLA is published."""
    for name, array in weights.items():
        if not mx.all(mx.isfinite(array.astype(mx.float16))).item():
            raise ValueError(f"{name} is not finite in float16")
    with new_folder(folder) as partial:
        tensors = {}
        for name, array in weights.items():
            if name.endswith("patch_embed.proj.weight"):
                array = array.transpose(0, 3, 1, 2)
            tensors[name] = mx.contiguous(array.astype(mx.float16))
        file = str(partial / "model.safetensors")
        mx.save_safetensors(file, tensors, metadata={"format": "pt"})
        write_config(partial, CONFIG)
        named = {
            "preprocessor_config.json": PREPROCESSOR,
            "tokenizer_config.json": _TOKENIZER_CONFIG,
        }
        for name, content in named.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        build_tokenizer().save(str(partial / "tokenizer.json"))


_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 512,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<PAD>",
}


def build_tokenizer():
    """One token a word: a closed list, as the instructions are."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(_WORDS), behavior="removed", invert=True
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL[:4]])
    return tokenizer
