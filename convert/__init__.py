"""Convert a checkpoint once: `convert(hf_path, mlx_path, ...)`.

This folder is the package `mlx_tokprune.convert` (`pyproject.toml` says so), though it
lies beside `mlx_tokprune/`. Each file of a family registers its key table, and
importing this package registers all of them.
"""

from . import fastvlm, openvla, pi0fast, resnetvlm  # noqa: F401
from .converter import convert

__all__ = ["convert"]
