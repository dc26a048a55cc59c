"""Answers about pictures: `generate` and `stream_generate`.

Streaming, sampling and the cache are mlx-lm's; this file feeds them pruned prompts and
keeps the time.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from ..errors import InputError
from ..image import load_image
from ..models.family import VisionModel
from ..models.language import Read
from ..pipeline import Scene, VisualTokens, check_memory, plan_for, run
from ..processor import Processor
from ..pruners import Plan, Pruners, as_plan
from ..threads import end_streams_with_thread
from ..timing import NO_CLOCK, Clock, NoClock
from .memory import Memory
from .settings import Settings

log = logging.getLogger("mlx_tokprune")


class Vision(Protocol):
    """What looks in place of a model's tower: a `Temporal`, or a Core ML package.

    plan: the pruners that it brings along.
    """

    plan: Plan

    def check(self, model: VisionModel) -> None:
        """Raise `InputError` unless it can stand in for this model's tower."""

    def __call__(
        self, model: VisionModel, scene: Scene, plan: Plan, clock: NoClock
    ) -> VisualTokens: ...


@dataclass(frozen=True)
class Response:
    """One piece of a streamed answer; the last one has `finish_reason`.

    text: this piece. token: its id. visual: the kept tokens. ttft_ms: from decoded
    pictures and prompt string to the first token id on the host. reused: tokens of the
    prompt that a `Memory` knew. stages_ms: of each stage, where a clock fenced them.
    """

    text: str
    token: int
    visual: VisualTokens = field(repr=False)
    ttft_ms: float
    decode_tokens_per_second: float
    finish_reason: str | None = None
    reused: int = 0
    stages_ms: dict[str, float] | None = None


@dataclass(frozen=True)
class _Question:
    """One question about some pictures, checked."""

    model: VisionModel
    processor: Processor
    images: list[Image.Image]
    text: str
    plan: Plan
    vision: Vision | None
    memory: Memory | None
    settings: Settings
    clock: NoClock


def stream_generate(
    model: VisionModel,
    processor: Processor,
    images: Sequence,
    prompt: str,
    *,
    pruner: Pruners = None,
    vision: Vision | None = None,
    memory: Memory | None = None,
    stages: bool = False,
    **settings,
) -> Iterator[Response]:
    """Stream an answer about `images` (files, arrays or PIL images, in order).

    pruner: a `Pruner`, or several at different places; when `None` those that the
    checkpoint carries, mostly none.
    vision: what sees and prunes in place of the model's tower and `pruner`: a Core ML
    package (`coreml.vision.open_vision`) or a `Temporal`. memory: a `Memory`, which
    makes another question about the same pictures quick. stages: fence the run and time
    its stages, which makes its TTFT a little longer. settings: fields of `Settings`.
    Raises `InputError` before anything is computed, but for more tokens than there are
    or than the model can read, which the first step finds.
    """
    chosen = Settings(**settings)
    images = decoded(images)
    check_answers(model)
    if vision is not None and as_plan(pruner):
        raise InputError("what sees also prunes: give the pruner to it, not here")
    plan = plan_for(model, pruner if vision is None else vision.plan)
    chosen.check(model)
    processor.check(prompt, len(images))
    if vision is not None:
        vision.check(model)
    else:
        check_memory(model, processor.image_size, len(images))
    clock = Clock() if stages else NO_CLOCK
    question = (model, processor, images, prompt, plan, vision, memory, chosen, clock)
    return _stream(_Question(*question))


def generate(
    model: VisionModel, processor: Processor, images: Sequence, prompt: str, **options
) -> str:
    """The whole answer as text; takes what `stream_generate` takes."""
    pieces = stream_generate(model, processor, images, prompt, **options)
    return "".join(piece.text for piece in pieces)


def decoded(images) -> list[Image.Image]:
    """Pictures of one prompt, decoded; `InputError` where there is none."""
    if isinstance(images, (str, os.PathLike, np.ndarray, Image.Image)):
        images = [images]
    if len(images) == 0:
        raise InputError("no picture was given; expected at least one")
    return [load_image(image) for image in images]


def check_answers(model: VisionModel) -> None:
    """Raise `InputError` for a policy."""
    if model.answers != "text":
        raise InputError(
            "this model answers in actions, not in words; use mlx_tokprune.act, or "
            "give a FastVLM checkpoint"
        )


def _stream(question: _Question) -> Iterator[Response]:
    from mlx_lm.generate import generation_stream, wired_limit

    end_streams_with_thread()
    model = cast(nn.Module, question.model)
    with wired_limit(model, [cast(mx.Stream, generation_stream)]):
        yield from _answer(question)


def _answer(asked: _Question) -> Iterator[Response]:
    from mlx_lm.sample_utils import make_sampler

    settings, tokenizer = asked.settings, asked.processor.tokenizer
    sampler = make_sampler(settings.temp, settings.top_p)
    if settings.seed is not None:
        mx.random.seed(settings.seed)
    start = time.perf_counter()
    read, visual, reused, remember = _read(asked)
    with asked.clock.stage("prefill"):
        logits = asked.model.decoder.logits(read.hidden)[:, -1]
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        begun = int(np.array(sampler(logits))[0])
    ttft = (time.perf_counter() - start) * 1e3
    _check_first(logits, begun)
    log.debug("first token after %.1f ms, %d tokens known", ttft, reused)
    remember()
    first = time.perf_counter()
    detokenizer = tokenizer.detokenizer
    detokenizer.reset()
    for number, token in enumerate(_steps(asked, begun, read, sampler), 1):
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
            ttft_ms=ttft,
            decode_tokens_per_second=(number - 1) / elapsed if number > 1 else 0.0,
            finish_reason=reason,
            reused=reused,
            stages_ms=asked.clock.times,
        )
        if reason:
            return


def _read(asked: _Question) -> tuple[Read, VisualTokens, int, Callable[[], None]]:
    """The prompt in the language model.

    Also how much of it a memory knew, and what makes it remember, after the clock.
    """
    model, processor, settings = asked.model, asked.processor, asked.settings
    cache, known, vision, pixels = model.decoder.make_cache(), 0, asked.vision, None
    with asked.clock.stage("preprocess") as done:
        prompt = processor.prompt(asked.text, len(asked.images))
        recalled = None
        if asked.memory is not None:
            about = (asked.images, asked.plan, vision)
            recalled = asked.memory.about(model, processor, *about)
            known = recalled.fill(cache, prompt, settings.positions)
            vision = recalled.look(vision)
        if not (recalled and recalled.visual):
            pixels = mx.array(processor.pixels(asked.images))
            done.append(pixels)
    read, visual = run(
        model,
        Scene(pixels, prompt),
        asked.plan,
        positions=settings.positions,
        vision=vision,
        cache=cache,
        known=known,
        step=settings.prefill_step_size,
        clock=asked.clock,
    )

    def remember() -> None:
        mx.eval(visual.indices)  # other threads could not
        if recalled and not known:
            recalled.keep(cache, prompt, settings.positions)

    return read, visual, known, remember


def _check_first(logits: mx.array, token: int) -> None:
    """Weights that are damaged must not look like an answer."""
    if not mx.isfinite(logits[0, token]).item():
        raise InputError(
            "the model's first logits are not finite; its weights are damaged"
        )


def _steps(asked: _Question, token: int, read: Read, sampler) -> Iterator[int]:
    """`token`, which the prompt led to, and those that follow it."""
    from mlx_lm.generate import generate_step, maybe_quantize_kv_cache

    yield token
    settings, cache = asked.settings, read.cache
    if settings.max_tokens > 1:
        maybe_quantize_kv_cache(cache, **settings.quantization)
        for following, _ in generate_step(
            mx.array([token]),
            cast(nn.Module, asked.model),
            max_tokens=settings.max_tokens - 1,
            sampler=sampler,
            prompt_cache=cache,
            **settings.quantization,
        ):
            yield cast(int, following)
