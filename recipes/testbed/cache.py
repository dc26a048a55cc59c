"""Folder of what the test bed downloads and builds."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the folder for files `name` that are made from downloads.

    `~/.cache/mlx_tokprune/NAME`, or NAME in the folder of `MLX_TOKPRUNE_CACHE`.
    """
    root = os.environ.get("MLX_TOKPRUNE_CACHE") or "~/.cache/mlx_tokprune"
    return Path(root).expanduser() / name
