"""Register ResNet-VLM, whose checkpoints are in the MLX layout, and the name `testbed`.

An import of this module makes `load` and the commands read them.
"""

from mlx_tokprune.checkpoints.family import Family, register_family
from mlx_tokprune.checkpoints.hub import EMBEDDED

from .cache import cache_folder
from .resnet_vlm import ModelArgs, ResNetVLM

NAME = "testbed"
BUILT = cache_folder(NAME) / "checkpoint"  # written by `python -m recipes.testbed`

_STEM = "vision_tower.stem.weight"

if BUILT.is_dir():
    EMBEDDED[NAME] = BUILT

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
