"""`attach` for models of mlx-vlm, and a door.

The command is `commands/attach.py`; nothing of it is imported until it is asked for.
"""

from .adapters.mlx_vlm import Handle, attach
from .adapters.pixels import RepeatPruner, TemporalPruner

__all__ = ["Handle", "RepeatPruner", "TemporalPruner", "attach"]


def __getattr__(name: str):
    if name not in ("build_parser", "main"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .commands import attach as command

    return getattr(command, name)


if __name__ == "__main__":
    from .commands.attach import main

    main()
