"""OpenVLA-OFT's `lora_adapter/` in peft's format, merged into the weights beside it.

No file records whether the weights hold the adapter already. OFT's training and its
merge script leave the adapter beside merged weights; a folder made from the base
model's weights and the adapter is not merged. A policy with the adapter merged twice,
or not at all, runs and fails. So the share of the adapter in the weights is measured:
the projection of a matrix W on the adapter's change D, <W, D> / <D, D>, is 1 + x in
merged weights and x in base weights, where x is near 0, since a base model is not
trained towards D. Where the share is not clear, or D is too small to measure it, the
caller must choose.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

import mlx.core as mx

from ..checkpoints.shards import (
    ADAPTER,
    FLOATS,
    Checkpoint,
    Shape,
    Tensor,
    load_tensors,
    read_header,
)
from ..errors import InputError
from ..files import read_json
from .sidefiles import plain

CHOICES = ("auto", "merge", "ignore")
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_MEASURED = 16  # number of matrices to measure, those with the largest change
_CLEAR = 0.25  # largest distance of a clear share from 0 or 1
_SURE = 0.05  # largest standard error of a clear share
# Settings that do not affect how factors are added; any other must be unset.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config"),
    *("megatron_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "target_modules", "task_type"),
}
_READ = {"peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora"}
# Values of `init_lora_weights` that leave the base model's weights unchanged; others,
# such as pissa, move a part of them into the factors before training.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by the checkpoint's tensor names: W becomes W + scale * B @ A."""

    file: Path
    scale: float
    factors: Mapping[str, tuple[str, str]]  # (A, B)

    def add(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return `weights` with the adapter added in float32, lazily.

        Changes the dictionary in place; changed tensors keep their type.
        """
        stored = load_tensors(self.file)
        for name, (down, up) in self.factors.items():
            change = self.scale * (_matrix(stored[up]) @ _matrix(stored[down]))
            weight = weights[name]
            exact = weight.astype(mx.float32) + change.reshape(weight.shape)
            weights[name] = exact.astype(weight.dtype)
        return weights

    def share_in(self, weights: dict[str, mx.array]) -> tuple[float, float] | None:
        """Return the share of the adapter in `weights` and its standard error.

        Returns `None` for an adapter that changes nothing. Removes the matrices that it
        reads from `weights`, so that memory holds one matrix.
        """
        stored, sizes = load_tensors(self.file), {}
        for name, factors in self.factors.items():
            down, up = (_matrix(stored.pop(factor)) for factor in factors)
            # The squared norm of up @ down, without forming the product.
            size = mx.sum((up.T @ up) * (down @ down.T)).item()
            sizes[name] = size * self.scale**2
        largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:_MEASURED]
        total = sum(sizes[name] for name in largest)
        if not total:
            return None
        stored, product, spread = load_tensors(self.file), 0.0, 0.0
        for name in largest:
            down, up = (_matrix(stored.pop(factor)) for factor in self.factors[name])
            weight = _matrix(weights.pop(name))
            product += self.scale * cast(float, mx.sum((up.T @ weight) * down).item())
            spread += cast(float, mx.mean(weight * weight).item()) * sizes[name]
            del weight
            mx.clear_cache()
        return product / total, math.sqrt(spread) / total


def add_adapter(checkpoint: Checkpoint, mode: str = "auto") -> Checkpoint:
    """Merge a checkpoint's `lora_adapter/` into its weights, when they are loaded.

    mode: `merge` adds the adapter, `ignore` leaves it out, `auto` adds it unless the
    weights hold it already. Raises `InputError` for an adapter that cannot be added, or
    when `auto` finds no clear share of it in the weights.
    """
    if mode not in CHOICES:
        raise InputError(
            f"unknown lora_adapter {mode!r}; expected one of {', '.join(CHOICES)}"
        )
    folder = checkpoint.folder / ADAPTER
    if not folder.is_dir():
        if mode == "merge" or checkpoint.base:
            raise InputError(
                f"{checkpoint.folder} has no {ADAPTER} folder, so there is nothing to "
                "merge; leave out --lora-adapter and --base-model"
            )
        return checkpoint
    if mode == "ignore":
        checkpoint.notes.append(f"{ADAPTER} was left out, as requested")
        return checkpoint
    adapter = read_adapter(folder, checkpoint)
    reason, merging = _decide(adapter, checkpoint, mode)
    count = f"{len(adapter.factors)} matrices"
    if merging:
        checkpoint.notes.append(
            f"{ADAPTER} was added to {count} of the weights ({reason})"
        )
        checkpoint.finish = adapter.add
    else:
        checkpoint.notes.append(f"{ADAPTER} was not added to the weights: {reason}")
    return checkpoint


def _decide(adapter: Adapter, checkpoint: Checkpoint, mode: str) -> tuple[str, bool]:
    """Return the reason for a note, and whether to add the adapter."""
    measured = adapter.share_in(checkpoint.load())
    if measured is None:
        return "it changes nothing", False
    share, error = measured
    reason = f"they held {max(share, 0):.2f} of it"
    if mode == "merge":
        return f"{reason}, and the merge was requested", True
    if error <= _SURE and abs(share) <= _CLEAR:
        return reason, True
    if error <= _SURE and abs(share - 1) <= _CLEAR:
        return f"they hold {share:.2f} of it already", False
    raise InputError(
        f"the weights of {checkpoint.folder} hold {share:.2f} (+- {error:.2f}) of its "
        f"{ADAPTER}, which does not tell whether they were merged; choose with "
        "mlx_tokprune.convert --lora-adapter merge or --lora-adapter ignore"
    )


def read_adapter(folder: Path, checkpoint: Checkpoint) -> Adapter:
    """Read an adapter's settings and headers, and check them against the checkpoint.

    Raises `InputError` for a setting that is not supported, or factors that do not fit.
    """
    rank, scale = _read_settings(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        files = sorted(path.name for path in folder.glob("adapter_model*"))
        raise InputError(
            f"{folder} has {files[0] if files else 'no weights'}; expected "
            "adapter_model.safetensors, as peft saves it"
        )
    header = read_header(file)
    factors = _pair(_places(header, checkpoint, file), header, file)
    names = {plain(n): n for n in checkpoint.tensors if n not in checkpoint.extra}
    matched = {}
    for path, (down, up) in factors.items():
        name = names.get(f"{path}.weight")
        if name is None:
            raise InputError(
                f"{file} changes {path}, of which the model in "
                f"{checkpoint.base or checkpoint.folder} has no weight; expected "
                "its own adapter"
            )
        _check_fit(name, checkpoint.tensors[name], header[down], header[up], rank)
        matched[name] = (down, up)
    _check_finite(file)
    return Adapter(file, scale, matched)


def _read_settings(folder: Path) -> tuple[int, float]:
    """Return the rank, and the scale of the factors' product."""
    path = folder / "adapter_config.json"
    if not path.exists():
        raise InputError(f"{folder} has no adapter_config.json; expected peft's folder")
    settings = read_json(path)

    def refuse(name: str, expected: str) -> NoReturn:
        raise InputError(
            f"{path} says {name} {settings.get(name)!r}; expected {expected}"
        )

    if settings.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'")
    if settings.get("bias", "none") != "none":
        refuse("bias", "'none', the only supported value")
    for name in sorted(settings.keys() - _HARMLESS - _READ):
        if settings[name]:
            refuse(name, "it unset, as merging does not support it")
    start = settings.get("init_lora_weights")
    if not any(start is choice or start == choice for choice in _STARTS):
        refuse("init_lora_weights", "a start that leaves the base model unchanged")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank < 1 << 16:
        refuse("r", "a whole number from 1 to 65535")
    if type(alpha) not in (int, float) or not 1e-6 < alpha < 1e6:
        refuse("lora_alpha", "a number between 1e-6 and 1e6")
    root = settings.get("use_rslora", False)
    if type(root) is not bool:
        refuse("use_rslora", "true or false")
    return rank, alpha / (math.sqrt(rank) if root else rank)


def _places(
    header: Mapping[str, Tensor], checkpoint: Checkpoint, file: Path
) -> dict[tuple[str, str], str]:
    """Return tensor names by (path, "A" or "B"), without towers from a side file.

    OFT wraps the towers' blocks with FiLM after it adds the adapter, and saves them
    whole in the side file, with the factors.
    """
    has_side_tower = any(n.startswith("vision_backbone.") for n in checkpoint.extra)
    places = {}
    for name in header:
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(
                f"{file} has the tensor {name}; expected only lora_A and lora_B of "
                "linear layers and convolutions"
            )
        path = plain(match[1])
        tower = path.startswith("vision_backbone.")
        if tower and not has_side_tower and path != match[1]:
            raise InputError(
                f"{file} is of a policy with FiLM, but {checkpoint.folder} has no "
                "vision_backbone--*_checkpoint.pt; expected both, as OpenVLA-OFT saves "
                "them"
            )
        if tower and has_side_tower:
            continue
        if (path, match[2]) in places:
            raise InputError(f"{file} has lora_{match[2]} of {path} twice")
        places[path, match[2]] = name
    return places


def _pair(
    places: Mapping[tuple[str, str], str], header: Mapping[str, Tensor], file: Path
) -> dict[str, tuple[str, str]]:
    """Return the names of the factors (A, B) by path; refuse one without the other."""
    factors = {}
    for path, part in places:
        other = "B" if part == "A" else "A"
        if (path, other) not in places:
            raise InputError(
                f"{file} has lora_{part} of {path} but no lora_{other}; expected both"
            )
        factors[path] = (places[path, "A"], places[path, "B"])
    if not factors:
        raise InputError(f"{file} has no factors; expected lora_A and lora_B tensors")
    for names in factors.values():
        for name in names:
            if header[name].dtype not in FLOATS:
                raise InputError(
                    f"tensor {name} of {file} has type {header[name].dtype}; expected "
                    f"{', '.join(FLOATS)}"
                )
    return factors


def _check_fit(name: str, weight: Tensor, down: Tensor, up: Tensor, rank: int) -> None:
    ones: Shape = (1,) * (len(weight.shape) - 2)
    fits = len(weight.shape) >= 2 and weight.dtype in FLOATS
    fits = fits and down.shape == (rank, *weight.shape[1:])
    if not fits or up.shape != (weight.shape[0], rank, *ones):
        raise InputError(
            f"the adapter's factors {up.shape} and {down.shape} of rank {rank} do not "
            f"fit tensor {name}, which has shape {weight.shape} and type {weight.dtype}"
        )


def _check_finite(file: Path) -> None:
    """Raise `InputError` for NaN or infinity; memory holds one tensor."""
    stored = load_tensors(file)
    for name in sorted(stored):
        if not mx.all(mx.isfinite(stored.pop(name))).item():
            raise InputError(
                f"tensor {name} of {file} has numbers that are not finite; the adapter "
                "is damaged, or its training went wrong"
            )


def _matrix(array: mx.array) -> mx.array:
    """Return `array` in float32 as a matrix with one row per output."""
    return array.astype(mx.float32).reshape(array.shape[0], -1)
