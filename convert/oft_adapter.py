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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx

from ..checkpoints.loading import check_finite
from ..checkpoints.peft import FACTOR, pair, read_settings, read_tensors
from ..checkpoints.quantization import FLOATS
from ..checkpoints.shards import ADAPTER, Checkpoint, Shape, Tensor, load_tensors
from ..errors import InputError
from .sidefiles import plain

CHOICES = ("auto", "merge", "ignore")
_MEASURED = 16  # number of matrices to measure, those with the largest change
_CLEAR = 0.25  # largest distance of a clear share from 0 or 1
_SURE = 0.05  # largest standard error of a clear share


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
        "mlx_tokprune convert --lora-adapter merge or --lora-adapter ignore"
    )


def read_adapter(folder: Path, checkpoint: Checkpoint) -> Adapter:
    """Read an adapter's settings and headers, and check them against the checkpoint.

    Raises `InputError` for a setting that is not supported, or factors that do not fit.
    """
    settings = read_settings(folder)
    file, header = read_tensors(folder)
    factors = pair(_places(header, checkpoint, file), file)
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
        _check_fit(
            name, checkpoint.tensors[name], header[down], header[up], settings.rank
        )
        matched[name] = (down, up)
    check_finite({f"{n} of {file}": a for n, a in load_tensors(file).items()})
    return Adapter(file, settings.of("")[1], matched)


def _places(
    header: Mapping[str, Tensor], checkpoint: Checkpoint, file: Path
) -> dict[tuple[str, str], str]:
    """Return tensor names by path and part, without towers from a side file.

    OFT wraps the towers' blocks with FiLM after it adds the adapter, and saves them
    whole in the side file, with the factors.
    """
    has_side_tower = any(n.startswith("vision_backbone.") for n in checkpoint.extra)
    places = {}
    for name in header:
        match = FACTOR.fullmatch(name)
        if match is None or match[2] not in ("lora_A", "lora_B"):
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
            raise InputError(f"{file} has {match[2]} of {path} twice")
        places[path, match[2]] = name
    return places


def _check_fit(name: str, weight: Tensor, down: Tensor, up: Tensor, rank: int) -> None:
    ones: Shape = (1,) * (len(weight.shape) - 2)
    fits = len(weight.shape) >= 2 and weight.dtype in FLOATS
    fits = fits and down.shape == (rank, *weight.shape[1:])
    if not fits or up.shape != (weight.shape[0], rank, *ones):
        raise InputError(
            f"the adapter's factors {up.shape} and {down.shape} of rank {rank} do not "
            f"fit tensor {name}, which has shape {weight.shape} and type {weight.dtype}"
        )


def _matrix(array: mx.array) -> mx.array:
    """Return `array` in float32 as a matrix with one row per output."""
    return array.astype(mx.float32).reshape(array.shape[0], -1)
