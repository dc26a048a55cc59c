"""Serve a model in mlx-vlm, each request with a pruning budget."""

import argparse
import sys

from ..checkpoints.hub import resolve
from ..cli import (
    Parser,
    add_option,
    add_prune,
    add_seed,
    command,
    plan_of,
)
from ..errors import InputError, note
from ..files import read_json
from ..pruners import DEFAULT_METHOD, Pruner
from .budgets import KEEP_ALL, with_budget
from .mlx_vlm import check_known, import_mlx_vlm
from .server import install
from .server_settings import HIGH, LOW, Settings


def build_parser() -> Parser:
    """Return the parser of `mlx_tokprune serve`."""
    parser = Parser(
        prog="mlx_tokprune serve",
        allow_abbrev=False,
        description=f"{__doc__}\nOther flags go to mlx_vlm.server.",
        example="mlx_tokprune serve --model Qwen2.5-VL-3B-Instruct-4bit \\\n"
        "    --keep-ratio 0.5 --port 8080",
    )
    add = parser.add_argument
    help_ = "folder or hub id to load at the start (default: a request's model)"
    add("--model", dest="checkpoint", metavar="MODEL", help=help_)
    help_ = "address to listen on (default: 127.0.0.1, this machine alone)"
    add("--host", default="127.0.0.1", help=help_)
    add("--port", default="8080", metavar="N", help="port (default: 8080)")
    group = parser.add_argument_group("pruning (methods: mlx_tokprune methods)")
    add = group.add_argument
    add_prune(group, "method and default budget, such as norm:0.5")
    keep = group.add_mutually_exclusive_group()
    help_ = "share of visual tokens where a request has no budget (default: 1, all)"
    keep.add_argument("--keep-ratio", type=float, metavar="RATIO", help=help_)
    help_ = "visual tokens of a prompt where a request has no budget"
    keep.add_argument("--keep-tokens", type=int, metavar="N", help=help_)
    add("--method", help=f"pruning method of all requests (default: {DEFAULT_METHOD})")
    add_option(group)
    add_seed(group)
    for name, default in (("low", LOW), ("high", HIGH)):
        help_ = f"share or count of images of detail {name} (default: {default})"
        flag = {"type": float, "default": default, "metavar": "BUDGET"}
        add(f"--detail-{name}", help=help_, **flag)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Serve, from command line arguments."""
    import_mlx_vlm()
    args, rest = build_parser().parse_known_args(argv)
    if any(flag.startswith("--rel") for flag in rest):
        raise InputError(
            "--reload starts mlx-vlm's server anew, without pruning; leave it out"
        )
    pruner = _pruner(args)
    settings = Settings(pruner, args.detail_low, args.detail_high)
    if args.checkpoint is not None:
        from mlx_vlm.utils import get_model_type

        config = read_json(resolve(args.checkpoint) / "config.json")
        check_known(str(get_model_type(config)), with_budget(pruner, KEEP_ALL))
        rest = ["--model", args.checkpoint, *rest]
    install(settings)
    from mlx_vlm.server.cli import main as serve

    values = ", ".join(f"{n} {v}" for n, v in settings.current().items() if v)
    note(f"budgets of {pruner.method!r}: {values}; see /v1/settings")
    address = ["--host", args.host, "--port", args.port]
    sys.argv = ["mlx_tokprune serve", *address, *rest]
    serve()


def _pruner(args: argparse.Namespace) -> Pruner:
    """Return the pruner of the flags, whose budget is the default of requests."""
    if not args.prune:
        args.method = args.method or DEFAULT_METHOD
        if args.keep_ratio is None and args.keep_tokens is None:
            args.keep_ratio = 1.0
    pruner, *others = [*(plan_of(args, DEFAULT_METHOD) or ())]
    if others:
        raise InputError("the server prunes at one place; expected one METHOD:BUDGET")
    return pruner
