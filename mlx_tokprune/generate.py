"""`generate` and `stream_generate` where mlx-lm has them, and a door.

The command is `commands/generate.py`; nothing of it is imported until it is asked for.
"""

from .answer.stream import generate, stream_generate

__all__ = ["generate", "stream_generate"]


def __getattr__(name: str):
    if name not in ("build_parser", "main"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .commands import generate as command

    return getattr(command, name)


if __name__ == "__main__":
    from .commands.generate import main

    main()
