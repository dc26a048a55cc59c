"""ResNet-VLM: ResNet-50, a two-layer projector, and a Llama-like language model.

The family of the test bed, which joins published weights. Its tower is
convolutional, without attention. It has as many tokens as FastVLM at twice the image
size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_tokprune.features import Features
from mlx_tokprune.files import object_of
from mlx_tokprune.models.checks import expect, is_size
from mlx_tokprune.models.language import Decoder
from mlx_tokprune.models.layers import projector
from mlx_tokprune.models.protocol import PROVIDES, ChatModel
from mlx_tokprune.models.text_config import read_text
from mlx_tokprune.processing.prompt import Prompt

from .resnet import CHANNELS, STAGES, STRIDE, ResNet50

_FREQUENCIES = 4  # of a token's position, along each side
_SINES = 4 * _FREQUENCIES


@dataclass(frozen=True)
class ModelArgs:
    """Checked `config.json`; `text` is passed to mlx-lm's Llama."""

    text: dict
    image_size: int = 512
    crops: ClassVar = False
    marks: ClassVar = ("", "")

    @property
    def depth(self) -> int:
        """Number of language model layers and tower blocks."""
        return self.text["num_hidden_layers"] + sum(STAGES)

    @property
    def context(self) -> int:
        """Most tokens that the language model can read."""
        return self.text.get("max_position_embeddings", 2048)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelArgs":
        """Check a config.

        Raises `InputError` for sizes that are missing, impossible or inconsistent.
        """
        text = read_text(object_of(config, "text_config"), "llama")
        size = object_of(config, "vision_config").get("image_size", cls.image_size)
        right = is_size(size) and size % STRIDE == 0
        expect(right, "image_size", size, f"a multiple of {STRIDE}")
        return cls(text, size)


class ResNetVLM(ChatModel, nn.Module):
    """ResNet-VLM: `encode` and `project` for pictures; a call runs the text model."""

    stride = STRIDE
    feature_size = CHANNELS + _SINES
    provides: ClassVar = {**PROVIDES, "tower": ("grid",)}

    def __init__(self, args: ModelArgs, inference: bool = True):
        super().__init__()
        from mlx_lm.models import llama

        self.args, self.carried = args, ()
        self.vision_tower = ResNet50()
        hidden = args.text["hidden_size"]
        self.mm_projector = projector(self.feature_size, hidden)
        self.language_model = llama.Model(llama.ModelArgs.from_dict(args.text))
        self._decoder = Decoder(self.language_model)

    @property
    def image_size(self) -> int:
        """Pixels per side of the square pictures that the projector was trained on."""
        return self.args.image_size

    def memory_of(self, side: int) -> int:
        """Return the approximate peak bytes of encoding a square picture.

        The first stage's feature maps: 256 channels at every fourth pixel.
        """
        return 4 * 4 * 256 * (side // 4) ** 2

    def encode(
        self,
        pixels: mx.array,
        needs: tuple[str, ...] = (),
        prompt: Prompt | None = None,
    ) -> Features:
        """Encode pixels (B, S, S, 3) in [0, 1] as tokens before the projector.

        A token joins the tower's features and sines of its position, which convolutions
        hardly encode. All tokens' sines have one norm, so that features alone decide
        which tokens have the largest norm.
        """
        features = self.vision_tower(pixels)
        batch, height, width, channels = features.shape
        tokens = features.reshape(batch, height * width, channels)
        sines = mx.broadcast_to(_places(height, width), (*tokens.shape[:2], _SINES))
        tokens = mx.concatenate([tokens, sines.astype(tokens.dtype)], axis=-1)
        return Features(tokens, (height, width))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the tensors unchanged: files and memory have one layout."""
        return weights


def _places(height: int, width: int) -> mx.array:
    """Return sines (N, _SINES) of each token's centre, by row and column."""
    rates = 2.0 ** np.arange(_FREQUENCIES) * math.pi / 2
    rows = np.repeat((np.arange(height) + 0.5) / height, width)
    columns = np.tile((np.arange(width) + 0.5) / width, height)
    angles = np.concatenate([rows[:, None] * rates, columns[:, None] * rates], axis=1)
    return mx.array(np.concatenate([np.sin(angles), np.cos(angles)], 1), mx.float32)
