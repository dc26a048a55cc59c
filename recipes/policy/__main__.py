"""Train the demo policy or measure one: `python -m recipes.policy`."""

import dataclasses
import statistics
from pathlib import Path

from mlx_tokprune.cli import Parser, command
from mlx_tokprune.errors import InputError, import_matplotlib, nearest
from mlx_tokprune.files import check_output
from mlx_tokprune.scenes.worlds import TASKS, import_simulator


def build_parser() -> Parser:
    parser = Parser(prog="recipes.policy", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, resuming what is in the folder")
    run.add_argument("--folder", required=True, help="where training state is kept")
    run.add_argument("--output", required=True, help="checkpoint folder to write")
    run.add_argument(
        "--scale", type=float, default=1.0, help="of the steps and episodes (default 1)"
    )
    success = commands.add_parser("success", help="measure in closed loop")
    success.add_argument("--model", default="demo-policy")
    success.add_argument("--episodes", type=int, default=25, help="of each task")
    success.add_argument("--tasks", nargs="+", default=list(TASKS))
    success.add_argument("--methods", nargs="+", help="default: all")
    help_ = "shares of tokens to keep (default: 0.75 0.5 0.25 0.1 0.05)"
    success.add_argument("--budgets", nargs="+", type=float, help=help_)
    help_ = "only these, called as in the table: none, 'trimvla 0.1' (default: all)"
    success.add_argument("--rows", nargs="+", metavar="ROW", help=help_)
    help_ = "of a chunk, the actions done before looking again (default: all)"
    success.add_argument("--first", type=int, metavar="N", help=help_)
    success.add_argument("--log", required=True, help="JSON lines, added to")
    _add_chunks(commands)
    _add_tune(commands)
    _add_score(commands)
    table = commands.add_parser("table", help="the table of one or more logs")
    table.add_argument("logs", nargs="+")
    table.add_argument("--model", default="demo-policy")
    table.add_argument("--plot", help="also draw it to this PNG")
    help_ = "of a training at which each log was measured: a table by these"
    table.add_argument("--steps", nargs="+", type=int, help=help_)
    help_ = "for TTFT, each row; 0 leaves it out (default: 15)"
    table.add_argument("--runs", type=int, default=15, help=help_)
    return parser


def _add_tune(commands) -> None:
    help_ = "fine-tune under pruning whose choice is learned, resuming"
    parser = commands.add_parser("tune", help=help_)
    add = parser.add_argument
    help_ = "folder of a policy of its shape (default: demo-policy)"
    add("--model", default="demo-policy", help=help_)
    add("--method", default="trimvla", help="trimvla (default) or lightvla")
    help_ = "of trimvla; lightvla has its own (default: 0.1)"
    add("--keep-ratio", type=float, default=0.1, help=help_)
    add("--steps", type=int, default=800, help="(default: 800)")
    add("--batch", type=int, default=16, help="frames in a step (default: 16)")
    add("--learning-rate", type=float, default=1e-4, help="(default: 1e-4)")
    help_ = "of LoRA; 0, the default, trains all of the language model"
    add("--rank", type=int, default=0, help=help_)
    help_ = "weight of the choice's gradient (default: 2)"
    add("--choice", type=float, default=2.0, help=help_)
    help_ = "on the scores, fades to 0 (default: 0.5)"
    add("--noise", type=float, default=0.5, help=help_)
    help_ = "share of the policy's own unpruned actions in what is learned (default: 1)"
    add("--distill", type=float, default=1.0, help=help_)
    add("--tower", action="store_true", help="train the towers, too")
    help_ = "episodes of each task (default: 36)"
    add("--demonstrations", type=int, default=36, help=help_)
    help_ = "episodes of each task in a round of DAgger (default: 8)"
    add("--corrections", type=int, default=8, help=help_)
    add("--rounds", type=int, default=2, help="of DAgger (default: 2)")
    add("--seed", type=int, default=0)
    help_ = "steps after which FOLDER/step-STEP is written (default: 200 400)"
    add("--snapshots", nargs="*", type=int, default=(200, 400), help=help_)
    add("--folder", required=True, help="where training state is kept")
    add("--output", required=True, help="checkpoint folder to write")


def _add_score(commands) -> None:
    help_ = "train a scorer that reads the instruction and the last action, resuming"
    parser = commands.add_parser("score", help=help_)
    add = parser.add_argument
    help_ = "folder of a policy of its shape (default: demo-policy)"
    add("--model", default="demo-policy", help=help_)
    help_ = "acting (default), or asking, which does not read the last action"
    add("--scorer", default="acting", help=help_)
    help_ = "of the policy, whose attention is imitated (default: the best)"
    add("--layers", nargs="+", type=int, metavar="LAYER", help=help_)
    help_ = "weight of the actions' loss through a gate, beside imitation (default: 0)"
    add("--actions", type=float, default=0.0, metavar="WEIGHT", help=help_)
    help_ = "between which each batch draws its own (default: 0.05 0.25)"
    ratios = {"nargs": 2, "type": float, "default": (0.05, 0.25)}
    add("--keep-ratios", metavar=("LEAST", "MOST"), help=help_, **ratios)
    add("--steps", type=int, default=600, help="(default: 600)")
    add("--batch", type=int, default=32, help="frames in a step (default: 32)")
    add("--learning-rate", type=float, default=1e-3, help="(default: 1e-3)")
    help_ = "episodes of each task (default: 24)"
    add("--demonstrations", type=int, default=24, help=help_)
    help_ = "others, to compare choices with (default: 4)"
    add("--held-out", type=int, default=4, help=help_)
    help_ = "episodes of each task in a round in which the policy acts (default: 6)"
    add("--corrections", type=int, default=6, help=help_)
    add("--rounds", type=int, default=2, help="of these (default: 2)")
    add("--seed", type=int, default=0)
    add("--folder", required=True, help="where training state is kept")
    add("--output", required=True, help="folder of the scorer to write")


def _add_chunks(commands) -> None:
    help_ = "train a small pi0-FAST that answers in chunks of actions, resuming"
    parser = commands.add_parser("chunks", help=help_)
    add = parser.add_argument
    help_ = "the policy that it begins with (default: demo-policy)"
    add("--teacher", default="demo-policy", help=help_)
    add("--start", help="folder of a policy of its own shape to go on with instead")
    add("--steps", type=int, default=6000, help="(default: 6000)")
    help_ = "of these, those that only learn to see as the teacher does (default: 500)"
    add("--align", type=int, default=500, help=help_)
    add("--batch", type=int, default=32, help="frames in a step (default: 32)")
    add("--learning-rate", type=float, default=1e-3, help="(default: 1e-3)")
    help_ = "episodes of each task (default: 100)"
    add("--demonstrations", type=int, default=100, help=help_)
    help_ = "episodes of each task in a round of DAgger (default: 8)"
    add("--corrections", type=int, default=8, help=help_)
    add("--rounds", type=int, default=3, help="of DAgger (default: 3)")
    add("--seed", type=int, default=0)
    add("--folder", required=True, help="where training state is kept")
    add("--output", required=True, help="checkpoint folder to write")


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.command == "table":
        _print_table(args)
        return
    if args.command != "chunks":  # needs it only where episodes are missing
        import_simulator()
    commands = {"run": _train, "tune": _tune, "chunks": _chunk, "success": _measure}
    commands["score"] = _score
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
    """What the flags say of the fields of these settings."""
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
        check_output(args.plot)
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
    """The share of TTFT that each row saves, medians of interleaved warm runs."""
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
