"""Prune the visual tokens of a model that mlx-vlm runs."""

from .mlx_vlm import Handle, attach
from .model_folder import prune_when_loaded, write_folder
from .pixels import RepeatPruner, TemporalPruner

__all__ = [
    "Handle",
    "RepeatPruner",
    "TemporalPruner",
    "attach",
    "prune_when_loaded",
    "write_folder",
]
