"""ResNet-VLM checkpoints: the test bed's, in the MLX layout from the start."""

from collections.abc import Iterable

from .family import Family

_STEM = "vision_tower.stem.weight"


def is_resnet_vlm(names: Iterable[str]) -> bool:
    return _STEM in names


RESNET_VLM = Family(
    name="ResNet-VLM",
    reads="ResNet-VLM as `python -m mlx_tokprune.testbed` builds it",
    is_mlx=lambda shapes: True,
    keys=(),
    axes=lambda name, ndim: None,
    complete=lambda checkpoint, shapes: dict(checkpoint.config),
)
