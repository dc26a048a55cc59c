"""`predict_action`: predict one observation's action and measure its times.

Control loops use `policy.Policy`.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..models.protocol import VisionModel
from ..pipeline import DEFAULT_POSITIONS, VisualTokens, check_positions
from ..pipeline.planning import plan_for
from ..pipeline.timing import NO_CLOCK, Clock
from ..processing.processor import AnyProcessor, check_acts
from ..pruners import Pruners
from ..runtime import end_streams_with_thread
from .episode import first_inputs
from .heads import head_of
from .inputs import check_action, check_images, check_scorers, observe, tell

log = logging.getLogger("mlx_tokprune")


@dataclass(frozen=True)
class Action:
    """A policy's answer to one observation.

    values: (A,) in robot units, or (chunk, A) from OpenVLA-OFT and pi0-FAST.
    normalized: the values in [-1, 1]. token_ids: the A tokens, or the tokens of
    pi0-FAST's answer; `None` for OFT, which has none. visual: the kept visual tokens.
    ttft_ms: time from decoded images to the first action token on the host (OFT: to the
    whole chunk). total_ms: time to the last token. stages_ms: time of each fenced
    stage, with `stages`. wrong: fault of a pi0-FAST answer, whose values are then
    padded or cut; else `None`.
    """

    values: np.ndarray
    normalized: np.ndarray
    token_ids: tuple[int, ...] | None
    visual: VisualTokens = field(repr=False)
    ttft_ms: float
    total_ms: float
    stages_ms: dict[str, float] | None = None
    wrong: str | None = None


def predict_action(
    model: VisionModel,
    processor: AnyProcessor,
    images: Sequence | Mapping,
    instruction: str,
    *,
    unnorm_key: str | None = None,
    proprio: Sequence[float] | np.ndarray | None = None,
    pruner: Pruners = None,
    positions: str = DEFAULT_POSITIONS,
    stages: bool = False,
) -> Action:
    """Predict the action for one observation.

    images: files, arrays or PIL images, in the policy's order, or by the names of its
    cameras, of which any may be absent (pi0-FAST). unnorm_key: data set whose action
    units are used; optional for a policy of one data set. proprio: robot state in its
    own units, for policies that read it. pruner: one pruner, or several at different
    places; `None` uses the checkpoint's own pruners, mostly none. stages: fence the run
    and time its stages. Raises `InputError` for arguments that do not fit the policy.
    """
    processor = check_acts(processor)
    plan = plan_for(model, pruner)
    check_positions(positions)
    images = check_images(model, images)
    bounds = processor.bounds("action", unnorm_key)
    head = head_of(model, processor, len(bounds.low))
    head.check(bounds)
    size = len(bounds.low)
    check_scorers(plan, size)
    states = None if proprio is None else [proprio]
    clock = Clock() if stages else NO_CLOCK
    end_streams_with_thread()
    start = time.perf_counter()
    with clock.stage("preprocess") as done:
        prompt, state = tell(head, model, instruction, states, unnorm_key)
        scene = observe(processor, [images], prompt, state, first_inputs(1, size))
        done.append(scene.pixels)
    parts, visual = head.decode(model, scene, plan, positions=positions, clock=clock)
    with clock.stage("prefill"):
        mx.eval(parts[0])
    first = time.perf_counter()
    with clock.stage("decode"):
        answer = np.array(head.joined(parts))[0]
    last = time.perf_counter()
    mx.eval(visual.indices)  # MLX evaluates lazy arrays only on their own thread
    log.debug("action after %.1f ms", (last - start) * 1e3)
    normalized = check_action(head.normalized(answer))
    wrong = head.wrong(answer)
    if wrong:
        log.warning("the policy gave %s", wrong)
    return Action(
        bounds.to_units(normalized),
        normalized,
        head.ids(answer),
        visual,
        (first - start) * 1e3,
        (last - start) * 1e3,
        clock.times,
        wrong,
    )
