"""The door of the command `commands/report.py`."""


def __getattr__(name: str):
    from .commands import report as command

    return getattr(command, name)


if __name__ == "__main__":
    from .commands.report import main

    main()
