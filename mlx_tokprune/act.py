"""`predict_action`, and the door of its command.

The command is `commands/act.py`; nothing of it is imported until it is asked for.
"""

from .doors import door
from .robot.predict import predict_action

__all__ = ["predict_action"]

__getattr__ = door(__name__, "act")

if __name__ == "__main__":
    from .commands.act import main

    main()
