"""OpenVLA-OFT's `lora_adapter/`, in peft's format: added to the weights beside it.

No file says whether weights hold the adapter already. OFT's training and its merge
script leave it beside weights that do; who lays the base model's weights beside it has
weights that do not. A wrong guess gives a policy that runs and fails, so the weights
are asked: the projection of a matrix W on the adapter's change D, <W, D> / <D, D>, is
1 + x in merged weights and x in others, where x is near 0, since D is no part of what
a base model knows. Where that is not clear, or D too small to say, nothing is guessed.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..checkpoints.shards import ADAPTER, FLOATS, Checkpoint, Shape, Tensor, read_header
from ..errors import InputError
from ..files import read_json
from .sidefiles import plain

CHOICES = ("auto", "merge", "ignore")
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_ASKED = 16  # matrices, the most changed ones
_CLEAR = 0.25  # a share this near to 0 or 1 is one
_SURE = 0.05  # standard error of a share, at most
# Settings that say nothing of how factors are added; any other is unset, or refused.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config"),
    *("megatron_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "target_modules", "task_type"),
}
_READ = {"peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora"}
# Others move part of the base model's weights into the factors before training.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """Factors by the checkpoint's tensor names: W becomes W + scale * B @ A."""

    file: Path
    scale: float
    factors: Mapping[str, tuple[str, str]]  # (A, B)

    def add(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """All weights, those that are changed computed in float32. Lazy."""
        stored = _load(self.file)
        for name, (down, up) in self.factors.items():
            change = self.scale * (_matrix(stored[up]) @ _matrix(stored[down]))
            weight = weights[name]
            exact = weight.astype(mx.float32) + change.reshape(weight.shape)
            weights[name] = exact.astype(weight.dtype)
        return weights

    def share_in(self, weights: dict[str, mx.array]) -> tuple[float, float] | None:
        """How much of the adapter the weights hold, and the standard error of that.

        `None` for an adapter that changes nothing. Takes what it reads out of
        `weights`, so that memory holds one matrix.
        """
        stored, sizes = _load(self.file), {}
        for name, factors in self.factors.items():
            down, up = (_matrix(stored.pop(factor)) for factor in factors)
            size = mx.sum((up.T @ up) * (down @ down.T)).item()  # of up @ down
            sizes[name] = size * self.scale**2
        asked = sorted(sizes, key=lambda name: (-sizes[name], name))[:_ASKED]
        total = sum(sizes[name] for name in asked)
        if not total:
            return None
        stored, found, spread = _load(self.file), 0.0, 0.0
        for name in asked:
            down, up = (_matrix(stored.pop(factor)) for factor in self.factors[name])
            weight = _matrix(weights.pop(name))
            found += self.scale * mx.sum((up.T @ weight) * down).item()
            spread += mx.mean(weight * weight).item() * sizes[name]
            del weight
            mx.clear_cache()
        return found / total, math.sqrt(spread) / total


def add_adapter(checkpoint: Checkpoint, how: str = "auto") -> Checkpoint:
    """The checkpoint with its adapter in its weights, whichever way it got there.

    how: `merge` adds it, `ignore` leaves it, `auto` adds it where the weights do not
    hold it. Raises `InputError` for an adapter that cannot be added, or when the
    weights do not say.
    """
    if how not in CHOICES:
        raise InputError(
            f"unknown lora_adapter {how!r}; expected one of {', '.join(CHOICES)}"
        )
    folder = checkpoint.folder / ADAPTER
    if not folder.is_dir():
        if how == "merge" or checkpoint.base:
            raise InputError(
                f"{checkpoint.folder} has no {ADAPTER} folder, so there is nothing to "
                "merge; leave out --lora-adapter and --base-model"
            )
        return checkpoint
    if how == "ignore":
        checkpoint.notes.append(f"{ADAPTER} was left out, as you said")
        return checkpoint
    adapter = read_adapter(folder, checkpoint)
    said, merging = _decide(adapter, checkpoint, how)
    count = f"{len(adapter.factors)} matrices"
    if merging:
        checkpoint.notes.append(
            f"{ADAPTER} was added to {count} of the weights ({said})"
        )
        checkpoint.finish = adapter.add
    else:
        checkpoint.notes.append(f"{ADAPTER} was not added to the weights: {said}")
    return checkpoint


def _decide(adapter: Adapter, checkpoint: Checkpoint, how: str) -> tuple[str, bool]:
    """Why, and whether the adapter is added."""
    measured = adapter.share_in(checkpoint.load())
    if measured is None:
        return "it changes nothing", False
    share, error = measured
    said = f"they held {max(share, 0):.2f} of it"
    if how == "merge":
        return f"{said}, and you said so", True
    if error <= _SURE and abs(share) <= _CLEAR:
        return said, True
    if error <= _SURE and abs(share - 1) <= _CLEAR:
        return f"they hold {share:.2f} of it already", False
    raise InputError(
        f"the weights of {checkpoint.folder} hold {share:.2f} (+- {error:.2f}) of its "
        f"{ADAPTER}, which does not tell whether they were merged; say it, with "
        "mlx_tokprune.convert --lora-adapter merge or --lora-adapter ignore"
    )


def read_adapter(folder: Path, checkpoint: Checkpoint) -> Adapter:
    """Settings and headers of an adapter, checked against the checkpoint's."""
    rank, scale = _read_settings(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        found = sorted(path.name for path in folder.glob("adapter_model*"))
        raise InputError(
            f"{folder} has {found[0] if found else 'no weights'}; expected "
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
    """Rank, and what the product of the factors is multiplied with."""
    path = folder / "adapter_config.json"
    if not path.exists():
        raise InputError(f"{folder} has no adapter_config.json; expected peft's folder")
    settings = read_json(path)

    def refuse(name: str, expected: str):
        raise InputError(
            f"{path} says {name} {settings.get(name)!r}; expected {expected}"
        )

    if settings.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'")
    if settings.get("bias", "none") != "none":
        refuse("bias", "'none', all that is merged here")
    for name in sorted(settings.keys() - _HARMLESS - _READ):
        if settings[name]:
            refuse(name, "it unset, as this is not merged here")
    start = settings.get("init_lora_weights")
    if not any(start is known or start == known for known in _STARTS):
        refuse("init_lora_weights", "a start that leaves the base model as it was")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank < 1 << 16:
        refuse("r", "a whole number from 1 to 65535")
    if type(alpha) not in (int, float) or not 1e-6 < alpha < 1e6:
        refuse("lora_alpha", "a number between 1e-6 and 1e6")
    root = settings.get("use_rslora", False)
    if type(root) is not bool:
        refuse("use_rslora", "true or false")
    return rank, alpha / (math.sqrt(rank) if root else rank)


def _places(header: Mapping, checkpoint: Checkpoint, file: Path) -> dict:
    """(path, A or B) -> name, without towers that come from a side file.

    OFT wraps the blocks of towers with FiLM after the adapter is laid on, and saves
    them whole in that file, factors included.
    """
    elsewhere = any(name.startswith("vision_backbone.") for name in checkpoint.extra)
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
        if tower and not elsewhere and path != match[1]:
            raise InputError(
                f"{file} is of a policy with FiLM, but {checkpoint.folder} has no "
                "vision_backbone--*_checkpoint.pt; expected both, as OpenVLA-OFT saves "
                "them"
            )
        if tower and elsewhere:
            continue
        if (path, match[2]) in places:
            raise InputError(f"{file} has lora_{match[2]} of {path} twice")
        places[path, match[2]] = name
    return places


def _pair(places: Mapping, header: Mapping, file: Path) -> dict[str, tuple[str, str]]:
    factors = {}
    for path, which in places:
        other = "B" if which == "A" else "A"
        if (path, other) not in places:
            raise InputError(
                f"{file} has lora_{which} of {path} but no lora_{other}; expected both"
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
    right = len(weight.shape) >= 2 and weight.dtype in FLOATS
    right = right and down.shape == (rank, *weight.shape[1:])
    if not right or up.shape != (weight.shape[0], rank, *ones):
        raise InputError(
            f"the adapter's factors {up.shape} and {down.shape} of rank {rank} do not "
            f"fit tensor {name}, which has shape {weight.shape} and type {weight.dtype}"
        )


def _check_finite(file: Path) -> None:
    """One tensor after the other, so that memory holds one."""
    stored = _load(file)
    for name in sorted(stored):
        if not mx.all(mx.isfinite(stored.pop(name))).item():
            raise InputError(
                f"tensor {name} of {file} has numbers that are not finite; the adapter "
                "is damaged, or its training went wrong"
            )


def _load(file: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(file), format="safetensors"))


def _matrix(array: mx.array) -> mx.array:
    """In float32; of a convolution one row for each output."""
    return array.astype(mx.float32).reshape(array.shape[0], -1)
