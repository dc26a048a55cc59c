"""Accuracy, agreement and divergence of pruned answers, on your questions or ours."""

import json
import sys
from pathlib import Path

import mlx.core as mx

from ..bench.machine import describe
from ..bench.subjects import Answering, Asked
from ..commands import DEFAULT_POSITIONS
from ..demo import CHECKPOINT
from ..errors import InputError, Parser, command
from ..files import write_text
from ..loading import load
from ..models.openvla import OpenVLA
from ..pipeline import POSITIONS
from ..pruners import get_method, list_pruners
from .data import DESCRIBE, Questions, read_questions
from .gather import Workers, launch
from .measure import (
    SCHEMA,
    Evaluator,
    Journal,
    Row,
    answer_all,
    describe_run,
    make_rows,
)
from .table import draw, markdown, summarize

RATIOS = (0.5, 0.25, 0.11)


def build_parser() -> Parser:
    parser = Parser(prog="mlx_tokprune.evaluate", description=__doc__)
    add = parser.add_argument
    add("--model", help="folder or hub id (default: the embedded demo model)")
    add("--data", default="demo", help="JSONL file, folder of pictures, or demo")
    add("--pictures", type=int, default=64, help="of the demo (default: 64)")
    add("--prompt", help=f"asked of a folder's pictures (default: {DESCRIBE!r})")
    add("--methods", nargs="+", help="default: all of the vision stage")
    budget = parser.add_mutually_exclusive_group()
    ratios = {"nargs": "+", "type": float, "metavar": "R"}
    budget.add_argument("--keep-ratios", default=RATIOS, **ratios)
    tokens = {"nargs": "+", "type": int, "metavar": "K", "default": []}
    budget.add_argument("--eval-budgets", help="visual tokens instead", **tokens)
    add("--image-size", type=int, help="of the input, px (default: the model's own)")
    add("--positions", choices=POSITIONS, default=DEFAULT_POSITIONS)
    add("--max-tokens", type=int, default=32, help="of an answer (default: 32)")
    add("--workers", type=int, default=1, help="processes on this machine")
    add("--output", default="evaluate.json", help="result file")
    add("--plot", help="draw accuracy against FLOPs to this PNG")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    rows = _rows(args)
    questions = read_questions(args.data, args.pictures, args.prompt)
    if args.workers > 1:
        launch(sys.argv[1:] if argv is None else argv, args.workers, args.output)
        return
    workers = Workers()
    if workers.is_first:
        for number, reason in questions.skipped:
            print(f"skipped line {number}: {reason}")
    model, processor = load(CHECKPOINT if args.model is None else args.model)
    if isinstance(model, OpenVLA):
        raise InputError(
            "this model answers in actions; measure policies in closed loop with "
            "mlx_tokprune.train.policy success"
        )
    subject = Answering("", model, processor)
    if args.image_size:
        subject = subject.at(args.image_size)
        processor = subject.processor
    options = {"positions": args.positions, "max_tokens": args.max_tokens}
    options["image_size"] = processor.image_size
    evaluator = Evaluator(model, processor, rows, args.positions, args.max_tokens)
    header = describe_run(model, questions.items, rows, **options)
    journal = Journal(_journal_file(args.output, workers), header)
    mine = workers.share(len(questions.items))
    records = answer_all(evaluator, questions.items, mine, journal)
    records = workers.gather(records)
    if not workers.is_first:
        return
    flops = _flops(args, subject, rows, questions)
    result = {
        **{"schema": SCHEMA, "machine": describe(), "run": header},
        "model": "demo" if args.model is None else args.model,
        "image_size": processor.image_size,
        "data": args.data,
        "questions": len(questions.items),
        "skipped": [list(line) for line in questions.skipped],
        "rows": summarize(questions.items, records, flops),
        "answers": _answers(questions, records),
    }
    write_text(args.output, json.dumps(result, indent=1) + "\n")
    _report(args, result)


def _rows(args) -> list[Row]:
    if min(args.pictures, args.max_tokens, args.workers) < 1:
        raise InputError("pictures, max tokens and workers are whole numbers from 1")
    methods = args.methods or [m for m in list_pruners("vision") if m != "none"]
    for name in methods:
        if get_method(name).stage != "vision":
            raise InputError(
                f"method {name!r} looks at the prompt, which only policies can do; "
                f"choose one of {', '.join(list_pruners('vision'))}"
            )
    for ratio in args.keep_ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"keep ratio {ratio:g} is outside (0, 1]")
    parent = Path(args.output).absolute().parent
    if not parent.is_dir():
        raise InputError(f"--output is in {parent}, which does not exist")
    return make_rows(
        methods, () if args.eval_budgets else args.keep_ratios, args.eval_budgets
    )


def _journal_file(output: str, workers: Workers) -> Path:
    """Beside the result, so that a run that is stopped goes on where it was."""
    return Path(f"{output}.{workers.rank}-of-{workers.size}.jsonl")


def _flops(args, subject: Answering, rows: list[Row], questions: Questions) -> dict:
    """Up to the first token of the first question."""
    item = questions.items[0]
    images, found = [item.load()], {}
    for row in rows:
        asked = Asked(images, item.question, row.pruner, args.positions)
        costs = subject.count(asked).costs.values()
        found[row.label] = sum(cost.flops for cost in costs)
    return found


def _answers(questions: Questions, records: dict) -> list[dict]:
    return [
        {
            "picture": item.picture,
            "question": item.question,
            "answers": list(item.answers),
            "kind": item.kind,
            "given": {label: row["answer"] for label, row in records[number].items()},
        }
        for number, item in enumerate(questions.items)
    ]


def _report(args, result: dict) -> None:
    machine = result["machine"]
    print(
        f"{result['questions']} questions of {result['data']}, {args.positions} "
        f"positions, {machine['device']}, MLX {mx.__version__}"
    )
    print(markdown(result["rows"]))
    print(f"\nwrote {args.output}")
    if args.plot:
        draw(result["rows"], Path(args.plot))
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
