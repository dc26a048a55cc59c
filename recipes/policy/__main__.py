"""Train the demo policy or measure one: `python -m recipes.policy`."""

import dataclasses
import statistics
from pathlib import Path

from mlx_tokprune.cli import Parser, command
from mlx_tokprune.errors import InputError, import_matplotlib, nearest
from mlx_tokprune.files import PICTURE, check_output

from .worlds import TASKS, import_simulator


def build_parser() -> Parser:
    parser = Parser(
        prog="recipes.policy",
        usage="%(prog)s {run,success,chunks,tune,score,frames,table} [options]",
        description=__doc__,
    )
    kinds = {"dest": "command", "required": True, "metavar": "COMMAND"}
    commands = parser.add_subparsers(prog=parser.prog, help="one of:", **kinds)
    run = commands.add_parser("run", help="train the demo policy")
    help_ = "share of the steps and episodes to run (default: 1)"
    run.add_argument("--scale", type=float, default=1.0, metavar="X", help=help_)
    _add_folders(run, "checkpoint")
    _add_success(commands.add_parser("success", help="measure in closed loop"))
    help_ = "train a small pi0-FAST that answers in chunks of actions"
    _add_chunks(commands.add_parser("chunks", help=help_))
    help_ = "fine-tune a policy under pruning whose choice is learned"
    _add_tune(commands.add_parser("tune", help=help_))
    help_ = "train a scorer that reads the instruction and the last action"
    _add_score(commands.add_parser("score", help=help_))
    frames = commands.add_parser("frames", help="write frames with their actions")
    help_ = "number of frames (default: 64)"
    frames.add_argument("--pictures", type=int, default=64, metavar="N", help=help_)
    help_ = "folder to write; must not exist"
    frames.add_argument("--output", required=True, metavar="FOLDER", help=help_)
    _add_table(commands.add_parser("table", help="print the table of one or more logs"))
    return parser


def _add_folders(parser: Parser, made: str) -> None:
    add = parser.add_argument
    help_ = "folder for the training state, to resume"
    add("--folder", required=True, metavar="FOLDER", help=help_)
    help_ = f"folder of the {made} to write; must not exist"
    add("--output", required=True, metavar="FOLDER", help=help_)


def _add_training(
    parser: Parser, steps: int, batch: int, rate: float, episodes: tuple[int, int, int]
) -> None:
    """Add the flags of every training here, with these defaults.

    episodes: demonstrations, episodes of a round of DAgger (each per task), and rounds.
    """
    add = parser.add_argument
    whole = {"type": int, "metavar": "N"}
    add("--steps", default=steps, help=f"training steps (default: {steps})", **whole)
    add("--batch", default=batch, help=f"frames of a step (default: {batch})", **whole)
    help_ = f"learning rate (default: {rate:g})"
    add("--learning-rate", type=float, default=rate, metavar="X", help=help_)
    demonstrations, corrections, rounds = episodes
    help_ = f"expert episodes of each task (default: {demonstrations})"
    add("--demonstrations", default=demonstrations, help=help_, **whole)
    help_ = f"episodes of each task in a round of DAgger (default: {corrections})"
    add("--corrections", default=corrections, help=help_, **whole)
    help_ = f"rounds of DAgger (default: {rounds})"
    add("--rounds", default=rounds, help=help_, **whole)
    add("--seed", default=0, help="seed of the batches (default: 0)", **whole)


def _add_success(parser: Parser) -> None:
    add = parser.add_argument
    help_ = "demo-policy, folder or hub id (default: demo-policy)"
    add("--model", default="demo-policy", help=help_)
    help_ = "episodes of each task (default: 25)"
    add("--episodes", type=int, default=25, metavar="N", help=help_)
    tasks = list(TASKS)
    add("--tasks", nargs="+", default=tasks, help="Meta-World tasks (default: all)")
    add("--methods", nargs="+", help="pruning methods (default: all)")
    help_ = "keep ratios (default: 0.75 0.5 0.25 0.1 0.05)"
    add("--budgets", nargs="+", type=float, metavar="R", help=help_)
    help_ = "rows by their label, such as none or 'trimvla 0.1' (default: all)"
    add("--rows", nargs="+", metavar="ROW", help=help_)
    help_ = "actions of a chunk to execute before the next image (default: all)"
    add("--first", type=int, metavar="N", help=help_)
    help_ = "JSON lines of results; new lines are appended"
    add("--log", required=True, metavar="FILE", help=help_)


def _add_tune(parser: Parser) -> None:
    add = parser.add_argument
    help_ = "demo-policy, or a policy of its shape (default: demo-policy)"
    add("--model", default="demo-policy", help=help_)
    add("--method", default="trimvla", help="trimvla or lightvla (default: trimvla)")
    help_ = "keep ratio of trimvla; lightvla has its own count (default: 0.1)"
    add("--keep-ratio", type=float, default=0.1, metavar="R", help=help_)
    help_ = "LoRA rank; 0 trains the whole language model (default: 0)"
    add("--rank", type=int, default=0, metavar="N", help=help_)
    help_ = "weight of the gradient of the choice (default: 2)"
    add("--choice", type=float, default=2.0, metavar="X", help=help_)
    help_ = "noise on the scores, which fades to 0 (default: 0.5)"
    add("--noise", type=float, default=0.5, metavar="X", help=help_)
    help_ = "share of unpruned actions among the targets (default: 1)"
    add("--distill", type=float, default=1.0, metavar="X", help=help_)
    add("--tower", action="store_true", help="train the towers as well")
    help_ = "steps that write FOLDER/step-STEP (default: 200 400)"
    steps = {"nargs": "*", "type": int, "default": (200, 400), "metavar": "STEP"}
    add("--snapshots", help=help_, **steps)
    _add_training(parser, 800, 16, 1e-4, (36, 8, 2))
    _add_folders(parser, "checkpoint")


def _add_score(parser: Parser) -> None:
    add = parser.add_argument
    help_ = "demo-policy, or a policy of its shape (default: demo-policy)"
    add("--model", default="demo-policy", help=help_)
    help_ = "acting, or asking, which ignores the last action (default: acting)"
    add("--scorer", default="acting", help=help_)
    help_ = "policy layers whose attention is imitated (default: the best)"
    add("--layers", nargs="+", type=int, metavar="LAYER", help=help_)
    help_ = "weight of the loss of actions through a gate (default: 0)"
    add("--actions", type=float, default=0.0, metavar="WEIGHT", help=help_)
    help_ = "range that each batch draws from (default: 0.05 0.25)"
    ratios = {"nargs": 2, "type": float, "default": (0.05, 0.25)}
    add("--keep-ratios", metavar=("LEAST", "MOST"), help=help_, **ratios)
    help_ = "held-out episodes of each task, to compare choices (default: 4)"
    add("--held-out", type=int, default=4, metavar="N", help=help_)
    _add_training(parser, 600, 32, 1e-3, (24, 6, 2))
    _add_folders(parser, "scorer")


def _add_chunks(parser: Parser) -> None:
    add = parser.add_argument
    help_ = "policy to take the first weights from (default: demo-policy)"
    add("--teacher", default="demo-policy", help=help_)
    help_ = "folder of a small pi0-FAST to continue from instead"
    add("--start", metavar="FOLDER", help=help_)
    help_ = "first steps, which only align visual tokens (default: 500)"
    add("--align", type=int, default=500, metavar="N", help=help_)
    _add_training(parser, 6000, 32, 1e-3, (100, 8, 3))
    _add_folders(parser, "checkpoint")


def _add_table(parser: Parser) -> None:
    add = parser.add_argument
    add("logs", nargs="+", metavar="LOG", help="files of `success --log`")
    help_ = "policy to time (default: demo-policy)"
    add("--model", default="demo-policy", help=help_)
    add("--plot", metavar="PNG", help="draw the table to a PNG file")
    help_ = "training step of each log, for a table by step"
    add("--steps", nargs="+", type=int, metavar="STEP", help=help_)
    help_ = "timed runs of each row; 0 leaves TTFT out (default: 15)"
    add("--runs", type=int, default=15, metavar="N", help=help_)


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.command == "table":
        _print_table(args)
        return
    if args.command != "chunks":  # needs it only where episodes are missing
        import_simulator()
    commands = {"run": _train, "tune": _tune, "chunks": _chunk, "success": _measure}
    commands |= {"score": _score, "frames": _write_frames}
    commands[args.command](args)


def _train(args) -> None:
    from .cloning import Cloning, Trainer
    from .student import write_checkpoint

    if Path(args.output).exists():
        raise InputError(f"{args.output} already exists; choose a new folder")
    if not args.scale > 0:
        raise InputError(f"scale {args.scale:g} is out of range; expected > 0")
    trainer = Trainer(Path(args.folder), Cloning().scaled(args.scale))
    trainer.run()
    write_checkpoint(trainer.averaged(), Path(args.output))
    print(f"wrote {args.output}")


def _given(args, kind: type) -> dict:
    """Return the fields of these settings that the flags set."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: value for name, value in vars(args).items() if name in names}


def _schedule(args):
    """How long is trained, once there is a place for what comes out."""
    from mlx_tokprune.train.loop import Schedule

    if Path(args.output).exists():
        raise InputError(f"{args.output} already exists; choose a new folder")
    return Schedule(args.steps, args.learning_rate, seed=args.seed)


def _tune(args) -> None:
    from .tuning import Tuner, Tuning

    schedule, tuning = _schedule(args), Tuning(**_given(args, Tuning))
    tuner = Tuner(args.model, tuning, schedule, Path(args.folder))
    tuner.run(Path(args.output), tuple(args.snapshots))
    print(f"wrote {args.output}")


def _write_frames(args) -> None:
    from ..questions import write_questions
    from .frames import draw_frames

    if args.pictures < 1:
        raise InputError("pictures is a whole number from 1")
    print(f"wrote {write_questions(draw_frames(args.pictures), args.output)}")


def _score(args) -> None:
    from .scoring import ScorerTrainer, Scoring, markdown

    schedule, given = _schedule(args), _given(args, Scoring)
    given["layers"] = tuple(args.layers) if args.layers else None
    least, most = args.keep_ratios
    scoring = Scoring(**given, least=least, most=most)
    trainer = ScorerTrainer(args.model, scoring, schedule, Path(args.folder))
    found = trainer.run(Path(args.output))
    print("nats from the actions with every token, on held-out frames, by keep ratio")
    print(markdown(found))
    print(f"wrote {args.output}")


def _chunk(args) -> None:
    from .chunking import Chunker, Chunking

    schedule, chunking = _schedule(args), Chunking(**_given(args, Chunking))
    Chunker(chunking, schedule, Path(args.folder)).run(Path(args.output))
    print(f"wrote {args.output}")


def _measure(args) -> None:
    from mlx_tokprune.checkpoints.loading import load

    from .success import BUDGETS, measure, rows

    for task in args.tasks:
        if task not in TASKS:
            known = ", ".join(TASKS)
            raise InputError(
                f"unknown task {task!r}; the tasks are {known}.{nearest(task, TASKS)}"
            )
    if args.episodes < 1:
        raise InputError(f"cannot run {args.episodes} episodes; the least is 1")
    chosen = rows(args.methods, args.budgets or BUDGETS, args.rows)
    log = Path(args.log)
    about = (args.episodes, args.tasks, chosen, log, args.first)
    measure(*load(args.model), *about)
    print(f"wrote {log}")


def _print_table(args) -> None:
    from .table import by_step, draw, draw_by_step, markdown, read_log

    if args.plot:
        check_output(args.plot, PICTURE)
        import_matplotlib()
    found = []
    for log in map(Path, args.logs):
        if not log.exists():
            raise InputError(f"{log} does not exist; expected a log of `success`")
        found.append(read_log(log))
    if args.steps:
        if len(args.steps) != len(found):
            raise InputError(f"give a step for each of {len(found)} logs")
        logs = dict(zip(args.steps, found, strict=True))
        print(by_step(logs))
        if args.plot:
            draw_by_step(logs, Path(args.plot))
        return
    lines = [line for log in found for line in log]
    saved = _time_saved(args.model, args.runs) if args.runs else {}
    print(markdown(lines, saved))
    if args.plot:
        draw(lines, Path(args.plot))


def _time_saved(folder: str, runs: int) -> dict[str, float]:
    """Return the share of TTFT that each row saves, from interleaved warm runs."""
    from mlx_tokprune.act.predict import predict_action
    from mlx_tokprune.checkpoints.embedded import POLICY_FRAME, POLICY_STATE
    from mlx_tokprune.checkpoints.loading import load
    from mlx_tokprune.processing.image import load_image

    from .success import CONTROLS, rows

    model, processor = load(folder)
    image, asked = load_image(POLICY_FRAME.path), POLICY_FRAME.question
    chosen = [row for row in rows() if row.label not in CONTROLS]
    times: dict[str, list[float]] = {row.label: [] for row in chosen}
    for number in range(runs + 2):
        for row in chosen:
            options = {"pruner": row.pruner, "positions": row.positions}
            options |= {"proprio": POLICY_STATE} if model.args.state_size else {}
            action = predict_action(model, processor, [image], asked, **options)
            if number >= 2:
                times[row.label].append(action.ttft_ms)
    whole = statistics.median(times["none"])
    return {
        label: 1 - statistics.median(values) / whole
        for label, values in times.items()
        if label != "none"
    }


if __name__ == "__main__":
    main()
