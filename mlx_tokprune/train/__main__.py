"""Train scorers or the demo model, or measure it: `python -m mlx_tokprune.train`."""

from pathlib import Path

from ..cli import (
    Parser,
    add_budget,
    add_method,
    add_option,
    command,
    describe_methods,
    make_pruners,
)
from ..errors import InputError, nearest, printable
from ..pruners.scorers import SCORERS, is_scorer, load_scorer
from ..scenes.pictures import check_fonts

_QUESTIONS = 5  # about each picture in a step
DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> Parser:
    parser = Parser(prog="mlx_tokprune.train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_prune(commands)
    _add_lora(commands)
    fuse = commands.add_parser("fuse", help="write a checkpoint with its adapter in it")
    fuse.add_argument("--model", default="demo", help="folder, hub id or demo")
    fuse.add_argument("--adapter-path", required=True, help="folder of the adapter")
    fuse.add_argument("--output", required=True, help="folder to write")
    return parser


def _add_lora(commands) -> None:
    help_ = "fine-tune the language model under pruning (LoRA or DoRA)"
    parser = commands.add_parser("lora", help=help_, epilog=describe_methods())
    _add_training(parser, steps=300, rate=3e-4)
    add = parser.add_argument
    add_method(parser, "norm, a keep ratio of 0.25")
    add_budget(parser)
    add_option(parser)
    add("--rank", type=int, default=8)
    add("--scale", type=float, default=20.0, help="of the adapter (default: 20)")
    add("--layers", type=int, help="the last so many (default: all)")
    add("--dora", action="store_true", help="DoRA in place of LoRA")
    add("--projector", action="store_true", help="train the projector, too")
    _add_distill(parser)
    help_ = "train on the values of quantized weights: more memory, faster on a CPU"
    add("--dequantize", action="store_true", help=help_)


def _add_distill(parser) -> None:
    help_ = "weight of the divergence from the unpruned answers (default: 0)"
    parser.add_argument("--distill", type=float, default=0.0, help=help_)


def _add_training(parser, steps: int, rate: float) -> None:
    """What both kinds of training have."""
    add = parser.add_argument
    add("--model", default="demo", help="folder, hub id or demo (default)")
    help_ = "JSON lines, LLaVA's conversations, or pictures of demo or testbed"
    add("--data", default="demo", help=f"{help_} (default)")
    add("--pictures", type=int, default=2048, help="that are generated (default: 2048)")
    add("--steps", type=int, default=steps, help=f"(default: {steps})")
    add("--batch", type=int, default=32, help="pictures in a step (default: 32)")
    help_ = "about each of them in a step (default: 5)"
    add("--questions", type=int, help=help_)
    add("--learning-rate", type=float, default=rate, help=f"(default: {rate:g})")
    add("--accumulate", type=int, default=1, help="batches of a step (default: 1)")
    add("--seed", type=int, default=0)
    help_ = "of weights that stay as they are (default: as stored, float32 on a CPU)"
    add("--dtype", choices=DTYPES, help=help_)
    help_ = "compute layers again in the backward pass, for less memory"
    add("--grad-checkpoint", action="store_true", help=help_)
    help_ = "where training state is kept; resumed (default: OUTPUT.training)"
    add("--folder", help=help_)
    add("--output", required=True, help="folder to write; must not exist")


def _add_prune(commands) -> None:
    help_ = "train a scorer, on a model that stays as it is"
    parser = commands.add_parser("prune", help=help_)
    _add_training(parser, steps=300, rate=3e-3)
    add = parser.add_argument
    help_ = f"{' or '.join(SCORERS)}, or the folder of one to begin with"
    add("--scorer", default="adaptive", help=f"{help_} (default: adaptive)")
    help_ = "between which each batch draws its own (default: 0.05 0.25)"
    ratios = {"nargs": 2, "type": float}
    add("--keep-ratios", metavar=("LEAST", "MOST"), help=help_, **ratios)
    help_ = "share of the steps in which the least comes down from all"
    add("--curriculum", type=float, default=0.0, help=help_)
    help_ = "in the place of the answers' loss: their gradient, or layers' attention"
    add("--imitate", metavar="gradient|LAYER", nargs="+", default=[], help=help_)
    help_ = "where at most so many tokens stay, imitate what each alone answers"
    add("--alone", type=int, default=0, metavar="TOKENS", help=f"{help_} (default: 0)")
    help_ = "the power of what --imitate says, for each question (default: 1)"
    add("--sharpen", type=float, default=1.0, metavar="POWER", help=help_)
    help_ = "learn the count, too: the price of what is kept (with --within: 1)"
    add("--sparsity", type=float, metavar="PRICE", help=help_)
    help_ = "learn a count of FOLDER's best with which answers stay so near"
    add("--within", type=float, metavar="NATS", help=help_)
    _add_distill(parser)


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if getattr(args, "data", "demo") == "demo" and args.command != "fuse":
        check_fonts()
    commands = {"prune": _prune, "lora": _lora, "fuse": _fuse}
    commands[args.command](args)


def _prune(args) -> None:
    from .scorer import Lesson, goal_of, train_scorer

    if args.scorer not in SCORERS and not is_scorer(args.scorer):
        raise InputError(
            f"unknown scorer {args.scorer!r}; expected {' or '.join(SCORERS)}, or the "
            f"folder of one.{nearest(args.scorer, SCORERS)}"
        )
    known = SCORERS.get(args.scorer) or load_scorer(args.scorer)
    answers = not args.imitate and args.within is None
    alone = known.at == "prompt" and answers
    if alone and (args.questions or 1) > 1:
        raise InputError(
            "a scorer at the prompt learns from the answers with one question about "
            "each picture; leave out --questions, or say --imitate gradient"
        )
    questions = 1 if alone else args.questions or _QUESTIONS
    names = (
        "curriculum",
        "distill",
        "imitate",
        "alone",
        "sharpen",
        "sparsity",
        "within",
    )
    how = {name: getattr(args, name) for name in names}
    how["imitate"] = goal_of(args.imitate)
    if args.keep_ratios:
        how["least"], how["most"] = args.keep_ratios
    lesson = Lesson(args.steps, args.batch, questions, **how)
    drawn = args.curriculum or (args.keep_ratios and args.within is None)
    if drawn and lesson.own_count:
        raise InputError(
            "how many tokens stay is learned; leave out --curriculum and, without "
            "--within, --keep-ratios"
        )
    samples, schedule, folder, output = _training(args)
    train_scorer(
        *(_load(args), args.scorer, samples, lesson, schedule, folder, output),
        checkpoint=args.grad_checkpoint,
    )
    print(f"wrote {output}")


def _lora(args) -> None:
    from ..pruners import DEFAULT_METHOD, get_method
    from .lora import Adapter, train_adapter

    unset = not args.prune and args.keep_ratio is None and args.keep_tokens is None
    if unset and get_method(args.method or DEFAULT_METHOD).lacks_budget({}):
        args.keep_ratio = 0.25
    plan = make_pruners(args, DEFAULT_METHOD)
    adapter = Adapter(args.rank, args.scale, args.layers, args.dora, args.projector)
    samples, schedule, folder, output = _training(args)
    train_adapter(
        *(_load(args), samples, plan, args.positions, adapter),
        *((args.batch, args.questions or _QUESTIONS), schedule, folder, output),
        checkpoint=args.grad_checkpoint,
        distill=args.distill,
        dequantize=args.dequantize,
    )
    print(f"wrote {output}")


def _fuse(args) -> None:
    from .lora import fuse

    fuse(args.model, args.adapter_path, args.output)
    print(f"wrote {args.output}")


def _load(args) -> tuple:
    import mlx.core as mx

    from ..checkpoints.loading import load

    return load(args.model, getattr(mx, args.dtype) if args.dtype else None)


def _training(args) -> tuple:
    """Samples, schedule, the folder of the state, and that of the result."""
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
    return samples, schedule, folder, output


if __name__ == "__main__":
    main()
