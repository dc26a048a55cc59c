"""Convert a checkpoint once: `convert(hf_path, mlx_path, ...)`."""

from .command import build_parser, convert, main

__all__ = ["build_parser", "convert", "main"]
