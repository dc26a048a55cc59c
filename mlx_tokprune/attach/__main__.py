"""A folder that mlx-vlm loads and that prunes by itself, from the command line."""

from ..cli import Parser, add_option, command, read_options
from ..errors import InputError
from ..pipeline import POSITIONS
from ..pruners import DEFAULT_METHOD, Pruner
from .model_folder import write_folder
from .pixels import RepeatPruner, TemporalPruner


def build_parser() -> Parser:
    parser = Parser(prog="mlx_tokprune.attach", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a checkpoint of mlx-vlm")
    help_ = "that can choose at the prompt, such as norm, dart, cdpruner or attention"
    add("--method", help=f"{help_} (default: norm)")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--keep-ratio", type=float, help="share of visual tokens, (0, 1]")
    help_ = "visual tokens of a prompt; pictures of fewer keep all"
    keep.add_argument("--keep-tokens", type=int, help=help_)
    help_ = "of videos keep what changed by more, of pixels in [0, 1]"
    add("--temporal", type=float, metavar="THRESHOLD", help=help_)
    help_ = "of --temporal: frames after which a token is kept anew (default: none)"
    add("--max-age", type=int, metavar="FRAMES", help=help_)
    help_ = "leave out patches that repeat neighbours up to this, before the tower"
    add("--drop-repeats", type=float, metavar="THRESHOLD", help=help_)
    help_ = "of models without M-RoPE: original for one prompt at a time"
    add("--positions", choices=POSITIONS, help=f"{help_} (default: contiguous)")
    add("--seed", type=int, default=0, help="of method random")
    add("--mlx-path", required=True, help="folder to write; must not exist")
    add_option(parser)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    target = write_folder(args.model, args.mlx_path, _pruners(args), args.positions)
    print(f"wrote {target}; python -m mlx_vlm.generate --model {target} prunes")


def _pruners(args) -> list:
    """What the flags say, all of it together."""
    options, found = read_options(args.option), []
    budget = (args.keep_ratio, args.keep_tokens)
    if args.temporal is not None:
        found.append(TemporalPruner(args.temporal, args.max_age))
    elif args.max_age is not None:
        raise InputError("--max-age is of --temporal THRESHOLD, which is missing")
    if args.drop_repeats is not None:
        found.append(RepeatPruner(args.drop_repeats))
    if budget != (None, None):
        method = args.method or DEFAULT_METHOD
        pruner = Pruner(method, *budget, seed=args.seed, options=options)
        if pruner.keeps_all:
            raise InputError("nothing would be pruned; expected a keep ratio below 1")
        found.append(pruner)
    elif args.method is not None:
        raise InputError("a method needs a budget: --keep-ratio or --keep-tokens")
    if not found:
        raise InputError(
            "nothing would be pruned; expected one of --keep-ratio, --keep-tokens, "
            "--temporal and --drop-repeats"
        )
    return found
