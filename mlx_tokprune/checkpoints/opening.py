"""From a name to a checkpoint whose tensors fit its config, and to an empty model."""

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import InputError
from ..pipeline.planning import plan_for
from ..pruners import Pruners
from .family import Family, identify
from .hub import resolve
from .shards import Checkpoint

# What building a model from an impossible config runs into.
MISFITS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError)


class Opened(NamedTuple):
    """A checkpoint whose headers were read and fit its config."""

    family: Family
    checkpoint: Checkpoint
    config: dict


def open_checkpoint(
    path_or_hf_repo: str | Path,
    lora_adapter: str = "auto",
    base_model: str | Path | None = None,
) -> Opened:
    """Find and check a checkpoint, from its headers alone.

    lora_adapter, base_model: of an OpenVLA-OFT policy, as `convert` takes them. Raises
    `InputError` unless every tensor is there once, with its shape.
    """
    folder = resolve(path_or_hf_repo)
    base = resolve(base_model) if base_model is not None else None
    family, checkpoint = identify(Checkpoint.open(folder, base), lora_adapter)
    shapes = family.shapes(checkpoint)
    config = family.complete(checkpoint, shapes)
    expected = expected_shapes(family, config, len(checkpoint.tensors))
    family.check(checkpoint, shapes, config, expected)
    return Opened(family, checkpoint, config)


def build(family: Family, config: dict, inference: bool, tensors: int | None = None):
    """The model of a config; with `inference` false its parameters are its tensors."""
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
    """Every tensor of the MLX layout for this config, with its shape.

    tensors: how many there are; a config of more layers is not built.
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


def named_tensors(model: nn.Module) -> dict[str, mx.array]:
    """The parameters of a model, by the names that they have in a checkpoint."""
    return dict(tree_flatten(model.parameters()))


def check_plan(family: Family, config: dict, pruners: Pruners) -> None:
    """Raise `InputError` unless a model of this config can be pruned so."""
    plan_for(build(family, config, True), pruners)
