"""FastVLM checkpoints: their key table, and what their tensors say of the config.

Reads Apple's PyTorch layout and the MLX community's; writes the latter, which mlx-vlm
loads too.
"""

import re
from collections.abc import Iterable

from ..files import object_of
from .checkpoint import Checkpoint
from .family import Family, Shape

_TOWER = "vision_tower.vision_model"

# Apple's PyTorch names -> MLX names.
_KEYS: tuple[tuple[str, str | None], ...] = (
    (r".*\.num_batches_tracked$", None),
    (r".*\.rotary_emb\.inv_freq$", None),
    (
        r"^model\.vision_tower\.vision_tower\.model\.patch_embed\.",
        f"{_TOWER}.patch_embed.blocks.",
    ),
    (r"^model\.vision_tower\.vision_tower\.model\.", f"{_TOWER}."),
    (r"^model\.mm_projector\.", "mm_projector."),
    (r"^(model\.|lm_head\.)", r"language_model.\1"),
)
# Carried along when present, used by no visual token.
_OPTIONAL = re.compile(rf"^{re.escape(_TOWER)}\.head\.")


def is_fastvlm(names: Iterable[str]) -> bool:
    """Whether there is a FastViTHD in one of the layouts that can be read."""
    towers = ("model.vision_tower.vision_tower.", f"{_TOWER}.")
    return any(name.startswith(towers) for name in names)


def describe_unreadable(checkpoint: Checkpoint) -> str | None:
    """What a FastVLM in a layout that cannot be read is; `None` for anything else."""
    names = checkpoint.tensors
    if list(checkpoint.folder.glob("*.mlpackage")) or any(
        n.startswith("multi_modal_projector.") for n in names
    ):
        return "Apple's MLX export, whose vision tower is a Core ML package"
    if checkpoint.config.get("model_type") == "fast_vlm" or any(
        ".timm_model." in n for n in names
    ):
        return "a transformers fast_vlm checkpoint, whose tower has timm's names"
    return None


def _axes(name: str, ndim: int) -> tuple[int, ...] | None:
    if name.startswith(_TOWER) and ndim == 4:
        return (0, 2, 3, 1)  # channels-last convolutions
    if ".layer_scale" in name and ndim == 3:
        return (1, 2, 0)
    return None


def _complete(checkpoint: Checkpoint, shapes: dict[str, Shape]) -> dict:
    config = dict(checkpoint.config)
    tied = "language_model.lm_head.weight" not in shapes
    config["tie_word_embeddings"] = tied
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = config["text_config"] | {"tie_word_embeddings": tied}
    head = shapes.get(f"{_TOWER}.head.proj")
    if head is not None and head[-1] != 768:
        # mlx-vlm builds this unused head 768 wide unless the config says otherwise.
        vision = object_of(config, "vision_config")
        config["vision_config"] = vision | {"projection_dim": head[-1]}
    return config


FASTVLM = Family(
    name="FastVLM",
    reads=(
        "FastVLM as Apple's PyTorch checkpoints (apple/FastVLM-0.5B, -1.5B, -7B) or as "
        "MLX checkpoints (such as mlx-community/FastVLM-0.5B-bf16)"
    ),
    is_mlx=lambda shapes: (
        not any(n.startswith("model.vision_tower.vision_tower.") for n in shapes)
    ),
    keys=_KEYS,
    axes=_axes,
    complete=_complete,
    optional=_OPTIONAL,
)
