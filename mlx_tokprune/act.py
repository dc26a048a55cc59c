"""Robot actions: `predict_action` for one observation, and the command.

`control.py` knows the way of an observation; this file keeps the time, and turns what
comes out into robot units. `policy.py` is for control loops.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from . import control
from .act_inputs import (
    action_bounds,
    check_finite,
    check_images,
    check_model,
    check_positions,
    check_pruner,
    normalize_states,
)
from .commands import (
    DEFAULT_POSITIONS,
    add_budget,
    check_overlay,
    describe_methods,
    device_name,
    make_pruner,
    write_overlay,
)
from .control import Patches
from .demo import POLICY, POLICY_FRAME
from .errors import InputError, Parser, command
from .features import Selection
from .image import center_crop, load_image
from .loading import load
from .models.openvla import OpenVLA
from .policy import Policy
from .pruners import Pruner

DEFAULT_METHOD = "trimvla"


@dataclass(frozen=True)
class Action:
    """What a policy answers to one observation.

    values: (A,) in robot units, or (chunk, A) from OpenVLA-OFT. normalized: the same
    in [-1, 1]. token_ids: the A tokens, `None` for OFT, which has none. patches: the
    kept visual tokens. ttft_ms: from decoded pictures to the first action token on the
    host (OFT: to the whole chunk). total_ms: to the last.
    """

    values: np.ndarray
    normalized: np.ndarray
    token_ids: tuple[int, ...] | None
    patches: Patches = field(repr=False)
    ttft_ms: float
    total_ms: float


def predict_action(
    model: OpenVLA,
    processor,
    images: Sequence,
    instruction: str,
    *,
    unnorm_key: str | None = None,
    proprio: Sequence[float] | None = None,
    pruner: Pruner | None = None,
    positions: str = DEFAULT_POSITIONS,
) -> Action:
    """The action for one observation.

    images: files, arrays or PIL images, in the policy's order. unnorm_key: the data set
    whose units are wanted; may be left out where there is one. proprio: robot state in
    its own units, for OFT policies that read it. pruner: every visual token stays when
    `None`. Raises `InputError` for anything that does not fit the policy.
    """
    pruner = check_pruner(pruner)
    check_model(model, processor)
    check_positions(positions)
    images = check_images(model, images)
    bounds = action_bounds(model, processor, unnorm_key)
    states = None if proprio is None else [proprio]
    state = normalize_states(model, processor, states, unnorm_key, 1)
    start = time.perf_counter()
    observation = control.observe(processor, images, instruction, state)
    features = control.encode(model, observation, pruner.needs)
    patches = control.see(model, observation, pruner, features)
    sequence = control.assemble(model, observation, patches, positions)
    if model.args.oft:
        chunk = control.regress(model, sequence)[0].astype(mx.float32)
        normalized = check_finite(np.array(chunk))
        first = last = time.perf_counter()
        ids = None
    else:
        tokens = control.decode(model, sequence, len(bounds.low))
        mx.eval(tokens[0])
        first = time.perf_counter()
        ids = tuple(int(token) for token in mx.concatenate(tokens))
        last = time.perf_counter()
        normalized = processor.values(np.array(ids))
    return Action(
        bounds.to_units(normalized),
        normalized,
        ids,
        patches,
        (first - start) * 1e3,
        (last - start) * 1e3,
    )


# The command ------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(
        prog="mlx_tokprune.act",
        description=__doc__.splitlines()[0],
        epilog=describe_methods(["vision", "prompt"]),
    )
    add = parser.add_argument
    add("--model", help="folder or hub id (default: the embedded demo policy)")
    add("--image", action="append", default=[], help="a picture; repeat for several")
    add("--instruction", help="what the robot should do")
    add("--unnorm-key", help="the data set whose units are wanted")
    add("--proprio", type=float, nargs="+", help="robot state, in its own units")
    add("--method", help=f"pruning method, see below (default: {DEFAULT_METHOD})")
    add_budget(parser)
    add("--coverage", type=float, help="of trimvla without a budget (default: 0.15)")
    add("--min-keep-ratio", type=float, help="of the same (default: 0.1)")
    add("--seed", type=int, default=0, help="of method random")
    add("--runs", type=int, default=5, help="warm runs for actions/s (default: 5)")
    add("--overlay", help="write a picture of what was kept to this PNG")
    add("--json", action="store_true", help="end stdout with one line of JSON")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    own = {name: getattr(args, name) for name in ("coverage", "min_keep_ratio")}
    own = {name: value for name, value in own.items() if value is not None}
    pruner = make_pruner(
        DEFAULT_METHOD if args.method is None and own else args.method,
        args.keep_ratio,
        args.keep_tokens,
        args.seed,
        DEFAULT_METHOD,
        own,
    )
    pictures, instruction = args.image, args.instruction
    if args.model is None:
        pictures = pictures or [POLICY_FRAME.path]
        instruction = POLICY_FRAME.question if instruction is None else instruction
    if instruction is None:
        raise InputError("no instruction was given; say --instruction TEXT")
    if args.runs < 1:
        raise InputError(f"cannot time {args.runs} runs; the least is 1")
    check_overlay(args.overlay, pictures)
    images = [load_image(picture) for picture in pictures]
    model, processor = load(POLICY if args.model is None else args.model)
    mx.reset_peak_memory()
    asked = {"pruner": pruner, "positions": args.positions}
    action = predict_action(
        model,
        processor,
        images,
        instruction,
        unnorm_key=args.unnorm_key,
        proprio=args.proprio,
        **asked,
    )
    peak = mx.get_peak_memory() / 1e6
    states = None if args.proprio is None else [args.proprio]
    state = normalize_states(model, processor, states, args.unnorm_key, 1)
    stages = control.measure_stages(
        *(model, processor, images, instruction),
        *(pruner, args.positions, state, action.normalized.shape[-1]),
    )
    policy = Policy(model, processor, unnorm_key=args.unnorm_key, **asked)
    rate = _actions_per_second(policy, images, instruction, args.proprio, args.runs)
    patches = action.patches
    if args.overlay:
        selection = _per_picture(patches, len(images))
        seen = [center_crop(image, processor.crop) for image in images]
        write_overlay(args.overlay, seen, selection, patches.grid, padded=False)
    record = {
        "action": action.values.tolist(),
        "normalized_action": action.normalized.tolist(),
        "token_ids": action.token_ids and list(action.token_ids),
        "visual_tokens": patches.total,
        "kept_indices": patches.indices.tolist(),
        "stages_ms": dataclasses.asdict(stages),
        "ttft_ms": action.ttft_ms,
        "total_ms": action.total_ms,
        "actions_per_second": rate,
        "peak_memory_mb": peak,
        "method": pruner.method,
        "keep": patches.indices.shape[1],
        "positions": args.positions,
        "device": device_name(),
    }
    print(format_report(record), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(record))


def _actions_per_second(policy, images, instruction, proprio, runs: int) -> float:
    """Actions of one call over the median time of warm, compiled calls."""
    policy(images, instruction, proprio)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        values = policy(images, instruction, proprio)
        times.append(time.perf_counter() - start)
    return (len(values) if values.ndim > 1 else 1) / statistics.median(times)


def _per_picture(patches: Patches, pictures: int) -> Selection | list[np.ndarray]:
    """What was kept of each picture, also where the pruner chose among all of them."""
    if patches.selection.indices.shape[0] == pictures:
        return patches.selection
    each = patches.total // pictures
    kept = np.array(patches.indices[0])
    return [kept[kept // each == i] % each for i in range(pictures)]


def format_report(record: dict) -> str:
    """The figures of one action, for people."""
    times = ", ".join(f"{name} {ms:.1f}" for name, ms in record["stages_ms"].items())
    rows = np.atleast_2d(record["action"])
    shown = "\n                ".join(
        " ".join(f"{value:+.4f}" for value in row) for row in rows
    )
    return "\n".join(
        [
            f"action          {shown}",
            f"visual tokens   {record['visual_tokens']}, kept {record['keep']} "
            f"({record['method']}, {record['positions']} positions)",
            f"stages          {times} ms (fenced, in a second run)",
            f"TTFT            {record['ttft_ms']:.1f} ms, whole action "
            f"{record['total_ms']:.1f} ms (first run, cold, not fenced)",
            f"actions/s       {record['actions_per_second']:.1f} (warm, compiled)",
            f"peak memory     {record['peak_memory_mb']:.0f} MB (MLX arrays)",
            f"device          {record['device']}",
        ]
    )


if __name__ == "__main__":
    main()
