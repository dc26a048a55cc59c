"""`predict_action`, and the door of its command.

The command is `commands/act.py`; nothing of it is imported until it is asked for.
"""

from .robot.predict import predict_action

__all__ = ["predict_action"]


def __getattr__(name: str):
    if name not in ("build_parser", "main"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .commands import act as command

    return getattr(command, name)


if __name__ == "__main__":
    from .commands.act import main

    main()
