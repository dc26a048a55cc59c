"""Accuracy, agreement and divergence of pruned answers, on your questions or ours."""

import json
import sys
from pathlib import Path

import mlx.core as mx

from ..bench.machine import describe
from ..bench.subjects import Acting, Answering, Asked, subject_of
from ..commands import DEFAULT_POSITIONS
from ..demo import EMBEDDED
from ..errors import InputError, Parser, command
from ..files import write_text
from ..loading import PADDINGS, check, load
from ..pipeline import POSITIONS
from ..pruners import get_method, list_pruners
from .actions import ActionEvaluator
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
    add("--model", help="folder, hub id, demo or demo-policy (default: demo)")
    add("--data", default="demo", help="JSONL, folder of pictures, demo or metaworld")
    add("--pictures", type=int, default=64, help="of demo and metaworld (default: 64)")
    add("--prompt", help=f"asked of a folder's pictures (default: {DESCRIBE!r})")
    add("--methods", nargs="+", help="default: all of the vision stage")
    budget = parser.add_mutually_exclusive_group()
    ratios = {"nargs": "+", "type": float, "metavar": "R"}
    budget.add_argument("--keep-ratios", default=RATIOS, **ratios)
    tokens = {"nargs": "+", "type": int, "metavar": "K", "default": []}
    budget.add_argument("--eval-budgets", help="visual tokens instead", **tokens)
    add("--image-size", type=int, help="of the input, px (default: the model's own)")
    add("--padding", choices=PADDINGS, default="keep", help="of pictures to squares")
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
    name = args.model or ("demo-policy" if args.data == "metaworld" else "demo")
    if args.workers > 1:
        check(EMBEDDED.get(name, name))
        launch(sys.argv[1:] if argv is None else argv, args.workers, args.output)
        return
    workers = Workers()
    if workers.is_first:
        for number, reason in questions.skipped:
            print(f"skipped line {number}: {reason}")
    subject = subject_of(name, *load(EMBEDDED.get(name, name)))
    subject = subject.at(args.image_size or subject.image_size, args.padding)
    _check_methods(rows, subject)
    header = describe_run(
        subject.model,
        questions.items,
        rows,
        positions=args.positions,
        max_tokens=args.max_tokens,
        image_size=subject.image_size,
        padding=args.padding,
    )
    journal = Journal(_journal_file(args.output, workers), header)
    mine = workers.share(len(questions.items))
    evaluator = _evaluator(args, subject, rows)
    records = answer_all(evaluator, questions.items, mine, journal)
    records = workers.gather(records)
    if workers.is_first:
        result = {
            **{"schema": SCHEMA, "machine": describe(), "run": header},
            **{"model": name, "image_size": subject.image_size, "data": args.data},
            "questions": len(questions.items),
            "skipped": [list(line) for line in questions.skipped],
            "rows": summarize(
                questions.items, records, _flops(args, subject, rows, questions)
            ),
            "answers": _answers(questions, records),
        }
        write_text(args.output, json.dumps(result, indent=1) + "\n")
        _remove_journals(args.output, workers)
        _report(args, result)


def _evaluator(args, subject: Answering | Acting, rows: list[Row]):
    model, processor = subject.model, subject.processor
    if isinstance(subject, Acting):
        return ActionEvaluator(model, processor, rows, args.positions)
    return Evaluator(model, processor, rows, args.positions, args.max_tokens)


def _rows(args) -> list[Row]:
    if min(args.pictures, args.max_tokens, args.workers) < 1:
        raise InputError("pictures, max tokens and workers are whole numbers from 1")
    methods = args.methods or [m for m in list_pruners("vision") if m != "none"]
    for name in methods:
        get_method(name)
    for ratio in args.keep_ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"keep ratio {ratio:g} is outside (0, 1]")
    parent = Path(args.output).absolute().parent
    if not parent.is_dir():
        raise InputError(f"--output is in {parent}, which does not exist")
    return make_rows(
        methods, () if args.eval_budgets else args.keep_ratios, args.eval_budgets
    )


def _check_methods(rows: list[Row], subject: Answering | Acting) -> None:
    for row in rows:
        if row.pruner.stage not in subject.method_stages:
            raise InputError(
                f"method {row.pruner.method!r} looks at the prompt, which only "
                f"policies can do; choose one of {', '.join(list_pruners('vision'))}"
            )


def _journal_file(output: str, workers: Workers) -> Path:
    """Beside the result, so that a run that is stopped goes on where it was."""
    return Path(f"{output}.{workers.rank}-of-{workers.size}.jsonl")


def _remove_journals(output: str, workers: Workers) -> None:
    """Those of this machine; the result holds all that is in them."""
    place = Path(output).absolute()
    for file in place.parent.glob(f"{place.name}.*-of-{workers.size}.jsonl"):
        file.unlink()


def _flops(
    args, subject: Answering | Acting, rows: list[Row], questions: Questions
) -> dict[str, float]:
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
            "scores": {k: row["accuracy"] for k, row in records[number].items()},
        }
        for number, item in enumerate(questions.items)
    ]


def _report(args, result: dict) -> None:
    machine = result["machine"]
    print(
        f"{result['questions']} questions of {result['data']}, {args.positions} "
        f"positions, padding {args.padding}, {machine['device']}, MLX {mx.__version__}"
    )
    print(markdown(result["rows"]))
    print(f"\nwrote {args.output}")
    if args.plot:
        draw(result["rows"], Path(args.plot))
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
