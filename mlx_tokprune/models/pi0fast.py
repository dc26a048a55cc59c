"""pi0-FAST (arXiv 2501.09747): PaliGemma (SigLIP, one linear layer, Gemma) that acts.

The language model is mlx-lm's Gemma, with the activation of its Gemma 2, which is what
PaliGemma was trained with. Up to as many pictures as it has cameras; one that is absent
takes no place. Pictures and text see each other, answered tokens what is before them.
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
from .checks import check_language, expect, is_size
from .language import Decoder
from .protocol import POLICY_PROVIDES, Common
from .vit import ViT, ViTConfig, check_tower

DIALECTS = ("lerobot", "openpi")
_MOST_CAMERAS = 16


@dataclass(frozen=True)
class ModelArgs:
    """What `config.json` says of a policy.

    text: goes to mlx-lm's Gemma as it is. cameras: their names, in order. horizon,
    action_dim: actions of a chunk, numbers of an action. state_size: numbers of the
    robot's state. rules: what scales actions and state. steps: the most tokens of an
    answer. longest_prompt: of a prompt. skipped: tokens behind FAST's at the end of the
    vocabulary. dialect: which reference it acts as. strict: an answer must begin as the
    reference's does.
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
        """Raises `InputError` when sizes are missing, impossible or disagree."""
        text = dict(object_of(config, "text_config"))
        model_type = text.setdefault("model_type", "gemma")
        expect(model_type == "gemma", "text_config.model_type", model_type, "'gemma'")
        text.setdefault("rms_norm_eps", 1e-6)
        check_language(text)
        size = text.get("head_dim")
        expect(is_size(size) and size % 2 == 0, "head_dim", size, "an even number")
        policy = object_of(config, "policy")
        sizes = {}
        for name, least in (
            *(("horizon", 1), ("action_dim", 1), ("state_size", 0), ("steps", 1)),
            *(("longest_prompt", 1), ("skipped", 0)),
        ):
            value = policy.get(name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            right = whole and least <= value < 1 << 13
            expect(right, f"policy {name}", value, f"a whole number from {least}")
            sizes[name] = value
        cameras, dialect = policy.get("cameras"), policy.get("dialect")
        right = isinstance(cameras, list) and 0 < len(cameras) <= _MOST_CAMERAS
        right = right and all(isinstance(name, str) and name for name in cameras)
        right = right and len(set(cameras)) == len(cameras)
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
                "the policy's actions are relative to its state, which is not read "
                "here; expected use_relative_actions false"
            )
        how = {"dialect": dialect, "strict": strict, "rules": rules}
        return cls(text, _tower(config), tuple(cameras), **sizes, **how)

    @property
    def depth(self) -> int:
        """Layers and blocks in all."""
        return self.text["num_hidden_layers"] + self.tower.depth

    @property
    def crop(self) -> float:
        return 1.0


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
        mlp_ratio=(inner + 0.5) / width,  # times the width, cut to a whole number
        **{"whole": True, "split": True, "tanh_gelu": True},
    )
    check_tower(tower)
    return tower


class Projector(nn.Module):
    """(B, K, C) visual tokens -> (B, K, D) embeddings."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.linear = nn.Linear(inputs, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x)


class Pi0Fast(Common, nn.Module):
    """`encode`, `project` and `text`; `decoder` reads them and what is answered.

    With `inference=False` its parameters are exactly the tensors of the MLX layout.
    """

    answers = "chunks"
    attends = "prefix"
    provides = POLICY_PROVIDES
    sees_parts = False
    reads_prompt = False
    pictures = None  # as many as cameras are there

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
        return self.args.cameras

    @property
    def gap(self) -> int:
        """openpi answers a position later than the prompt ends."""
        return int(self.args.dialect == "openpi")

    @property
    def image_size(self) -> int:
        return self.args.tower.image_size

    @property
    def stride(self) -> int:
        return self.args.tower.patch_size

    @property
    def feature_size(self) -> int:
        """C, the channels of a visual token before the projector."""
        return self.args.tower.embed_dim

    def encode(
        self,
        pixels: mx.array,
        needs: tuple[str, ...] = (),
        prompt: Prompt | None = None,
    ) -> Features:
        """(B, S, S, 3) pixels in [0, 1] -> visual tokens before the projector."""
        pixels = (pixels * 2 - 1).astype(self.vision_tower.pos_embed.dtype)
        tokens, extras = self.vision_tower(pixels, needs=needs)
        side = self.args.tower.side
        return Features(tokens, (side, side), extras=extras)

    def project(self, tokens: mx.array) -> mx.array:
        """(B, K, C) visual tokens -> (B, K, D), which Gemma's scale does not touch."""
        return self.multi_modal_projector(tokens)

    def text(self, prompt: Prompt, state: mx.array | None = None) -> list[mx.array]:
        """(1, L, D) for each text around the pictures, the first of which is empty.

        The state is a part of the last.
        """
        words = self.decoder.embed(prompt.arrays()[-1])
        return [words[:, :0], words]  # quantized tables cannot embed nothing

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """MLX-layout tensors -> what the inference form holds: the same."""
        return weights


def _gemma(text: Mapping[str, Any]) -> nn.Module:
    """mlx-lm's Gemma. Its GELU is exact, PaliGemma's by tanh, as Gemma 2's."""
    from mlx_lm.models import gemma, gemma2

    model = gemma.Model(gemma.ModelArgs.from_dict(dict(text)))
    for layer in model.layers:
        layer.mlp = gemma2.MLP(text["hidden_size"], text["intermediate_size"])
    if not text.get("tie_word_embeddings", True):
        hidden, rows = text["hidden_size"], text["vocab_size"]
        model.lm_head = nn.Linear(hidden, rows, bias=False)
    return model
