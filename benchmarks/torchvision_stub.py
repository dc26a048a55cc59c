"""Repair of a torchvision that was built for another torch."""

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def repair_torchvision() -> None:
    """Declare the operators that a torchvision built for another torch lacks.

    The operators are never called, but timm and transformers need them for import.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            types = "Tensor dets, Tensor scores, float iou_threshold"
            _LIBRARY.define(f"{name}({types}) -> Tensor")
