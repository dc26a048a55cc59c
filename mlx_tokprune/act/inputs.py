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
from .heads import Head


def check_acts(processor) -> None:
    """Raise `InputError` for the processor of a model that answers in words."""
    if not isinstance(processor, ActionProcessor | ChunkProcessor):
        raise InputError(
            "this model answers in words, not in actions; use mlx_tokprune.generate, "
            "or give an OpenVLA checkpoint"
        )


def observe(
    processor: ActionProcessor | ChunkProcessor,
    robots: Sequence[Sequence[Image.Image]],
    prompt: Prompt,
    state: mx.array | None = None,
    extras: Mapping[str, mx.array] | None = None,
) -> Scene:
    """Return the scene of robots that are told the same. extras: those of `Scene`."""
    pixels = mx.array(processor.pixels([i for images in robots for i in images]))
    return Scene(pixels, prompt, len(robots), state, extras or {})


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
    head: Head,
    model: VisionModel,
    instruction: str,
    proprio: Sequence | None,
    unnorm_key: str | None,
    robots: int = 1,
    prompt: Callable[[str], Prompt] | None = None,
) -> tuple[Prompt, mx.array | None]:
    """Return the prompt of robots, and the states that the model reads beside it.

    proprio: the state of each robot in its own units. prompt: in the place of the
    processor's, such as one that remembers.
    """
    values = check_states(model, proprio, robots)
    state = None
    if values is not None:
        state = head.state(values, head.processor.bounds("proprio", unnorm_key))
    return head.tell(instruction, state, prompt)


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


def check_states(
    model: VisionModel, proprio: Sequence | None, robots: int
) -> np.ndarray | None:
    """Return (robots, p) states in their own units; `None` for policies without.

    Raises `InputError` for states that are not what the policy reads.
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
    return state
