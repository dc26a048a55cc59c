"""Doors: modules that give a command, and import it once somebody asks."""

import importlib
from collections.abc import Callable


def door(
    module: str, command: str, names: tuple[str, ...] = ("build_parser", "main")
) -> Callable[[str], object]:
    """The `__getattr__` of `module`: `names` are those of `commands/<command>.py`."""

    def get(name: str):
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        found = importlib.import_module(f".commands.{command}", __package__)
        return getattr(found, name)

    return get
