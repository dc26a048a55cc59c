"""Checks and preparation of a policy's inputs: images, states, pruners."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import InputError, nearest
from ..models.protocol import VisionModel
from ..pipeline import Scene
from ..processing.image import load_image
from ..processing.processor import PolicyProcessor
from ..processing.prompt import Prompt
from ..pruners import Plan
from .heads import Head


def observe(
    processor: PolicyProcessor,
    robots: Sequence[Sequence[Image.Image]],
    prompt: Prompt,
    state: mx.array | None = None,
    extras: Mapping[str, mx.array] | None = None,
) -> Scene:
    """Return the scene of robots with one shared prompt.

    robots: the images of each robot. state: (B, p) normalised states. extras: run-time
    inputs of pruners (`Scene.extras`).
    """
    pixels = mx.array(processor.pixels([i for images in robots for i in images]))
    return Scene(pixels, prompt, len(robots), state, extras or {})


def check_scorers(plan: Plan, size: int) -> None:
    """Raise `InputError` for a scorer that reads actions of another size."""
    for pruner in plan:
        reads = getattr(pruner.scorer, "settings", {}).get("actions", size)
        if reads != size:
            raise InputError(
                f"the scorer {pruner.folder} reads actions of {reads} numbers, and "
                f"those of this policy have {size}; train one for it"
            )


def check_action(normalized: np.ndarray) -> np.ndarray:
    """Return the actions; raise `InputError` if any number is not finite.

    A robot must never receive NaN or infinity.
    """
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

    proprio: the state of each robot in its own units. prompt: replaces the processor's
    function, such as by a cached one. Raises `InputError` for states that do not fit
    the policy.
    """
    values = check_states(model, proprio, robots)
    state = None
    if values is not None:
        state = head.state(values, head.processor.bounds("proprio", unnorm_key))
    return head.tell(instruction, state, prompt)


def name_images(model: VisionModel, images: Mapping) -> list:
    """Return images by camera name as a list in the model's order.

    Cameras without an image are left out. A name may be a part that only one camera
    has, such as `wrist`. Raises `InputError` for unknown or ambiguous names.
    """
    if not model.cameras:
        raise InputError(
            "this policy's pictures have no names; give them as a list, in order"
        )
    by_camera = {}
    for name, image in images.items():
        camera = _camera(model.cameras, name)
        if camera in by_camera:
            raise InputError(f"the camera {camera} has two pictures; expected one")
        by_camera[camera] = image
    return [by_camera[camera] for camera in model.cameras if camera in by_camera]


def _camera(cameras: tuple[str, ...], name: Any) -> str:
    matches = [c for c in cameras if c == name]
    matches = matches or [c for c in cameras if str(name) and str(name) in c]
    if len(matches) != 1:
        problem = "fits several of" if matches else "is none of"
        raise InputError(
            f"camera {name!r} {problem} {', '.join(cameras)}."
            + nearest(str(name), cameras)
        )
    return matches[0]


def check_images(model: VisionModel, images: Any) -> list[Image.Image]:
    """Return the decoded images of one robot.

    images: a list in the policy's order, one image, or a mapping by camera name. Raises
    `InputError` unless they fit the policy.
    """
    if isinstance(images, Mapping):
        images = name_images(model, images)
    if isinstance(images, (str, os.PathLike, np.ndarray, Image.Image)):
        images = [images]
    if not isinstance(images, Sequence):
        raise InputError(f"pictures come as a list, not {type(images).__name__}")
    if model.cameras and not 0 < len(images) <= len(model.cameras):
        raise InputError(
            f"this policy takes 1 to {len(model.cameras)} pictures, of "
            f"{', '.join(model.cameras)}; {len(images)} given"
        )
    if model.cameras:
        return [load_image(image) for image in images]
    count = model.pictures or 1
    if len(images) != count:
        raise InputError(
            f"this policy takes {count} picture{'s' * (count > 1)}; {len(images)} given"
        )
    return [load_image(image) for image in images]


def check_states(
    model: VisionModel, proprio: Sequence | None, robots: int
) -> np.ndarray | None:
    """Return (robots, p) states in their own units; `None` for policies without states.

    Raises `InputError` for states that do not fit the policy.
    """
    size = model.args.state_size
    if not size and proprio is None:
        return None
    if not size:
        raise InputError("this policy reads no robot state; leave out proprio")
    if proprio is None:
        raise InputError(
            f"this policy reads the robot's state; give proprio, {size} numbers"
        )
    if not isinstance(proprio, Sequence | np.ndarray) or len(proprio) != robots:
        raise InputError(f"proprio has no state for each of {robots} robots")
    try:
        state = np.asarray(proprio, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise InputError(f"proprio is no list of {size} numbers") from None
    if state.ndim != 2 or state.shape[1] != size:
        raise InputError(
            f"proprio is {size} numbers for this policy; got "
            f"{state.shape[-1] if state.ndim == 2 else state.shape}"
        )
    if not np.isfinite(state).all():
        raise InputError("proprio has a number that is not finite; expected real ones")
    return state
