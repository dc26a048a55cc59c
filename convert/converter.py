"""Conversion of a Hugging Face checkpoint to MLX format: `convert`."""

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from ..checkpoints.carried import carry, read_carried
from ..checkpoints.family import BITS, GROUPS, QUANTIZED, Family
from ..checkpoints.hub import resolve
from ..checkpoints.loading import check_finite, load_tokenizer, tokenizer_folder
from ..checkpoints.opening import check_plan, open_checkpoint
from ..checkpoints.shards import (
    BYTES,
    FLOATS,
    Checkpoint,
    copy_beside,
    copy_companions,
    write_config,
    write_shards,
)
from ..errors import InputError, note
from ..files import check_name, new_folder
from ..pruners import Pruners, as_plan
from .openvla import OPENVLA

log = logging.getLogger(__name__)
INT8_WARNING = (
    "8 bits lower OpenVLA's success rate: its paper reports 58.1 % of tasks, against "
    "71.3 % without quantization and 71.9 % with 4 bits (arXiv 2406.09246)"
)
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def convert(
    hf_path: str,
    mlx_path: str,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int = 4,
    q_group_size: int = 64,
    actions_per_chunk: int | None = None,
    pictures: int | None = None,
    pruner: Pruners = None,
    lora_adapter: str = "auto",
    base_model: str | None = None,
    crop: float | None = None,
    resize: str | None = None,
    jpeg: int | None = None,
    norm: str | None = None,
) -> Path:
    """Write the checkpoint `hf_path` (hub id or folder) as an MLX checkpoint.

    Tensors are streamed, so memory holds about one shard of 1 GB. The source is only
    read; its tokenizer, licence and model card are copied.

    Args:
        hf_path: hub id or folder of the source.
        mlx_path: folder to write; must not exist.
        dtype: type of float tensors; as stored when `None`.
        quantize: quantize the language model; the vision tower stays float.
        q_bits: bits per weight.
        q_group_size: weights per scale.
        actions_per_chunk: actions per forward pass of an OpenVLA-OFT policy (default:
            the robot's, else 8).
        pictures: number of input images of an OpenVLA-OFT policy (default: the
            robot's, else 2).
        pruner: one or several pruners to store in the checkpoint; they apply wherever
            the caller passes none. `None` keeps the pruners of the source.
        lora_adapter: mode of OpenVLA-OFT's `lora_adapter/`: `merge` adds it to the
            weights, `ignore` leaves it out, `auto` merges it unless the weights hold it
            already, which is measured on the weights, as no file records it.
        base_model: hub id or folder of the model that `lora_adapter/` was trained on,
            for a source folder without weights.
        crop: encoded share of a picture's area, around the middle (OpenVLA and OFT).
        resize: filter that resizes pictures, `bicubic` or `lanczos` (likewise).
        jpeg: quality of a round trip through JPEG before resizing, 0 for none
            (likewise).
        norm: scaling of actions and states, a key of `processing.actions.NORMS`
            (OpenVLA-OFT and pi0-FAST).

    Returns:
        The new folder.

    Raises:
        InputError: the source cannot be read, the target exists, or an option does not
            fit the checkpoint.
    """
    if q_bits not in BITS or q_group_size not in GROUPS:
        raise InputError(
            f"cannot quantize to {q_bits} bits in groups of {q_group_size}; expected "
            + QUANTIZED
        )
    if dtype is not None and dtype not in DTYPES:
        raise InputError(
            f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}"
        )
    check_name(mlx_path)
    target = Path(mlx_path)
    source = resolve(hf_path)
    inside = Path(os.path.realpath(target)).is_relative_to(os.path.realpath(source))
    if source.is_dir() and inside:
        raise InputError(
            f"{target} is inside {source}, which is only read; choose a folder "
            "elsewhere"
        )
    settings = {
        **{"actions_per_chunk": actions_per_chunk, "pictures": pictures},
        **{"crop": crop, "resize": resize, "jpeg": jpeg, "norm": norm},
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    family, checkpoint, config = open_checkpoint(
        source, lora_adapter, base_model, settings
    )
    for text in checkpoint.notes:
        note(text)
    if pruner is None:
        pruner = read_carried(config, checkpoint.folder)
    if as_plan(pruner):
        check_plan(family, config, pruner)
    beside = family.beside(checkpoint)
    # Refuse a source without a usable tokenizer before the long work.
    load_tokenizer(tokenizer_folder(checkpoint, beside), config)
    if quantize and q_bits == 8 and family is OPENVLA:
        log.warning(INT8_WARNING)
    if quantize and config.get("quantization"):
        raise InputError(f"{checkpoint.folder} is already quantized; leave out -q")
    quantization = (q_group_size, q_bits) if quantize else None
    tensors = _stream(family, checkpoint, dtype, quantization)
    size = _bytes_to_write(family, checkpoint, dtype, quantization)
    with new_folder(target) as folder:
        if checkpoint.base:  # first, so that the policy's own files replace the base's
            copy_companions(checkpoint.base, folder)
        copy_companions(checkpoint.folder, folder)
        copy_beside(beside, folder)
        target_config = _target_config(config, dtype, quantize, q_bits, q_group_size)
        write_config(folder, carry(pruner, target_config, folder))
        write_shards(folder, tensors, size)
    return target


def _stream(
    family: Family,
    checkpoint: Checkpoint,
    dtype: str | None,
    quantization: tuple[int, int] | None,
) -> Iterator[tuple[str, mx.array]]:
    """Yield the MLX-layout tensors by name; release each once it is consumed."""
    weights = family.to_mlx_layout(checkpoint.load())
    names = sorted(weights)
    for name in tqdm(names, desc="converting", unit="tensor", disable=None):
        array = weights.pop(name)
        if mx.issubdtype(array.dtype, mx.floating):
            check_finite({name: array})
            array = array.astype(DTYPES[dtype]) if dtype else array
        if quantization and _can_quantize(name, array.shape, quantization[0]):
            path = name.removesuffix(".weight")
            parts = mx.quantize(array, *quantization)
            mx.eval(parts)  # else the source stays in memory with the shard
            yield from zip(
                (name, f"{path}.scales", f"{path}.biases"), parts, strict=True
            )
            del parts
        else:
            yield name, array
        del array


def _can_quantize(name: str, shape: tuple[int, ...], group_size: int) -> bool:
    """Return whether a tensor is a matrix of the language model, in whole groups."""
    matrix = name.startswith("language_model.") and len(shape) == 2
    return matrix and name.endswith(".weight") and shape[1] % group_size == 0


def _target_config(
    config: dict, dtype: str | None, quantize: bool, bits: int, group: int
) -> dict:
    config = {k: v for k, v in config.items() if k != "auto_map"}
    if dtype:
        config = _typed(config, dtype) | {"torch_dtype": dtype}
    if quantize:
        config["quantization"] = {"group_size": group, "bits": bits, "mode": "affine"}
        config["quantization_config"] = config["quantization"]
    return config


def _typed(config: dict, dtype: str) -> dict:
    """Return a config that names `dtype` wherever it named a type of the weights."""
    typed = dict(config)
    for name, value in config.items():
        if name in ("dtype", "torch_dtype"):
            typed[name] = dtype
        elif name.endswith("_config") and isinstance(value, dict):
            typed[name] = _typed(value, dtype)
    return typed


def _bytes_to_write(
    family: Family,
    checkpoint: Checkpoint,
    dtype: str | None,
    quantization: tuple[int, int] | None,
) -> int:
    """Return the bytes that the converted tensors need on disk."""
    total, stored = 0.0, family.dtypes(checkpoint)
    for name, shape in family.shapes(checkpoint).items():
        size = float(BYTES[stored[name]])
        if dtype is not None and stored[name] in FLOATS:
            size = float(DTYPES[dtype].size)
        if quantization and _can_quantize(name, shape, quantization[0]):
            group, bits = quantization
            size = bits / 8 + 2 * size / group  # weights, and a scale and a bias each
        total += math.prod(shape) * size
    return int(total)
