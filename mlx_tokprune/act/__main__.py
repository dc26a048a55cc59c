"""Print the action of a robot policy for one observation."""

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.embedded import POLICY_FRAME
from ..checkpoints.loading import load
from ..checkpoints.policy_settings import SETTINGS
from ..cli import (
    Parser,
    add_adapter,
    add_drafts,
    add_output,
    add_pruning,
    add_seed,
    add_settings,
    begin_logging,
    check_overlay,
    command,
    draft_plan,
    methods,
    places,
    plan_of,
    write_overlay,
)
from ..errors import InputError
from ..pipeline.planning import given_or_carried
from ..processing.image import center_crop, load_image
from ..processing.processor import check_acts
from ..pruners import POLICY_METHOD, Plan
from ..runtime import device_name
from .heads import head_of
from .inputs import check_images
from .policy import Policy
from .predict import predict_action


def build_parser() -> Parser:
    """Return the parser of `mlx_tokprune act`."""
    parser = Parser(
        prog="mlx_tokprune act",
        usage="--model MODEL --image IMAGE --instruction TEXT [options]",
        description=__doc__,
        example="mlx_tokprune act --model openvla-7b-mlx --image frame.png \\\n"
        '    --instruction "open the drawer" --method norm --keep-ratio 0.5',
    )
    add = parser.add_argument
    help_ = "folder, hub id or demo-pi0 (default: demo-policy)"
    add("--model", help=help_)
    add_adapter(parser)
    help_ = "image, or CAMERA=FILE; repeatable"
    add("--image", action="append", default=[], help=help_)
    add("--instruction", metavar="TEXT", help="task of the robot")
    add("--unnorm-key", metavar="NAME", help="data set whose action units are used")
    help_ = "robot state in its own units, if the policy reads it"
    add("--proprio", "--state", type=float, nargs="+", metavar="X", help=help_)
    add_pruning(parser, POLICY_METHOD)
    add = parser.add_argument_group("with --method trimvla and no budget").add_argument
    help_ = "coverage of attention to reach (default: 0.15)"
    add("--coverage", type=float, metavar="SHARE", help=help_)
    help_ = "share of tokens that is always kept (default: 0.1)"
    add("--min-keep-ratio", type=float, metavar="RATIO", help=help_)
    add_settings(parser)
    group = parser.add_argument_group("control loop")
    add = group.add_argument
    help_ = "actions of a chunk to execute before the next image (default: all)"
    add("--first", type=int, metavar="N", help=help_)
    help_ = "warm runs that time actions/s (default: 0)"
    add("--runs", type=int, metavar="N", default=0, help=help_)
    help_ = "speculate, with equal actions: by the last one, its rest, or n-grams"
    add_drafts(group, ("last", "shifted", "ngram"), help_)
    add_seed(group)
    overlay = "write a picture of the kept tokens"
    add_output(parser, overlay, "end stdout with one line of JSON")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Run `mlx_tokprune act`."""
    args = build_parser().parse_args(argv)
    begin_logging(args.verbose)
    own = {name: getattr(args, name) for name in ("coverage", "min_keep_ratio")}
    own = {name: value for name, value in own.items() if value is not None}
    pruners = plan_of(args, POLICY_METHOD, own)
    names, pictures = split_names(args.image)
    instruction = args.instruction
    if args.model is None:
        pictures = pictures or [POLICY_FRAME.path]
        instruction = POLICY_FRAME.question if instruction is None else instruction
    if instruction is None:
        raise InputError("no instruction was given; say --instruction TEXT")
    if args.runs < 0:
        raise InputError(f"cannot time {args.runs} runs; the least is 0")
    drafting = draft_plan(args)
    if (args.draft or args.draft_model) and not args.runs:
        raise InputError("drafts are for control loops; say --runs, too")
    check_overlay(args.overlay, pictures)
    images = [load_image(picture) for picture in pictures]
    model, processor = load(
        "demo-policy" if args.model is None else args.model,
        adapter_path=args.adapter_path,
        settings={
            n: getattr(args, n) for n in SETTINGS if getattr(args, n) is not None
        },
    )
    if names:
        images = dict(zip(names, images, strict=True))
    processor = check_acts(processor)
    bounds = processor.bounds("action", args.unnorm_key)
    head_of(model, processor, len(bounds.low)).first(args.first)
    plan = given_or_carried(model, pruners)
    mx.reset_peak_memory()
    options = {"pruner": plan, "positions": args.positions}
    options["unnorm_key"] = args.unnorm_key
    policy = None
    if args.runs:  # refuse a draft before acting
        draft = _draft(args, drafting)
        policy = Policy(model, processor, draft=draft, first=args.first, **options)
    action = predict_action(
        *(model, processor, images, instruction),
        **{"proprio": args.proprio, "stages": args.stages, **options},
    )
    peak, rate, calls = mx.get_peak_memory() / 1e6, None, None
    if policy is not None:
        rate = _actions_per_second(policy, images, instruction, args.proprio, args.runs)
        calls = policy.calls
    visual = action.visual
    if args.overlay:
        inputs = check_images(model, images)
        inputs = [center_crop(image, processor.crop) for image in inputs]
        write_overlay(args.overlay, inputs, visual, padded=processor.pads)
    record = {
        "action": action.values[: args.first].tolist(),
        "normalized_action": action.normalized[: args.first].tolist(),
        "token_ids": action.token_ids and list(action.token_ids),
        "visual_tokens": visual.total,
        "wrong": action.wrong,
        "kept_indices": visual.left(),
        "stages_ms": action.stages_ms,
        "ttft_ms": action.ttft_ms,
        "total_ms": action.total_ms,
        "actions_per_second": rate,
        "calls": calls,
        "peak_memory_mb": peak,
        "method": methods(plan),
        "keep": len(visual.left()[0]),
        "places": places(visual),
        "positions": args.positions,
        "device": device_name(),
    }
    print(format_report(record), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(record))


def _draft(args: argparse.Namespace, plan: Plan | None) -> Any:
    """Return the `draft` argument of `Policy`."""
    if args.draft_model:
        loaded = load(args.draft_model)
        options = {"positions": args.positions, "unnorm_key": args.unnorm_key}
        return Policy(*loaded, pruner=plan, **options)
    return True if args.draft == "last" else args.draft or False


def split_names(texts: list[str]) -> tuple[list[str], list[str]]:
    """Split `CAMERA=FILE` texts into camera names and files.

    Texts without any name give no names. Raises `InputError` when only a part of the
    texts has a name, or a name comes twice.
    """
    parts = [("", t) if os.path.exists(t) else _named(t) for t in texts]
    names, files = [n for n, _ in parts], [f for _, f in parts]
    if not any(names):
        return [], files
    if not all(names) or len(set(names)) < len(names):
        raise InputError(
            f"--image is CAMERA=FILE for every picture, each camera once, or FILE for "
            f"all; got {' '.join(texts)}"
        )
    return names, files


def _named(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    return (name, file) if equals and "/" not in name else ("", text)


def _actions_per_second(
    policy: Policy,
    images: list | dict,
    instruction: str,
    proprio: list[float] | None,
    runs: int,
) -> float:
    """Return the actions of one call over the median time of warm, compiled calls."""
    values, times = policy(images, instruction, proprio), []
    for _ in range(runs):
        start = time.perf_counter()
        values = policy(images, instruction, proprio)
        times.append(time.perf_counter() - start)
    return (len(values) if values.ndim > 1 else 1) / statistics.median(times)


def format_report(record: dict) -> str:
    """Return the figures of one action as readable lines."""
    rows = np.atleast_2d(record["action"])
    shown = "\n                ".join(
        " ".join(f"{value:+.4f}" for value in row) for row in rows
    )
    lines = [
        f"action          {shown}",
        f"visual tokens   {record['visual_tokens']}, kept {record['keep']} "
        f"({record['method']}, {record['positions']} positions)",
    ]
    if record["wrong"]:
        lines.insert(1, f"error           {record['wrong']}; padded, cut or zeros")
    stages = record["stages_ms"]
    if stages:
        times = ", ".join(f"{name} {ms:.1f}" for name, ms in stages.items())
        lines.append(f"stages          {times} ms (one by one)")
    lines.append(
        f"TTFT            {record['ttft_ms']:.1f} ms, whole action "
        f"{record['total_ms']:.1f} ms (cold{', slowed by --stages' * bool(stages)})"
    )
    if record["actions_per_second"]:
        rate = record["actions_per_second"]
        note = f"warm, {record['calls']} calls of the language model"
        lines.append(f"actions/s       {rate:.1f} ({note})")
    return "\n".join(
        [
            *lines,
            f"peak memory     {record['peak_memory_mb']:.0f} MB (MLX arrays)",
            f"device          {record['device']}",
        ]
    )


if __name__ == "__main__":
    main()
