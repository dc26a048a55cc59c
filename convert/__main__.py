"""Convert a Hugging Face checkpoint to MLX format."""

from ..checkpoints.quantization import MODES
from ..checkpoints.upload import check_repo, upload
from ..cli import (
    Parser,
    add_option,
    add_prune,
    add_settings,
    add_upload,
    command,
    read_options,
    read_plans,
)
from ..errors import InputError
from .converter import DTYPES, RECIPES, convert
from .oft_adapter import CHOICES


def build_parser() -> Parser:
    """Return the parser of `mlx_tokprune convert`."""
    parser = Parser(
        prog="mlx_tokprune convert",
        usage="--hf-path MODEL --mlx-path FOLDER [options]",
        description=__doc__,
        example="mlx_tokprune convert --hf-path apple/FastVLM-0.5B \\\n"
        "    --mlx-path FastVLM-0.5B-mlx",
    )
    add = parser.add_argument
    help_ = "hub id, folder or demo to convert"
    add("--hf-path", required=True, metavar="MODEL", help=help_)
    help_ = "folder to write; must not exist"
    add("--mlx-path", required=True, metavar="FOLDER", help=help_)
    help_ = "type of float tensors (default: as stored)"
    add("--dtype", choices=list(DTYPES), help=help_)
    add_upload(parser)
    group = parser.add_argument_group("quantization (as in mlx-lm)")
    add = group.add_argument
    help_ = "quantize the language model; the vision tower stays float"
    add("-q", "--quantize", action="store_true", help=help_)
    help_ = "bits per weight: 1, 2, 3, 4, 5, 6 or 8 (default: 4; mxfp8: 8)"
    add("--q-bits", type=int, metavar="BITS", help=help_)
    help_ = "weights per scale: 32, 64, 128 (default: 64; mxfp4, mxfp8: 32; nvfp4: 16)"
    add("--q-group-size", type=int, metavar="N", help=help_)
    help_ = "number format of packed weights (default: affine)"
    add("--q-mode", choices=list(MODES), help=help_)
    help_ = "mlx-lm's recipe of mixed bits: more for v_proj, down_proj and lm_head"
    add("--quant-predicate", choices=RECIPES, help=help_)
    group = parser.add_argument_group("pruning")
    add_prune(
        group, "store a pruner in the checkpoint, such as norm:0.5 or ./scorer:0.25"
    )
    add_option(group)
    add = add_settings(parser).add_argument
    help_ = "lora_adapter/: auto merges it unless the weights hold it (default: auto)"
    add("--lora-adapter", choices=CHOICES, default="auto", help=help_)
    help_ = "hub id or folder of the model that lora_adapter/ was trained on"
    add("--base-model", metavar="MODEL", help=help_)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, or with the process's arguments when `None`."""
    flags = vars(build_parser().parse_args(argv))
    plans, options = flags.pop("prune"), read_options(flags.pop("option"))
    pruner = read_plans(plans, options) if plans else None
    if options and pruner is None:
        raise InputError("--option sets a parameter of --prune's method; add --prune")
    names = ("q_bits", "q_group_size", "q_mode", "quant_predicate")
    sizes = {name: flags.pop(name) for name in names}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if sizes and not flags["quantize"]:
        raise InputError(
            "--q-bits, --q-group-size, --q-mode and --quant-predicate require -q"
        )
    repo = flags.pop("upload_repo")
    check_repo(repo)
    target = convert(**flags, **sizes, pruner=pruner)
    print(f"wrote {target}")
    upload(repo, target, flags["hf_path"], "convert", argv)


if __name__ == "__main__":
    main()
