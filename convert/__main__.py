"""Convert a Hugging Face checkpoint to MLX format."""

from ..cli import Parser, add_option, add_prune, command, read_options, read_plans
from ..errors import InputError
from .converter import DTYPES, convert
from .oft_adapter import CHOICES


def build_parser() -> Parser:
    parser = Parser(prog="mlx_tokprune.convert", description=__doc__)
    add = parser.add_argument
    add("--hf-path", required=True, help="hub id or folder of the checkpoint")
    add("--mlx-path", required=True, help="folder to write; must not exist")
    add("--dtype", choices=list(DTYPES), help="of float tensors (default: as they are)")
    add(
        "-q", "--quantize", action="store_true", help="quantize the language model only"
    )
    help_ = "bits per weight: 2, 3, 4, 5, 6 or 8 (default: 4)"
    add("--q-bits", type=int, help=help_)
    add("--q-group-size", type=int, help="weights per scale (default: 64)")
    add("--actions-per-chunk", type=int, help="of an OpenVLA-OFT policy (default: 8)")
    add("--pictures", type=int, help="an OpenVLA-OFT policy looks at (default: 2)")
    help_ = "of an OpenVLA-OFT policy (default: auto, merge unless the weights hold it)"
    add("--lora-adapter", choices=CHOICES, default="auto", help=help_)
    help_ = "hub id or folder of what lora_adapter/ was trained on, if not beside it"
    add("--base-model", help=help_)
    add_prune(parser, "let it prune by itself, such as trimvla, or FOLDER:0.25")
    add_option(parser)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    asked = vars(build_parser().parse_args(argv))
    plans, options = asked.pop("prune"), read_options(asked.pop("option"))
    pruner = read_plans(plans, options) if plans else None
    if options and pruner is None:
        raise InputError("--option is for what --prune names; say that, too")
    sizes = {name: asked.pop(name) for name in ("q_bits", "q_group_size")}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if sizes and not asked["quantize"]:
        raise InputError("--q-bits and --q-group-size are said of -q; add -q")
    target = convert(**asked, **sizes, pruner=pruner)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
