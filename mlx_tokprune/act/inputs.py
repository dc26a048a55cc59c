"""What is given to a policy, checked: pictures, states, data sets, pruners."""

import os
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import InputError, nearest
from ..models.protocol import VisionModel
from ..pipeline import Scene
from ..processing.chunks import ChunkProcessor
from ..processing.image import load_image
from ..processing.processor import ActionProcessor
from ..processing.prompt import Prompt
from ..pruners import Plan


def check_acts(model: VisionModel, processor) -> None:
    """Raise `InputError` for a model that answers in words."""
    acts = isinstance(processor, ActionProcessor | ChunkProcessor)
    if model.answers == "text" or not acts:
        raise InputError(
            "this model answers in words, not in actions; use mlx_tokprune.generate, "
            "or give an OpenVLA checkpoint"
        )


def check_first(model: VisionModel, first: int | None) -> None:
    """Raise `InputError` unless a chunk has so many first actions; `None` is all."""
    if first is None:
        return
    if model.answers == "bins":
        raise InputError("this policy answers one action at a time; leave out first")
    chunk = model.args.horizon if model.answers == "chunks" else model.args.oft.chunk
    if isinstance(first, bool) or not isinstance(first, int) or not 0 < first <= chunk:
        raise InputError(
            f"cannot do the first {first!r} actions of a chunk; expected 1 to {chunk}"
        )


def observe(
    processor: ActionProcessor | ChunkProcessor,
    robots: Sequence[Sequence[Image.Image]],
    prompt: Prompt,
    state: mx.array | None = None,
    acted: mx.array | None = None,
) -> Scene:
    """What robots see, and what all of them are told. acted: that of `Scene`."""
    pixels = mx.array(processor.pixels([i for images in robots for i in images]))
    return Scene(pixels, prompt, len(robots), state, acted=acted)


def check_scorers(plan: Plan, size: int) -> None:
    """Raise `InputError` unless scorers read actions of `size` numbers, if any."""
    for pruner in plan:
        reads = getattr(pruner.scorer, "settings", {}).get("actions", size)
        if reads != size:
            raise InputError(
                f"the scorer {pruner.folder} reads actions of {reads} numbers, and "
                f"those of this policy have {size}; train one for it"
            )


def check_action(normalized: np.ndarray) -> np.ndarray:
    """A robot must never get what is not a number."""
    if not np.isfinite(normalized).all():
        raise InputError(
            "the policy's action is not finite; its weights or its inputs are damaged"
        )
    return normalized


def tell(
    model: VisionModel,
    processor,
    instruction: str,
    proprio,
    unnorm_key,
    robots: int = 1,
    prompt: Callable[[str], Prompt] | None = None,
) -> tuple[Prompt, mx.array | None]:
    """What robots are told, and their states beside it, unless one is told that, too.

    prompt: in the place of the processor's, such as one that remembers.
    """
    state = normalize_states(model, processor, proprio, unnorm_key, robots)
    if model.answers != "chunks":
        return (prompt or processor.prompt)(instruction), state
    return processor.prompt(instruction, np.zeros(0) if state is None else state), None


def name_images(model: VisionModel, images: Mapping) -> list:
    """Pictures by the names of cameras -> in the model's order; others are absent.

    A name may be a part that only one camera has, such as `wrist`.
    """
    if not model.cameras:
        raise InputError(
            "this policy's pictures have no names; give them as a list, in order"
        )
    found = {}
    for name, image in images.items():
        camera = _camera(model.cameras, name)
        if camera in found:
            raise InputError(f"the camera {camera} has two pictures; expected one")
        found[camera] = image
    return [found[camera] for camera in model.cameras if camera in found]


def _camera(cameras: tuple[str, ...], name) -> str:
    fitting = [c for c in cameras if c == name]
    fitting = fitting or [c for c in cameras if str(name) and str(name) in c]
    if len(fitting) != 1:
        problem = "fits several of" if fitting else "is none of"
        raise InputError(
            f"camera {name!r} {problem} {', '.join(cameras)}."
            + nearest(str(name), cameras)
        )
    return fitting[0]


def check_images(model: VisionModel, images) -> list[Image.Image]:
    """The decoded pictures of one robot; by name where its cameras have names."""
    if isinstance(images, Mapping):
        images = name_images(model, images)
    if isinstance(images, (str, os.PathLike, np.ndarray, Image.Image)):
        images = [images]
    if not isinstance(images, Sequence):
        raise InputError(f"pictures come as a list, not {type(images).__name__}")
    if model.cameras and not 0 < len(images) <= len(model.cameras):
        raise InputError(
            f"this policy looks at 1 to {len(model.cameras)} pictures, of "
            f"{', '.join(model.cameras)}; {len(images)} given"
        )
    if model.cameras:
        return [load_image(image) for image in images]
    wanted = model.pictures or 1
    if len(images) != wanted:
        raise InputError(
            f"this policy looks at {wanted} picture{'s' * (wanted > 1)}; "
            f"{len(images)} given"
        )
    return [load_image(image) for image in images]


def normalize_states(model, processor, proprio, unnorm_key, robots: int):
    """(robots, p) normalised states; `None` for policies that read none.

    Where the state is a part of what a robot is told, one as a NumPy array (p,), which
    is not clipped.
    """
    wanted = model.args.state_size
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
    if model.answers == "chunks" and not len(bounds.low):
        return state[0]  # as it is
    if len(bounds.low) != wanted:
        raise InputError(
            f"norm_stats scale {len(bounds.low)} numbers of proprio, but the policy "
            f"reads {wanted}"
        )
    if model.answers == "chunks":
        return bounds.from_units_unclipped(state[0])
    return mx.array(bounds.from_units(state).astype(np.float32))
