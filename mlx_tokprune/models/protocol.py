"""Interface of all model families.

A family is one file here: a module with these attributes, and a `ModelArgs` that checks
its config. Callers read a model's abilities from its attributes, never from its class.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import mlx.core as mx
import mlx.nn as nn

from ..features import EPISODE_EXTRAS, Features, HasParameters
from ..processing.prompt import Prompt
from .language import Decoder

# Extras of `Features` by place, for families whose tower has attention.
PROVIDES: Mapping[str, tuple[str, ...]] = {
    "tower": ("grid", "attention", "attention_middle", "keys"),
    "prompt": ("grid", "text", "queries", "text_keys"),
    "layer": ("attention", "keys", "text", "text_attention"),
}
# The same for policies, whose episodes add the previous action.
POLICY_PROVIDES: Mapping[str, tuple[str, ...]] = {
    **PROVIDES,
    "prompt": (*PROVIDES["prompt"], *EPISODE_EXTRAS),
}


class ModelBase:
    """Attributes that most families share."""

    gap = 0
    provides = PROVIDES
    signs: str | None = None
    language_model: Any
    _decoder: Decoder

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the pictures; empty, as pictures have no names."""
        return ()

    @property
    def layers(self) -> list:
        """mlx-lm's transformer layers, in order."""
        return self.language_model.layers

    @property
    def decoder(self) -> Decoder:
        """Reader of the language model."""
        return self._decoder

    def memory_of(self, side: int) -> int:
        """Return 0: pictures have one size, so memory needs no check."""
        return 0

    def __call__(
        self,
        inputs: mx.array,
        cache: list | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Return logits (B, T, V) for ids (B, T) or `input_embeddings` (B, T, D).

        mlx-lm's signature, so that its generation and quantization accept the model.
        """
        return self.language_model(inputs, cache, input_embeddings)

    @staticmethod
    def quant_predicate(path: str, module: nn.Module) -> bool:
        """Select the language model's layers; towers and projector are kept in float.

        mlx-lm's quantization calls it with each module.
        """
        return path.startswith("language_model.") and hasattr(module, "to_quantized")


class ChatModel(ModelBase):
    """Attributes that models with text answers in ChatML share.

    mm_projector: layers from visual tokens to language model embeddings.
    """

    image_token = "<image>"
    prompt_opening = "<|im_start|>system\n"
    prompt_turn = "<|im_end|>\n<|im_start|>user\n"
    prompt_prefix = f"{prompt_opening}You are a helpful assistant.{prompt_turn}"
    prompt_suffix = "<|im_end|>\n<|im_start|>assistant\n"
    answers = "text"
    pictures = None
    sees_parts = False
    reads_prompt = False
    attends = "causal"
    mm_projector: list

    def project(self, tokens: mx.array) -> mx.array:
        """Project visual tokens (B, K, C) to embeddings (B, K, D)."""
        for layer in self.mm_projector:
            tokens = layer(tokens)
        return tokens

    def text(self, prompt: Prompt, state: mx.array | None = None) -> list[mx.array]:
        """Return the embeddings (1, L, D) of each text around the pictures."""
        return [self.decoder.embed(ids) for ids in prompt.arrays()]


class VisionModel(HasParameters, Protocol):
    """Vision-language model or robot policy, an `nn.Module`.

    answers: "text", or actions as "bins" (tokens), "slots" (states for a head) or
    "chunks" (tokens of a compressed chunk of actions).
    attends: "causal", "full" or "prefix" (full, and causal for the answer).
    gap: positions left free between prompt and answer.
    image_size, stride: pixels per side of a picture, and of a visual token.
    feature_size: C, channels of a visual token before the projector.
    pictures: number per observation; `None` for any number.
    cameras: names of the pictures, any of which may be absent; empty without names.
    provides: by place ("tower", "prompt", "layer"), the extras of `Features` that a
        pruner can read there; "grid" if tokens fill their grid.
    sees_parts: whether the tower can encode a part of a picture alone.
    reads_prompt: whether the tower is conditioned on the prompt.
    args: the checked config.
    action_head: of a model that answers in slots.
    language_model: mlx-lm's.
    mm_projector: layers of the projector, of a model that answers in text.
    block_sizes: numbers per visual token in each part of the extra `blocks`.
    carried: pruners of the checkpoint, used unless the caller passes others.
    signs: fingerprint of the loaded weights (`pruners/scorers`), or `None`.
    """

    answers: Literal["text", "bins", "slots", "chunks"]
    attends: Literal["causal", "full", "prefix"]
    gap: int
    image_size: int
    stride: int
    feature_size: int
    pictures: int | None
    cameras: tuple[str, ...]
    provides: Mapping[str, tuple[str, ...]]
    sees_parts: bool
    reads_prompt: bool
    args: Any
    action_head: Any
    language_model: Any
    mm_projector: list
    block_sizes: tuple[int, ...]
    carried: tuple
    signs: str | None

    def load_weights(self, weights: list, strict: bool = True) -> Any:
        """Replace parameters by name, as in `nn.Module`."""
        ...

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the tensors of the MLX layout as the module's parameters."""
        ...

    def freeze(self) -> Any:
        """Exclude all parameters from training, as in `nn.Module`."""
        ...

    def eval(self) -> Any:
        """Set evaluation mode, as in `nn.Module`."""
        ...

    @property
    def decoder(self) -> Decoder:
        """Reader of the language model."""
        ...

    def memory_of(self, side: int) -> int:
        """Return the approximate peak bytes of encoding a square picture, or 0."""
        ...

    def encode(
        self,
        pixels: mx.array,
        needs: tuple[str, ...] = (),
        prompt: Prompt | None = None,
    ) -> Features:
        """Encode pixels (B, S, S, 3) in [0, 1] as tokens before the projector.

        needs: names of the extras to compute. prompt: read if `reads_prompt`.
        """
        ...

    def project(self, tokens: mx.array) -> mx.array:
        """Project visual tokens (B, K, C) to embeddings (B, K, D)."""
        ...

    def text(self, prompt: Prompt, state: mx.array | None = None) -> list[mx.array]:
        """Return the embeddings (1 or B, L, D) of each text around the pictures.

        state: (B, p), the robots' normalised state, for policies that read it.
        """
        ...
