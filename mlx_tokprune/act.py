"""Robot actions: `predict_action`, `Policy` for control loops, and the command.

`control.py` knows the way of an observation; this file checks what comes in, keeps the
time, and turns what comes out into robot units.
"""

import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from PIL import Image

from . import control
from .actions import Bounds
from .commands import (
    DEFAULT_POSITIONS,
    add_budget,
    check_overlay,
    describe_methods,
    device_name,
    make_pruner,
    write_overlay,
)
from .control import Observation, Patches
from .demo import POLICY, POLICY_FRAME
from .errors import InputError, Parser, command
from .features import Features, Selection
from .image import center_crop, load_image
from .loading import ActionProcessor, load
from .models.openvla import OpenVLA
from .pipeline import POSITIONS
from .prompt import check_text
from .pruners import Pruner

DEFAULT_METHOD = "trimvla"
_BUCKET = 8  # visual tokens by which compiled shapes grow where counts vary


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
    pruner = _check_pruner(pruner)
    _check_model(model, processor)
    _check_positions(positions)
    images = _check_images(model, images)
    bounds = _action_bounds(model, processor, unnorm_key)
    states = None if proprio is None else [proprio]
    state = _normalize_states(model, processor, states, unnorm_key, 1)
    start = time.perf_counter()
    observation = control.observe(processor, images, instruction, state)
    features = control.encode(model, observation, pruner.needs)
    patches = control.see(model, observation, pruner, features)
    sequence = control.assemble(model, observation, patches, positions)
    if model.args.oft:
        chunk = control.regress(model, sequence)[0].astype(mx.float32)
        normalized = _check_finite(np.array(chunk))
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


class Policy:
    """A policy in a control loop: `action = policy(images, instruction)`.

    Holds model, pruner and data set. Each shape is compiled once, so that the second
    call of a shape (batch, length of the instruction, and for methods with a count of
    their own its multiple of 8) does not compile again. Nothing of one observation
    reaches the next; `reset` between episodes forgets the tokens of past instructions.
    `kept` is how many visual tokens the last call had per robot, on average.
    """

    def __init__(
        self,
        model: OpenVLA,
        processor,
        *,
        pruner: Pruner | None = None,
        positions: str = DEFAULT_POSITIONS,
        unnorm_key: str | None = None,
        compile: bool = True,
    ):
        _check_model(model, processor)
        _check_positions(positions)
        self.model, self.processor = model, processor
        self.pruner = _check_pruner(pruner)
        self.positions = positions
        self.unnorm_key = unnorm_key
        self.bounds = _action_bounds(model, processor, unnorm_key)
        self._pictures = model.args.pictures
        wrap = mx.compile if compile else (lambda function: function)
        self._whole = wrap(self._act_on_pixels)
        self._features = wrap(self._encode)
        self._rest = wrap(self._act_on_patches)
        self.kept = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin an episode."""
        self._prompt = functools.lru_cache(maxsize=16)(self.processor.prompt)

    def __call__(
        self, images: Sequence, instruction: str, proprio: Sequence[float] | None = None
    ) -> np.ndarray:
        """(A,) action in robot units, or (chunk, A) from OpenVLA-OFT."""
        states = None if proprio is None else [proprio]
        return self.act_on_batch([images], instruction, states)[0]

    def act_on_batch(
        self,
        batch: Sequence[Sequence],
        instruction: str,
        proprio: Sequence[Sequence[float]] | None = None,
    ) -> np.ndarray:
        """(B, A) or (B, chunk, A) for B robots that were told the same.

        batch: the pictures of each robot. proprio: the state of each.
        """
        if not isinstance(batch, Sequence) or not len(batch):
            raise InputError("the batch is empty; expected the pictures of one robot")
        robots = [_check_images(self.model, images) for images in batch]
        state = _normalize_states(
            self.model, self.processor, proprio, self.unnorm_key, len(batch)
        )
        pixels = mx.array(self.processor.pixels([i for some in robots for i in some]))
        check_text(instruction, "the instruction")
        start, prompt = self._prompt(instruction)
        args = (pixels, mx.array([start]), mx.array(prompt))
        args += () if state is None else (state,)
        if self.pruner.has_own_count:
            result = self._act_with_own_count(args)
        else:
            result, indices = self._whole(*args)
            self.kept = indices.shape[1]
        normalized = self._normalized(result)
        return self.bounds.to_units(normalized)

    def _normalized(self, result: mx.array) -> np.ndarray:
        if self.model.args.oft:
            return _check_finite(np.array(result.astype(mx.float32)))
        return self.processor.values(np.array(result))

    def _observation(self, pixels, start, prompt, *state) -> Observation:
        return Observation(pixels, start, prompt, self._pictures, *state)

    def _finish(self, observation: Observation, patches: Patches) -> mx.array:
        sequence = control.assemble(self.model, observation, patches, self.positions)
        if self.model.args.oft:
            return control.regress(self.model, sequence)
        steps = len(self.bounds.low)
        return mx.stack(control.decode(self.model, sequence, steps), axis=1)

    def _act_on_pixels(self, *args) -> tuple[mx.array, mx.array]:
        observation = self._observation(*args)
        features = control.encode(self.model, observation, self.pruner.needs)
        patches = control.see(self.model, observation, self.pruner, features)
        return self._finish(observation, patches), patches.indices

    def _encode(self, *args) -> mx.array:
        return control.encode(self.model, self._observation(*args)).tokens

    def _act_on_patches(self, embeddings, indices, mask, *args) -> mx.array:
        side = self.model.args.towers[0].side
        total = side * side * self._pictures
        selection = Selection(indices, mask=mask)
        patches = Patches(embeddings, indices, mask, total, (side, side), selection)
        return self._finish(self._observation(*args), patches)

    def _act_with_own_count(self, args: tuple) -> mx.array:
        """The count is only known once the pruner has run: compile around it."""
        observation = self._observation(*args)
        side = self.model.args.towers[0].side
        features = Features(self._features(*args), (side, side))
        patches = control.see(self.model, observation, self.pruner, features)
        self.kept = patches.indices.shape[1]
        if patches.mask is not None:
            self.kept = mx.mean(mx.sum(patches.mask, axis=1)).item()
        return self._rest(*_padded(patches), *args)


def _padded(patches: Patches) -> tuple[mx.array, mx.array, mx.array]:
    """Embeddings, indices and mask of the next multiple of `_BUCKET` tokens."""
    batch, kept = patches.indices.shape
    more = min(-kept % _BUCKET, patches.total - kept)
    mask = patches.mask
    mask = mx.ones((batch, kept), mx.bool_) if mask is None else mask
    return (
        mx.pad(patches.embeddings, ((0, 0), (0, more), (0, 0))),
        mx.pad(patches.indices, ((0, 0), (0, more))),
        mx.pad(mask, ((0, 0), (0, more))),
    )


# Checks -----------------------------------------------------------------------------


def _check_model(model, processor) -> None:
    if not isinstance(model, OpenVLA) or not isinstance(processor, ActionProcessor):
        raise InputError(
            "this model answers in words, not in actions; use mlx_tokprune.generate, "
            "or give an OpenVLA checkpoint"
        )


def _check_pruner(pruner: Pruner | None) -> Pruner:
    if pruner is not None and not isinstance(pruner, Pruner):
        raise InputError(f"a pruner is a `Pruner`, not {type(pruner).__name__}")
    return pruner or Pruner("none")


def _action_bounds(model: OpenVLA, processor, unnorm_key: str | None) -> Bounds:
    bounds = processor.bounds("action", unnorm_key)
    oft = model.args.oft
    if oft and len(bounds.low) != oft.action_dim:
        raise InputError(
            f"norm_stats scale {len(bounds.low)} numbers of action, but the policy's "
            f"actions have {oft.action_dim}"
        )
    return bounds


def _check_finite(normalized: np.ndarray) -> np.ndarray:
    """A robot must never get what is not a number."""
    if not np.isfinite(normalized).all():
        raise InputError(
            "the policy's action is not finite; its weights or its inputs are damaged"
        )
    return normalized


def _check_images(model: OpenVLA, images) -> list[Image.Image]:
    """The decoded pictures of one robot."""
    if isinstance(images, (str, os.PathLike, np.ndarray, Image.Image)):
        images = [images]
    if not isinstance(images, Sequence):
        raise InputError(f"pictures come as a list, not {type(images).__name__}")
    wanted = model.args.pictures
    if len(images) != wanted:
        raise InputError(
            f"this policy looks at {wanted} picture{'s' * (wanted > 1)}; "
            f"{len(images)} given"
        )
    return [load_image(image) for image in images]


def _check_positions(positions: str) -> None:
    if positions not in POSITIONS:
        raise InputError(f"positions are {' or '.join(POSITIONS)}, not {positions!r}")


def _normalize_states(model, processor, proprio, unnorm_key, robots: int):
    """(robots, p) normalised states; `None` for policies that read none."""
    wanted = model.args.oft.proprio_dim if model.args.oft else 0
    if not wanted and proprio is None:
        return None
    if not wanted:
        raise InputError("this policy reads no robot state; leave out proprio")
    if proprio is None:
        raise InputError(
            f"this policy reads the robot's state; give proprio, {wanted} numbers"
        )
    if not isinstance(proprio, Sequence | np.ndarray) or len(proprio) != robots:
        raise InputError(f"{robots} robots need as many states")
    try:
        state = np.asarray(proprio, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise InputError("proprio is no list of numbers") from None
    if state.ndim != 2 or state.shape[1] != wanted:
        raise InputError(
            f"proprio is {wanted} numbers for this policy; got "
            f"{state.shape[-1] if state.ndim == 2 else state.shape}"
        )
    if not np.isfinite(state).all():
        raise InputError("proprio has a number that is not finite")
    bounds = processor.bounds("proprio", unnorm_key)
    if len(bounds.low) != wanted:
        raise InputError(
            f"norm_stats scale {len(bounds.low)} numbers of proprio, but the policy "
            f"reads {wanted}"
        )
    return mx.array(bounds.from_units(state).astype(np.float32))


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
    state = _normalize_states(model, processor, states, args.unnorm_key, 1)
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
