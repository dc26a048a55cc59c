"""Low-rank adapters of mlx-lm, mlx-vlm and peft, added to a loaded model.

All three train W + scale * (A B), and DoRA the length of its rows, too; names,
orientation and the place of the scale differ.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..errors import InputError, nearest
from ..files import object_of, read_json
from .opening import MISFITS, named_tensors
from .peft import FACTOR, PATTERNS, pair, read_settings, read_tensors
from .quantization import Format
from .shards import check_shapes, load_tensors, read_header

PROJECTOR = "projector.safetensors"  # optional file of an adapter
_TRAINERS = (
    "an adapter of mlx_tokprune train lora, mlx_lm.lora, mlx-vlm's trainer or peft"
)
_PLACES = ("language_model.", "mm_projector.")  # layers that an adapter can change
# Ends of mlx-vlm's tensor names, those of its older versions included.
_PARTS = {"lora_a": "a", "lora_b": "b", "A": "a", "B": "b", "m": "m"}


class Factors(NamedTuple):
    """Trained change of one layer.

    a: (inputs, rank). b: (rank, outputs). scale: of their product. m: (outputs,)
    lengths of DoRA, or `None`.
    """

    a: mx.array
    b: mx.array
    scale: float
    m: mx.array | None = None


def add_adapter(
    model: Any,
    folder: Path,
    rename: Callable[[str], str | None],
    formats: Mapping[str, Format],
) -> None:
    """Add the adapter of a folder to a model, whichever trainer wrote it.

    rename: from original tensor names to MLX names. formats: of the checkpoint's
    quantized matrices. Raises `InputError` for an adapter that does not fit, or has a
    setting that is not followed.
    """
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} has no adapter_config.json; expected {_TRAINERS}")
    config = read_json(folder / "adapter_config.json")
    if "peft_type" in config:
        _attach(model, _from_peft(folder, rename), folder)
        return
    if not (folder / "adapters.safetensors").is_file():
        raise InputError(f"{folder} has no adapters.safetensors; expected {_TRAINERS}")
    scale = object_of(config, "lora_parameters").get("scale", 1)
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise InputError(
            f"the adapter {folder} has the scale {scale!r}; expected a number"
        )
    file = folder / "adapters.safetensors"
    if any(name.startswith("language_model.") for name in read_header(file)):
        _check_base(object_of(config, "base_quantization"), formats, folder)
        factors, projector = _from_mlx_vlm(file, config)
        _attach(model, factors, folder)
    else:
        _add_mlx_lm(model, folder)
        projector = _read(folder / PROJECTOR)
    _set_projector(model, projector, folder)


def _add_mlx_lm(model: Any, folder: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    try:
        load_adapters(model.language_model, str(folder))
    except (*MISFITS, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the adapter {folder} does not fit ({reason})") from None


def _read(file: Path) -> dict[str, mx.array]:
    """Return the tensors of a file, none without the file."""
    if not file.is_file():
        return {}
    read_header(file)  # raises `InputError` for a damaged file
    return load_tensors(file)


def _set_projector(model: Any, tensors: Mapping[str, mx.array], folder: Path) -> None:
    """Replace the projector's weights by those that were trained with the adapter."""
    if not tensors:
        return
    own = projector_of(model)
    check_shapes(
        {name: array.shape for name, array in tensors.items()},
        {name: array.shape for name, array in own.items()},
        f"the projector of the adapter {folder}",
    )
    new = [(name, array.astype(own[name].dtype)) for name, array in tensors.items()]
    model.load_weights(new, strict=False)


def projector_of(model: nn.Module) -> dict[str, mx.array]:
    """Return the projector's tensors, by their names in a checkpoint."""
    named = named_tensors(model).items()
    return {n: array for n, array in named if n.startswith("mm_projector.")}


def trains_projector(folder: Path) -> bool:
    """Return whether an adapter's folder has weights of the projector."""
    files = (folder / PROJECTOR, folder / "adapters.safetensors")
    return any(
        name.startswith("mm_projector.") and name.endswith((".weight", ".bias"))
        for file in files
        if file.is_file()
        for name in read_header(file)
    )


# Other trainers -----------------------------------------------------------------------


def _from_mlx_vlm(
    file: Path, config: Mapping
) -> tuple[dict[str, Factors], dict[str, mx.array]]:
    """Return the factors by path, and the projector's trained weights, usually none."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise InputError(
            f"{file} was written by mlx-vlm with fine_tune_type {kind!r}; expected "
            "lora or dora: all weights of a model belong in a folder for --model"
        )
    parameters = object_of(config, "lora_parameters") or config
    rank: Any = parameters.get("rank")
    scale: Any = parameters.get("scale")
    if "lora_parameters" not in config:  # by an older version
        alpha = config.get("alpha", 0.1)
        numbers = type(rank) is int and type(alpha) in (int, float)
        scale = alpha / rank if numbers and rank > 0 else None
    if scale is None or not math.isfinite(scale):
        raise InputError(
            f"adapter_config.json beside {file} gives no scale, or no rank and alpha; "
            "expected them, as mlx-vlm's trainer writes them"
        )
    parts: dict[str, dict[str, mx.array]] = {}
    projector = {}
    for name, array in _read(file).items():
        path, _, end = name.rpartition(".")
        if end in _PARTS:
            parts.setdefault(path, {})[_PARTS[end]] = array
        elif name.startswith("mm_projector."):
            projector[name] = array
        else:
            raise InputError(
                f"{file} has the tensor {name}; expected factors of low-rank adapters, "
                "or the projector's weights"
            )
    for path, tensors in parts.items():
        expected = {"a", "b", "m"} if kind == "dora" else {"a", "b"}
        if tensors.keys() != expected:
            raise InputError(
                f"{file} has {len(tensors)} tensors for {path}; expected "
                f"{len(expected)}, as {kind} has"
            )
        if (shape := tensors["a"].shape)[-1] != rank:
            raise InputError(
                f"{file} has factors of shape {shape} for {path}; expected the rank "
                f"{rank} of its settings"
            )
    return {p: Factors(**t, scale=scale) for p, t in parts.items()}, projector


def _check_base(base: Mapping, formats: Mapping[str, Format], folder: Path) -> None:
    """Raise `InputError` unless the adapter was trained on weights in these formats."""
    for path in base:
        entry: Any = object_of(base, path)
        trained = Format(*(entry.get(name) for name in Format._fields))
        if formats.get(path) != trained:
            own = formats.get(path, "floats")
            raise InputError(
                f"the adapter {folder} was trained on {path} in {trained}, and the "
                f"checkpoint has {own}; expected the checkpoint that it was trained on"
            )


def _from_peft(folder: Path, rename: Callable[[str], str | None]) -> dict[str, Factors]:
    """Return the factors by path in the MLX layout."""
    extra = folder / "non_lora_trainables.bin"
    if extra.exists():
        raise InputError(
            f"{extra} has weights that were trained beside the adapter; expected one "
            "checkpoint: merge both, as LLaVA's merge_lora_weights.py does"
        )
    settings = read_settings(folder, ("use_dora", *PATTERNS))
    file, header = read_tensors(folder)
    places: dict[tuple[str, str], str] = {}
    for name in header:
        match = FACTOR.fullmatch(name)
        if match is None:
            raise InputError(
                f"{file} has the tensor {name}; expected only lora_A and lora_B of "
                "linear layers"
            )
        places[match[1], match[2]] = name
    lengths = {p: n for (p, part), n in places.items() if part.endswith("_vector")}
    pairs = {key: n for key, n in places.items() if not key[1].endswith("_vector")}
    paths = pair(pairs, file)
    if lengths.keys() != (paths.keys() if settings.dora else set()):
        raise InputError(
            f"{file} has lora_magnitude_vector of {len(lengths)} layers; expected "
            f"{len(paths) if settings.dora else 0}, as its settings say use_dora "
            f"{settings.dora}"
        )
    stored, factors = load_tensors(file), {}
    for path, names in paths.items():
        new = rename(f"{path}.weight")
        if new is None:  # a layer that no answer depends on
            continue
        (rank, scale), (a, b) = settings.of(path), (stored[name].T for name in names)
        if a.ndim != 2 or a.shape[1] != rank:
            raise InputError(
                f"tensor {names[0]} of {file} has shape {header[names[0]].shape}; "
                f"expected the rank {rank} of its settings"
            )
        m = stored[lengths[path]].reshape(-1) if settings.dora else None
        factors[new.removesuffix(".weight")] = Factors(a, b, scale, m)
    return factors


def _attach(model: Any, factors: Mapping[str, Factors], folder: Path) -> None:
    """Put factors beside the layers that they change, as mlx-lm's modules."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    modules, layers = dict(model.named_modules()), []
    linear = {
        path: module
        for path, module in modules.items()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear))
        and path.startswith(_PLACES)
    }
    for path, (a, b, scale, m) in factors.items():
        if path not in linear:
            raise InputError(
                f"the adapter {folder} changes {path}; expected linear layers of this "
                "checkpoint's language model, or of FastVLM's projector: merge others "
                "into their base model (peft's merge_and_unload; for OpenVLA, convert "
                "a folder that has it as lora_adapter/)." + nearest(path, linear)
            )
        layer = linear[path]
        outputs, inputs = layer.weight.shape
        if isinstance(layer, nn.QuantizedLinear):
            inputs = layer.scales.shape[1] * layer.group_size
        sizes = (a.shape, b.shape, (outputs,) if m is None else m.shape)
        rank = a.shape[-1]
        if sizes != ((inputs, rank), (rank, outputs), (outputs,)):
            raise InputError(
                f"the adapter {folder} has factors {a.shape} and {b.shape} for {path}, "
                f"which has {inputs} inputs and {outputs} outputs; expected an adapter "
                "of this model"
            )
        if not all(mx.all(mx.isfinite(x)).item() for x in (a, b, m) if x is not None):
            raise InputError(
                f"the adapter {folder} has numbers for {path} that are not finite; it "
                "is damaged, or its training went wrong"
            )
        kind: Any = LoRALinear if m is None else DoRALinear
        adapted = kind.from_base(layer, r=rank, scale=scale)
        adapted.lora_a, adapted.lora_b = a, b
        if m is not None:
            adapted.m = m
        layers.append((path, adapted))
    model.update_modules(tree_unflatten(layers))
