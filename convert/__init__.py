"""Convert a checkpoint once: `convert(hf_path, mlx_path, ...)`.

Here is what checkpoints look like: folders, files, and the names of each family. What
converts one is `commands/convert.py`, which also asks the models.
"""

__all__ = ["build_parser", "convert", "main"]


def __getattr__(name: str):
    """`convert` and its command, once somebody asks: they stand above this folder."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..commands import convert as command

    return getattr(command, name)
