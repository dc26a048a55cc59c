"""The door of the command `commands/report.py`."""


def __getattr__(name: str):
    if name not in ("build_parser", "main"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .commands import report as command

    return getattr(command, name)


if __name__ == "__main__":
    from .commands.report import main

    main()
