"""Conversion of a Hugging Face checkpoint to MLX format: `convert`."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ..checkpoints.carried import carry, read_carried
from ..checkpoints.family import Family
from ..checkpoints.hub import resolve
from ..checkpoints.loading import check_finite, load_tokenizer, tokenizer_folder
from ..checkpoints.opening import build, check_plan, open_checkpoint
from ..checkpoints.quantization import (
    GROUPS,
    MODES,
    SECTIONS,
    Format,
    Quantization,
)
from ..checkpoints.shards import (
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
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")  # of mlx-lm


def convert(
    hf_path: str,
    mlx_path: str,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    quant_predicate: str | None = None,
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
        q_bits: bits per weight; the mode's default when `None`.
        q_group_size: weights per scale; the mode's default when `None`.
        q_mode: mode of `mx.quantize`: affine, mxfp4, nvfp4 or mxfp8.
        quant_predicate: mlx-lm's recipe of mixed bits, such as mixed_4_6.
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
    default = _default_format(q_bits, q_group_size, q_mode, quant_predicate)
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
    quantization = Quantization()
    if quantize:
        if checkpoint.quantization.formats:
            raise InputError(f"{checkpoint.folder} is already quantized; leave out -q")
        if default.bits == 8 and family is OPENVLA:
            log.warning(INT8_WARNING)
        quantization = _plan(family, config, default, quant_predicate)
    tensors = _stream(family, checkpoint, dtype, quantization)
    size = _bytes_to_write(family, checkpoint, dtype, quantization)
    with new_folder(target) as folder:
        if checkpoint.base:  # first, so that the policy's own files replace the base's
            copy_companions(checkpoint.base, folder)
        copy_companions(checkpoint.folder, folder)
        copy_beside(beside, folder)
        target_config = _target_config(config, dtype, quantization)
        write_config(folder, carry(pruner, target_config, folder))
        write_shards(folder, tensors, size)
    return target


def _default_format(
    bits: int | None, group: int | None, mode: str, recipe: str | None
) -> Format:
    """Return the format of matrices that no recipe names.

    Raises `InputError` for a format that MLX does not have, or a recipe with a format.
    """
    if recipe is not None and (recipe not in RECIPES or bits or mode != "affine"):
        raise InputError(
            f"the recipe {recipe!r} cannot be used with q_bits {bits} and mode "
            f"{mode!r}; expected one of {', '.join(RECIPES)}, mode affine and no bits, "
            "which the recipe sets"
        )
    sizes = MODES.get(mode, [(64, 4)])[0]
    sizes = [a if b is None else b for a, b in zip(sizes, (group, bits), strict=True)]
    return Format(*sizes, mode).check("the conversion has")


def _plan(
    family: Family, config: dict, default: Format, recipe: str | None
) -> Quantization:
    """Return the formats that mlx-lm gives to the matrices of the language model.

    Logs a warning with the number of matrices whose width is not in whole groups, which
    stay float. Raises `InputError` when none would be quantized.
    """
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    model = build(family, config, False)
    choose = model.quant_predicate
    if recipe is not None:
        language, group = model.language_model, default.group_size
        # mlx-lm calls it with two values, against its annotation.
        mixed: Any = mixed_quant_predicate_builder(recipe, language, group)
        choose = lambda path, module: (  # noqa: E731
            model.quant_predicate(path, module)
            and mixed(path.removeprefix("language_model."), module)
        )
    paths = [p for p, m in model.named_modules() if model.quant_predicate(p, m)]
    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints bits per weight
        group, bits, mode = default
        model, _ = quantize_model(model, {}, group, bits, mode, quant_predicate=choose)
    formats = {
        path: Format(module.group_size, module.bits, module.mode)
        for path, module in model.named_modules()
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    }
    floats = [path for path in paths if path not in formats]
    if floats:
        state = (
            f"groups of {default.group_size} do not divide the width of {len(floats)} "
            f"of {len(paths)} matrices of the language model, such as {floats[0]}"
        )
        if not formats:
            fitting = [str(group) for group in GROUPS if group < default.group_size]
            raise InputError(
                f"{state}, so nothing would be quantized; expected "
                f"{' or '.join(fitting) or 'mode nvfp4, with groups of 16'}"
            )
        log.warning("%s: these stay float", state)
    return Quantization(formats, default)


def _stream(
    family: Family, checkpoint: Checkpoint, dtype: str | None, plan: Quantization
) -> Iterator[tuple[str, mx.array]]:
    """Yield the MLX-layout tensors by name; release each once it is consumed."""
    weights = family.to_mlx_layout(checkpoint.load())
    names = sorted(weights)
    for name in tqdm(names, desc="converting", unit="tensor", disable=None):
        array = weights.pop(name)
        if mx.issubdtype(array.dtype, mx.floating):
            check_finite({name: array})
            array = _cast(name, array, DTYPES[dtype]) if dtype else array
        parts = _packed(name, array, plan)
        del array
        mx.eval(parts)  # else a quantized matrix stays in memory with the shard
        yield from parts.items()
        del parts


def _cast(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return a tensor in another type; raise `InputError` for a number beyond it."""
    result = array.astype(dtype)
    if not mx.all(mx.isfinite(result)).item():
        kind, other = str(dtype).rpartition(".")[2], "bfloat16"
        raise InputError(
            f"tensor {name} has numbers up to {mx.max(mx.abs(array)).item():.3g}, and "
            f"the largest of {kind} is {mx.finfo(dtype).max:.5g}; expected --dtype "
            + ("float32" if kind == other else other)
        )
    return result


def _target_config(config: dict, dtype: str | None, plan: Quantization) -> dict:
    config = {k: v for k, v in config.items() if k != "auto_map"}
    if dtype:
        config = _typed(config, dtype) | {"torch_dtype": dtype}
    if plan.formats:
        config |= dict.fromkeys(SECTIONS, plan.section)
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
    family: Family, checkpoint: Checkpoint, dtype: str | None, plan: Quantization
) -> int:
    """Return the bytes that the converted tensors need on disk, from lazy arrays."""
    total = 0
    for name, array in family.to_mlx_layout(checkpoint.load()).items():
        if dtype and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(DTYPES[dtype])
        total += sum(part.nbytes for part in _packed(name, array, plan).values())
    return total


def _packed(name: str, array: mx.array, plan: Quantization) -> dict[str, mx.array]:
    """Return a tensor, or the tensors of a matrix to quantize, by name. Lazy."""
    path = name.removesuffix(".weight")
    if path == name or path not in plan.formats:
        return {name: array}
    return plan.formats[path].pack(path, array)
