"""Answers about pictures: `generate`, `stream_generate`, and the command.

Streaming, sampling and the cache are mlx-lm's; this file feeds them pruned prompts and
keeps the time.
"""

import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from PIL import Image

from .budget import fit_image_size
from .commands import (
    DEFAULT_POSITIONS,
    add_budget,
    check_overlay,
    describe_methods,
    device_name,
    make_pruner,
    write_overlay,
)
from .demo import CHECKPOINT, PICTURES
from .errors import InputError, Parser, command
from .image import load_image
from .loading import PADDINGS
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
    measure_stages,
    see,
)
from .pruners import Pruner, check_seed
from .temporal import Temporal

DEFAULT_METHOD = "norm"


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
        if self.kv_bits not in (None, 4, 8) or self.kv_group_size not in (32, 64, 128):
            raise InputError(
                f"cannot quantize the cache to {self.kv_bits} bits in groups of "
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
            raise InputError(
                f"groups of {self.kv_group_size} do not divide this model's keys of "
                f"{size} numbers; choose a --kv-group-size that does"
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

    pruner: a `Pruner`; every visual token when `None`. vision: a Core ML package
    (`coreml.vision.open_vision`) instead of the model's tower and `pruner`. memory: a
    `Memory`, which makes another question about the same pictures quick. settings:
    fields of `Settings`. Raises `InputError` before anything is computed, but for more
    tokens to keep than there are, which the first step finds.
    """
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
    if vision:
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


# The command ------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(
        prog="mlx_tokprune.generate",
        description=__doc__.splitlines()[0],
        epilog=describe_methods(["vision"]),
    )
    add = parser.add_argument
    add("--model", help="folder or hub id (default: the embedded demo model)")
    add("--image", action="append", default=[], help="a picture; repeat for several")
    help_ = "a question; <image> marks a picture's place; repeat to ask more than one"
    add("--prompt", action="append", default=[], help=help_)
    add("--method", help="pruning method, see below (default: norm)")
    add_budget(parser)
    package = "a package of mlx_tokprune.coreml that sees and prunes (macOS)"
    add("--vision", metavar="FILE.mlpackage", help=package)
    help_ = "pictures are frames: ask about each, encoding what changed since the last"
    add("--temporal", action="store_true", help=help_)
    help_ = "encode the black border of a padded picture, or leave it out"
    add("--padding", choices=PADDINGS, default="keep", help=f"{help_} (default: keep)")
    size = parser.add_mutually_exclusive_group()
    help_ = "pixels of the longer side (default: as trained)"
    size.add_argument("--image-size", type=int, help=help_)
    help_ = "the largest input size whose TTFT is expected to stay below MS"
    size.add_argument("--vision-budget", type=float, metavar="MS", help=help_)
    add("--max-tokens", type=int, default=256)
    add("--temp", type=float, default=0.0, help="sampling temperature (default: 0)")
    add("--top-p", type=float, default=0.0)
    add("--seed", type=int, default=0, help="of sampling and of method random")
    add("--prefill-step-size", type=int, default=PREFILL_STEP)
    add("--kv-bits", type=int, help="quantize the cache to 4 or 8 bits")
    add("--kv-group-size", type=int, default=64)
    add("--quantized-kv-start", type=int, default=5000, help="token from which on")
    add("--overlay", help="write a picture of what was kept to this PNG")
    add("--json", action="store_true", help="a line of JSON on stdout per question")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    pruner, vision = _pruner_and_vision(args)
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(args, name) for name in names})
    pictures, prompts = args.image, args.prompt
    if args.model is None:
        pictures = pictures or [PICTURES[0].path]
        prompts = prompts or [PICTURES[0].question]
    if not prompts:
        raise InputError("no prompt was given; say --prompt TEXT")
    check_overlay(args.overlay, pictures)
    images = [load_image(picture) for picture in pictures]
    from .loading import load

    model, processor = load(CHECKPOINT if args.model is None else args.model)
    asking = _Asking(args, model, processor, images, pruner, vision, settings)
    asking.check(prompts)
    asking.fit(prompts[0])
    frames = [[image] for image in images] if args.temporal else [images]
    for seen, prompt in itertools.product(frames, prompts):
        asking.images = seen
        record, visual = asking.answer(prompt)
        print(format_report(record), file=sys.stderr if args.json else sys.stdout)
        if args.json:
            print(json.dumps(record))
    if args.overlay:
        write_overlay(args.overlay, seen, visual.selection, visual.grid)


@dataclass
class _Asking:
    """The command's questions, one after another."""

    args: object
    model: object
    processor: object
    images: list
    pruner: Pruner
    vision: Vision | None
    settings: Settings
    memory: Memory = field(default_factory=Memory)

    def check(self, prompts: list[str]) -> None:
        """Refuse any before answering the first."""
        if not isinstance(self.model, OpenVLA):
            for prompt in prompts:
                pictures = 1 if self.args.temporal else len(self.images)
                self.processor.prompt(prompt, pictures)

    def fit(self, prompt: str) -> None:
        """Choose the input size."""
        args, size = self.args, self.processor.image_size
        package = self.vision and not args.temporal
        if isinstance(self.model, OpenVLA) or package:
            if args.image_size or args.vision_budget or args.padding != "keep":
                raise InputError(
                    "input size and padding can only be chosen for a FastVLM that sees "
                    "by itself; leave them out"
                )
            return
        self.processor = self.processor.at(args.image_size or size, args.padding)
        if args.vision_budget is not None:
            fit = fit_image_size(
                *(self.model, self.processor, self.images, prompt, self.pruner),
                *(self.settings.positions, args.vision_budget),
            )
            self.processor = self.processor.at(fit.image_size)

    @property
    def _memory(self) -> Memory | None:
        """Frames are each asked about once."""
        several = len(self.args.prompt) > 1 and not self.args.temporal
        return self.memory if several else None

    def answer(self, prompt: str) -> tuple[dict, VisualTokens]:
        """Prints an answer; gives its record and visual tokens."""
        asked = (self.model, self.processor, self.images, prompt)
        mx.reset_peak_memory()
        pieces = []
        for piece in stream_generate(
            *asked,
            pruner=self.pruner,
            vision=self.vision,
            memory=self._memory,
            **dataclasses.asdict(self.settings),
        ):
            pieces.append(piece)
            print(piece.text, end="", flush=True)
        print()
        peak = mx.get_peak_memory() / 1e6
        positions, visual = self.settings.positions, piece.visual
        package = None if self.args.temporal else self.vision
        encoded = self.vision.encoded if self.args.temporal else None
        stages = measure_stages(*asked, self.pruner, positions, package)
        by = package.function if package else self.pruner
        record = {
            "text": "".join(piece.text for piece in pieces),
            "token_ids": [piece.token for piece in pieces],
            "visual_tokens": visual.total,
            "kept_indices": visual.selection.indices.tolist(),
            "stages_ms": dataclasses.asdict(stages),
            "ttft_ms": piece.ttft_ms,
            "decode_tokens_per_second": piece.decode_tokens_per_second,
            "peak_memory_mb": peak,
            "method": by.method,
            "keep": visual.selection.keep,
            "positions": positions,
            "image_size": self.processor.image_size,
            "padding": self.processor.padding,
            "reused_tokens": piece.reused,
            "encoded": encoded,
            "device": device_name(),
        }
        return record, visual


def _pruner_and_vision(args) -> tuple[Pruner, Vision | None]:
    """What prunes, and what sees in place of the model's tower, if anything."""
    if args.vision is None:
        budget = (args.keep_ratio, args.keep_tokens)
        pruner = make_pruner(args.method, *budget, args.seed, DEFAULT_METHOD)
        return pruner, Temporal(pruner) if args.temporal else None
    if args.temporal:
        raise InputError("a package sees whole frames; leave out --temporal")
    if args.method is not None or args.keep_tokens is not None:
        raise InputError(
            "a package has its own method; with --vision, say only --keep-ratio, to "
            "choose one of its functions"
        )
    from .coreml.vision import open_vision

    return Pruner("none"), open_vision(args.vision, args.keep_ratio)


def format_report(record: dict) -> str:
    """The figures of one answer, for people."""
    stages, reused = record["stages_ms"], record["reused_tokens"]
    times = ", ".join(f"{name} {ms:.1f}" for name, ms in stages.items())
    seen = record["encoded"]
    seen = "" if seen is None else f", {seen:.0%} of the frame encoded"
    return "\n".join(
        [
            f"visual tokens   {record['visual_tokens']} per picture of "
            f"{record['image_size']} px, kept {record['keep']} "
            f"({record['method']}, {record['positions']} positions)",
            f"stages          {times} ms (fenced, in a second run)",
            f"TTFT            {record['ttft_ms']:.1f} ms (cold, not fenced)"
            + (f", {reused} tokens of the prompt known" if reused else "")
            + seen.replace("%", " %"),
            f"decode          {record['decode_tokens_per_second']:.1f} tokens/s",
            f"peak memory     {record['peak_memory_mb']:.0f} MB (MLX arrays)",
            f"device          {record['device']}",
        ]
    )


if __name__ == "__main__":
    main()
