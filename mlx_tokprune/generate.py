"""Answers about pictures, from the command line; `answering.py` is what it runs."""

import dataclasses
import itertools
import json
import math
import sys
from dataclasses import dataclass, field

import mlx.core as mx

from .answering import Settings, generate, stream_generate
from .budget import fit_image_size
from .commands import (
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
from .loading import PADDINGS, load
from .memory import Memory
from .models.openvla import OpenVLA
from .pipeline import PREFILL_STEP, Vision, VisualTokens, measure_stages
from .pruners import Pruner
from .temporal import Temporal

__all__ = ["generate", "main", "stream_generate"]  # as `mlx_lm.generate` has them

DEFAULT_METHOD = "norm"


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
    help_ = "write a picture of what was kept, at last, to this PNG"
    add("--overlay", help=help_)
    add("--json", action="store_true", help="a line of JSON after each answer")
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
    if not pictures:
        raise InputError("no picture was given; say --image FILE")
    budget = args.vision_budget
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise InputError(
            f"a TTFT of {budget:g} ms cannot be kept; expected more than 0"
        )
    check_overlay(args.overlay, pictures)
    images = [load_image(picture) for picture in pictures]
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
                self.processor.prompt(prompt, len(self._shown))

    def fit(self, prompt: str) -> None:
        """Choose the input size."""
        args, size = self.args, self.processor.image_size
        package = self.vision and not args.temporal
        if isinstance(self.model, OpenVLA) or package:
            sizes = (args.image_size, args.vision_budget)
            if any(size is not None for size in sizes) or args.padding != "keep":
                raise InputError(
                    "input size and padding can only be chosen for a FastVLM that sees "
                    "by itself; leave them out"
                )
            return
        size = size if args.image_size is None else args.image_size
        self.processor = self.processor.at(size, args.padding)
        if args.vision_budget is not None:
            fit = fit_image_size(
                *(self.model, self.processor, self._shown, prompt, self.pruner),
                *(self.settings.positions, args.vision_budget),
            )
            self.processor = self.processor.at(fit.image_size)

    @property
    def _shown(self) -> list:
        """The pictures of one prompt."""
        return self.images[:1] if self.args.temporal else self.images

    def answer(self, prompt: str) -> tuple[dict, VisualTokens]:
        """Prints an answer; gives its record and visual tokens."""
        asked = (self.model, self.processor, self.images, prompt)
        mx.reset_peak_memory()
        pieces = []
        for piece in stream_generate(
            *asked,
            pruner=self.pruner,
            vision=self.vision,
            memory=self.memory if len(self.args.prompt) > 1 else None,
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
            "prompt": prompt,
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
            f"stages          {times} ms (fenced, in a second run"
            + (", of the whole frame)" if seen else ")"),
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
