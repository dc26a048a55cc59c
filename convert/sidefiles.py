"""OpenVLA-OFT's side files: torch pickles beside the shards.

Read with `weights_only=True`, so that a pickle can hold tensors and nothing else. Needs
torch (the extra `oft`), and only to convert.
"""

import re
from pathlib import Path

import mlx.core as mx

from ..checkpoints.shards import TYPES, Checkpoint, Tensor
from ..errors import InputError

_FILE = re.compile(
    r"(action_head|proprio_projector|vision_backbone|noisy_action_projector)"
    r"--.*checkpoint\.pt$"
)


def find_side_files(folder: Path) -> dict[str, Path]:
    """The side file of each part. Raises `InputError` when a part has two."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.pt")):
        match = _FILE.match(path.name)
        if not match:
            continue
        if match[1] in found:
            raise InputError(
                f"{folder} has both {found[match[1]].name} and {path.name}; expected "
                f"one {match[1]} file, so move the others away"
            )
        found[match[1]] = path
    return found


def add_side_files(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the side files' tensors under their part's name."""
    files = find_side_files(checkpoint.folder)
    if not files:
        return checkpoint
    if "noisy_action_projector" in files:
        raise InputError(
            f"{checkpoint.folder} has {files['noisy_action_projector'].name}, so it is "
            "a diffusion policy; expected an OpenVLA-OFT policy with L1 regression"
        )
    if "action_head" not in files:
        names = ", ".join(path.name for path in files.values())
        raise InputError(
            f"{checkpoint.folder} has {names} but no action_head--*_checkpoint.pt; "
            "expected both, as OpenVLA-OFT saves them"
        )
    extra: dict[str, mx.array] = {}
    for part, path in files.items():
        for name, array in _read(path).items():
            whole = name if name.startswith(f"{part}.") else f"{part}.{name}"
            extra[whole] = array
    extra = _merge_lora({plain(k): v for k, v in extra.items()})
    tensors = dict(checkpoint.tensors)
    if "vision_backbone" in files:
        # The FiLM backbone replaces the one in the shards.
        tensors = {n: t for n, t in tensors.items() if not _is_tower(n)}
    for name, array in extra.items():
        tensors[name] = Tensor(checkpoint.folder, TYPES[array.dtype], array.shape)
    folder, base = checkpoint.folder, checkpoint.base
    return Checkpoint(folder, checkpoint.config, tensors, extra, base)


def _is_tower(name: str) -> bool:
    return name.startswith("vision_backbone.")


def plain(name: str) -> str:
    """Without the wrappers of data parallelism and FiLM."""
    name = name.replace(".module.", ".")
    name = name.replace("vision_backbone.vision_backbone.", "vision_backbone.")
    return re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", name)


def _merge_lora(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Adapters that were left in a FiLM backbone, added to their matrices.

    OpenVLA-OFT trains with rank r and alpha min(r, 16).
    """
    merged = {}
    for name, array in tensors.items():
        if ".lora_" in name:
            continue
        if ".base_layer." not in name:
            merged[name] = array
            continue
        path, _, kind = name.rpartition(".base_layer.")
        down, up = (tensors.get(f"{path}.lora_{x}.default.weight") for x in "AB")
        if kind == "weight" and down is not None and up is not None:
            rank = down.shape[0]
            delta = up.astype(mx.float32) @ down.astype(mx.float32).reshape(rank, -1)
            delta = delta.reshape(array.shape) * (min(rank, 16) / rank)
            array = (array.astype(mx.float32) + delta).astype(array.dtype)
        merged[f"{path}.{kind}"] = array
    return merged


def _read(path: Path) -> dict[str, mx.array]:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path.name} is a torch pickle and torch is not installed; install it "
            "with pip install 'mlx-tokprune[oft]'"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged pickles run into whatever their bytes say
        raise InputError(
            f"{path} is damaged or holds more than tensors, and is refused; expected "
            "what torch.save makes of a state_dict"
        ) from None
    plain = isinstance(state, dict) and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    )
    if not plain:
        raise InputError(
            f"{path} does not hold a flat table of tensors and is refused; expected "
            "what torch.save makes of a state_dict"
        )
    return {
        name.removeprefix("module."): _to_mlx(tensor, f"{name} of {path}")
        for name, tensor in state.items()
    }


def _to_mlx(tensor, name: str) -> mx.array:
    import torch

    types = {
        torch.float32: mx.float32,
        torch.float64: mx.float32,
        torch.float16: mx.float16,
        torch.bfloat16: mx.bfloat16,
    }
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.dtype not in types:
        kind = f"{tensor.layout} {tensor.dtype}".replace("torch.", "")
        raise InputError(f"tensor {name} is {kind}; expected floats, dense")
    return mx.array(tensor.detach().float().numpy()).astype(types[tensor.dtype])
