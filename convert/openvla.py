"""OpenVLA and Prismatic checkpoints: key table, statistics and side files.

The MLX layout, defined here, keeps the reference names. Convolutions are channels-last.
SigLIP's attention pooling is left out, as no feature depends on it.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..checkpoints.family import Family, Shape, register_family
from ..checkpoints.policy_settings import CHUNKS, PICTURES, check_settings
from ..checkpoints.shards import Checkpoint
from ..errors import InputError
from ..files import object_of, read_json
from ..models.checks import expect
from ..models.openvla import ModelArgs, OpenVLA
from ..processing.actions import NORMS
from ..processing.image import Preparation
from .oft_adapter import add_adapter
from .sidefiles import add_side_files

# Prismatic names -> MLX names.
_KEYS: tuple[tuple[str, str | None], ...] = (
    (r".*\.rotary_emb\.inv_freq$", None),
    (r"^vision_backbone\.(fused_)?featurizer\.attn_pool\.", None),
    (r"^module\.", ""),
)
_HEAD = "action_head.model.fc2.weight"
_PATCHES = re.compile(
    r"^vision_backbone\.(fused_)?featurizer\.patch_embed\.proj\.weight$"
)

# Actions per forward pass, images and normalisation of OFT's robots, which its
# checkpoints do not record. From prismatic/vla/constants.py of
# github.com/moojink/openvla-oft.
_ROBOTS = {
    "libero": {"actions_per_chunk": 8, "pictures": 2, "norm": "quantiles"},
    "aloha": {"actions_per_chunk": 25, "pictures": 3, "norm": "min_max"},
    "bridge": {"actions_per_chunk": 5, "pictures": 1, "norm": "quantiles"},
}
_FLAGS = {"chunk": "actions_per_chunk", "pictures": "pictures", "rule": "norm"}
_NUMBERED = rf"({'|'.join(_ROBOTS)})(v?\d+)?"  # as in aloha1, bridgev2
# Pictures in the evaluations of fine-tuned policies: run_libero_eval.py and
# openvla_utils.py of github.com/openvla/openvla and github.com/moojink/openvla-oft.
_EVALUATION = {"crop": 0.9, "resize": "lanczos", "jpeg": 95}
_PRETRAINING = {"fractal20220817_data", "bridge_orig"}  # both are in OpenVLA's mixture


def _matches(checkpoint: Checkpoint) -> bool:
    names = checkpoint.tensors
    return any(n.startswith("vision_backbone.featurizer.") for n in names)


def _gather(
    family: Family, checkpoint: Checkpoint, adapter: str
) -> tuple[Family, Checkpoint]:
    """Add OpenVLA-OFT's side files and its `lora_adapter/` to the checkpoint.

    adapter: mode of `lora_adapter/` (`oft_adapter.add_adapter`).
    """
    return family, add_adapter(add_side_files(checkpoint), adapter)


def _is_mlx(shapes: Mapping[str, Shape]) -> bool:
    patches = [s for n, s in shapes.items() if _PATCHES.match(n)]
    return all(len(s) == 4 and s[3] == 3 and s[1] != 3 for s in patches)


def _axes(name: str, ndim: int) -> tuple[int, ...] | None:
    return (0, 2, 3, 1) if _PATCHES.match(name) and ndim == 4 else None


def _complete(checkpoint: Checkpoint, shapes: dict[str, Shape]) -> dict:
    config = dict(checkpoint.config)
    folder = checkpoint.folder
    if (folder / "preprocessor_config.json").exists():
        config["preprocessor"] = read_json(folder / "preprocessor_config.json")
    if (folder / "dataset_statistics.json").exists():
        config["norm_stats"] = read_json(folder / "dataset_statistics.json")
    stats = config.setdefault("norm_stats", {})
    if not isinstance(stats, dict):
        raise InputError(
            f"norm_stats of {folder} is no object; expected one entry per data set"
        )
    text = config.get("text_config")
    if isinstance(text, dict):
        tied = "language_model.lm_head.weight" not in shapes
        config["text_config"] = text | {"tie_word_embeddings": tied}
    if stats:
        _check_prompt(config)
        config["image_processing"] = _image_processing(checkpoint, config, shapes)
    if _HEAD in shapes:
        config["oft"] = _oft(checkpoint, config, shapes)
    else:
        check_settings(checkpoint.settings, PICTURES, folder)
    return config


def _check_prompt(config: Mapping) -> None:
    """Raise `InputError` for a language model that was prompted in a chat's format."""
    name = config.get("llm_backbone_id")
    expected = "a name that ends with -pure, as other models have other prompts"
    expect(
        name is None or str(name).endswith("-pure"), "llm_backbone_id", name, expected
    )


def _image_processing(
    checkpoint: Checkpoint, config: Mapping, shapes: Mapping[str, Shape]
) -> dict:
    """Return how a policy's pictures are prepared; note what was guessed.

    The caller's settings count first, then `image_processing`, which conversion writes,
    then a crop that config.json or else preprocessor_config.json states.
    """
    settings = checkpoint.settings
    stated = _stated_crop(object_of(config, "preprocessor") | config)
    stated |= object_of(config, "image_processing")
    stated |= {name: settings[name] for name in PICTURES if name in settings}
    Preparation.from_dict(stated)
    guess, reason = _guess_pictures(checkpoint, config, _HEAD in shapes)
    _note(checkpoint, "pictures are prepared with", guess, stated, reason)
    return guess | stated


def _note(
    checkpoint: Checkpoint, what: str, guess: Mapping, stated: Mapping, reason: str
) -> None:
    """Note the settings that were guessed, and the flags that choose them."""
    missing = [name for name in guess if name not in stated]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
    values = ", ".join(f"{name} {guess[name]}" for name in missing)
    if missing:
        checkpoint.notes.append(f"{what} {values}, because {reason}; {flags} change it")


def _stated_crop(config: Mapping) -> dict:
    """Return the crop that a config states by `crop` or `center_crop`, if any."""
    crop, center = config.get("crop"), config.get("center_crop")
    right = center is None or isinstance(center, bool)
    expect(right, "center_crop", center, "true or false")
    if crop is None:
        return {} if center is None else {"crop": 0.9 if center else 1.0}
    crop = Preparation.from_dict({"crop": crop}).crop
    right = center is None or center == (crop < 1)
    expect(right, "center_crop", center, f"what fits crop {crop}")
    return {"crop": float(crop)}


def _guess_pictures(
    checkpoint: Checkpoint, config: Mapping, oft: bool
) -> tuple[dict[str, Any], str]:
    """Return the preparation that a policy was trained for, and the reason."""
    names, folder = list(config["norm_stats"]), checkpoint.folder
    plain = {"crop": 1.0, "resize": "bicubic", "jpeg": 0}
    if "crop" in object_of(config, "oft"):
        old = {"crop": config["oft"]["crop"], "resize": "lanczos", "jpeg": 0}
        return old, "an earlier version of convert wrote it; OpenVLA-OFT has JPEG 95"
    if oft:
        return _EVALUATION, "OpenVLA-OFT's evaluation does so"
    libero = [name for name in names if "libero" in _robots_in(name)]
    if libero:
        return _EVALUATION, f"OpenVLA's evaluation in LIBERO does so ({libero[0]!r})"
    if set(names) >= _PRETRAINING:
        return plain, "its data sets are those of OpenVLA's pretraining, without crops"
    augmented = "OpenVLA's finetune.py trains on random crops unless told otherwise"
    for sign in ("dataset_statistics.json", "image_aug"):
        if (folder / sign).exists() or sign in folder.name:
            return _EVALUATION, f"{sign} says that it was fine-tuned: {augmented}"
    return plain, (
        f"nothing says that it was fine-tuned on crops (data set {names[0]!r}); a "
        "policy that was needs --crop 0.9 --resize lanczos --jpeg 95"
    )


def _oft(checkpoint: Checkpoint, config: dict, shapes: dict[str, Shape]) -> dict:
    """Return an OFT policy's settings: from the tensors, else its robot's defaults."""
    action_dim, settings = shapes[_HEAD][0], checkpoint.settings
    own: dict[str, Any] = object_of(config, "oft")
    stored = {_FLAGS.get(key, key): value for key, value in own.items()}
    stored.pop("crop", None)  # of earlier versions; now in `image_processing`
    stored |= {name: settings[name] for name in _FLAGS.values() if name in settings}
    guess = {}
    if not stored.keys() >= set(_FLAGS.values()):
        robot, reason = _guess_robot(checkpoint, config["norm_stats"], action_dim)
        guess = _ROBOTS[robot]
        what = f"the policy's robot is not recorded; settings of {robot} are used:"
        _note(checkpoint, what, guess, stored, reason)
    keys = {flag: key for key, flag in _FLAGS.items()}
    oft = {keys.get(name, name): value for name, value in (guess | stored).items()}
    oft["rule"] = NORMS.get(oft["rule"], oft["rule"])
    proprio = shapes.get("proprio_projector.fc1.weight", (0, 0))[-1]
    film = "vision_backbone.featurizer.blocks.0.scale.weight" in shapes
    return oft | {"action_dim": action_dim, "proprio_dim": proprio, "film": film}


def _guess_robot(
    checkpoint: Checkpoint, stats: Mapping, action_dim: int
) -> tuple[str, str]:
    """Return the robot of an OFT policy, which no file records, and the reason.

    Raises `InputError` for data sets of several robots.
    """
    key = checkpoint.settings.get("unnorm_key")
    keys = [key] if key in stats else list(stats)
    by_name = {robot: name for name in keys for robot in _robots_in(name)}
    if len(by_name) > 1:
        raise InputError(
            f"the data sets of {checkpoint.folder} name several robots "
            f"({', '.join(by_name)}), which differ in actions per chunk, pictures and "
            "norm; expected one of them, or --actions-per-chunk, --pictures and --norm"
        )
    for robot, name in by_name.items():
        return robot, f"data set {name!r} names it"
    if action_dim == 14:
        return "aloha", "only ALOHA, with two arms, has actions of 14 numbers"
    in_folder = _robots_in(checkpoint.folder.name)
    if len(in_folder) == 1:
        return in_folder[0], f"folder {checkpoint.folder.name!r} names it"
    return "libero", "no data set names one, and it is OpenVLA-OFT's default"


def _robots_in(name: str) -> list[str]:
    """Return the robots that are whole words of a name, without their numbers."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    matches = (re.fullmatch(_NUMBERED, word) for word in words)
    return list(dict.fromkeys(match[1] for match in matches if match))


OPENVLA = register_family(
    Family(
        name="OpenVLA",
        model=OpenVLA,
        args=ModelArgs,
        matches=_matches,
        gather=_gather,
        takes_adapter=True,
        reads=(
            "OpenVLA, OpenVLA-OFT and Prismatic checkpoints with one or two vision "
            "towers (such as openvla/openvla-7b)"
        ),
        is_mlx=_is_mlx,
        keys=_KEYS,
        axes=_axes,
        complete=_complete,
        settings=(*PICTURES, *CHUNKS, "norm"),
    )
)
