"""OpenVLA-OFT's side files: torch pickles beside the shards.

They are read with `weights_only=True`, so that a pickle can hold only tensors.
Conversion needs torch (the extra `oft`) for them; inference does not.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ..checkpoints.shards import Checkpoint
from ..errors import InputError

if TYPE_CHECKING:  # torch is an extra
    import torch

_FILE = re.compile(
    r"(action_head|proprio_projector|vision_backbone|noisy_action_projector)"
    r"--.*checkpoint\.pt$"
)


def find_side_files(folder: Path) -> dict[str, Path]:
    """Return the side file of each part; raise `InputError` when a part has two."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.pt")):
        match = _FILE.match(path.name)
        if not match:
            continue
        if match[1] in files:
            raise InputError(
                f"{folder} has both {files[match[1]].name} and {path.name}; expected "
                f"one {match[1]} file, so move the others away"
            )
        files[match[1]] = path
    return files


def add_side_files(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the side files' tensors, named after their part.

    Raises `InputError` for a diffusion policy, or side files without an action head.
    """
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
            full_name = name if name.startswith(f"{part}.") else f"{part}.{name}"
            extra[full_name] = array
    extra = _merge_lora({plain(k): v for k, v in extra.items()})
    # A FiLM backbone replaces the one in the shards.
    replaced = ("vision_backbone.",) if "vision_backbone" in files else ()
    return checkpoint.with_extra(extra, replaced)


def plain(name: str) -> str:
    """Return a tensor name without the wrappers of data parallelism and FiLM."""
    name = name.replace(".module.", ".")
    name = name.replace("vision_backbone.vision_backbone.", "vision_backbone.")
    return re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", name)


def _merge_lora(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Merge LoRA adapters that a FiLM backbone was saved with into their matrices.

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
        tensors = {str(name): tensor.detach() for name, tensor in state.items()}
    except Exception:  # a damaged pickle can raise any error
        raise InputError(
            f"{path} is damaged or holds more than a flat table of tensors, and is "
            "refused; expected a state_dict as torch.save writes it"
        ) from None
    return {
        name.removeprefix("module."): _to_mlx(tensor, f"{name} of {path}")
        for name, tensor in tensors.items()
    }


def _to_mlx(tensor: "torch.Tensor", name: str) -> mx.array:
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
    return mx.array(tensor.float().numpy()).astype(types[tensor.dtype])
