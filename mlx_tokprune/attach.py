"""`attach` for models of mlx-vlm, and a door.

The command is `commands/attach.py`; nothing of it is imported until it is asked for.
"""

from .adapters.mlx_vlm import Handle, attach
from .adapters.pixels import RepeatPruner, TemporalPruner
from .doors import door

__all__ = ["Handle", "RepeatPruner", "TemporalPruner", "attach"]

__getattr__ = door(__name__, "attach")

if __name__ == "__main__":
    from .commands.attach import main

    main()
