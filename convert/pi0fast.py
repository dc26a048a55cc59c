"""pi0-FAST checkpoints of lerobot and openpi: key table, sizes, statistics.

Neither config has the model's sizes; they follow from the tensors. lerobot keeps the
statistics beside its processors, openpi under `assets/`, and both name tokenizers in
other places. The MLX layout has all files in one folder, and the section `policy` in
config.json.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.family import Family, Shape, register_family
from ..checkpoints.hub import fetch
from ..checkpoints.shards import Checkpoint, load_tensors, read_header
from ..errors import InputError
from ..files import object_of, read_json
from ..models.checks import expect
from ..models.pi0fast import ModelArgs, Pi0Fast
from ..processing.actions import NORMS

_ROOT = r"^(?:model\.)?paligemma_with_expert\.paligemma\.(?:model\.)?"
_BLOCK = _ROOT + r"vision_tower\.(?:vision_model\.)?encoder\.layers\.(\d+)\."
_TOWER = _ROOT + r"vision_tower\.(?:vision_model\.)?"
_LANGUAGE = _ROOT + r"language_model\.(?:model\.)?"
_KEYS: tuple[tuple[str, str | None], ...] = (
    (r".*\.rotary_emb\.inv_freq$", None),
    (r".*\.position_ids$", None),
    (_TOWER + r"head\.", None),
    (_BLOCK + r"self_attn\.([qkv])_proj\.", r"vision_tower.blocks.\1.attn.\2."),
    (_BLOCK + r"self_attn\.out_proj\.", r"vision_tower.blocks.\1.attn.proj."),
    (_BLOCK + r"layer_norm([12])\.", r"vision_tower.blocks.\1.norm\2."),
    (_BLOCK + r"mlp\.", r"vision_tower.blocks.\1.mlp."),
    (_TOWER + r"embeddings\.patch_embedding\.", "vision_tower.patch_embed.proj."),
    (_TOWER + r"embeddings\.position_embedding\.weight$", "vision_tower.pos_embed"),
    (_TOWER + r"post_layernorm\.", "vision_tower.norm."),
    (_ROOT + r"multi_modal_projector\.", "multi_modal_projector."),
    (_ROOT + r"(?:language_model\.)?lm_head\.", "language_model.lm_head."),
    (_LANGUAGE, "language_model.model."),
)
_PATCHES = "vision_tower.patch_embed.proj.weight"
_TABLE = "language_model.model.embed_tokens.weight"
_HEAD = "language_model.lm_head.weight"
# Attention heads of SigLIP towers by width, which no checkpoint records.
_HEADS = {1152: 16, 1024: 16, 768: 12}
_RULES = {name.upper(): rule for name, rule in NORMS.items()}
_OPENPI_CAMERAS = ["base_0_rgb", "base_1_rgb", "wrist_0_rgb"]


def _matches(checkpoint: Checkpoint) -> bool:
    names = checkpoint.tensors
    return any("paligemma_with_expert." in n or n == _PATCHES for n in names)


def _gather(
    family: Family, checkpoint: Checkpoint, _: str
) -> tuple[Family, Checkpoint]:
    """Return the family with the key table for this checkpoint's names.

    Raises `InputError` for pi0 and pi0.5, whose action expert starts from noise.
    """
    names = list(checkpoint.tensors)
    if any(re.search(r"gemma_expert\.|action_(in|out)_proj\.", n) for n in names):
        raise InputError(
            f"{checkpoint.folder} has an action expert, as pi0 and pi0.5 have; this "
            "reads pi0-FAST, which answers in tokens"
        )
    renamed = {family.rename(n) for n in names}
    if _TABLE in renamed or _HEAD not in renamed:
        return family, checkpoint
    # Tied embeddings are stored once, here under the name of the head.
    head = (_ROOT + r"(?:language_model\.)?lm_head\.weight$", _TABLE)
    return dataclasses.replace(family, keys=(head, *_KEYS)), checkpoint


def _is_mlx(shapes: Mapping[str, Shape]) -> bool:
    return not any("paligemma_with_expert." in name for name in shapes)


def _axes(name: str, ndim: int) -> tuple[int, ...] | None:
    return (0, 2, 3, 1) if name == _PATCHES and ndim == 4 else None


def _complete(checkpoint: Checkpoint, shapes: dict[str, Shape]) -> dict:
    config = dict(checkpoint.config)
    config["model_type"] = "pi0_fast"
    text, vision = (object_of(config, f"{n}_config") for n in ("text", "vision"))
    config["text_config"] = _text(shapes) | dict(text)
    config["text_config"]["tie_word_embeddings"] = _HEAD not in shapes
    config["vision_config"] = _vision(shapes) | dict(vision)
    if "policy" in config:
        config["norm_stats"] = dict(object_of(config, "norm_stats"))
        config["policy"] = dict(object_of(config, "policy"))
    elif config.get("type") is None:
        config["norm_stats"], rules = _assets(checkpoint)
        config["policy"] = _openpi(config) | {"rules": rules}
    else:
        _check_lerobot(config)
        config["policy"] = _lerobot(config)
        config["norm_stats"], changes = _processors(checkpoint)
        config["policy"] |= changes
    config["policy"].setdefault("state_size", _state_size(config))
    if "norm" in checkpoint.settings:
        norm = checkpoint.settings["norm"]
        rules = dict.fromkeys(("action", "proprio"), NORMS.get(norm, norm))
        config["policy"]["rules"] = rules
    return config


def _size(shapes: Mapping[str, Shape], name: str, axis: int) -> int:
    if len(shapes.get(name, ())) <= axis:
        raise InputError(f"the checkpoint lacks tensor {name}, which gives its sizes")
    return shapes[name][axis]


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    return 1 + max(
        (int(match[1]) for n in shapes if (match := re.match(pattern, n))), default=-1
    )


def _text(shapes: Mapping[str, Shape]) -> dict:
    """Return Gemma's sizes; its variants in pi0-FAST have one key-value head."""
    layer = "language_model.model.layers.0."
    head = _size(shapes, f"{layer}self_attn.k_proj.weight", 0)
    return {
        "model_type": "gemma",
        "vocab_size": _size(shapes, _TABLE, 0),
        "hidden_size": _size(shapes, f"{layer}input_layernorm.weight", 0),
        "intermediate_size": _size(shapes, f"{layer}mlp.gate_proj.weight", 0),
        "num_hidden_layers": _count(shapes, r"language_model\.model\.layers\.(\d+)\."),
        "num_attention_heads": _size(shapes, f"{layer}self_attn.q_proj.weight", 0)
        // head,
        "num_key_value_heads": 1,
        "head_dim": head,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
    }


def _vision(shapes: Mapping[str, Shape]) -> dict:
    width, patch, _, _ = (_size(shapes, _PATCHES, axis) for axis in range(4))
    side = round(_size(shapes, "vision_tower.pos_embed", 0) ** 0.5)
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_size": width,
        "intermediate_size": _size(shapes, "vision_tower.blocks.0.mlp.fc1.weight", 0),
        "num_hidden_layers": _count(shapes, r"vision_tower\.blocks\.(\d+)\."),
        "num_attention_heads": _HEADS.get(width),
    }


def _lerobot(config: Mapping) -> dict:
    """Return the policy section from lerobot's config; defaults from lerobot's code.

    A chunk has `chunk_size` actions. The number of executed actions per chunk,
    `n_action_steps` in lerobot, is a setting of the caller, not of the checkpoint.
    """
    features = object_of(config, "input_features")
    cameras = [n for n in features if object_of(features, n).get("type") == "VISUAL"]
    return {
        "dialect": "lerobot",
        "cameras": [re.sub(r"^observation\.(images\.)?", "", n) for n in cameras],
        "horizon": config.get("chunk_size", 50),
        "action_dim": _feature(config, "output_features", "action"),
        "steps": config.get("max_decoding_steps", 256),
        "longest_prompt": config.get("tokenizer_max_length", 200),
        "skipped": config.get("fast_skip_tokens", 128),
        "strict": config.get("validate_action_token_prefix", True),
        "relative": config.get("use_relative_actions", False),
    }


def _check_lerobot(config: Mapping) -> None:
    """Raise `InputError` for settings of lerobot's config that cannot be followed."""
    expect(config["type"] == "pi0_fast", "type", config["type"], "'pi0_fast'")
    side = config["vision_config"]["image_size"]
    resolution = config.get("image_resolution", [side, side])
    right = resolution == [side, side]
    expect(right, "image_resolution", resolution, f"[{side}, {side}], the tower's")
    temperature = config.get("temperature", 0)
    expect(temperature == 0, "temperature", temperature, "0, for greedy tokens")


def _openpi(config: Mapping) -> dict:
    return {
        "dialect": "openpi",
        "cameras": _OPENPI_CAMERAS,
        "horizon": config.get("action_horizon", 32),
        "action_dim": config.get("action_dim", 32),
        "steps": 256,
        "longest_prompt": config.get("max_token_len", 250),
        "skipped": 128,
    }


def _feature(config: Mapping, group: str, name: str) -> Any:
    """Return the length of a one-dimensional feature; `None` for another shape."""
    shape = object_of(object_of(config, group), name).get("shape")
    return shape[0] if isinstance(shape, list) and len(shape) == 1 else None


def _state_size(config: Mapping) -> int:
    """Return the size of the robot state: from its statistics, else the config."""
    for entry in config["norm_stats"].values():
        for name, values in object_of(entry, "proprio").items():
            if name in _STATISTICS and isinstance(values, list):
                return len(values)
    return _feature(config, "input_features", "observation.state") or 0


# Statistics ---------------------------------------------------------------------------

_STATISTICS = ("q01", "q99", "q10", "q90", "min", "max", "mean", "std")
_PARTS = {"action": ("action", "ACTION"), "observation.state": ("proprio", "STATE")}
# Parts of the names of lerobot's steps that are followed, or need nothing here.
_STEPS = ("rename", "batch", "unnormalizer", "normalizer", "prepare", "device")
_STEPS += ("action_tokenizer", "actiontokenizer", "tokenizer", "relative", "absolute")


def _processors(checkpoint: Checkpoint) -> tuple[dict, dict]:
    """Return statistics by data set, and the entries of `policy` from the processors.

    lerobot's preprocessor normalises the state, its postprocessor the action.
    """
    config, folder = checkpoint.config, checkpoint.folder
    before = _read_steps(folder / "policy_preprocessor.json")
    after = _read_steps(folder / "policy_postprocessor.json")
    modes = {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    modes |= object_of(config, "normalization_mapping")
    normalizer = before.get("normalizer", {})
    _mode(folder, normalizer, "VISUAL", modes)
    stats, rules = {}, {}
    scaling = {"proprio": normalizer, "action": after.get("unnormalizer", normalizer)}
    for part, kind in _PARTS.values():
        rules[part] = _mode(folder, scaling[part], kind, modes)
        values = _statistics(folder, scaling[part].get("state_file"))
        stats |= {name: values[name] for name in values if name == part}
    if not _lists(object_of(normalizer, "config"), "observation.state"):
        rules["proprio"] = "identity"
    changes: dict[str, Any] = {"rules": rules}
    tokenizer = object_of(before.get("tokenizer", {}), "config")
    name = config.get("text_tokenizer_name", _NAMES["text"][2])
    other = tokenizer.get("tokenizer_name", name)
    expect(other == name, "text_tokenizer_name", name, f"{other!r}, as its processor")
    if "max_length" in tokenizer:
        changes["longest_prompt"] = tokenizer["max_length"]
    return {"lerobot": stats} if stats else {}, changes


def _read_steps(file: Path) -> dict[str, dict]:
    """Return the steps of a processor's file by their part of `_STEPS`.

    Raises `InputError` for steps that cannot be followed.
    """
    steps = read_json(file).get("steps") if file.is_file() else []
    by_name = {}
    for step in steps if isinstance(steps, list) else []:
        step = step if isinstance(step, dict) else {}
        whole = str(step.get("registry_name") or step.get("class"))
        lower = whole.rpartition(".")[2].lower()
        name = next((part for part in _STEPS if part in lower), None)
        enabled = object_of(step, "config").get("enabled")
        if name is None or (name in ("relative", "absolute") and enabled):
            reason = "actions are relative to its state" if name else "it is unknown"
            raise InputError(
                f"{file} has the step {whole}, which is not supported: {reason}; "
                "expected a policy without it"
            )
        by_name[name] = step
    return by_name


def _mode(folder: Path, step: Mapping, kind: str, modes: Mapping) -> str:
    """Return the rule that a step has for features of a kind; pictures have none."""
    settings = object_of(step, "config")
    eps = settings.get("eps", 1e-8)
    expect(eps == 1e-8, "eps of a normalizer", eps, "1e-08")
    modes = object_of(settings, "norm_map") if "norm_map" in settings else modes
    mode = str(modes.get(kind, "IDENTITY"))
    expected = ("IDENTITY",) if kind == "VISUAL" else tuple(_RULES)
    if mode.upper() not in expected:
        raise InputError(
            f"{folder} normalises {kind} by {mode!r}; expected one of "
            f"{', '.join(expected)}"
        )
    return _RULES[mode.upper()]


def _lists(settings: Mapping, feature: str) -> bool:
    """Return whether a normalizer lists a feature; one without a list has all."""
    features, keys = object_of(settings, "features"), "normalize_observation_keys"
    chosen = settings.get(keys)
    right = chosen is None or isinstance(chosen, list)
    expect(right, keys, chosen, "a list of features")
    return feature in (features or [feature]) and (chosen is None or feature in chosen)


def _statistics(folder: Path, name: object) -> dict[str, dict]:
    """Return lists by part and statistic from a processor's safetensors file."""
    if name is None:  # lerobot writes none for a policy without statistics
        return {}
    if not isinstance(name, str) or Path(name).name != name:
        raise InputError(
            f"a processor of {folder} names the statistics {name!r}; expected a file "
            "in the folder"
        )
    read_header(folder / name)  # raises `InputError` for a damaged file
    stats: dict[str, dict] = {}
    for key, array in load_tensors(folder / name).items():
        part, _, statistic = key.rpartition(".")
        if part in _PARTS and statistic in _STATISTICS and array.ndim == 1:
            values = array.astype(mx.float32).tolist()
            stats.setdefault(_PARTS[part][0], {})[statistic] = values
    return stats


def _assets(checkpoint: Checkpoint) -> tuple[dict, dict]:
    """Return (statistics by data set, rules by part) of openpi's assets.

    openpi writes `assets/<data set>/norm_stats.json`, where the name of a data set may
    have slashes, and records no rule: its code decides by the training config.
    """
    stats, assets = {}, checkpoint.folder / "assets"
    for file in sorted(assets.rglob("norm_stats.json")):
        entry = object_of(read_json(file), "norm_stats")
        parts = {"action": entry.get("actions"), "proprio": entry.get("state")}
        name = file.parent.relative_to(assets).as_posix()
        stats[name] = {k: v for k, v in parts.items() if v}
    parts = [part for entry in stats.values() for part in entry.values()]
    quantiles = all(isinstance(p, dict) and p.get("q01") is not None for p in parts)
    norm, reason = "quantiles", "openpi's default for pi0-FAST"
    if not quantiles:
        norm, reason = "mean_std", "the statistics have no quantiles"
    if "norm" not in checkpoint.settings:
        checkpoint.notes.append(
            f"openpi records no normalisation; {norm} is used: {reason}; --norm sets "
            "it (mean_std for pi0_fast_libero). Actions that openpi takes relative to "
            "the state (extra_delta_transform) stay relative"
        )
    return stats, dict.fromkeys(("action", "proprio"), NORMS[norm])


# Tokenizers ---------------------------------------------------------------------------

_NAMES = {
    "text": ("tokenizer", "text_tokenizer_name", "google/paligemma-3b-pt-224"),
    "fast": ("fast", "action_tokenizer_name", "lerobot/fast-action-tokenizer"),
}
_HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
# Files to download, without the weights in the same repository on the hub.
_FILES = ("*token*.json", "processor_config.json", "LICENSE*", "NOTICE*")


def _beside(checkpoint: Checkpoint) -> dict[str, Path]:
    """Return the files of both tokenizers, by their names in the MLX layout.

    Files that are in the folder already are left out. Raises `InputError` when files
    are neither in the folder nor on the hub.
    """
    folder, files = checkpoint.folder, {}
    if not (folder / "tokenizer.json").is_file():
        source = _tokenizer(checkpoint, "text")
        for file in sorted(source.glob("*token*.json")):
            files[file.name] = file
    if not (folder / "fast_tokenizer.json").is_file():
        source = _tokenizer(checkpoint, "fast")
        for name in ("tokenizer", "processor_config"):
            files[f"fast_{name}.json"] = source / f"{name}.json"
    return files


def _tokenizer(checkpoint: Checkpoint, kind: str) -> Path:
    """Return the folder of the text or FAST tokenizer, downloaded when needed."""
    inside, key, default = _NAMES[kind]
    folder = checkpoint.folder / inside
    if (folder / "tokenizer.json").is_file():
        return folder
    name = checkpoint.config.get(key, default)
    if not isinstance(name, str) or not re.fullmatch(_HUB_ID, name):
        raise InputError(
            f"config.json of {checkpoint.folder} says {key} {name!r}, which is no hub "
            f"id; put its files into {folder}"
        )
    try:
        snapshot = fetch(name, _FILES)
    except InputError as error:
        raise InputError(f"{error}; put its files into {folder}") from None
    if not (snapshot / "tokenizer.json").is_file():
        raise InputError(f"{snapshot} has no tokenizer.json; put one into {folder}")
    return snapshot


PI0FAST = register_family(
    Family(
        name="pi0-FAST",
        model=Pi0Fast,
        args=ModelArgs,
        matches=_matches,
        gather=_gather,
        reads="pi0-FAST policies as lerobot saves them (such as lerobot/pi0fast-base)",
        is_mlx=_is_mlx,
        keys=_KEYS,
        axes=_axes,
        complete=_complete,
        beside=_beside,
        settings=("norm",),
    )
)
