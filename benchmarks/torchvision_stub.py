"""A torchvision that was built for another torch, so that it can be imported."""

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def repair_torchvision() -> None:
    """Declare the operators that a torchvision built for another torch lacks.

    They are never called; without them neither timm nor transformers can be imported.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            types = "Tensor dets, Tensor scores, float iou_threshold"
            _LIBRARY.define(f"{name}({types}) -> Tensor")
