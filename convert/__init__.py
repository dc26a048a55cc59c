"""Convert a Hugging Face checkpoint to MLX format: `convert(hf_path, mlx_path, ...)`.

This folder is the package `mlx_tokprune.convert` (see `package-dir` in
`pyproject.toml`), although it lies beside `mlx_tokprune/`. Each family file registers
its key table, so importing this package imports every file.
"""

import importlib
import pkgutil

from .converter import convert

__all__ = ["convert"]

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "__main__":
        importlib.import_module(f".{_module.name}", __name__)
