"""Torch helpers of the golden scripts: loading weights, ranking, greedy decoding."""

from collections.abc import Mapping
from pathlib import Path

import torch
from command import Refusal
from safetensors.torch import load_file
from torch import nn

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
RATIOS = {"50": 0.5, "25": 0.25}


def import_timm():
    """Import timm beside a torchvision that was built for another torch.

    Such a torchvision lacks operators. They are never called, but timm needs their
    declarations.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            types = "Tensor dets, Tensor scores, float iou_threshold"
            _LIBRARY.define(f"{name}({types}) -> Tensor")
    import timm

    return timm


def load_into(
    tensors: Mapping[str, torch.Tensor], folder: Path, unused: set[str]
) -> None:
    """Fill a model's tensors, under the checkpoint's names, from its file.

    Raises `Refusal` unless the file holds exactly these tensors and the unused ones.
    """
    weights = load_file(folder / "model.safetensors")
    for name in sorted(set(weights) ^ (set(tensors) | unused)):
        what = "unknown" if name in weights else "missing"
        raise Refusal(f"{folder}/model.safetensors: {name} is {what}")
    for name, tensor in tensors.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            raise Refusal(f"{folder}/model.safetensors: {name} is {shapes}")
        tensor.copy_(weights[name])


def selections(scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return kept indices by case for (N,) scores by method; `""` keeps all."""
    everything = torch.arange(len(next(iter(scores.values()))))
    return {"": everything} | {
        f"{method}_{budget}": highest(values, ratio)
        for method, values in scores.items()
        for budget, ratio in RATIOS.items()
    }


def highest(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return the indices of the highest scores, ascending; ties go to the first."""
    keep = max(1, int(len(scores) * ratio))
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:keep].sort().values


def embed(language: nn.Module, ids) -> torch.Tensor:
    return language.get_input_embeddings()(torch.tensor([list(ids)]))


def answer(
    language: nn.Module, prompt: torch.Tensor, count: int, stop: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of the last 8 positions of (1, T, D), and greedy ids, uncached.

    Positions count the tokens present, so they are contiguous after pruning.
    """
    logits = last = language(inputs_embeds=prompt, use_cache=False).logits[0]
    ids: list[int] = []
    while True:
        ids.append(int(last[-1].argmax()))
        if len(ids) == count or ids[-1] == stop:
            return logits[-8:], torch.tensor(ids)
        sequence = torch.cat([prompt, embed(language, ids)], dim=1)
        last = language(inputs_embeds=sequence, use_cache=False).logits[0]
