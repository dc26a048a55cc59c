"""Families of mlx-vlm: their placeholder ids, grids and towers.

A family is listed once its greedy answers equal those of the full prompt with the
dropped columns masked (`tests/test_mlx_vlm.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from . import attending
from .attention import Tower

_MEDIA = (
    *("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
    *("image_patch_id", "im_patch_token", "img_context_token_id"),
)
Grids = list[tuple[int, int]]


@dataclass(frozen=True)
class Family:
    """Layout of pictures in a family of mlx-vlm.

    grids: from the processor's inputs and the model's config, the grid (h, w) of each
    picture or frame, if tokens form grids. each: embeddings of a placeholder. signs:
    whether negative ids are the placeholders. cold: reason why a chat reads its whole
    prompt again, if it does. why: reason why the family is refused, if it is. turns:
    whether positions have three dimensions (M-RoPE), and stay original. slices:
    whether mlx-vlm leaves it to us to slice those by chunks. reads_ids: whether layers
    read ids, which then cannot tell pictures apart. pixels: whether
    each token has its own group of patches, as `look` and `towers` require. tower:
    attention of the tower.
    """

    grids: Callable[[Mapping, Any], Grids] | None = None
    each: Callable[[Mapping], int] | None = None
    signs: bool = False
    cold: str | None = None
    why: str | None = None
    turns: bool = False
    slices: bool = False
    reads_ids: bool = False
    pixels: bool = False
    tower: Tower | None = None


def _by_grid(inputs: Mapping, config: Any) -> Grids:
    """Return the grids of Qwen's pictures, or of the frames of videos."""
    kinds = [n for n in ("image_grid_thw", "video_grid_thw") if len(inputs.get(n, []))]
    if len(kinds) > 1:
        raise InputError(
            "a prompt with pictures and videos is pruned by methods that need no grid, "
            "such as 'norm'"
        )
    side, grids = config.vision_config.spatial_merge_size, []
    for name in ("image_grid_thw", "video_grid_thw"):
        for t, h, w in np.array(inputs.get(name, [])).reshape(-1, 3).tolist():
            grids += [(int(h) // side, int(w) // side)] * int(t)
    return grids


def _square(count: Callable[[Any], int]) -> Callable[[Mapping, Any], Grids]:
    """Return `grids` for one square of `count(config)` tokens per picture."""

    def grids(inputs: Mapping, config: Any) -> Grids:
        side = round(count(config) ** 0.5)
        return [(side, side)] * len(inputs["pixel_values"])

    return grids


def _patches(config: Any) -> int:
    """Return the patches of a picture."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def _cells(inputs: Mapping) -> int:
    """Return FastVLM's tokens of a picture, one for each 64 x 64 pixels."""
    return (np.shape(inputs["pixel_values"])[-1] // 64) ** 2


_QWEN = Family(_by_grid, turns=True, pixels=True, tower=attending.QWEN)
_GLM = Family(_by_grid, turns=True, slices=True, tower=attending.QWEN)
_GLM_OCR = dataclasses.replace(_GLM, tower=None)
# Appears in mlx-vlm's log, before ", so the whole chat is read again".
_LAYERED = "mlx-vlm takes inputs of its layers from wrong rows behind a cache"
_UNKNOWN = "mlx-vlm does not recognize its placeholders"
_REFUSED = {  # names of families, by the reason
    "its pictures reach the layers by cross attention": "mllama",
    "its pictures reach a decoder by cross attention": "florence2 nemotron_parse",
    "its language model in mlx-vlm ignores embeddings: it never sees pictures": (
        "mistral_large3"
    ),
    "it scores options at places in a prompt, which pruning moves": "clef d1 d1_omni",
    "it returns embeddings, not answers": ("colidefics3 colqwen2_5 qwen3_vl_embedding"),
    "it answers by diffusion, which is not tested with pruning": "diffusion_gemma",
    "its layers use places in the picture and a mask of the whole prompt": (
        "falcon_ocr falcon_perception"
    ),
    "its layers choose experts by token ids, which pruning changes": (
        "deepseek_v4 deepseek_v41"
    ),
    "its config does not name the placeholder of visual tokens": (
        "minicpmo minicpmv4_6 molmo"
    ),
    "one id stands for all visual tokens, whose number only the tower tells": (
        "phi4_siglip phi4mm"
    ),
    "mlx-vlm puts its picture before the prompt, which has no ids for it": (
        "moondream2 moondream3"
    ),
    "pruning has not been tested with it": (
        "aya_vision cohere_compass deepseek_vl_v2 deepseekocr deepseekocr_2 "
        "ernie4_5_moe_vl glm5_next got granite4_vision granite_vision hunyuan_vl "
        "inkling jina_vlm kimi_k3 llama4 llava_bunny llmjpvl locateanything "
        "mage_vl mimo_v2 minicpmv4_7 minimax_m3_vl molmo_point multi_modality "
        "nemotron_h_nano_omni plamo2vl qwen3_omni_moe step3p7 unlimited_ocr "
        "youtu_vl zaya1_vl"
    ),
}
FAMILIES: Mapping[str, Family] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5": _QWEN,
    "qwen4_exp": dataclasses.replace(
        _QWEN,
        reads_ids=True,
        cold="its layers read ids, which are those of any picture",
    ),
    "llava": Family(_square(_patches), tower=attending.LLAVA),
    "llava_onevision": Family(tower=attending.ONEVISION),
    "idefics3": Family(tower=attending.IDEFICS),
    "smolvlm": Family(tower=attending.IDEFICS),
    "internvl_chat": Family(tower=attending.INTERN),
    "gemma3": Family(
        _square(lambda config: config.text_config.mm_tokens_per_image),
        tower=attending.GEMMA3,
    ),
    "gemma3n": Family(cold=_LAYERED),
    "gemma4": Family(cold=_LAYERED, tower=attending.GEMMA4),
    "paligemma": Family(
        _square(_patches),
        cold="its prompts attend in both directions",
        tower=attending.PALIGEMMA,
    ),
    "pixtral": Family(tower=attending.PIXTRAL),
    "mistral3": Family(tower=attending.MISTRAL3),
    **dict.fromkeys(("glm4v", "glm4v_moe"), _GLM),
    **dict.fromkeys(("glm_ocr", "paddleocr_vl"), _GLM_OCR),
    **dict.fromkeys(("dots_ocr", "muse_glimmer"), Family(_by_grid)),
    **dict.fromkeys(
        ("internvl", "lfm2_vl", "kimi_vl", "kimi_k25", "muse_spark", "idefics2"),
        Family(),
    ),
    "gemma4_unified": Family(cold=_LAYERED),
    "molmo2": Family(cold=_UNKNOWN),
    "phi3_v": Family(signs=True, cold=_UNKNOWN),
    "fastvlm": Family(each=_cells, tower=attending.FASTVLM),
    "llava_next": Family(
        why="mlx-vlm gives it a newline for each visual token and more rows than ids, "
        "so it is not defined which row is which"
    ),
    **{
        name: Family(why=why)
        for why, names in _REFUSED.items()
        for name in names.split()
    },
}


def media_of(config: Any, family: Family) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from ids to bool: placeholders of visual tokens."""
    if family.signs:
        return lambda ids: ids < 0
    named = (getattr(config, name, None) for name in _MEDIA)
    placeholders = [number for number in named if number is not None]
    return lambda ids: np.isin(ids, placeholders)
