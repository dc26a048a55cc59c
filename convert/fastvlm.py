"""FastVLM checkpoints: key table, and config fields that follow from the tensors.

Reads Apple's PyTorch layout, transformers' `fast_vlm` and the MLX community's layout;
writes the MLX community's layout, which mlx-vlm loads, too.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.family import Family, Shape, register_family
from ..checkpoints.shards import Checkpoint
from ..errors import InputError
from ..files import object_of, read_json
from ..models.checks import expect, is_size
from ..models.fastvithd import TOTAL_STRIDE, VisionConfig
from ..models.fastvlm import FastVLM, ModelArgs
from ..models.text_config import DEFAULT_THETA
from .coremltower import add_tower, is_app

_TOWER = "vision_tower.vision_model"

_APPLE = "model.vision_tower.vision_tower."
_TIMM = "model.vision_tower.timm_model."


def _timm_keys() -> tuple[tuple[str, str], ...]:
    """Map timm's stages to MLX indices in one list, `network`.

    Stage 0 has blocks only; each later stage begins with a downsampling layer, and the
    last two have a position convolution before their blocks.
    """
    old, keys, place = re.escape(_TIMM), [], 0
    for stage in range(5):
        start = rf"^{old}stages\.{stage}\."
        if stage > 0:
            new = f"{_TOWER}.network.{place}.proj."
            kernel = r"downsample\.proj\.0\.reparam_conv\."
            keys += [(start + kernel, f"{new}0.lkb_reparam.")]
            keys += [(start + r"downsample\.proj\.", new)]
            place += 1
        if stage > 2:
            keys += [(start + r"pos_emb\.", f"{_TOWER}.network.{place}.")]
            place += 1
        new = rf"{_TOWER}.network.{place}.\1."
        keys += [(start + r"blocks\.(\d+)\.mlp\.", rf"{new}convffn.")]
        scale = r"blocks\.(\d+)\.(layer_scale\w*)\.gamma$"
        keys += [(start + scale, rf"{new}\2"), (start + r"blocks\.(\d+)\.", new)]
        place += 1
    keys += [
        (rf"^{old}stem\.", f"{_TOWER}.patch_embed.blocks."),
        (rf"^{old}final_conv\.se\.fc1\.", f"{_TOWER}.conv_exp.se.reduce."),
        (rf"^{old}final_conv\.se\.fc2\.", f"{_TOWER}.conv_exp.se.expand."),
        (rf"^{old}final_conv\.", f"{_TOWER}.conv_exp."),
    ]
    return tuple(keys)


# Names of transformers and of Apple's PyTorch checkpoints -> MLX names.
_KEYS: tuple[tuple[str, str | None], ...] = (
    (r".*\.num_batches_tracked$", None),
    (r".*\.rotary_emb\.inv_freq$", None),
    *_timm_keys(),
    (r"^model\.multi_modal_projector\.linear_1\.", "mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "mm_projector.2."),
    (r"^multi_modal_projector\.linear_([02])\.", r"mm_projector.\1."),
    (r"^model\.language_model\.", "language_model.model."),
    (
        r"^model\.vision_tower\.vision_tower\.model\.patch_embed\.",
        f"{_TOWER}.patch_embed.blocks.",
    ),
    (r"^model\.vision_tower\.vision_tower\.model\.", f"{_TOWER}."),
    (r"^model\.mm_projector\.", "mm_projector."),
    (r"^(model\.|lm_head\.)", r"language_model.\1"),
)
# Copied when present; no visual token uses it.
_OPTIONAL = re.compile(rf"^{re.escape(_TOWER)}\.head\.")


def _matches(checkpoint: Checkpoint) -> bool:
    """Return whether the checkpoint has a FastViTHD tower in a supported layout."""
    towers = (_APPLE, _TIMM, f"{_TOWER}.")
    tensors = checkpoint.tensors
    return is_app(checkpoint) or any(name.startswith(towers) for name in tensors)


def _gather(
    family: Family, checkpoint: Checkpoint, _: str
) -> tuple[Family, Checkpoint]:
    return family, add_tower(checkpoint) if is_app(checkpoint) else checkpoint


def _unreadable(checkpoint: Checkpoint) -> str | None:
    """Return the name of an unsupported FastVLM layout; `None` for other models."""
    names = checkpoint.tensors
    if list(checkpoint.folder.glob("*.mlpackage")) or any(
        n.startswith("multi_modal_projector.") for n in names
    ):
        return "Apple's MLX export, whose vision tower is a Core ML package"
    if checkpoint.config.get("model_type") == "fast_vlm":
        return f"a transformers fast_vlm checkpoint without the tensors {_TIMM}*"
    return None


def _axes(name: str, ndim: int) -> tuple[int, ...] | None:
    if name.startswith(_TOWER) and ndim == 4:
        return (0, 2, 3, 1)  # channels-last convolutions
    if ".layer_scale" in name and ndim == 3:
        return (1, 2, 0)
    return None


def _complete(checkpoint: Checkpoint, shapes: dict[str, Shape]) -> dict:
    config, notes = dict(checkpoint.config), checkpoint.notes
    if any(name.startswith(_TIMM) for name in checkpoint.tensors):
        config = _from_transformers(config, shapes)
    elif "image_aspect_ratio" not in config:
        notes.append(
            "config.json gives no image_aspect_ratio; pictures are cropped to their "
            "middle square, as in Apple's code (its published models say 'pad')"
        )
    if "rope_theta" not in config | object_of(config, "text_config"):
        config["rope_theta"] = DEFAULT_THETA
        notes.append(
            "config.json gives no rope_theta; 10000 is used, as in transformers"
        )
    vision, usual = object_of(config, "vision_config"), VisionConfig.image_size
    size = _input_size(config, checkpoint.folder, notes) or usual
    if size != vision.get("image_size", usual):
        config["vision_config"] = vision | {"image_size": size}
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


# Input size --------------------------------------------------------------------------

_CROP = ("crop_size",)
# Files of an image processor; transformers 5 puts its settings into the second.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# Settings of an image processor that have one value in every FastVLM.
_PIXELS = {
    **{"do_resize": True, "do_rescale": True, "resample": 3, "rescale_factor": 1 / 255},
    **{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]},
}


def _input_size(config: Mapping, folder: Path, notes: list[str]) -> int | None:
    """Return the pixels per side that the checkpoint was trained on; `None` if unknown.

    The end of `mm_vision_tower` comes first, as Apple's code reads nothing else; then
    the image processor, which transformers and mlx-vlm read; then `vision_config`.
    notes: takes places that disagree.
    """
    tower, side = config.get("mm_vision_tower"), object_of(config, "vision_config")
    expected = "a name that ends in the input size, such as 'mobileclip_l_1024'"
    expect(isinstance(tower, str | None), "mm_vision_tower", tower, expected)
    end, label = re.search(r"_([0-9]+)$", tower or ""), f"mm_vision_tower {tower!r}"
    places = [(f"config.json says {label}", int(end[1]))] if end else []
    places += _processor_size(folder)
    if (side := side.get("image_size")) is not None:
        places.append((f"config.json says vision_config.image_size {side!r}", side))
    for place, size in places:
        if not is_size(size) or size % TOTAL_STRIDE:
            expected = f"one size, a multiple of {TOTAL_STRIDE} px"
            raise InputError(f"{place}; expected {expected}")
    others = [place for place, size in places[1:] if size != places[0][1]]
    if others:
        reader = "Apple's code" if end else "transformers and mlx-vlm"
        disagreement = f"{places[0][0]}, but {' and '.join(others)}"
        notes.append(f"{disagreement}; the first is used, as {reader} would do")
    if tower and not places:
        size = f"{VisionConfig.image_size} px is used, as in Apple's models"
        notes.append(f"config.json says {label}, which ends in no input size; {size}")
    return places[0][1] if places else None


def _processor_size(folder: Path) -> list[tuple[str, Any]]:
    """Return the size in an image processor's file, with its place, or nothing.

    Raises `InputError` for a preprocessing that FastVLM does not have.
    """
    for name in _PROCESSORS:
        content = read_json(folder / name) if (folder / name).is_file() else {}
        settings = content.get("image_processor", content)
        if not isinstance(settings, dict) or not settings.keys() & {*_CROP, "size"}:
            continue
        plain = (
            () if settings.get("do_normalize", True) else ("image_mean", "image_std")
        )
        for field in sorted(_PIXELS.keys() & settings.keys() - plain):
            if settings[field] not in (None, _PIXELS[field]):
                raise InputError(
                    f"{name} says {field} {settings[field]!r}; expected "
                    f"{_PIXELS[field]!r}, as FastVLM's towers were trained"
                )
        fields = (*(_CROP if settings.get("do_center_crop", True) else ()), "size")
        sizes = {n: settings[n] for n in fields if settings.get(n) is not None}
        sides = [_side(size) for size in sizes.values()]
        label = " and ".join(f"{field} {size!r}" for field, size in sizes.items())
        if any(side != sides[0] for side in sides):
            raise InputError(f"{name} says {label}; expected one size")
        return [(f"{name} says {label}", sides[0])] if sides else []
    return []


def _side(value: Any) -> Any:
    """Return the one number in an image processor's size; else the value."""
    sides = list(value.values()) if isinstance(value, dict) else [value]
    return sides[0] if sides and sides.count(sides[0]) == len(sides) else value


# Fields of transformers' config that have one value in every FastVLM.
_FIXED = {
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": -1,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}
_SIZES = ("layers", "embed_dims", "mlp_ratios", "cls_ratio")  # of timm's tower
_IM_END = 151645  # Qwen2's token that ends an answer; missing in the configs


def _from_transformers(config: Mapping, shapes: dict[str, Shape]) -> dict:
    """Return transformers' config in Apple's form, which mlx-vlm reads, too."""
    vision, text = object_of(config, "vision_config"), object_of(config, "text_config")
    sizes = _timm_sizes(vision)
    for name, only in _FIXED.items():
        if config.get(name, only) != only:
            raise InputError(
                f"config.json says {name} {config[name]!r}; expected {only!r}, the "
                "only supported value"
            )
    stops = text.get("eos_token_id", config.get("eos_token_id"))
    stops = {*(stops if isinstance(stops, list) else [stops]), _IM_END} - {None}
    vocabulary = shapes.get("language_model.model.embed_tokens.weight", (0,))[0]
    flat = {k: v for k, v in text.items() if k not in ("architectures", "dtype")}
    return flat | {
        "model_type": "llava_qwen2",
        "architectures": ["LlavaQwen2ForCausalLM"],
        # A smaller vocabulary than Qwen2's does not have <|im_end|>.
        "eos_token_id": sorted(i for i in stops if i != _IM_END or i < vocabulary),
        "mm_hidden_size": shapes.get("mm_projector.0.weight", (0, 0))[-1],
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        "torch_dtype": config.get("dtype", config.get("torch_dtype")),
        "vision_config": sizes,
    }


def _timm_sizes(vision: Mapping) -> dict:
    """Return the tower's sizes that differ from FastViTHD's defaults."""
    name, arguments = vision.get("architecture"), object_of(vision, "model_args")
    unknown = sorted(arguments.keys() - {*_SIZES, "inference_mode"})
    if str(name).split(".")[0] != "fastvit_mci3" or unknown:
        raise InputError(
            f"config.json describes the vision tower {name!r}"
            + (f" with {unknown[0]}" if unknown else "")
            + "; expected timm's fastvit_mci3, which FastVLM has"
        )
    if not arguments.get("inference_mode", False):
        raise InputError(
            "config.json says inference_mode false for the vision tower, whose "
            "branches are then not folded; expected a FastVLM as transformers "
            "publishes it"
        )
    sizes = {name: arguments[name] for name in _SIZES if name in arguments}
    return sizes | {k: vision[k] for k in ("image_size",) if k in vision}


FASTVLM = register_family(
    Family(
        name="FastVLM",
        model=FastVLM,
        args=ModelArgs,
        matches=_matches,
        gather=_gather,
        unreadable=_unreadable,
        reads=(
            "FastVLM as Apple's PyTorch checkpoints (apple/FastVLM-0.5B, -1.5B, -7B), "
            "as transformers' fast_vlm, or as MLX checkpoints (such as "
            "mlx-community/FastVLM-0.5B-bf16)"
        ),
        is_mlx=lambda shapes: not any(n.startswith((_APPLE, _TIMM)) for n in shapes),
        keys=_KEYS,
        axes=_axes,
        complete=_complete,
        optional=_OPTIONAL,
    )
)
