"""Open a checkpoint by name, check its tensors against its config, build its model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import InputError
from ..features import HasParameters
from ..files import object_of
from ..models.protocol import VisionModel
from ..models.text_config import flat_rope
from ..pipeline.planning import plan_for
from ..pruners import Pruners
from .family import Family, identify
from .hub import resolve
from .policy_settings import check_settings
from .quantization import SECTIONS, QuantizationReader
from .shards import Checkpoint

# Errors of MLX and Python while a model is built from an impossible config.
MISFITS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError)


class ModelSource(NamedTuple):
    """Checkpoint whose headers fit its config, with its family and complete config."""

    family: Family
    checkpoint: Checkpoint
    config: dict


def open_checkpoint(
    path_or_hf_repo: str | Path,
    lora_adapter: str = "auto",
    base_model: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> ModelSource:
    """Find and check a checkpoint, from its headers alone.

    lora_adapter, base_model: options for an OpenVLA-OFT policy, as in `convert`.
    settings: values that replace those of a policy's checkpoint.
    Raises `InputError` unless each expected tensor exists once, with its shape.
    """
    folder = resolve(path_or_hf_repo)
    base = resolve(base_model) if base_model is not None else None
    family, checkpoint = identify(Checkpoint.open(folder, base), lora_adapter)
    checkpoint.settings = dict(settings or {})
    check_settings(checkpoint.settings, family.settings, folder)
    parts = (checkpoint.config, object_of(checkpoint.config, "text_config"))
    untied = any(part.get("tie_word_embeddings") is False for part in parts)
    top, text = (flat_rope(part, checkpoint.notes) for part in parts)
    checkpoint.config = top if text == parts[1] else top | {"text_config": text}
    stored = family.shapes(checkpoint)
    dtypes, source = family.dtypes(checkpoint), str(folder)
    headers = (checkpoint.config, stored, dtypes, family.rename, source)
    quantization = checkpoint.quantization = QuantizationReader(*headers).read()
    shapes = quantization.unpacked(stored)
    config = family.complete(checkpoint, shapes)
    for name in SECTIONS:
        config.pop(name, None)
        if quantization.formats:
            config[name] = quantization.section
    expected = expected_shapes(family, config, len(checkpoint.tensors))
    family.check(checkpoint, shapes, expected)
    if untied and not any(name.endswith("lm_head.weight") for name in shapes):
        checkpoint.notes.append(
            "config.json says tie_word_embeddings false, but there is no lm_head; the "
            "embeddings are used for both"
        )
    return ModelSource(family, checkpoint, config)


def build(
    family: Family, config: dict, inference: bool, tensors: int | None = None
) -> VisionModel:
    """Build the model of a config, without weights.

    inference: whether layers may be folded; with `False` the model's parameters are
    exactly the checkpoint's tensors. tensors: number of tensors in the checkpoint; a
    config with more layers raises `InputError`.
    """
    args = family.args.from_dict(config)
    depth = args.depth
    if tensors is not None and depth > tensors:
        raise InputError(
            f"config.json describes {depth} layers, but the checkpoint has only "
            f"{tensors} tensors"
        )
    return family.model(args, inference)


def expected_shapes(
    family: Family, config: dict, tensors: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every MLX-layout tensor of a config, by name.

    tensors: number of tensors in the checkpoint; a config with more layers is not
    built. Raises `InputError` for a config that does not describe a model.
    """
    try:
        model = build(family, config, False, tensors)
    except InputError:
        raise
    except MISFITS as e:
        raise InputError(
            f"config.json does not describe a {family.name} model ({e})"
        ) from None
    return {name: array.shape for name, array in named_tensors(model).items()}


def named_tensors(model: HasParameters) -> dict[str, mx.array]:
    """Return a model's parameters, by their names in a checkpoint."""
    return dict(tree_flatten(model.parameters()))


def check_plan(family: Family, config: dict, pruners: Pruners) -> None:
    """Raise `InputError` unless `pruners` can prune a model of this config."""
    plan_for(build(family, config, True), pruners)
