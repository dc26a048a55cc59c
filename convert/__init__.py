"""Convert a checkpoint once: `convert(hf_path, mlx_path, ...)`.

This folder is the package `mlx_tokprune.convert` (`pyproject.toml` says so), though it
lies beside `mlx_tokprune/`. Here is what checkpoints look like: folders, files, and the
names of each family. What converts one is `commands/convert.py`, which also asks the
models.
"""

from ..doors import door

__all__ = ["build_parser", "convert", "main"]

__getattr__ = door(__name__, "convert", (*__all__,))
