"""Write a model folder that mlx-vlm loads and that prunes by itself."""

import argparse
import shlex
from typing import Any

from ..checkpoints.upload import check_repo, upload
from ..cli import (
    Parser,
    add_option,
    add_prune,
    add_seed,
    add_upload,
    command,
    plan_of,
)
from ..errors import InputError
from ..pipeline import POSITIONS
from ..pruners import DEFAULT_METHOD
from .model_folder import write_folder
from .pixels import RepeatPruner, TemporalPruner


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="mlx_tokprune attach",
        usage="--model MODEL --mlx-path FOLDER [options]",
        description=__doc__,
        example="mlx_tokprune attach --model Qwen2.5-VL-3B-Instruct-4bit \\\n"
        "    --prune norm:0.5 --mlx-path qwen-half",
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of an mlx-vlm checkpoint")
    help_ = "folder to write; must not exist"
    add("--mlx-path", required=True, metavar="FOLDER", help=help_)
    add_upload(parser)
    group = parser.add_argument_group("pruning (methods: mlx_tokprune methods)")
    add = group.add_argument
    add_prune(group, "METHOD:SHARE or METHOD:TOKENS, such as dart:0.5")
    keep = group.add_mutually_exclusive_group()
    help_ = "share of visual tokens to keep, in (0, 1]"
    keep.add_argument("--keep-ratio", type=float, metavar="RATIO", help=help_)
    help_ = "visual tokens of a prompt to keep; all if there are fewer"
    keep.add_argument("--keep-tokens", type=int, metavar="N", help=help_)
    add("--method", help=f"method of the keep ratio (default: {DEFAULT_METHOD})")
    add_option(group)
    help_ = "kept tokens' positions (default: original for Qwen, else contiguous)"
    add("--positions", choices=POSITIONS, help=help_)
    add_seed(group)
    add = parser.add_argument_group("pruning before the tower").add_argument
    number: dict[str, Any] = {"type": float, "metavar": "THRESHOLD"}
    help_ = "videos: drop tokens whose pixels changed by at most this, in [0, 1]"
    add("--drop-unchanged", help=help_, **number)
    # The old name of the flag.
    add("--temporal", dest="drop_unchanged", type=float, help=argparse.SUPPRESS)
    help_ = "videos: frames after which a token is kept again (default: never)"
    add("--max-age", type=int, metavar="FRAMES", help=help_)
    help_ = "skip patches whose neighbour differs by at most this, in [0, 1]"
    add("--drop-repeats", help=help_, **number)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Write a model folder that prunes, from command line arguments."""
    args = build_parser().parse_args(argv)
    check_repo(args.upload_repo)
    target = write_folder(args.model, args.mlx_path, _pruners(args), args.positions)
    generate = shlex.join(["python", "-m", "mlx_vlm.generate", "--model", str(target)])
    print(f"wrote {target}, which prunes: {generate}")
    upload(args.upload_repo, target, args.model, "attach", argv)


def _pruners(args: argparse.Namespace) -> list:
    """Return the pixel pruners and the token pruner that the arguments configure."""
    pruners: list = []
    if args.drop_unchanged is not None:
        pruners.append(TemporalPruner(args.drop_unchanged, args.max_age))
    elif args.max_age is not None:
        raise InputError("--max-age requires --drop-unchanged THRESHOLD")
    if args.drop_repeats is not None:
        pruners.append(RepeatPruner(args.drop_repeats))
    unset = args.keep_ratio is None and args.keep_tokens is None
    if args.method is not None and unset and not args.prune:
        raise InputError("--method requires --keep-ratio or --keep-tokens")
    plan = plan_of(args, DEFAULT_METHOD) or ()
    if any(pruner.keeps_all for pruner in plan):
        raise InputError("nothing would be pruned; expected a keep ratio below 1")
    pruners += plan
    if not pruners:
        raise InputError(
            "nothing would be pruned; expected one of --prune, --keep-ratio, "
            "--keep-tokens, --drop-unchanged and --drop-repeats"
        )
    return pruners


if __name__ == "__main__":
    main()
