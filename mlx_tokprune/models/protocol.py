"""What the path asks of a model, whatever its family.

A family is one file here: a module with these attributes, and a `ModelArgs` that checks
its config. What a model can do is asked for by name, never by its class.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import mlx.core as mx
import mlx.nn as nn

from ..features import EPISODE_EXTRAS, Features
from ..processing.prompt import Prompt
from .language import Decoder

# Extras of `Features` at each kind of place, of families whose tower has attention.
PROVIDES: Mapping[str, tuple[str, ...]] = {
    "tower": ("grid", "attention", "attention_middle", "keys"),
    "prompt": ("grid", "text", "queries", "text_keys"),
    "layer": ("attention", "keys", "text", "text_attention"),
}
# Of policies, whose robot did something before.
POLICY_PROVIDES: Mapping[str, tuple[str, ...]] = {
    **PROVIDES,
    "prompt": (*PROVIDES["prompt"], *EPISODE_EXTRAS),
}


class Common:
    """What most families have alike."""

    gap = 0
    cameras: tuple[str, ...] = ()
    provides = PROVIDES
    signs: str | None = None
    language_model: Any
    _decoder: Decoder

    @property
    def layers(self) -> list:
        return self.language_model.layers

    @property
    def decoder(self) -> Decoder:
        return self._decoder

    def memory_of(self, side: int) -> int:
        return 0  # their pictures have one size

    def __call__(self, inputs, cache=None, input_embeddings=None) -> mx.array:
        """Logits (B, T, V) of token ids (B, T) or of `input_embeddings` (B, T, D)."""
        return self.language_model(inputs, cache, input_embeddings)

    @staticmethod
    def quant_predicate(path: str, module: nn.Module) -> bool:
        """Only the language model is quantized; towers and projector stay float."""
        return path.startswith("language_model.") and hasattr(module, "to_quantized")


class Chat(Common):
    """What models have alike that answer in words, in ChatML.

    mm_projector: layers, from visual tokens to embeddings of the language model.
    """

    image_token = "<image>"
    prompt_prefix = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    )
    prompt_suffix = "<|im_end|>\n<|im_start|>assistant\n"
    answers = "text"
    pictures = None
    sees_parts = False
    reads_prompt = False
    attends = "causal"
    mm_projector: list

    def project(self, tokens: mx.array) -> mx.array:
        """(B, K, C) visual tokens -> (B, K, D) language model embeddings."""
        for layer in self.mm_projector:
            tokens = layer(tokens)
        return tokens

    def text(self, prompt: Prompt, state: mx.array | None = None) -> list[mx.array]:
        """(1, L, D) for each text around the pictures."""
        return [self.decoder.embed(ids) for ids in prompt.arrays()]


class VisionModel(Protocol):
    """A vision-language model, or a policy.

    answers: in "text", or in actions: "bins" (tokens), "slots" (states for a head) or
    "chunks" (tokens of a compressed chunk of actions).
    image_size, stride: pixels per side of a picture, and of a visual token. pictures:
    how many an observation has; `None` for any number. cameras: their names, where
    they have such, of which any may be absent. provides: by place ("tower",
    "prompt", "layer"), the extras of `Features` that a pruner can have there; "grid"
    where tokens fill their grid. sees_parts: whether the tower can see a part of a
    picture alone. reads_prompt: whether the tower is conditioned on the prompt.
    attends: "causal", "full" or "prefix" (full, and causal for what is answered). gap:
    positions that stay free between prompt and answer. args: what its config says.
    action_head: of a model that answers in slots. language_model: mlx-lm's. carried:
    pruners of its checkpoint, which prune unless others are given. signs: what tells
    its weights from another model's (`learned/fitting.py`), once they were loaded.
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
    carried: tuple
    signs: str | None

    @property
    def decoder(self) -> Decoder: ...

    def memory_of(self, side: int) -> int:
        """Bytes that encoding a square picture takes at its peak, roughly, or 0."""
        ...

    def encode(
        self,
        pixels: mx.array,
        needs: tuple[str, ...] = (),
        prompt: Prompt | None = None,
    ) -> Features:
        """(B, S, S, 3) pixels in [0, 1] -> visual tokens before the projector."""
        ...

    def project(self, tokens: mx.array) -> mx.array:
        """(B, K, C) visual tokens -> (B, K, D) language model embeddings."""
        ...

    def text(self, prompt: Prompt, state: mx.array | None = None) -> list[mx.array]:
        """(1 or B, L, D) for each text around the pictures."""
        ...
