"""All families, and prompts and images for them."""

import numpy as np
from PIL import Image

from . import gemma, glm, kin, llava, mistral, muse, phi, qwen, tiled
from .family import Family

MODULES = (qwen, llava, tiled, gemma, mistral, phi, kin, glm, muse)
FAMILIES = {family.name: family for part in MODULES for family in part.FAMILIES}
NOT_HERE = {
    "mllama": "pictures reach the layers by cross attention, not as tokens",
    "florence2": "an encoder and a decoder with cross attention",
}


def prompt(processor, model_config, text: str, pictures: int = 1) -> str:
    """Return the prompt that mlx-vlm's own command makes of `text`."""
    from mlx_vlm.prompt_utils import apply_chat_template

    return apply_chat_template(processor, model_config, text, num_images=pictures)


def picture(family: Family, seed: int = 0) -> Image.Image:
    """Return random squares of colour at the family's size."""
    colours = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(colours).resize(family.size, Image.Resampling.NEAREST)
