"""Train a scorer of visual tokens, or an adapter under pruning."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.upload import check_repo, upload
from ..cli import Parser, add_pruning, add_upload, command, plan_of
from ..errors import InputError, nearest, printable
from ..pruners.scorers import SCORERS, is_scorer, load_scorer
from ..scenes.pictures import check_fonts

if TYPE_CHECKING:  # loaded only by the command that needs them
    from ..models.protocol import VisionModel
    from ..processing.processor import AnyProcessor
    from .loop import Schedule
    from .samples import Samples

    Loaded = tuple[VisionModel, AnyProcessor]

_QUESTIONS = 5  # for each picture in a step
DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> Parser:
    """Return the parser of `mlx_tokprune train`."""
    parser = Parser(
        prog="mlx_tokprune train",
        description=__doc__,
        usage="{prune,lora,fuse} [options]",
        example="mlx_tokprune train prune --data questions.jsonl --output scorer",
    )
    kinds = {"dest": "command", "required": True, "prog": parser.prog}
    help_ = "one of:"
    commands = parser.add_subparsers(metavar="COMMAND", help=help_, **kinds)
    _add_prune(commands)
    _add_lora(commands)
    help_ = "write a checkpoint with its adapter merged"
    fuse = commands.add_parser(
        "fuse",
        usage="--adapter-path FOLDER --save-path FOLDER\n  [options]",
        help=help_,
        description=f"{help_[0].upper()}{help_[1:]}.",
        example="mlx_tokprune train fuse --adapter-path adapter --save-path fused",
    )
    add, folder = fuse.add_argument, {"required": True, "metavar": "FOLDER"}
    add("--model", default="demo", help="demo, folder or hub id (default: demo)")
    add("--adapter-path", help="folder of the adapter to merge", **folder)
    help_ = "folder to write; must not exist"
    add("--save-path", "--output", dest="output", help=help_, **folder)
    add_upload(fuse)
    return parser


def _add_lora(commands: argparse._SubParsersAction) -> None:
    help_ = "fine-tune the language model under pruning (LoRA or DoRA)"
    parser = commands.add_parser(
        "lora",
        usage="--data DATA --adapter-path FOLDER [options]",
        help=help_,
        description=f"{help_[0].upper()}{help_[1:]}.",
        example="mlx_tokprune train lora --data questions.jsonl --keep-ratio 0.25 \\\n"
        "    --output adapter",
    )
    _add_training(parser, steps=300, rate=3e-4)
    add_pruning(parser, "norm at 0.25")
    add = parser.add_argument_group("adapter").add_argument
    help_ = "rank of the adapter (default: 8)"
    add("--rank", type=int, metavar="N", default=8, help=help_)
    help_ = "factor of the adapter (default: 20)"
    add("--scale", type=float, metavar="X", default=20.0, help=help_)
    help_ = "number of last layers to adapt (default: all)"
    add("--num-layers", "--layers", dest="layers", type=int, metavar="N", help=help_)
    add("--dora", action="store_true", help="DoRA in place of LoRA")
    add("--projector", action="store_true", help="train the projector as well")
    _add_distill(add)
    help_ = "train on dequantized weights: more memory, faster on a CPU"
    add("--dequantize", action="store_true", help=help_)


def _add_distill(add: Callable[..., argparse.Action]) -> None:
    help_ = "weight of the KL from unpruned answers (default: 0)"
    add("--distill", type=float, metavar="X", default=0.0, help=help_)


def _add_training(parser: Parser, steps: int, rate: float) -> None:
    """Add the options of every training, with mlx-lm's names first."""
    add = parser.add_argument
    add("--model", default="demo", help="demo, folder or hub id (default: demo)")
    help_ = "JSONL, LLaVA JSON or demo (default: demo)"
    add("--data", default="demo", help=help_)
    help_ = "images to generate, for demo (default: 2048)"
    add("--pictures", type=int, metavar="N", default=2048, help=help_)
    names = (
        ("--adapter-path", "--output")
        if parser.prog.endswith("lora")
        else ("--output",)
    )
    help_ = "folder to write; must not exist"
    add(*names, dest="output", required=True, metavar="FOLDER", help=help_)
    add_upload(parser)
    help_ = "state to resume from (default: OUTPUT.training)"
    add("--folder", metavar="FOLDER", help=help_)
    add = parser.add_argument_group("training").add_argument
    names, help_ = ("--iters", "--steps"), f"number of steps (default: {steps})"
    add(*names, dest="steps", type=int, metavar="N", default=steps, help=help_)
    names, help_ = ("--batch-size", "--batch"), "images in each batch (default: 32)"
    add(*names, dest="batch", type=int, metavar="N", default=32, help=help_)
    help_ = f"questions about each image (default: {_QUESTIONS})"
    add("--questions", type=int, metavar="N", help=help_)
    help_ = f"learning rate (default: {rate:g})"
    add("--learning-rate", type=float, metavar="X", default=rate, help=help_)
    names = ("--grad-accumulation-steps", "--accumulate")
    help_ = "batches in each step (default: 1)"
    add(*names, dest="accumulate", type=int, metavar="N", default=1, help=help_)
    help_ = "seed of the batches (default: 0)"
    add("--seed", type=int, metavar="N", default=0, help=help_)
    help_ = "type of frozen weights (default: as stored)"
    add("--dtype", choices=DTYPES, help=help_)
    help_ = "recompute layers in the backward pass (less memory)"
    add("--grad-checkpoint", action="store_true", help=help_)


def _add_prune(commands: argparse._SubParsersAction) -> None:
    help_ = "train a scorer of visual tokens; the model stays as it is"
    parser = commands.add_parser(
        "prune",
        usage="--data DATA --output FOLDER [options]",
        help=help_,
        description=f"{help_[0].upper()}{help_[1:]}.",
        example="mlx_tokprune train prune --data questions.jsonl --output scorer",
    )
    _add_training(parser, steps=300, rate=3e-3)
    add = parser.add_argument_group("scorer").add_argument
    help_ = f"{', '.join(SCORERS)} or folder (default: adaptive)"
    add("--scorer", default="adaptive", help=help_)
    help_ = "range of keep ratios, one drawn per batch (default: 0.05 0.25)"
    ratios = {"nargs": 2, "type": float}
    add("--keep-ratios", metavar=("LEAST", "MOST"), help=help_, **ratios)
    help_ = "share of the steps in which the least ratio falls from 1 (default: 0)"
    add("--curriculum", type=float, metavar="SHARE", default=0.0, help=help_)
    help_ = "learn gradients, or attention in these layers, in place of answers"
    add("--imitate", metavar="gradient|LAYER", nargs="+", default=[], help=help_)
    help_ = "at budgets up to this, learn what each token alone answers (default: 0)"
    add("--alone", type=int, default=0, metavar="TOKENS", help=help_)
    help_ = "power of the imitated scores (default: 1)"
    add("--sharpen", type=float, default=1.0, metavar="POWER", help=help_)
    help_ = "learn how many tokens to keep; penalty of each"
    add("--sparsity", type=float, metavar="PENALTY", help=help_)
    help_ = "learn the fewest tokens whose answer stays within this KL"
    add("--within", type=float, metavar="NATS", help=help_)
    _add_distill(add)


@command
def main(argv: list[str] | None = None) -> None:
    """Run `mlx_tokprune train` with these arguments, or with `sys.argv`."""
    args = build_parser().parse_args(argv)
    if getattr(args, "data", "demo") == "demo" and args.command != "fuse":
        check_fonts()
    commands = {"prune": _prune, "lora": _lora, "fuse": _fuse}
    check_repo(args.upload_repo)
    commands[args.command](args)
    upload(args.upload_repo, args.output, args.model, "train", argv)


def _prune(args: argparse.Namespace) -> None:
    from .scorer import Lesson, goal_of, train_scorer

    if args.scorer not in SCORERS and not is_scorer(args.scorer):
        raise InputError(
            f"unknown scorer {args.scorer!r}; expected {' or '.join(SCORERS)}, or the "
            f"folder of one.{nearest(args.scorer, SCORERS)}"
        )
    scorer = SCORERS.get(args.scorer) or load_scorer(args.scorer)
    answers = not args.imitate and args.within is None
    alone = scorer.at == "prompt" and answers
    if alone and (args.questions or 1) > 1:
        raise InputError(
            "a scorer at the prompt learns from the answers with one question about "
            "each picture; leave out --questions, or pass --imitate gradient"
        )
    questions = 1 if alone else args.questions or _QUESTIONS
    names = ("curriculum", "distill", "imitate", "alone", "sharpen")
    names += ("sparsity", "within")
    options = {name: getattr(args, name) for name in names}
    options["imitate"] = goal_of(args.imitate)
    if args.keep_ratios:
        options["least"], options["most"] = args.keep_ratios
    lesson = Lesson(args.steps, args.batch, questions, **options)
    drawn = args.curriculum or (args.keep_ratios and args.within is None)
    if drawn and lesson.own_count:
        raise InputError(
            "the number of kept tokens is learned; leave out --curriculum and, "
            "without --within, --keep-ratios"
        )
    loaded, samples, schedule, folder, output = _training(args)
    train_scorer(
        *(loaded, args.scorer, samples, lesson, schedule, folder, output),
        checkpoint=args.grad_checkpoint,
    )
    print(f"wrote {output}")


def _lora(args: argparse.Namespace) -> None:
    from ..pruners import DEFAULT_METHOD, get_method
    from .lora import Adapter, train_adapter

    unset = not args.prune and args.keep_ratio is None and args.keep_tokens is None
    if unset and get_method(args.method or DEFAULT_METHOD).lacks_budget({}):
        args.keep_ratio = 0.25
    plan = plan_of(args, DEFAULT_METHOD)
    adapter = Adapter(args.rank, args.scale, args.layers, args.dora, args.projector)
    loaded, samples, schedule, folder, output = _training(args)
    train_adapter(
        *(loaded, samples, plan, args.positions, adapter),
        *((args.batch, args.questions or _QUESTIONS), schedule, folder, output),
        checkpoint=args.grad_checkpoint,
        distill=args.distill,
        dequantize=args.dequantize,
    )
    print(f"wrote {output}")


def _fuse(args: argparse.Namespace) -> None:
    from .lora import fuse

    fuse(args.model, args.adapter_path, args.output)
    print(f"wrote {args.output}")


def _training(
    args: argparse.Namespace,
) -> tuple["Loaded", "Samples", "Schedule", Path, Path]:
    """Return model, samples, schedule, the state's folder, and the folder to write."""
    import mlx.core as mx

    from ..checkpoints.loading import load
    from .loop import Schedule
    from .samples import read_samples

    questions = _QUESTIONS if args.questions is None else args.questions
    if min(args.pictures, args.batch, questions) < 1:
        raise InputError("pictures, batch and questions are whole numbers from 1")
    output = Path(args.output)
    if output.exists():
        raise InputError(f"{output} already exists; choose a new folder")
    schedule = Schedule(
        *(args.steps, args.learning_rate),
        accumulate=args.accumulate,
        seed=args.seed,
    )
    samples = read_samples(args.data, args.pictures)
    for number, reason in samples.skipped:
        print(f"skipped line {number}: {printable(reason)}")
    folder = Path(args.folder or f"{args.output}.training")
    loaded = load(args.model, getattr(mx, args.dtype) if args.dtype else None)
    return loaded, samples, schedule, folder, output


if __name__ == "__main__":
    main()
