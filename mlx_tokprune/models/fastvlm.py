"""FastVLM (arXiv 2412.13303): FastViTHD, a two-layer projector, and Qwen2.

The language model is mlx-lm's. `FastVLM` has `layers` and accepts `input_embeddings`,
so that mlx-lm's caches, generation and quantization accept it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from ..features import Features
from ..files import object_of
from ..processing.prompt import Prompt
from .checks import expect, is_size
from .fastvithd import TOTAL_STRIDE, FastViTHD, VisionConfig, drop_layer_scales, fold
from .language import Decoder
from .layers import projector
from .protocol import PROVIDES, ChatModel
from .text_config import TEXT_FIELDS, read_text

_FIXED = {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "flat"}
# Aspect ratios under which Apple's code crops pictures to squares, as CLIP does.
_CROPPED = (None, "none", "square")


@dataclass(frozen=True)
class ModelArgs:
    """Checked `config.json`; `text` is passed to mlx-lm's Qwen2.

    crops: whether pictures are cropped to squares, not padded. marks: texts around a
    picture.
    """

    text: dict
    vision: VisionConfig = field(default_factory=VisionConfig)
    mm_hidden_size: int = 3072
    crops: bool = False
    marks: tuple[str, str] = ("", "")

    @property
    def depth(self) -> int:
        """Number of language model layers and tower blocks."""
        return self.text["num_hidden_layers"] + sum(self.vision.layers)

    @property
    def context(self) -> int:
        """Most tokens that the language model can read."""
        return self.text.get("max_position_embeddings", 32768)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelArgs":
        """Check a config.

        Raises `InputError` for sizes that are missing, impossible or inconsistent.
        """
        text = read_text(_text(config), "qwen2")
        fields = {f.name for f in dataclasses.fields(VisionConfig)}
        sizes = object_of(config, "vision_config")
        vision = VisionConfig(**{k: _tuple(v) for k, v in sizes.items() if k in fields})
        _check_vision(vision)
        features = config.get("mm_hidden_size", vision.output_dim)
        if features != vision.output_dim:
            raise InputError(
                f"config.json says mm_hidden_size {features}, but the tower it "
                f"describes has features of size {vision.output_dim}"
            )
        for name, only in _FIXED.items():
            value, expected = config.get(name), f"{only!r}, the only supported value"
            expect(value in (None, only), name, value, expected)
        aspect = config.get("image_aspect_ratio")
        expected = "'pad', 'square' or none; tiles (anyres) are not supported"
        expect(aspect in ("pad", *_CROPPED), "image_aspect_ratio", aspect, expected)
        name, marked = "mm_use_im_start_end", config.get("mm_use_im_start_end", False)
        expect(isinstance(marked, bool), name, marked, "true or false")
        marks = ("<im_start>", "<im_end>") if marked else ("", "")
        return cls(text, vision, features, aspect in _CROPPED, marks)


def _text(config: Mapping[str, Any]) -> dict:
    """Return the text settings: Apple has them at the top, mlx-vlm in `text_config`."""
    inner = object_of(config, "text_config")
    for name in (name for name in TEXT_FIELDS if name in config and name in inner):
        value, expected = inner[name], f"{config[name]!r}, as outside of text_config"
        expect(value == config[name], f"text_config.{name}", value, expected)
    return {**config, **inner}


def _check_vision(vision: VisionConfig) -> None:
    for name in ("image_size", "head_dim"):
        value = getattr(vision, name)
        expect(is_size(value), name, value, "a positive whole number")
    right = vision.image_size % TOTAL_STRIDE == 0
    expect(right, "image_size", vision.image_size, f"a multiple of {TOTAL_STRIDE}")
    right = isinstance(vision.cls_ratio, (int, float)) and 0 < vision.cls_ratio <= 16
    expect(right, "cls_ratio", vision.cls_ratio, "a number up to 16")
    checks = {
        "layers": is_size,
        "embed_dims": is_size,
        "mlp_ratios": lambda v: isinstance(v, (int, float)) and 0 < v <= 64,
        "token_mixers": lambda v: v in ("repmixer", "attention"),
        "pos_embs_shapes": lambda v: v in (None, (7, 7)),
    }
    for name, right in checks.items():
        value = getattr(vision, name)
        five = isinstance(value, tuple) and len(value) == 5
        expect(five and all(map(right, value)), name, value, "5 values, one per stage")
    last = vision.token_mixers[-1]
    expect(last == "attention", "token_mixers", last, "attention in the last stage")
    for dim, mixer in zip(vision.embed_dims, vision.token_mixers, strict=True):
        right = mixer != "attention" or dim % vision.head_dim == 0
        expect(right, "head_dim", vision.head_dim, f"a divisor of {dim}")


def _tuple(value: Any) -> Any:
    """Return nested lists as tuples, other values unchanged."""
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


class VisionTower(nn.Module):
    """FastViTHD, one level down as the checkpoint's keys have it."""

    def __init__(self, config: VisionConfig, inference: bool):
        super().__init__()
        self.vision_model = FastViTHD(config, inference)

    def __call__(self, pixels: mx.array, needs: tuple[str, ...] = ()) -> Features:
        """Encode pixels (B, S, S, 3) in [0, 1]; needs: names of the extras."""
        return self.vision_model(pixels, needs)


class FastVLM(ChatModel, nn.Module):
    """FastVLM: `encode` and `project` for pictures; a call runs the language model.

    With `inference=False` its parameters are exactly the tensors of the MLX layout.
    """

    stride = TOTAL_STRIDE
    sees_parts = True
    provides: Mapping[str, tuple[str, ...]] = {
        **PROVIDES,
        "tower": (*PROVIDES["tower"], "blocks"),
    }

    def __init__(self, args: ModelArgs, inference: bool = True):
        super().__init__()
        from mlx_lm.models import qwen2

        self.args, self.carried = args, ()
        self.vision_tower = VisionTower(args.vision, inference)
        hidden = args.text["hidden_size"]
        self.mm_projector = projector(args.mm_hidden_size, hidden)
        self.language_model = qwen2.Model(qwen2.ModelArgs.from_dict(args.text))
        self._decoder = Decoder(self.language_model)

    @property
    def image_size(self) -> int:
        """Pixels per side of the square pictures that the tower was trained on."""
        return self.args.vision.image_size

    @property
    def feature_size(self) -> int:
        """C, channels of a visual token before the projector."""
        return self.args.mm_hidden_size

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Numbers per attention block in the extra `blocks` of a visual token."""
        return self.args.vision.block_sizes

    def memory_of(self, side: int) -> int:
        """Return the approximate peak bytes of encoding a square picture.

        The stem's channels at every second pixel, and the attention of the first stage
        with attention, whose stride is half that of the last stage.
        """
        vision = self.args.vision
        tokens = (2 * side // self.stride) ** 2
        weights = 12 * tokens**2 * vision.embed_dims[-2] // vision.head_dim
        return 8 * side**2 * vision.embed_dims[0] + weights

    def encode(
        self,
        pixels: mx.array,
        needs: tuple[str, ...] = (),
        prompt: Prompt | None = None,
    ) -> Features:
        """Encode pixels (B, S, S, 3) in [0, 1] as tokens before the projector.

        needs: names of the extras. prompt: not read.
        """
        first = self.vision_tower.vision_model.patch_embed.blocks[0].reparam_conv
        return self.vision_tower(pixels.astype(first.weight.dtype), needs)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the tensors of the inference form, folded. Idempotent.

        Removes the modules whose tensors are folded into others.
        """
        weights = {k: v for k, v in weights.items() if ".vision_model.head." not in k}
        folded = fold(weights)
        if not any(".layer_scale" in name for name in folded):
            drop_layer_scales(self.vision_tower)
        return folded
