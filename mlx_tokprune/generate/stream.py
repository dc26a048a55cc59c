"""Answers about pictures: `generate` and `stream_generate`.

Streaming, sampling and the cache are mlx-lm's; this file feeds them pruned prompts and
keeps the time.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from ..errors import InputError
from ..models.protocol import VisionModel
from ..models.speculative import speculate
from ..pipeline import Scene, VisualTokens, run
from ..pipeline.limits import check_memory
from ..pipeline.planning import plan_for
from ..pipeline.timing import NO_CLOCK, Clock, NoClock
from ..processing.image import load_image
from ..processing.processor import Processor
from ..pruners import Plan, Pruners, as_plan
from ..runtime import end_streams_with_thread
from .drafts import Begun, Drafts
from .memory import Memory
from .settings import Settings

log = logging.getLogger("mlx_tokprune")


class Vision(Protocol):
    """A `Look` that users give: a `Temporal`, or a Core ML package.

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
    calls: how often the language model ran until then, for the prompt, too.
    """

    text: str
    token: int
    visual: VisualTokens = field(repr=False)
    ttft_ms: float
    decode_tokens_per_second: float
    finish_reason: str | None = None
    reused: int = 0
    stages_ms: dict[str, float] | None = None
    calls: int = 1


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
    drafts: Drafts | None
    settings: Settings
    clock: NoClock


class _Opening(NamedTuple):
    """A question that has been read. reused: tokens of it that a memory knew.

    remember: makes the memory remember it, after the clock.
    """

    begun: Begun
    reused: int
    remember: Callable[[], None]


def stream_generate(
    model: VisionModel,
    processor: Processor,
    images: Sequence,
    prompt: str,
    *,
    pruner: Pruners = None,
    vision: Vision | None = None,
    memory: Memory | None = None,
    draft: Drafts | None = None,
    stages: bool = False,
    **settings,
) -> Iterator[Response]:
    """Stream an answer about `images` (files, arrays or PIL images, in order).

    pruner: a `Pruner`, or several at different places; when `None` those that the
    checkpoint carries, mostly none.
    vision: what sees and prunes in place of the model's tower and `pruner`: a Core ML
    package (`coreml.vision.open_vision`) or a `Temporal`. memory: a `Memory`, which
    makes another question about the same pictures quick. draft: what drafts tokens, of
    which the model then checks several in a call (`answer.drafts`). stages: fence the
    run and time its stages, which makes its TTFT a little longer. settings: fields of
    `Settings`.
    Raises `InputError` before anything is computed, but for more tokens than there are
    or than the model can read, which the first step finds.
    """
    chosen = Settings(**settings)
    images = decoded(images)
    check_answers(processor)
    if vision is not None and as_plan(pruner):
        raise InputError("what sees also prunes: give the pruner to it, not here")
    plan = plan_for(model, pruner if vision is None else vision.plan)
    chosen.check(model)
    processor.check(prompt, len(images))
    if vision is not None:
        vision.check(model)
    else:
        check_memory(model, processor.image_size, len(images))
    if draft is not None:
        draft.check(model, processor, plan)
    clock = Clock() if stages else NO_CLOCK
    about = (model, processor, images, prompt, plan, vision)
    return _stream(_Question(*about, memory, draft, chosen, clock))


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


def check_answers(processor: Any) -> None:
    """Raise `InputError` for the processor of a policy."""
    if not isinstance(processor, Processor):
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
    begun, reused, remember = _open(asked)
    with asked.clock.stage("prefill"):
        logits = asked.model.decoder.logits(begun.read.hidden)[:, -1]
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = int(np.array(sampler(logits))[0])
    ttft = (time.perf_counter() - start) * 1e3
    _check(token if mx.isfinite(logits[0, token]).item() else -1)
    log.debug("first token after %.1f ms, %d tokens reused", ttft, reused)
    remember()
    first = time.perf_counter()
    detokenizer = tokenizer.detokenizer
    detokenizer.reset()
    steps = _steps(asked, token, begun, sampler)
    for number, (token, calls) in enumerate(steps, 1):
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
            visual=begun.visual,
            ttft_ms=ttft,
            decode_tokens_per_second=(number - 1) / elapsed if number > 1 else 0.0,
            finish_reason=reason,
            reused=reused,
            stages_ms=asked.clock.times,
            calls=calls,
        )
        if reason:
            return


def _open(asked: _Question) -> _Opening:
    """From a question to what the language model has read of it."""
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

    about = (model, asked.images, asked.text, prompt, read, visual, settings)
    return _Opening(Begun(*about), known, remember)


def _check(token: int) -> None:
    """Weights that are damaged must not look like an answer."""
    if token < 0:
        raise InputError("the model's logits are not finite; its weights are damaged")


def _steps(
    asked: _Question, token: int, begun: Begun, sampler
) -> Iterator[tuple[int, int]]:
    """`token`, which the prompt led to, and those that follow it.

    With each, how often the language model had run.
    """
    from mlx_lm.generate import generate_step, maybe_quantize_kv_cache

    yield token, 1
    settings, cache = asked.settings, begun.read.cache
    if settings.max_tokens == 1:
        return
    if asked.drafts is not None:
        yield from _drafted(asked.drafts, token, begun)
        return
    maybe_quantize_kv_cache(cache, **settings.quantization)
    for number, (following, _) in enumerate(
        generate_step(
            mx.array([token]),
            cast(nn.Module, asked.model),
            max_tokens=settings.max_tokens - 1,
            sampler=sampler,
            prompt_cache=cache,
            **settings.quantization,
        ),
        2,
    ):
        yield cast(int, following), number


def _drafted(drafts: Drafts, token: int, begun: Begun) -> Iterator[tuple[int, int]]:
    """What follows `token`, several tokens in a call where the draft had them."""
    from mlx_lm.generate import maybe_quantize_kv_cache

    settings, cache = begun.settings, begun.read.cache
    drafter = drafts.begin(begun)  # before the cache it may copy from is quantized

    def quantize() -> None:
        maybe_quantize_kv_cache(cache, **settings.quantization)

    quantize()
    widths = (drafts.tokens, settings.max_tokens - 1)
    parts = speculate(
        *(begun.model.decoder, cache, token, drafter, *widths, begun.sampling),
        after_call=quantize,
    )
    for calls, part in enumerate(parts, 2):
        for following in part:
            _check(following)
            yield following, calls
