"""What is given to a policy, checked: pictures, states, data sets, pruners."""

import os
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import InputError
from ..image import load_image
from ..models.family import VisionModel
from ..pipeline import Scene
from ..processor import ActionProcessor
from ..prompt import Prompt


def check_acts(model: VisionModel, processor) -> None:
    """Raise `InputError` for a model that answers in words."""
    if model.answers == "text" or not isinstance(processor, ActionProcessor):
        raise InputError(
            "this model answers in words, not in actions; use mlx_tokprune.generate, "
            "or give an OpenVLA checkpoint"
        )


def observe(
    processor: ActionProcessor,
    robots: Sequence[Sequence[Image.Image]],
    prompt: Prompt,
    state: mx.array | None = None,
) -> Scene:
    """What robots see, and what all of them are told."""
    pixels = mx.array(processor.pixels([i for images in robots for i in images]))
    return Scene(pixels, prompt, len(robots), state)


def check_action(normalized: np.ndarray) -> np.ndarray:
    """A robot must never get what is not a number."""
    if not np.isfinite(normalized).all():
        raise InputError(
            "the policy's action is not finite; its weights or its inputs are damaged"
        )
    return normalized


def check_images(model: VisionModel, images) -> list[Image.Image]:
    """The decoded pictures of one robot."""
    if isinstance(images, (str, os.PathLike, np.ndarray, Image.Image)):
        images = [images]
    if not isinstance(images, Sequence):
        raise InputError(f"pictures come as a list, not {type(images).__name__}")
    wanted = model.pictures or 1
    if len(images) != wanted:
        raise InputError(
            f"this policy looks at {wanted} picture{'s' * (wanted > 1)}; "
            f"{len(images)} given"
        )
    return [load_image(image) for image in images]


def normalize_states(model, processor, proprio, unnorm_key, robots: int):
    """(robots, p) normalised states; `None` for policies that read none."""
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
    if len(bounds.low) != wanted:
        raise InputError(
            f"norm_stats scale {len(bounds.low)} numbers of proprio, but the policy "
            f"reads {wanted}"
        )
    return mx.array(bounds.from_units(state).astype(np.float32))
