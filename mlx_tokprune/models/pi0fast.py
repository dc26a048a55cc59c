"""pi0-FAST (arXiv 2501.09747): a policy on PaliGemma (SigLIP, a linear layer, Gemma).

The language model is mlx-lm's Gemma with the activation of its Gemma 2, as PaliGemma
was trained. An observation has at most one picture per camera; an absent picture has no
tokens. Pictures and text attend to each other, answer tokens to all tokens before them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from ..features import Features
from ..files import object_of
from ..processing.actions import RULES
from ..processing.prompt import Prompt
from .checks import expect, is_size, is_whole
from .language import Decoder
from .protocol import POLICY_PROVIDES, ModelBase
from .text_config import read_text
from .vit import ViT, ViTConfig, check_tower

DIALECTS = ("lerobot", "openpi")
_MOST_CAMERAS = 16


@dataclass(frozen=True)
class ModelArgs:
    """Checked `config.json` of a policy.

    text: passed to mlx-lm's Gemma. cameras: their names, in order. horizon:
    actions per chunk. action_dim: numbers per action. state_size: numbers of robot
    state. rules: scaling of "action" and "proprio". steps: most tokens of an answer.
    longest_prompt: most tokens of a prompt. skipped: number of tokens behind FAST's at
    the end of the vocabulary. dialect: reference implementation to follow. strict:
    whether an answer must begin as the reference's does.
    """

    text: dict
    tower: ViTConfig
    cameras: tuple[str, ...]
    horizon: int
    action_dim: int
    state_size: int
    rules: Mapping[str, str]
    steps: int = 256
    longest_prompt: int = 200
    skipped: int = 128
    dialect: str = "lerobot"
    strict: bool = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelArgs":
        """Check a config.

        Raises `InputError` for sizes that are missing, impossible or inconsistent.
        """
        text = dict(object_of(config, "text_config"))
        model_type = text.setdefault("model_type", "gemma")
        expect(model_type == "gemma", "text_config.model_type", model_type, "'gemma'")
        text.setdefault("rms_norm_eps", 1e-6)
        text = read_text(text, model_type)
        size = text.get("head_dim")
        expect(is_size(size) and size % 2 == 0, "head_dim", size, "an even number")
        policy = object_of(config, "policy")
        sizes = {}
        for name, least in (
            *(("horizon", 1), ("action_dim", 1), ("state_size", 0), ("steps", 1)),
            *(("longest_prompt", 1), ("skipped", 0)),
        ):
            value = policy.get(name)
            right = is_whole(value) and least <= value < 1 << 13
            expect(right, f"policy {name}", value, f"a whole number from {least}")
            sizes[name] = value
        cameras, dialect = policy.get("cameras"), policy.get("dialect")
        right = isinstance(cameras, list) and _are_cameras(cameras)
        expected = f"1 to {_MOST_CAMERAS} different names"
        expect(right, "policy cameras", cameras, expected)
        expect(dialect in DIALECTS, "policy dialect", dialect, " or ".join(DIALECTS))
        strict = policy.get("strict", True)
        expect(isinstance(strict, bool), "policy strict", strict, "true or false")
        rules = object_of(policy, "rules")
        for part in ("action", "proprio"):
            right = rules.get(part) in (*RULES, "identity")
            expected = f"one of {', '.join(RULES)}, identity"
            expect(right, f"policy rules {part}", rules.get(part), expected)
        if policy.get("relative"):
            raise InputError(
                "the policy's actions are relative to its state, which is not "
                "supported; expected use_relative_actions false"
            )
        options = {"dialect": dialect, "strict": strict, "rules": rules}
        return cls(text, _tower(config), tuple(policy["cameras"]), **sizes, **options)

    @property
    def depth(self) -> int:
        """Number of language model layers and tower blocks."""
        return self.text["num_hidden_layers"] + self.tower.depth

    @property
    def crop(self) -> float:
        """Share of a picture's area that is encoded."""
        return 1.0


def _are_cameras(names: list) -> bool:
    texts = all(isinstance(name, str) and name for name in names)
    return 0 < len(names) <= _MOST_CAMERAS and texts and len(set(names)) == len(names)


def _tower(config: Mapping) -> ViTConfig:
    vision = object_of(config, "vision_config")
    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers")
    names += ("num_attention_heads", "intermediate_size")
    for name in names:
        value = vision.get(name)
        expect(is_size(value), f"vision_config.{name}", value, "a positive number")
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    tower = ViTConfig(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        embed_dim=width,
        depth=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        mlp_ratio=(inner + 0.5) / width,  # `ViTConfig.hidden` rounds it down to inner
        **{"whole": True, "split": True, "tanh_gelu": True},
    )
    check_tower(tower)
    return tower


class Projector(nn.Module):
    """Linear projector."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.linear = nn.Linear(inputs, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        """Project (B, K, C) to (B, K, D)."""
        return self.linear(x)


class Pi0Fast(ModelBase, nn.Module):
    """pi0-FAST: `encode`, `project` and `text` make the input of `decoder`.

    With `inference=False` its parameters are exactly the tensors of the MLX layout.
    """

    answers = "chunks"
    attends = "prefix"
    provides = POLICY_PROVIDES
    sees_parts = False
    reads_prompt = False
    pictures = None  # any number, up to one per camera

    def __init__(self, args: ModelArgs, inference: bool = True):
        super().__init__()
        self.args, self.carried = args, ()
        hidden = args.text["hidden_size"]
        self.vision_tower = ViT(args.tower)
        self.multi_modal_projector = Projector(args.tower.embed_dim, hidden)
        self.language_model = _gemma(args.text)
        self._decoder = Decoder(self.language_model, hidden**0.5)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the pictures, in order."""
        return self.args.cameras

    @property
    def gap(self) -> int:
        """Positions left free between prompt and answer: 1 in openpi, else 0."""
        return int(self.args.dialect == "openpi")

    @property
    def image_size(self) -> int:
        """Pixels per side of the square pictures that the tower was trained on."""
        return self.args.tower.image_size

    @property
    def stride(self) -> int:
        """Pixels per side of a visual token."""
        return self.args.tower.patch_size

    @property
    def feature_size(self) -> int:
        """C, channels of a visual token before the projector."""
        return self.args.tower.embed_dim

    def encode(
        self,
        pixels: mx.array,
        needs: tuple[str, ...] = (),
        prompt: Prompt | None = None,
    ) -> Features:
        """Encode pixels (B, S, S, 3) in [0, 1] as tokens before the projector.

        needs: names of the extras. prompt: not read.
        """
        pixels = (pixels * 2 - 1).astype(self.vision_tower.pos_embed.dtype)
        tokens, extras = self.vision_tower(pixels, needs=needs)
        side = self.args.tower.side
        return Features(tokens, (side, side), extras=extras)

    def project(self, tokens: mx.array) -> mx.array:
        """Project visual tokens (B, K, C) to (B, K, D), without Gemma's scale."""
        return self.multi_modal_projector(tokens)

    def text(self, prompt: Prompt, state: mx.array | None = None) -> list[mx.array]:
        """Return the embeddings (1, L, D) of the texts around the pictures.

        The first is empty. The prompt's last text contains the state.
        """
        words = self.decoder.embed(prompt.arrays()[-1])
        return [words[:, :0], words]  # quantized embeddings reject 0 tokens

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the tensors unchanged: files and memory have one layout."""
        return weights


def _gemma(text: Mapping[str, Any]) -> nn.Module:
    """Return mlx-lm's Gemma with Gemma 2's MLP.

    Its own GELU is exact; PaliGemma was trained with Gemma 2's, by tanh.
    """
    from mlx_lm.models import gemma, gemma2

    model = gemma.Model(gemma.ModelArgs.from_dict(dict(text)))
    for layer in model.layers:
        layer["mlp"] = gemma2.MLP(text["hidden_size"], text["intermediate_size"])
    if not text.get("tie_word_embeddings", True):
        hidden, rows = text["hidden_size"], text["vocab_size"]
        model.lm_head = nn.Linear(hidden, rows, bias=False)
    return model
