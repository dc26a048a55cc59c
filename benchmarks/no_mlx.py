"""Import this before `mlx_tokprune` where MLX may be missing, as on a GPU machine.

There the package's own names are not loaded, and those of its modules can be imported
that need NumPy and Pillow alone.
"""

import importlib.util
import sys
import types
from pathlib import Path

if importlib.util.find_spec("mlx") is None and "mlx_tokprune" not in sys.modules:
    package = types.ModuleType("mlx_tokprune")
    package.__path__ = [str(Path(__file__).resolve().parents[1] / "mlx_tokprune")]
    sys.modules["mlx_tokprune"] = package
