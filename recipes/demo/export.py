"""Export of a trained student as a checkpoint in Apple's PyTorch layout."""

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_tokprune.checkpoints.shards import write_config
from mlx_tokprune.files import new_folder

from .student import DEMO_CONFIG, Student

# MLX names -> Apple's names: the inverse of the converter's table.
_KEYS = (
    (r"^vision_tower\.vision_model\.patch_embed\.blocks\.", "patch_embed."),
    (r"^vision_tower\.vision_model\.", ""),
)
_TOWER = "model.vision_tower.vision_tower.model."


def torch_name(name: str) -> str:
    """Return Apple's PyTorch name of an MLX-layout tensor."""
    for pattern, replacement in _KEYS:
        if re.match(pattern, name):
            return _TOWER + re.sub(pattern, replacement, name)
    if name.startswith("mm_projector."):
        return f"model.{name}"
    return name.removeprefix("language_model.")


def to_torch_layout(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return MLX-layout weights under Apple's names, channels-first in float16."""
    tensors = {}
    for name, array in weights.items():
        if name.startswith("vision_tower.") and array.ndim == 4:
            array = array.transpose(0, 3, 1, 2)
        elif ".layer_scale" in name:
            array = array.transpose(2, 0, 1)
        tensors[torch_name(name)] = mx.contiguous(array.astype(mx.float16))
    return tensors


def export(student: Student, tokenizer, folder: Path, config=DEMO_CONFIG) -> None:
    """Write the student's FastVLM and its tokenizer to the new `folder`."""
    end = tokenizer.token_to_id("<|im_end|>")
    weights = dict(tree_flatten(student.vlm.parameters()))
    finite = all(np.isfinite(np.array(a)).all() for a in weights.values())
    if not finite:
        raise ValueError("the student has weights that are not finite")
    with new_folder(folder) as partial:
        tensors = to_torch_layout(weights)
        mx.save_safetensors(
            str(partial / "model.safetensors"), tensors, metadata={"format": "pt"}
        )
        write_config(partial, config | {"eos_token_id": end})
        tokenizer.save(str(partial / "tokenizer.json"))
        names = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 2048,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        }
        (partial / "tokenizer_config.json").write_text(
            json.dumps(names, indent=2) + "\n"
        )
