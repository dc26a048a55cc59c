"""Text answers about images: `generate` and `stream_generate`.

Streaming, sampling and the cache are mlx-lm's; this module passes them pruned prompts
and measures times.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from ..errors import InputError, note
from ..models.positions import LayerCache
from ..models.protocol import VisionModel
from ..models.speculative import speculate
from ..pipeline import Scene, VisualTokens, run
from ..pipeline.limits import check_memory
from ..pipeline.planning import plan_for
from ..pipeline.timing import NO_CLOCK, Clock, NoClock
from ..processing.processor import AnyProcessor, Processor, check_answers
from ..processing.prompt import Prompt
from ..processing.sources import named_image
from ..pruners import Plan, Pruners, as_plan
from ..runtime import end_streams_with_thread
from .drafts import Drafts, PrefillResult
from .memory import Memory
from .settings import LogitsProcessor, Sampler, Settings

log = logging.getLogger("mlx_tokprune")


class Vision(Protocol):
    """Replacement of tower and pruner: a `Temporal` or a Core ML package."""

    @property
    def plan(self) -> Plan:
        """Pruners that the replacement applies."""
        ...

    def check(self, model: VisionModel) -> None:
        """Raise `InputError` unless it can replace this model's tower."""

    def __call__(
        self, model: VisionModel, scene: Scene, plan: Plan, clock: NoClock
    ) -> VisualTokens:
        """Return the kept and projected visual tokens of a scene."""
        ...


@dataclass(frozen=True)
class Response:
    """One piece of a streamed answer; the last one has `finish_reason`.

    text: text of this piece. token: its id. visual: the kept visual tokens. ttft_ms:
    time from decoded images and prompt string to the first token id on the host.
    decode_tokens_per_second: rate after the first token. finish_reason: "stop" or
    "length". reused: prompt tokens taken from a `Memory`. stages_ms: time of each
    fenced stage, with `stages`. calls: language model calls so far, prompt included.
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
class Question:
    """A checked question about images, with its options."""

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


class AnswerStart(NamedTuple):
    """Start of an answer: the prompt that has been read, and its memory.

    reused: prompt tokens taken from the memory. remember: stores the prompt in the
    memory; called after TTFT is measured. room: tokens that fit behind the prompt.
    """

    prefill: PrefillResult
    reused: int
    remember: Callable[[], None]
    room: int = sys.maxsize


def stream_generate(
    model: VisionModel,
    processor: AnyProcessor,
    images: Sequence,
    prompt: str,
    *,
    pruner: Pruners = None,
    vision: Vision | None = None,
    memory: Memory | None = None,
    draft: Drafts | None = None,
    stages: bool = False,
    **settings: Any,
) -> Iterator[Response]:
    """Stream an answer about `images`, in order: what `named_image` takes.

    pruner: a `Pruner`, or several at different places; `None` uses the checkpoint's own
    pruners, mostly none. vision: replaces the model's tower and `pruner`: a Core ML
    package (`coreml.vision.open_vision`) or a `Temporal`. memory: a `Memory` that
    speeds up further questions about the same images. draft: speculative decoding
    (`generate.drafts`); the answer does not change. stages: fence the run and time its
    stages, which adds a little to TTFT. settings: fields of `Settings`.

    Raises `InputError` before anything is computed, except for a budget above the
    number of tokens and a prompt that is too long, which raise at the first step.
    """
    options = (pruner, vision, memory, draft, stages)
    return stream(prepare(model, processor, images, prompt, *options, settings))


def prepare(
    model: VisionModel,
    processor: AnyProcessor,
    images: Sequence,
    prompt: str,
    pruner: Pruners,
    vision: Vision | None,
    memory: Memory | None,
    draft: Drafts | None,
    stages: bool,
    settings: dict[str, Any],
) -> Question:
    """Check and return a question; arguments and errors of `stream_generate`."""
    chosen = Settings(**settings)
    images = decoded(images)
    processor = check_answers(processor)
    if chosen.system_prompt is not None:
        processor = processor.with_system(chosen.system_prompt)
    if vision is not None and as_plan(pruner):
        raise InputError("pass the pruner to `vision`, which replaces tower and pruner")
    plan = plan_for(model, pruner if vision is None else vision.plan)
    chosen.check(model)
    processor.check(prompt, len(images))
    if vision is not None:
        vision.check(model)
    else:
        check_memory(model, processor.image_size, len(images))
    if draft is not None:
        draft.check(model, processor, plan)
        if not chosen.only_temp_and_top_p or chosen.max_kv_size:
            raise InputError(
                "a draft samples by temp and top_p alone and un-reads tokens; leave "
                "out other sampling options, penalties, biases and max_kv_size"
            )
    clock = Clock() if stages else NO_CLOCK
    return Question(
        *(model, processor, images, prompt, plan, vision, memory, draft, chosen, clock)
    )


def generate(
    model: VisionModel,
    processor: AnyProcessor,
    images: Sequence,
    prompt: str,
    **options: Any,
) -> str:
    """Return the whole answer as text; options are those of `stream_generate`."""
    pieces = stream_generate(model, processor, images, prompt, **options)
    return "".join(piece.text for piece in pieces)


def decoded(images: Any) -> list[Image.Image]:
    """Return the decoded images of one prompt."""
    if isinstance(images, (str, bytes, os.PathLike, np.ndarray, Image.Image)):
        images = [images]
    if not isinstance(images, Iterable) or isinstance(images, Mapping):
        raise InputError(f"pictures come as a list, not {type(images).__name__}")
    images = list(images)
    if not images:
        raise InputError("no picture was given; expected at least one")
    return [named_image(image) for image in images]


def open_answer(question: Question) -> AnswerStart:
    """Encode the images and read the prompt of a question."""
    model, processor, settings = question.model, question.processor, question.settings
    cache, reused, vision = model.decoder.make_cache(), 0, question.vision
    pixels, images = None, question.images
    with question.clock.stage("preprocess") as done:
        prompt = processor.prompt(question.text, len(images))
        recalled = None
        if question.memory is not None:
            plan = question.plan
            recalled = question.memory.about(model, processor, images, plan, vision)
            reused = recalled.fill(cache, prompt, settings.positions)
            vision = recalled.look(vision)
        if not (recalled and recalled.visual):
            pixels = mx.array(processor.pixels(images))
            done.append(pixels)
    read, visual = run(
        model,
        Scene(pixels, prompt),
        question.plan,
        positions=settings.positions,
        vision=vision,
        cache=cache,
        cached=reused,
        step=settings.prefill_step_size,
        clock=question.clock,
    )

    def remember() -> None:
        mx.eval(visual.indices)  # MLX evaluates lazy arrays only on their own thread
        if recalled and not reused:
            recalled.keep(cache, prompt, settings.positions)

    prefill = PrefillResult(*(model, images, prompt, read, visual, settings))
    return AnswerStart(prefill, reused, remember)


def stream(
    question: Question, opened: Callable[[Question], AnswerStart] = open_answer
) -> Generator[Response]:
    """Stream the answer to a checked question. opened: reads the prompt."""
    from mlx_lm.generate import generation_stream, wired_limit

    end_streams_with_thread()
    model = cast(nn.Module, question.model)
    # Keeps large models in wired memory on macOS, as mlx-lm does; elsewhere a no-op.
    with wired_limit(model, [cast(mx.Stream, generation_stream)]):
        yield from _answer(question, opened)


def _answer(
    question: Question, opened: Callable[[Question], AnswerStart]
) -> Iterator[Response]:
    settings, tokenizer = question.settings, question.processor.tokenizer
    sampler = settings.sampler(tokenizer)
    if settings.seed is not None:
        mx.random.seed(settings.seed)
    start = time.perf_counter()
    prefill, reused, remember, room = opened(question)
    _check_fits(prefill.read.cache, settings)
    processors = settings.processors(prefill.prompt.ids())
    with question.clock.stage("prefill"):
        logits = question.model.decoder.logits(prefill.read.hidden)[:, -1]
        for process in processors:
            logits = process(mx.array([], mx.int32), logits)
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = int(np.array(sampler(logits))[0])
    ttft = (time.perf_counter() - start) * 1e3
    _check(token if mx.isfinite(logits[0, token]).item() else -1)
    log.debug("first token after %.1f ms, %d tokens reused", ttft, reused)
    remember()  # copies the cache, so it counts neither as TTFT nor as decoding
    first = time.perf_counter()
    text = AnswerText(tokenizer, settings.stop)
    context = question.processor.context
    fitting = context_room(question, prefill.prompt, prefill.visual)
    most = min(settings.max_tokens, room)
    steps = _steps(question, token, prefill, most, sampler, processors)
    for number, (token, calls) in enumerate(steps, 1):
        elapsed = time.perf_counter() - first
        if number == max(1, fitting + 1):
            note(f"the answer passes the model's context of {context} tokens")
        piece, reason = text.add(token, number == most)
        yield Response(
            text=piece,
            token=token,
            visual=prefill.visual,
            ttft_ms=ttft,
            decode_tokens_per_second=(number - 1) / elapsed if number > 1 else 0.0,
            finish_reason=reason,
            reused=reused,
            stages_ms=question.clock.times,
            calls=calls,
        )
        if reason:
            return


class AnswerText:
    """Text of an answer, token by token, cut before the first of the stop texts.

    Text that may begin a stop text is held back, by mlx-lm's `TextStateMachine`.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        from mlx_lm.generate import TextStateMachine

        self._ends, self._detokenizer = tokenizer.eos_token_ids, tokenizer.detokenizer
        self._detokenizer.reset()
        machine = TextStateMachine({"normal": [(text, None) for text in stops]})
        self._state = machine.make_state()

    def add(self, token: int, last: bool) -> tuple[str, str | None]:
        """Return the text of the next token, and the reason if the answer ends.

        last: no token follows.
        """
        from mlx_lm.generate import TextStateMachine

        reason = "stop" if token in self._ends else "length" if last else None
        if reason != "stop":
            self._detokenizer.add_token(token)
        if reason:
            self._detokenizer.finalize()
        segment = self._detokenizer.last_segment
        self._state, text, state = TextStateMachine.step(self._state, segment)
        if state is None:
            return text, "stop"
        return text + (TextStateMachine.flush(self._state)[1] if reason else ""), reason


def context_room(question: Question, prompt: Prompt, visual: VisualTokens) -> int:
    """Return the tokens that fit behind the prompt into the model's context."""
    original = question.settings.positions == "original"
    each = visual.total if original else visual.keep
    length = sum(map(len, prompt.segments)) + prompt.places * each
    return question.processor.context - length


def _check(token: int) -> None:
    """Raise `InputError` for -1, the mark of damaged weights."""
    if token < 0:
        raise InputError("the model's logits are not finite; its weights are damaged")


def _check_fits(cache: Sequence[LayerCache], settings: Settings) -> None:
    """Raise `InputError` for a prompt that `max_kv_size` cannot hold."""
    size, length = settings.max_kv_size, max(part.inner.offset for part in cache)
    if size is None:
        return
    if length > size:
        raise InputError(
            f"the pruned prompt has {length} tokens, but max_kv_size is {size}; "
            "expected a larger cache, or a smaller budget of visual tokens"
        )
    if any(part.visible is not None for part in cache):
        raise InputError(
            "max_kv_size needs pictures that keep equal numbers of tokens; give the "
            "method a budget"
        )


def _rotating(part: LayerCache, size: int) -> LayerCache:
    """Return a layer's cache as mlx-lm's cache of at most `size` tokens."""
    from mlx_lm.models.cache import RotatingKVCache

    inner = RotatingKVCache(max_size=size, keep=4)  # four, as in mlx-lm
    inner.update_and_fetch(*part.keys_and_values())
    return LayerCache(inner, part.shift)


def _steps(
    question: Question,
    token: int,
    prefill: PrefillResult,
    most: int,
    sampler: Sampler,
    processors: list[LogitsProcessor],
) -> Iterator[tuple[int, int]]:
    """Yield the answer's tokens, each with the language model calls so far.

    token: the first token, which follows the prompt. most: number of tokens.
    """
    from mlx_lm.generate import generate_step, maybe_quantize_kv_cache

    yield token, 1
    settings, cache = question.settings, prefill.read.cache
    if most == 1:
        return
    if question.drafts is not None:
        yield from _drafted(question.drafts, token, prefill, most)
        return
    if settings.max_kv_size is not None:
        cache[:] = [_rotating(part, settings.max_kv_size) for part in cache]
    maybe_quantize_kv_cache(cache, **settings.quantization)
    for number, (following, _) in enumerate(
        generate_step(
            mx.array([token], mx.int32),
            cast(nn.Module, question.model),
            max_tokens=most - 1,
            sampler=sampler,
            logits_processors=processors,
            prompt_cache=cache,
            **settings.quantization,
        ),
        2,
    ):
        yield cast(int, following), number


def _drafted(
    drafts: Drafts, token: int, prefill: PrefillResult, most: int
) -> Iterator[tuple[int, int]]:
    """Yield the tokens after `token`, several per call where the draft is accepted."""
    from mlx_lm.generate import maybe_quantize_kv_cache

    settings, cache = prefill.settings, prefill.read.cache
    drafter = drafts.begin(prefill)  # before the cache it may copy from is quantized

    def quantize() -> None:
        maybe_quantize_kv_cache(cache, **settings.quantization)

    quantize()
    widths = (drafts.tokens, most - 1)
    parts = speculate(
        *(prefill.model.decoder, cache, token, drafter, *widths, prefill.sampling),
        after_call=quantize,
    )
    for calls, part in enumerate(parts, 2):
        for following in part:
            _check(following)
            yield following, calls
