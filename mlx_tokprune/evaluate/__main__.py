"""Measure accuracy, agreement and divergence of pruned answers."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from ..checkpoints.loading import load
from ..checkpoints.opening import open_checkpoint
from ..cli import (
    RUNTIMES,
    Parser,
    add_adapter,
    add_rows,
    add_verbose,
    begin_logging,
    check_rows,
    command,
    options_of,
    read_options,
    row_plans,
)
from ..errors import InputError, import_matplotlib, printable
from ..files import PICTURE, check_apart, check_output, is_replaced, locked, write_text
from ..generate.settings import Settings
from ..measure.accuracy import SCHEMA
from ..measure.machine import describe
from ..measure.results import Row, make_rows
from ..measure.subject import OwnSubject, subject_of
from ..pipeline import DEFAULT_POSITIONS
from ..pipeline.planning import plan_for
from ..processing.processor import PADDINGS
from ..pruners import read_plan
from .accuracy_table import draw, most_common, summarize, tabulate
from .evaluator import Evaluator, describe_run
from .gather import Workers, end_with_launcher, launch, notes_once
from .items import DESCRIBE, Questions, blinded, read_questions
from .journal import Journal, answer_all
from .own_runtime import OwnRuntime
from .recommend import recommend, sentence

RATIOS = (0.5, 0.25, 0.11)
Start = tuple[Evaluator, dict, Questions]  # with the description of the run


def build_parser() -> Parser:
    """Return the parser of `mlx_tokprune evaluate`."""
    parser = Parser(
        prog="mlx_tokprune evaluate",
        description=__doc__,
        example="mlx_tokprune evaluate --model FastVLM-0.5B-mlx --data q.jsonl \\\n"
        "    --methods norm attention --keep-ratios 0.5 0.25 --recommend 0.02",
    )
    add = parser.add_argument
    help_ = "folder, hub id, demo or demo-policy (default: demo)"
    add("--model", default="demo", help=help_)
    add_adapter(parser)
    help_ = "JSON lines, folder of images, or demo (default: demo)"
    add("--data", default="demo", help=help_)
    help_ = "images to generate for demo (default: 64)"
    add("--pictures", type=int, metavar="N", default=64, help=help_)
    help_ = f"question about the images of a folder (default: {DESCRIBE!r})"
    add("--prompt", help=help_)
    add_rows(parser, RATIOS, budgets=True)
    add = parser.add_argument_group("images").add_argument
    help_ = "longer side of the input in pixels (default: as trained)"
    add("--image-size", type=int, metavar="PX", help=help_)
    help_ = "encode or skip the black border of padded images (default: keep)"
    add("--padding", choices=PADDINGS, default="keep", help=help_)
    help_ = "show black images, to measure accuracy without vision"
    add("--blind", action="store_true", help=help_)
    add = parser.add_argument_group("generation").add_argument
    help_ = "this library (own), or mlx-vlm and its models (default: own)"
    add("--runtime", choices=RUNTIMES, default=RUNTIMES[0], help=help_)
    help_ = "tokens of an answer at most (default: 32)"
    add("--max-tokens", "-m", type=int, metavar="N", default=32, help=help_)
    help_ = "bits of a quantized cache, 4 or 8 (default: not quantized)"
    add("--kv-bits", type=int, metavar="BITS", help=help_)
    help_ = "group size of a quantized cache (default: 64)"
    add("--kv-group-size", type=int, metavar="N", default=64, help=help_)
    help_ = "number of processes on this machine (default: 1)"
    add("--workers", type=int, metavar="N", default=1, help=help_)
    add = parser.add_argument_group("output").add_argument
    help_ = "name the cheapest row that loses at most this share, such as 0.02"
    add("--recommend", type=float, metavar="LOSS", help=help_)
    help_ = "result file (default: evaluate.json)"
    add("--output", metavar="JSON", default="evaluate.json", help=help_)
    add("--plot", metavar="PNG", help="draw accuracy against FLOPs")
    add_verbose(parser)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Evaluate a model, alone or in several processes, and write the result."""
    args = build_parser().parse_args(argv)
    begin_logging(args.verbose)
    end_with_launcher()
    with notes_once(args.workers):
        _run(args, sys.argv[1:] if argv is None else argv)


def _run(args: argparse.Namespace, argv: list[str]) -> None:
    _check(args)
    questions = read_questions(args.data, args.pictures, args.prompt)
    questions = blinded(questions) if args.blind else questions
    if args.workers > 1:
        if args.runtime != "own":
            raise InputError("mlx-vlm's runtime has one worker; leave out --workers")
        open_checkpoint(args.model)
        launch(argv, args.workers, args.output)
        return
    workers = Workers()
    with locked(_journal_file(args.output, workers.rank, workers.size)):
        _evaluate(args, questions, workers)


def _evaluate(args: argparse.Namespace, questions: Questions, workers: Workers) -> None:
    begin = _begin_mlx_vlm if args.runtime == "mlx-vlm" else _begin
    evaluator, header, questions = begin(args, questions)
    if workers.is_first:
        for number, reason in questions.skipped:
            print(f"skipped line {number}: {printable(reason)}")
    file = _journal_file(args.output, workers.rank, workers.size)
    journal = Journal(file, header)
    mine = workers.share(len(questions.items))
    records = answer_all(evaluator, questions.items, mine, journal)
    records = workers.gather(records)
    if workers.is_first:
        result = {
            **{"schema": SCHEMA, "machine": describe(), "run": header},
            **{"model": args.model, "image_size": header["image_size"]},
            "data": args.data,
            "questions": len(questions.items),
            "skipped": [list(line) for line in questions.skipped],
            "rows": summarize(questions.items, records),
            "most_common": most_common(questions.items),
            "answers": _answers(questions, records),
        }
        if args.recommend is not None:
            result["recommendation"] = recommend(
                questions.items, records, evaluator.rows, args.recommend
            )
        write_text(args.output, json.dumps(result, indent=1) + "\n", SCHEMA)
        _remove_journals(args.output, workers.size)
        _report(args, result)


def _begin(args: argparse.Namespace, questions: Questions) -> Start:
    """Return the evaluator of a model in our runtime, its run and its questions."""
    loaded = load(args.model, adapter_path=args.adapter_path)
    subject = subject_of(args.model, *loaded)
    size = subject.image_size if args.image_size is None else args.image_size
    subject = subject.at(size, args.padding)
    rows, settings = _rows(args, subject, questions), _settings(args)
    header = describe_run(
        subject.model,
        questions.items,
        rows,
        positions=settings.positions,
        max_tokens=args.max_tokens,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size if args.kv_bits else None,
        image_size=subject.image_size,
        padding=args.padding,
        blind=args.blind,
        adapter=args.adapter_path,
    )
    return Evaluator(OwnRuntime(subject, rows, settings), rows), header, questions


def _begin_mlx_vlm(args: argparse.Namespace, questions: Questions) -> Start:
    """Return the evaluator of a model in mlx-vlm's runtime, its run and questions."""
    from ..measure.mlx_vlm_subject import MlxVlmSubject, check_mlx_vlm
    from .mlx_vlm_runtime import MlxVlmRuntime, readable

    names = ("plans", "prune", "image_size", "adapter_path", "kv_bits", "eval_budgets")
    check_mlx_vlm(**{name: getattr(args, name) for name in names})
    check_mlx_vlm(recommend=args.recommend is not None, padding=args.padding == "skip")
    subject = MlxVlmSubject(args.model, args.positions)
    methods = subject.default_methods() if args.methods is None else args.methods
    rows = subject.rows(methods, args.keep_ratios, options_of(methods, args))
    questions = readable(subject, rows, questions)
    header = describe_run(
        subject.model,
        questions.items,
        rows,
        positions=subject.kind_of_positions,
        max_tokens=args.max_tokens,
        image_size=0,
        runtime="mlx-vlm",
    )
    runtime = MlxVlmRuntime(subject, args.max_tokens)
    return Evaluator(runtime, rows), header, questions


def _check(args: argparse.Namespace) -> None:
    """Raise `InputError` for bad flags before any file is read."""
    if min(args.pictures, args.max_tokens, args.workers) < 1:
        raise InputError("pictures, max tokens and workers are whole numbers from 1")
    _settings(args)
    loss = args.recommend
    if loss is not None and not 0 <= loss <= 1:
        raise InputError(f"a loss of {loss:g} is outside [0, 1]; 0.02 is 2 points")
    check_rows(args)
    check_apart(args.output, [args.data, *([args.plot] if args.plot else [])])
    check_output(args.output, SCHEMA)
    if args.plot:
        check_output(args.plot, PICTURE)
        import_matplotlib()


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(
        positions=args.positions or DEFAULT_POSITIONS,
        max_tokens=args.max_tokens,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=0,
    )


def _rows(
    args: argparse.Namespace, subject: OwnSubject, questions: Questions
) -> list[Row]:
    methods = args.methods
    if methods is None:
        everywhere = args.recommend is not None
        methods = [] if row_plans(args) else subject.default_methods(everywhere)
    options = options_of(methods, args)
    ratios = () if args.eval_budgets else args.keep_ratios
    plan_options = read_options(args.option)
    plans = {text: read_plan(text, plan_options) for text in row_plans(args)}
    counts = _token_counts(args, subject, questions)
    rows = make_rows(methods, ratios, counts, options, plans)
    for row in rows:
        plan_for(subject.model, row.pruners)  # refuses a bad plan before any answer
    return rows


def _token_counts(
    args: argparse.Namespace, subject: OwnSubject, questions: Questions
) -> list[int]:
    """Return `--eval-budgets`, capped at the visual tokens of a picture.

    Without padding, pictures differ in their tokens: the cap is the fewest of them.
    """
    counts = args.eval_budgets
    if not counts:
        return []
    pictures = list({item.picture: item for item in questions.items}.values())
    pictures = pictures if args.padding == "skip" else pictures[:1]
    total = min(subject.total([item.load()]) for item in pictures)
    over = [str(count) for count in counts if count > total]
    if over:
        print(
            f"{', '.join(over)} visual tokens are more than the {total}, so all are "
            "kept"
        )
    return list(dict.fromkeys(min(count, total) for count in counts))


def _journal_file(output: str, rank: int, size: int) -> Path:
    """Return the journal beside the result, from which a stopped run resumes."""
    return Path(f"{output}.{rank}-of-{size}.jsonl")


def _remove_journals(output: str, size: int) -> None:
    """Remove the journals of this machine, whose records are in the result."""
    for file in (_journal_file(output, rank, size) for rank in range(size)):
        with contextlib.suppress(InputError):  # of another machine's rank: not ours
            if is_replaced(file, SCHEMA):
                file.unlink()


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


def _report(args: argparse.Namespace, result: dict) -> None:
    machine, mlx = result["machine"], result["machine"]["versions"]["mlx"]
    print(
        f"{result['questions']} questions of {printable(result['data'])}, "
        f"{result['run']['positions']} "
        f"positions, padding {args.padding}, {machine['device']}, MLX {mlx}; shares in "
        "percent (95 % interval)"
    )
    print(tabulate(result["rows"]).markdown())
    if result["most_common"] is not None:
        share = f"{100 * result['most_common']:.1f} %"
        print(f"\nalways the most common answer to its kind of question: {share}")
    if "recommendation" in result:
        print(f"\n{sentence(result['recommendation'])}")
    print(f"\nwrote {args.output}")
    if args.plot:
        draw(result["rows"], Path(args.plot))
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
