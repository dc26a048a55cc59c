"""Answer questions about images."""

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.embedded import PICTURES
from ..checkpoints.loading import load
from ..cli import (
    Flags,
    Parser,
    add_adapter,
    add_output,
    add_pruning,
    begin_logging,
    check_overlay,
    command,
    methods,
    places,
    plan_of,
    write_overlay,
)
from ..errors import InputError
from ..models.protocol import VisionModel
from ..pipeline import VisualTokens
from ..pipeline.planning import given_or_carried
from ..processing.image import load_pictures
from ..processing.processor import PADDINGS, Processor, check_answers
from ..processing.sources import named_image
from ..pruners import DEFAULT_METHOD, Plan
from ..runtime import device_name
from .drafts import Drafts
from .flags import (
    add_answer_drafts,
    add_generation,
    add_images,
    add_system_prompt,
    make_drafts,
    settings_of,
)
from .image_size import fit_image_size
from .memory import Memory
from .prompt_cache import PromptCache
from .settings import Settings
from .stream import Vision, stream_generate
from .temporal import Temporal


def build_parser() -> Parser:
    """Return the parser of `mlx_tokprune generate`."""
    parser = Parser(
        prog="mlx_tokprune generate",
        usage="--model MODEL --image FILE --prompt TEXT [options]",
        description=__doc__,
        example="mlx_tokprune generate --model FastVLM-0.5B-mlx --image photo.jpg \\\n"
        '    --prompt "What is this?" --keep-ratio 0.5 --overlay kept.png',
    )
    add = parser.add_argument
    add("--model", help="demo, folder or hub id (default: demo)")
    add_adapter(parser)
    add_images(parser)
    help_ = "question; - reads it from stdin; repeatable"
    add("--prompt", "-p", action="append", default=[], metavar="TEXT", help=help_)
    add_system_prompt(parser)
    add(
        "--each",
        action="store_true",
        help="ask about each image alone (folders: always)",
    )
    add_pruning(parser, DEFAULT_METHOD)
    _add_vision(parser.add_argument_group("images"))
    group = add_generation(parser)
    help_ = "read the pruned images' cache, or write it"
    group.add_argument("--prompt-cache-file", metavar="FILE", help=help_)
    add_answer_drafts(parser.add_argument_group("speculative decoding"))
    overlay = "draw what the last place kept; the rest is dark"
    add_output(parser, overlay, "print a line of JSON after each answer")
    return parser


def _add_vision(group: Flags) -> None:
    """Add the flags of the vision input."""
    add = group.add_argument
    help_ = "Core ML package in place of the tower (macOS)"
    add("--vision", metavar="MLPACKAGE", help=help_)
    help_ = "images are video frames; encode changes only"
    add("--temporal", action="store_true", help=help_)
    help_ = "encode or skip black padding (default: keep)"
    add("--padding", choices=PADDINGS, default="keep", help=help_)
    size = group.add_mutually_exclusive_group()
    help_ = "longer side of the input (default: as trained)"
    size.add_argument("--image-size", type=int, metavar="PX", help=help_)
    help_ = "choose the largest input with TTFT below MS"
    size.add_argument("--latency-target", type=float, metavar="MS", help=help_)
    # The old name of the flag.
    hidden: dict[str, Any] = {"dest": "latency_target", "help": argparse.SUPPRESS}
    size.add_argument("--vision-budget", type=float, **hidden)


@command
def main(argv: list[str] | None = None) -> None:
    """Run `mlx_tokprune generate`."""
    args = build_parser().parse_args(argv)
    begin_logging(args.verbose)
    pruners, vision = _pruners_and_vision(args)
    settings = settings_of(args)
    pictures, prompts = args.image, args.prompt
    if args.model is None:
        pictures = pictures or [PICTURES[0].path]
        prompts = prompts or [PICTURES[0].question]
    if not prompts:
        raise InputError("no prompt was given; say --prompt TEXT")
    if "-" in prompts:
        if [*pictures, *prompts].count("-") > 1:
            raise InputError("standard input was named twice; give --prompt TEXT")
        try:
            text = sys.stdin.read().strip()
        except UnicodeDecodeError:
            raise InputError("standard input is no UTF-8 text") from None
        prompts = args.prompt = [text if one == "-" else one for one in prompts]
    if not pictures:
        raise InputError("no picture was given; say --image FILE")
    target = args.latency_target
    if target is not None and not (math.isfinite(target) and target > 0):
        raise InputError(
            f"a TTFT of {target:g} ms cannot be kept; expected more than 0"
        )
    each = args.each or any(os.path.isdir(picture) for picture in pictures)
    if each:
        loaded = [pair for picture in pictures for pair in _load(picture)]
        pictures, images = map(list, zip(*loaded, strict=True))
    else:
        images = [named_image(picture) for picture in pictures]
    check_overlay(args.overlay, pictures)
    model, processor = load(
        "demo" if args.model is None else args.model, adapter_path=args.adapter_path
    )
    processor = check_answers(processor)
    plan = given_or_carried(model, pruners)
    drafts = make_drafts(args)
    vision = Temporal(plan) if args.temporal else vision
    apart = each or args.temporal
    groups = [[image] for image in images] if apart else [images]
    memory = Memory() if len(prompts) > 1 else None
    if args.prompt_cache_file:
        if vision is not None or len(groups) > 1:
            raise InputError(
                "a prompt cache file holds the pictures of one prompt; leave out "
                "--temporal, --vision and --each"
            )
        memory = PromptCache(args.prompt_cache_file)
    session = _Session(args, model, processor, plan, vision, settings, drafts, memory)
    for prompt in prompts:  # refuse any before answering the first
        processor.check(prompt, len(groups[0]))
    session.fit(groups[0], prompts[0])
    names, last = pictures if each else [None] * len(groups), None
    for (group, name), prompt in itertools.product(
        zip(groups, names, strict=True), prompts
    ):
        record, visual = session.answer(group, prompt)
        last = (session.processor.encoded(group), visual)
        if name is not None:
            record = {"image": str(name)[:200], **record}
        print(format_report(record), file=sys.stderr if args.json else sys.stdout)
        if args.json:
            print(json.dumps(record))
    if args.overlay and last:
        write_overlay(args.overlay, *last)


def _load(picture: str | Path) -> list:
    """Return the pictures of a folder with their files, or the one of another name."""
    if os.path.isdir(picture):
        return load_pictures(picture)
    return [(picture, named_image(picture))]


@dataclass
class _Session:
    """The command's questions in order, with one model, memory and input size."""

    args: argparse.Namespace
    model: VisionModel
    processor: Processor
    plan: Plan
    vision: Vision | None
    settings: Settings
    drafts: Drafts | None
    memory: Memory | None

    def fit(self, images: list, prompt: str) -> None:
        """Choose the input size, by the latency target if there is one."""
        args, size = self.args, self.processor.image_size
        if self.vision and not args.temporal:
            sizes = (args.image_size, args.latency_target)
            if any(one is not None for one in sizes) or args.padding != "keep":
                raise InputError(
                    "a Core ML package has its own input size and padding; leave out "
                    "--image-size, --latency-target and --padding"
                )
            return
        size = size if args.image_size is None else args.image_size
        self.processor = self.processor.at(size, args.padding)
        if args.latency_target is not None:
            fit = fit_image_size(
                *(self.model, self.processor, images, prompt, self.plan),
                *(self.settings.positions, args.latency_target),
            )
            self.processor = self.processor.at(fit.image_size)

    def answer(self, images: list, prompt: str) -> tuple[dict, VisualTokens]:
        """Print an answer; return its record and visual tokens."""
        mx.reset_peak_memory()
        pieces = []
        for piece in stream_generate(
            *(self.model, self.processor, images, prompt),
            pruner=None if self.vision else self.plan,
            vision=self.vision,
            memory=self.memory,
            draft=self.drafts,
            stages=self.args.stages,
            **dataclasses.asdict(self.settings),
        ):
            pieces.append(piece)
            print(piece.text, end="", flush=True)
        print()
        last = pieces[-1]
        visual = last.visual
        record = {
            "prompt": prompt,
            "text": "".join(piece.text for piece in pieces),
            "token_ids": [piece.token for piece in pieces],
            "visual_tokens": visual.total,
            "kept_indices": visual.left(),
            "stages_ms": last.stages_ms,
            "ttft_ms": last.ttft_ms,
            "decode_tokens_per_second": last.decode_tokens_per_second,
            "calls": last.calls,
            "peak_memory_mb": mx.get_peak_memory() / 1e6,
            "method": self._method,
            "keep": max(map(len, visual.left())),
            "places": places(visual),
            "positions": self.settings.positions,
            "image_size": self.processor.image_size,
            "padding": self.processor.padding,
            "reused_tokens": last.reused,
            "encoded": getattr(self.vision, "encoded", None),  # of a `Temporal`
            "device": device_name(),
        }
        return record, visual

    @property
    def _method(self) -> str:
        function = getattr(self.vision, "function", None)  # of a Core ML package
        return methods(self.plan) if function is None else function.method


def _pruners_and_vision(args: argparse.Namespace) -> tuple[Plan | None, Vision | None]:
    """Return the pruners, and the Core ML package that replaces them and the tower."""
    if args.vision is None:
        return plan_of(args, DEFAULT_METHOD), None
    if args.temporal:
        raise InputError("a package encodes whole frames; leave out --temporal")
    own = (args.method, args.at, args.option, args.prune)
    if args.keep_tokens is not None or any(own):
        raise InputError(
            "a package has its own method; with --vision, give only --keep-ratio, "
            "which chooses one of its functions"
        )
    from ..coreml.vision import open_vision

    return (), open_vision(args.vision, args.keep_ratio)


def format_report(record: dict) -> str:
    """Return the figures of one answer as readable lines."""
    stages, reused = record["stages_ms"], record["reused_tokens"]
    encoded, lines = record["encoded"], []
    if "image" in record:
        lines.append(f"picture         {Path(record['image']).name}")
    lines.append(
        f"visual tokens   {record['visual_tokens']} per picture of "
        f"{record['image_size']} px, kept {record['keep']} "
        f"({record['method']}, {record['positions']} positions)"
    )
    if stages:
        times = ", ".join(f"{name} {ms:.1f}" for name, ms in stages.items())
        lines.append(f"stages          {times} ms (one by one)")
    ttft = f"TTFT            {record['ttft_ms']:.1f} ms"
    ttft += " (slowed by --stages)" if stages else ""
    ttft += f", {reused} prompt tokens reused" if reused else ""
    ttft += "" if encoded is None else f", {100 * encoded:.0f} % of the frame encoded"
    return "\n".join(
        [
            *lines,
            ttft,
            f"decode          {record['decode_tokens_per_second']:.1f} tokens/s, "
            f"{record['calls']} calls of the language model",
            f"peak memory     {record['peak_memory_mb']:.0f} MB (MLX arrays)",
            f"device          {record['device']}",
        ]
    )


if __name__ == "__main__":
    main()
