"""Recipes: training of the weights that this project ships; not installed.

Each folder is run from a clone, as `python -m recipes.NAME`. The PyTorch forms run on a
GPU machine without MLX: there `mlx_tokprune` is a bare package, and only modules that
do not need MLX can be imported.
"""

import importlib.util
import sys
import types
from pathlib import Path

if importlib.util.find_spec("mlx") is None and "mlx_tokprune" not in sys.modules:
    package = types.ModuleType("mlx_tokprune")
    package.__path__ = [str(Path(__file__).resolve().parents[1] / "mlx_tokprune")]
    sys.modules["mlx_tokprune"] = package
