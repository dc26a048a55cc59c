"""ResNet-VLM checkpoints of the test bed, which are written in the MLX layout."""

from ..checkpoints.family import Family, register_family
from ..models.resnet_vlm import ModelArgs, ResNetVLM

_STEM = "vision_tower.stem.weight"


RESNET_VLM = register_family(
    Family(
        name="ResNet-VLM",
        model=ResNetVLM,
        args=ModelArgs,
        matches=lambda checkpoint: _STEM in checkpoint.tensors,
        reads="ResNet-VLM as `python -m recipes.testbed` builds it",
        is_mlx=lambda shapes: True,
    )
)
