"""`generate` and `stream_generate` where mlx-lm has them, and a door.

The command is `commands/generate.py`; nothing of it is imported until it is asked for.
"""

from .answer.stream import generate, stream_generate
from .doors import door

__all__ = ["generate", "stream_generate"]

__getattr__ = door(__name__, "generate")

if __name__ == "__main__":
    from .commands.generate import main

    main()
