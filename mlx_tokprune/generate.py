"""Answers about pictures: `generate`, `stream_generate`, and the command.

Streaming, sampling and the cache are mlx-lm's; this file feeds them pruned prompts and
keeps the time.
"""

import dataclasses
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
from .models.openvla import OpenVLA
from .pipeline import (
    POSITIONS,
    Prefill,
    Vision,
    VisualTokens,
    assemble,
    measure_stages,
    see,
)
from .pruners import Pruner, check_seed

DEFAULT_METHOD = "norm"


@dataclass(frozen=True)
class Response:
    """One piece of a streamed answer; the last one has `finish_reason`.

    text: this piece. token: its id. visual: the kept tokens. ttft_ms: from decoded
    pictures and prompt string to the first token id on the host.
    """

    text: str
    token: int
    visual: VisualTokens = field(repr=False)
    ttft_ms: float
    decode_tokens_per_second: float
    finish_reason: str | None = None


def stream_generate(
    model,
    processor,
    images: Sequence,
    prompt: str,
    *,
    pruner: Pruner | None = None,
    positions: str = DEFAULT_POSITIONS,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 0.0,
    seed: int | None = None,
    vision: Vision | None = None,
) -> Iterator[Response]:
    """Stream an answer about `images` (files, arrays or PIL images, in order).

    pruner: a `Pruner`; every visual token when `None`. positions: `original` keeps the
    place each kept token had, `contiguous` closes the gaps. vision: a Core ML package
    (`coreml.vision.open_vision`) instead of the model's tower and `pruner`. The rest is
    as in mlx-lm.
    Raises `InputError` before anything is computed, but for more tokens to keep than
    there are, which the first step finds.
    """
    pruner = pruner or Pruner("none")
    if isinstance(images, (str, os.PathLike, np.ndarray, Image.Image)):
        images = [images]
    _check(images, positions, max_tokens, temp, top_p, seed)
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
    images = [load_image(image) for image in images]
    processor.prompt(prompt, len(images))
    if vision:
        vision.check(model)
    if seed is not None:
        mx.random.seed(seed)
    looks = vision or (lambda model, pixels: see(model, pixels, pruner))
    return _stream(
        model, processor, images, prompt, looks, positions, max_tokens, temp, top_p
    )


def _stream(
    model, processor, images, text, looks: Vision, positions, max_tokens, temp, top_p
) -> Iterator[Response]:
    from mlx_lm.generate import generate_step, generation_stream, wired_limit
    from mlx_lm.sample_utils import make_sampler

    start = time.perf_counter()
    prompt = processor.prompt(text, len(images))
    visual = looks(model, mx.array(processor.pixels(images)))
    prefill = assemble(model, prompt, visual, positions)
    first: list[float] = []

    def on_progress(done: int, total: int) -> None:
        # mlx-lm says so as soon as the first token id is on the host.
        if done == total and not first:
            first.append(time.perf_counter())

    steps = generate_step(
        mx.array([], mx.int32),
        model,
        max_tokens=max_tokens,
        sampler=make_sampler(temp, top_p),
        input_embeddings=prefill.embeddings[0],
        prompt_progress_callback=on_progress,
    )
    tokenizer = processor.tokenizer
    detokenizer = tokenizer.detokenizer
    detokenizer.reset()
    with wired_limit(model, [generation_stream]):
        for number, (token, _) in enumerate(_with_positions(model, prefill, steps), 1):
            elapsed = time.perf_counter() - first[0]
            reason = "length" if number == max_tokens else None
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
                ttft_ms=(first[0] - start) * 1e3,
                decode_tokens_per_second=(number - 1) / elapsed if number > 1 else 0.0,
                finish_reason=reason,
            )
            if reason:
                return


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


def _check(images, positions, max_tokens, temp, top_p, seed) -> None:
    if seed is not None:
        check_seed(seed)
    if len(images) == 0:
        raise InputError("no picture was given; expected at least one")
    if positions not in POSITIONS:
        raise InputError(f"positions are {' or '.join(POSITIONS)}, not {positions!r}")
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise InputError(f"cannot generate {max_tokens} tokens; the least is 1")
    if not (math.isfinite(temp) and temp >= 0 and 0 <= top_p <= 1):
        raise InputError(
            f"temperature {temp:g} and top-p {top_p:g} are out of range; expected a "
            "temperature of at least 0 and a top-p in [0, 1]"
        )


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
    add("--prompt", help="the question; <image> marks a picture's place")
    add("--method", help="pruning method, see below (default: norm)")
    add_budget(parser)
    package = "a package of mlx_tokprune.coreml that sees and prunes (macOS)"
    add("--vision", metavar="FILE.mlpackage", help=package)
    add("--max-tokens", type=int, default=256)
    add("--temp", type=float, default=0.0, help="sampling temperature (default: 0)")
    add("--top-p", type=float, default=0.0)
    add("--seed", type=int, default=0, help="of sampling and of method random")
    add("--overlay", help="write a picture of what was kept to this PNG")
    add("--json", action="store_true", help="end stdout with one line of JSON")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    pruner, vision = _pruner_and_vision(args)
    pictures, prompt = args.image, args.prompt
    if args.model is None:
        pictures = pictures or [PICTURES[0].path]
        prompt = PICTURES[0].question if prompt is None else prompt
    if prompt is None:
        raise InputError("no prompt was given; say --prompt TEXT")
    check_overlay(args.overlay, pictures)
    images = [load_image(picture) for picture in pictures]
    from .loading import load

    model, processor = load(CHECKPOINT if args.model is None else args.model)
    mx.reset_peak_memory()
    ids, pieces = [], []
    for piece in stream_generate(
        model,
        processor,
        images,
        prompt,
        pruner=pruner,
        positions=args.positions,
        max_tokens=args.max_tokens,
        temp=args.temp,
        top_p=args.top_p,
        seed=args.seed,
        vision=vision,
    ):
        ids.append(piece.token)
        pieces.append(piece.text)
        print(piece.text, end="", flush=True)
    print()
    peak = mx.get_peak_memory() / 1e6
    asked = (model, processor, images, prompt, pruner, args.positions)
    stages = measure_stages(*asked, vision)
    visual = piece.visual
    if args.overlay:
        write_overlay(args.overlay, images, visual.selection, visual.grid)
    record = {
        "text": "".join(pieces),
        "token_ids": ids,
        "visual_tokens": visual.total,
        "kept_indices": visual.selection.indices.tolist(),
        "stages_ms": dataclasses.asdict(stages),
        "ttft_ms": piece.ttft_ms,
        "decode_tokens_per_second": piece.decode_tokens_per_second,
        "peak_memory_mb": peak,
        "method": vision.function.method if vision else pruner.method,
        "keep": visual.selection.keep,
        "positions": args.positions,
        "device": device_name(),
    }
    print(format_report(record), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(record))


def _pruner_and_vision(args) -> tuple[Pruner, Vision | None]:
    """What prunes, MLX or a package; the other one of the two does nothing."""
    if args.vision is None:
        budget = (args.keep_ratio, args.keep_tokens)
        return make_pruner(args.method, *budget, args.seed, DEFAULT_METHOD), None
    if args.method is not None or args.keep_tokens is not None:
        raise InputError(
            "a package has its own method; with --vision, say only --keep-ratio, to "
            "choose one of its functions"
        )
    from .coreml.vision import open_vision

    return Pruner("none"), open_vision(args.vision, args.keep_ratio)


def format_report(record: dict) -> str:
    """The figures of one answer, for people."""
    stages = record["stages_ms"]
    times = ", ".join(f"{name} {ms:.1f}" for name, ms in stages.items())
    return "\n".join(
        [
            f"visual tokens   {record['visual_tokens']} per picture, kept "
            f"{record['keep']} ({record['method']}, {record['positions']} positions)",
            f"stages          {times} ms (fenced, in a second run)",
            f"TTFT            {record['ttft_ms']:.1f} ms (first run, cold, not fenced)",
            f"decode          {record['decode_tokens_per_second']:.1f} tokens/s",
            f"peak memory     {record['peak_memory_mb']:.0f} MB (MLX arrays)",
            f"device          {record['device']}",
        ]
    )


if __name__ == "__main__":
    main()
