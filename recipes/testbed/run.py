"""Run a command on the test bed: `python -m recipes.testbed.run COMMAND ...`.

The commands are those of `mlx_tokprune`, and `--model testbed` is one more model.
"""

import sys

from mlx_tokprune.__main__ import main as run
from mlx_tokprune.cli import command
from mlx_tokprune.errors import InputError

from .family import BUILT, NAME


@command
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if NAME in argv and not BUILT.is_dir():
        raise InputError(
            f"the test bed is not in {BUILT}; make it with `python -m recipes.testbed`"
        )
    run(argv)


if __name__ == "__main__":
    main()
