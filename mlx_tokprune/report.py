"""The HTML page of results: the door of the command, `commands/report.py`."""

from .doors import door

__getattr__ = door(__name__, "report")

if __name__ == "__main__":
    from .commands.report import main

    main()
