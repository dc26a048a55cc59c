"""The action of a robot policy, from the command line."""

import json
import os
import statistics
import sys
import time

import mlx.core as mx
import numpy as np

from ..checkpoints.embedded import POLICY_FRAME
from ..checkpoints.loading import load
from ..cli import (
    Parser,
    add_adapter,
    add_budget,
    add_common,
    add_drafts,
    draft_plan,
    add_method,
    begin_logging,
    check_overlay,
    command,
    describe_methods,
    make_pruners,
    methods,
    places,
    write_overlay,
)
from ..errors import InputError
from ..pipeline.planning import given_or_carried
from ..processing.image import center_crop, load_image
from ..pruners import POLICY_METHOD, Plan
from ..runtime import device_name
from .inputs import check_first, check_images
from .policy import Policy
from .predict import predict_action

def build_parser() -> Parser:
    parser = Parser(
        prog="mlx_tokprune.act",
        description=__doc__.splitlines()[0],
        epilog=describe_methods(),
    )
    add = parser.add_argument
    add(
        "--model",
        help="demo-policy, demo-pi0, a folder or hub id (default: demo-policy)",
    )
    help_ = "a picture, or CAMERA=FILE; repeat for several"
    add("--image", action="append", default=[], help=help_)
    add("--instruction", help="what the robot should do")
    add("--unnorm-key", help="the data set whose units are wanted")
    help_ = "robot state, in its own units"
    add("--proprio", "--state", type=float, nargs="+", help=help_)
    add_method(parser, POLICY_METHOD)
    add_budget(parser)
    add("--coverage", type=float, help="of trimvla without a budget (default: 0.15)")
    add("--min-keep-ratio", type=float, help="of the same (default: 0.1)")
    add("--seed", type=int, default=0, help="of method random")
    help_ = "of a chunk, the actions to do before looking again (default: all)"
    add("--first", type=int, metavar="N", help=help_)
    help_ = "warm runs of a compiled policy, for actions/s (default: none)"
    add("--runs", type=int, default=0, help=help_)
    help_ = (
        "draft each of these by the last one's tokens (last), by them without what was "
        "done (shifted) or only by how they went on (ngram); actions stay the same"
    )
    add_drafts(parser, ("last", "shifted", "ngram"), help_)
    help_ = "fence the run and time its stages, which makes its TTFT a little longer"
    add("--stages", action="store_true", help=help_)
    add("--overlay", help="write a picture of what was kept to this PNG")
    add("--json", action="store_true", help="end stdout with one line of JSON")
    add_adapter(parser)
    add_common(parser)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    begin_logging(args.verbose)
    own = {name: getattr(args, name) for name in ("coverage", "min_keep_ratio")}
    own = {name: value for name, value in own.items() if value is not None}
    pruners = make_pruners(args, POLICY_METHOD, own)
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
    )
    if names:
        images = dict(zip(names, images, strict=True))
    check_first(model, args.first)
    plan = given_or_carried(model, pruners)
    mx.reset_peak_memory()
    asked = {"pruner": plan, "positions": args.positions}
    asked["unnorm_key"] = args.unnorm_key
    policy = None
    if args.runs:  # refuse a draft before acting
        how = {"draft": _draft(args, drafting), "first": args.first}
        policy = Policy(model, processor, **how, **asked)
    action = predict_action(
        *(model, processor, images, instruction),
        **{"proprio": args.proprio, "stages": args.stages, **asked},
    )
    peak, rate, calls = mx.get_peak_memory() / 1e6, None, None
    if policy is not None:
        rate = _actions_per_second(policy, images, instruction, args.proprio, args.runs)
        calls = policy.calls
    visual = action.visual
    if args.overlay:
        seen = check_images(model, images)
        seen = [center_crop(image, processor.crop) for image in seen]
        write_overlay(args.overlay, seen, visual, padded=processor.pads)
    record = {
        "action": _first(action.values, args.first),
        "normalized_action": _first(action.normalized, args.first),
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


def _draft(args, plan: Plan | None):
    """What drafts, as `Policy` takes it."""
    if args.draft_model:
        loaded = load(args.draft_model)
        how = {"positions": args.positions, "unnorm_key": args.unnorm_key}
        return Policy(*loaded, pruner=plan, **how)
    return True if args.draft == "last" else args.draft or False


def _first(actions: np.ndarray, count: int | None) -> list:
    return actions.tolist() if count is None else actions[:count].tolist()


def split_names(texts: list[str]) -> tuple[list[str], list[str]]:
    """`camera=file` texts as names and files; no names where none are given.

    Raises `InputError` where some have a name and some have none, or one comes twice.
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


def _actions_per_second(policy, images, instruction, proprio, runs: int) -> float:
    """Actions of one call over the median time of warm, compiled calls."""
    policy(images, instruction, proprio)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        values = policy(images, instruction, proprio)
        times.append(time.perf_counter() - start)
    return (len(values) if values.ndim > 1 else 1) / statistics.median(times)


def format_report(record: dict) -> str:
    """The figures of one action, for people."""
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
        lines.insert(1, f"wrong           {record['wrong']}; padded, cut or zeros")
    stages = record["stages_ms"]
    if stages:
        times = ", ".join(f"{name} {ms:.1f}" for name, ms in stages.items())
        lines.append(f"stages          {times} ms (fenced)")
    lines.append(
        f"TTFT            {record['ttft_ms']:.1f} ms, whole action "
        f"{record['total_ms']:.1f} ms (cold, {'' if stages else 'not '}fenced)"
    )
    if record["actions_per_second"]:
        rate = record["actions_per_second"]
        how = f"warm, {record['calls']} calls of the language model"
        lines.append(f"actions/s       {rate:.1f} ({how})")
    return "\n".join(
        [
            *lines,
            f"peak memory     {record['peak_memory_mb']:.0f} MB (MLX arrays)",
            f"device          {record['device']}",
        ]
    )


if __name__ == "__main__":
    main()
