"""Answers about pictures: `generate` and `stream_generate`.

Streaming, sampling and the cache are mlx-lm's; this file feeds them pruned prompts and
keeps the time.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from PIL import Image

from .commands import DEFAULT_POSITIONS
from .errors import InputError
from .image import load_image
from .memory import Memory, opening_of, picture_key
from .models.openvla import OpenVLA
from .pipeline import (
    POSITIONS,
    PREFILL_STEP,
    Prefill,
    Vision,
    VisualTokens,
    assemble,
    first_logits,
    see,
)
from .pruners import Pruner, check_seed

_GROUPS = (32, 64, 128)  # sizes that MLX quantizes by


@dataclass(frozen=True)
class Response:
    """One piece of a streamed answer; the last one has `finish_reason`.

    text: this piece. token: its id. visual: the kept tokens. ttft_ms: from decoded
    pictures and prompt string to the first token id on the host. reused: tokens of the
    prompt that a `Memory` knew.
    """

    text: str
    token: int
    visual: VisualTokens = field(repr=False)
    ttft_ms: float
    decode_tokens_per_second: float
    finish_reason: str | None = None
    reused: int = 0


@dataclass(frozen=True)
class Settings:
    """How an answer is generated; names and defaults are those of mlx-lm.

    positions: `original` keeps the place each kept token had, `contiguous` closes the
    gaps. Raises `InputError` for values out of range.
    """

    positions: str = DEFAULT_POSITIONS
    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 0.0
    seed: int | None = None
    prefill_step_size: int = PREFILL_STEP
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __post_init__(self):
        if self.seed is not None:
            check_seed(self.seed)
        if self.positions not in POSITIONS:
            names = " or ".join(POSITIONS)
            raise InputError(f"positions are {names}, not {self.positions!r}")
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise InputError(
                f"cannot generate {self.max_tokens} tokens; the least is 1"
            )
        whole = ("max_tokens", "prefill_step_size", "quantized_kv_start")
        for name in (*whole, "kv_group_size"):
            if not isinstance(getattr(self, name), int):
                raise InputError(
                    f"{name} is a whole number, not {getattr(self, name)!r}"
                )
        temp, top_p = self.temp, self.top_p
        if not (math.isfinite(temp) and temp >= 0 and 0 <= top_p <= 1):
            raise InputError(
                f"temperature {temp:g} and top-p {top_p:g} are out of range; expected "
                "a temperature of at least 0 and a top-p in [0, 1]"
            )
        if self.prefill_step_size < 1 or self.quantized_kv_start < 0:
            raise InputError(
                "a prefill step has at least 1 token, and a cache is quantized from "
                "token 0 or later"
            )
        if self.kv_bits not in (None, 4, 8) or self.kv_group_size not in _GROUPS:
            raise InputError(
                f"cannot quantize the cache to {self.kv_bits or 8} bits in groups of "
                f"{self.kv_group_size}; expected 4 or 8 bits, and 32, 64 or 128"
            )

    @property
    def quantization(self) -> dict:
        """As mlx-lm's functions take it."""
        names = ("kv_bits", "kv_group_size", "quantized_kv_start")
        return {name: getattr(self, name) for name in names}

    def check(self, model) -> None:
        """Raise `InputError` unless this model's cache can be quantized so."""
        text = model.args.text
        size = text["hidden_size"] // text["num_attention_heads"]
        if self.kv_bits and size % self.kv_group_size:
            fitting = [str(group) for group in _GROUPS if size % group == 0]
            raise InputError(
                f"groups of {self.kv_group_size} do not divide this model's keys of "
                f"{size} numbers; those that do are {', '.join(fitting) or 'none'}"
            )


def stream_generate(
    model,
    processor,
    images: Sequence,
    prompt: str,
    *,
    pruner: Pruner | None = None,
    vision: Vision | None = None,
    memory: Memory | None = None,
    **settings,
) -> Iterator[Response]:
    """Stream an answer about `images` (files, arrays or PIL images, in order).

    pruner: a `Pruner`; every visual token when `None`. vision: what sees and prunes in
    place of the model's tower and `pruner`: a Core ML package
    (`coreml.vision.open_vision`) or a `Temporal`. memory: a `Memory`, which makes
    another question about the same pictures quick. settings: fields of `Settings`.
    Raises `InputError` before anything is computed, but for more tokens to keep than
    there are, which the first step finds.
    """
    if pruner and vision and not pruner.keeps_all:
        raise InputError("what sees also prunes: give the pruner to it, not here")
    pruner, chosen = pruner or Pruner("none"), Settings(**settings)
    if isinstance(images, (str, os.PathLike, np.ndarray, Image.Image)):
        images = [images]
    if len(images) == 0:
        raise InputError("no picture was given; expected at least one")
    if isinstance(model, OpenVLA):
        raise InputError(
            "this model answers in actions, not in words; use mlx_tokprune.act, or "
            "give a FastVLM checkpoint"
        )
    if pruner.stage != "vision":
        raise InputError(
            f"method {pruner.method!r} looks at the prompt, which only policies can do "
            "here (mlx_tokprune.act); choose another, such as 'norm'"
        )
    chosen.check(model)
    images = [load_image(image) for image in images]
    processor.prompt(prompt, len(images))
    if hasattr(vision, "check"):
        vision.check(model)
    if chosen.seed is not None:
        mx.random.seed(chosen.seed)
    return _stream(model, processor, images, prompt, pruner, vision, memory, chosen)


def _stream(
    model, processor, images, text, pruner, vision, memory, settings: Settings
) -> Iterator[Response]:
    from mlx_lm.generate import generation_stream, wired_limit

    with wired_limit(model, [generation_stream]):
        yield from _answer(
            model, processor, images, text, pruner, vision, memory, settings
        )


def _answer(
    model, processor, images, text, pruner, vision, memory, settings: Settings
) -> Iterator[Response]:
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.sample_utils import make_sampler

    def look() -> VisualTokens:
        pixels = mx.array(processor.pixels(images))
        return vision(model, pixels) if vision else see(model, pixels, pruner)

    start = time.perf_counter()
    prompt = processor.prompt(text, len(images))
    cache, known = make_prompt_cache(model), 0
    if memory is None:
        visual = look()
    else:
        size = (processor.image_size, processor.padding)
        key = picture_key(images, *size, pruner.key, vision)
        visual = memory.see(model, key, look)
    prefill = assemble(model, prompt, visual, settings.positions)
    if memory is not None:
        opening, length = opening_of(prompt, prefill, settings.positions)
        known = memory.recall(key, opening, cache)
    step = settings.prefill_step_size
    logits = first_logits(model, prefill, cache, known, step)
    sampler = make_sampler(settings.temp, settings.top_p)
    token = sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).item()
    first = time.perf_counter()
    if memory is not None and not known:
        memory.keep(key, opening, cache, length)
    steps = _steps(model, token, cache, sampler, settings)
    tokenizer = processor.tokenizer
    detokenizer = tokenizer.detokenizer
    detokenizer.reset()
    for number, token in enumerate(_with_positions(model, prefill, steps), 1):
        elapsed = time.perf_counter() - first
        reason = "length" if number == settings.max_tokens else None
        if token in tokenizer.eos_token_ids:
            reason = "stop"
        else:
            detokenizer.add_token(token)
        if reason:
            detokenizer.finalize()
        yield Response(
            text=detokenizer.last_segment,
            token=token,
            visual=visual,
            ttft_ms=(first - start) * 1e3,
            decode_tokens_per_second=(number - 1) / elapsed if number > 1 else 0.0,
            finish_reason=reason,
            reused=known,
        )
        if reason:
            return


def _steps(model, token: int, cache: list, sampler, settings: Settings) -> Iterator:
    """`token`, which the prompt in `cache` led to, and those that follow it."""
    from mlx_lm.generate import generate_step, maybe_quantize_kv_cache

    yield token
    if settings.max_tokens > 1:
        maybe_quantize_kv_cache(cache, **settings.quantization)
        for following, _ in generate_step(
            mx.array([token]),
            model,
            max_tokens=settings.max_tokens - 1,
            sampler=sampler,
            prompt_cache=cache,
            **settings.quantization,
        ):
            yield following


def _with_positions(model, prefill: Prefill, steps: Iterator) -> Iterator:
    """Advance `steps` with the prompt's positions in force, and only then."""
    try:
        while True:
            with model.positions.using(prefill.positions, prefill.shift):
                step = next(steps, None)
            if step is None:
                return
            yield step
    finally:
        steps.close()


def generate(model, processor, images: Sequence, prompt: str, **options) -> str:
    """The whole answer as text; takes what `stream_generate` takes."""
    pieces = stream_generate(model, processor, images, prompt, **options)
    return "".join(piece.text for piece in pieces)
