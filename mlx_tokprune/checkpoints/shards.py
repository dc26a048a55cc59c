"""Checkpoint folders: find shards, check them, read lazily, write shard by shard.

This module handles safetensors files and folders for all model families. Headers are
read and checked before any tensor, so a damaged checkpoint is refused before work
begins.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..files import read_json, write_arrays
from .hub import COMPANIONS
from .quantization import FLOATS, Quantization, Shape

ADAPTER = "lora_adapter"  # folder of OpenVLA-OFT, beside or instead of the weights
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 1 << 30
_ORBAX = (".", "params", "default")  # folders that can hold Orbax's _METADATA
_LARGEST_COMPANION = 256 << 20  # bytes
Weights = dict[str, mx.array]
# Safetensors types that MLX reads.
_DTYPES = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", *FLOATS)
# Safetensors types of the arrays that a conversion computes or passes on.
TYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
TYPES |= {mx.uint32: "U32", mx.uint8: "U8"}


@dataclass(frozen=True)
class Tensor:
    """File, type and shape of a tensor, from a safetensors header."""

    file: Path
    dtype: str
    shape: Shape


@dataclass(eq=False)
class Checkpoint:
    """Opened checkpoint folder, whose tensors are not read yet.

    Attributes:
        folder: checkpoint folder.
        config: content of config.json.
        tensors: header entries by tensor name.
        extra: tensors from other files that are in memory already.
        base: folder of config and weights, when they are not in `folder`.
        finish: function applied to the weights by `load`, such as an adapter merge.
        notes: messages for the user about how the checkpoint was read.
        settings: values that the caller sets in place of the checkpoint's.
        quantization: formats of the quantized matrices, read by `open_checkpoint`.
    """

    folder: Path
    config: dict
    tensors: dict[str, Tensor]
    extra: Weights = field(default_factory=dict)
    base: Path | None = None
    finish: Callable[[Weights], Weights] | None = None
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    quantization: Quantization = field(default_factory=Quantization)

    @classmethod
    def open(cls, folder: str | Path, base: Path | None = None) -> "Checkpoint":
        """Read config and headers. Raises `InputError` for an unusable folder."""
        folder = Path(folder)
        for path in (folder, base):
            _check_folder(path or folder)
        bare = not any(folder.glob("*.safetensors"))
        if base and not bare:
            raise InputError(
                f"{folder} has weights of its own; leave out the base model {base}"
            )
        if not base and bare and (folder / ADAPTER).is_dir():
            raise InputError(
                f"{folder} has {ADAPTER} but no weights, as OpenVLA-OFT saves a policy "
                "that is to be merged later; expected its base model, as in "
                "mlx_tokprune convert --base-model openvla/openvla-7b"
            )
        config = read_json((base or folder) / "config.json")
        tensors: dict[str, Tensor] = {}
        for file in _shards(base or folder):
            header = read_header(file)
            for name in header.keys() & tensors.keys():
                raise InputError(
                    f"tensor {name} is both in {tensors[name].file.name} and in "
                    f"{file.name}; expected it once"
                )
            tensors.update(header)
        return cls(folder, config, tensors, base=base)

    def with_extra(self, extra: Weights, replaced: tuple[str, ...]) -> "Checkpoint":
        """Return a copy with tensors that are in memory, named as in the folder.

        replaced: beginnings of the names of stored tensors that the copy leaves out.
        """
        tensors = {n: t for n, t in self.tensors.items() if not n.startswith(replaced)}
        for name, array in extra.items():
            tensors[name] = Tensor(self.folder, TYPES[array.dtype], array.shape)
        return replace(self, tensors=tensors, extra=extra)

    def load(self) -> Weights:
        """Return all tensors by name, lazily: MLX reads a tensor on evaluation."""
        weights: Weights = {}
        stored = {n: t for n, t in self.tensors.items() if n not in self.extra}
        for file in sorted({t.file for t in stored.values()}):
            weights.update(load_tensors(file))
        weights = {n: weights[n] for n in stored}
        return (self.finish(weights) if self.finish else weights) | self.extra


def load_tensors(file: Path) -> Weights:
    """Return the tensors of a safetensors file by name, lazily."""
    return cast(Weights, mx.load(str(file), format="safetensors"))


def _check_folder(folder: Path) -> None:
    """Raise `InputError` unless `path` is a folder of files and folders.

    Reading a pipe or a device in it could block forever.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; expected a checkpoint folder with "
            "config.json and safetensors files"
        )
    weights = any(folder.glob("*.safetensors"))
    if not weights and any((folder / p / "_METADATA").is_file() for p in _ORBAX):
        raise InputError(
            f"{folder} is an Orbax checkpoint, which is not read; expected the "
            "safetensors that lerobot saves: take lerobot/pi0fast-base, or write the "
            "weights under lerobot's names (openpi's convert_jax_model_to_pytorch.py "
            "refuses pi0-FAST)"
        )
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(
                f"{path} is neither a file nor a folder; expected a checkpoint of files"
            )


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("model*.safetensors"))
        files = files or sorted(folder.glob("*.safetensors"))
        if files:
            return files
        torch = sorted(p.name for p in folder.glob("*.bin"))
        content = f"only {torch[0]}, a torch pickle" if torch else "no weights"
        raise InputError(
            f"{folder} has {content}; expected safetensors files "
            f"(model.safetensors, or shards with {INDEX})"
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index} has no weight_map of tensor names to shards")
    return [_shard(folder, name) for name in sorted(set(map(str, names.values())))]


def _shard(folder: Path, name: str) -> Path:
    if Path(name).name != name or not os.path.isfile(folder / name):
        raise InputError(
            f"{INDEX} names the shard {name!r}, which is missing from {folder}; "
            "download it again: shards are files inside the folder"
        )
    return folder / name


def read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file by name, from its header.

    Raises `InputError` for a damaged header, overlapping tensors, a file of another
    length than the header gives, or types that MLX does not read.
    """
    if not file.is_file():
        raise InputError(f"{file} is not a file; expected a safetensors file")
    try:
        with safe_open(file, framework="numpy") as stream:
            slices = {name: stream.get_slice(name) for name in stream.keys()}
            tensors = {
                name: Tensor(file, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        reason = str(error).partition("deserializing header: ")[2]
        raise InputError(
            f"{file} is truncated or not a safetensors file ({reason}); expected the "
            "whole file, so download it again"
        ) from None
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise InputError(
                f"tensor {name} of {file} has type {tensor.dtype}; expected one that "
                f"MLX reads: {', '.join(_DTYPES)}"
            )
    return tensors


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    source: str,
) -> None:
    """Raise `InputError` unless `shapes` has exactly the expected names and shapes.

    source: description of the tensors' origin for the message.
    """
    for name, shape in expected.items():
        if name not in shapes:
            more = len(expected.keys() - shapes.keys()) - 1
            rest = f" and {more} more" if more else ""
            raise InputError(f"{source} lacks tensor {name}{rest}")
        if tuple(shapes[name]) != tuple(shape):
            raise InputError(
                f"tensor {name} of {source} has shape {tuple(shapes[name])}; "
                f"expected {tuple(shape)}"
            )
    if extra := sorted(shapes.keys() - expected.keys()):
        rest = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise InputError(f"{source} has the unknown tensor {extra[0]}{rest}")


def copy_beside(files: Mapping[str, Path], target: Path) -> None:
    """Copy files from other folders into `target`, under the names in `files`."""
    for name, path in files.items():
        _check_companion(path, path.parent)
        shutil.copyfile(path, target / name)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, licence and model card into `target`; code is not copied."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                _check_companion(path, source)
                shutil.copyfile(path, target / path.name)


def _check_companion(path: Path, source: Path) -> None:
    """Raise `InputError` for a file that is too large, or a link that leaves `source`.

    Links into the blobs of the Hugging Face cache that `source` belongs to are allowed.
    """
    allowed = [source.resolve()]
    allowed += [p.parent / "blobs" for p in allowed[0].parents if p.name == "snapshots"]
    if not any(path.resolve().is_relative_to(folder) for folder in allowed):
        raise InputError(
            f"{path} is a link that leaves {source}; expected the file itself"
        )
    if path.stat().st_size > _LARGEST_COMPANION:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes; expected at most "
            f"{_LARGEST_COMPANION} beside the weights"
        )


def write_config(folder: Path, config: dict) -> None:
    """Write `config` as config.json with sorted keys."""
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, mx.array]],
    total_bytes: int,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write lazy `tensors` as one safetensors file or as shards with an index.

    Each shard is evaluated, written and released before the next one, so memory holds
    one shard. total_bytes: estimate of the size, used only for the check of free disk
    space. shard_bytes: largest size of a shard. Raises `OSError` (ENOSPC) when the disk
    is full.
    """
    if shutil.disk_usage(folder).free < total_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written: list[tuple[Path, list[str], int]] = []
    shard: dict[str, mx.array] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            written.append(_write_shard(folder, len(written), shard))
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
        del array  # or this reference would keep the tensor in memory
    written.append(_write_shard(folder, len(written), shard))
    if len(written) == 1:
        written[0][0].rename(folder / "model.safetensors")
        return
    names: dict[str, str] = {}
    for number, (path, keys, _) in enumerate(written, 1):
        name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / name)
        names |= dict.fromkeys(keys, name)
    size = sum(nbytes for *_, nbytes in written)
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(
    folder: Path, number: int, shard: dict[str, mx.array]
) -> tuple[Path, list[str], int]:
    """Write and empty `shard`; return its path, tensor names and bytes."""
    path = folder / f"shard-{number}.safetensors"
    names, nbytes = list(shard), sum(a.nbytes for a in shard.values())
    write_arrays(path, shard, format="mlx")
    shard.clear()
    mx.clear_cache()
    return path, names, nbytes
