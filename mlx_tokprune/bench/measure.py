"""Rows of a benchmark and how they are measured: interleaved, resumable, honest.

TTFT is unfenced and starts with a decoded picture; stages are fenced, in a run of their
own. Every round measures each row once, so that a machine that slows down slows all.
"""

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from .. import control
from ..act import predict_action
from ..errors import InputError
from ..files import write_text
from ..generate import stream_generate
from ..models.openvla import OpenVLA
from ..pipeline import assemble, first_logits, measure_stages, see
from ..pruners import Pruner
from .graph import Cost, count
from .machine import describe, measure_rates

SCHEMA = "mlx_tokprune.bench/1"
SAMPLES = (
    *("ttft_ms", "total_ms", "decode_tokens_per_second", "peak_memory_mb"),
    "stages_ms",
)


@dataclass(frozen=True)
class Subject:
    """A loaded model under the name it has in the table."""

    name: str
    model: object
    processor: object

    @property
    def acts(self) -> bool:
        return isinstance(self.model, OpenVLA)

    def at(self, image_size: int) -> "Subject":
        """The same with pictures of another size."""
        resized = dataclasses.replace(self.processor, image_size=image_size)
        return dataclasses.replace(self, processor=resized)


@dataclass(frozen=True)
class Row:
    """What is measured: everything but the machine."""

    model: str
    image_size: int
    prompt: str
    method: str
    keep_ratio: float
    positions: str = "original"

    @property
    def pruner(self) -> Pruner:
        if self.keep_ratio == 1:
            return Pruner("none")
        return Pruner(self.method, self.keep_ratio)

    @property
    def case(self) -> tuple:
        """What a pruned row shares with the unpruned one beside it."""
        return (self.model, self.image_size, self.prompt)


def make_rows(
    subjects: Sequence[Subject],
    methods: Sequence[str],
    ratios: Sequence[float],
    sizes: Sequence[int],
    prompts: Sequence[str],
    positions: str,
) -> list[Row]:
    """Every combination; ratio 1 is one row, `none`. Always with the unpruned row."""
    rows = []
    for subject, prompt in itertools.product(subjects, prompts):
        own = subject.processor.image_size
        for size in [own] if subject.acts or not sizes else sizes:
            case = (subject.name, size, prompt)
            rows.append(Row(*case, "none", 1.0, positions))
            for method, ratio in itertools.product(methods, ratios):
                if ratio < 1:
                    rows.append(Row(*case, method, ratio, positions))
    return list(dict.fromkeys(rows))


def check_size(size: int) -> None:
    """Raise `InputError` unless FastVLM's tower takes pictures of `size` pixels."""
    if size < 64 or size % 64:
        nearest = max(64, round(size / 64) * 64)
        raise InputError(
            f"cannot encode pictures of {size} px; expected a multiple of 64, such as "
            f"{nearest}"
        )


# Measuring --------------------------------------------------------------------------


def run_once(subject: Subject, row: Row, images: list, tokens: int) -> dict:
    """One sample of each quantity; `tokens` is how many are generated."""
    asked = (subject.model, subject.processor, images, row.prompt)
    mx.reset_peak_memory()
    start = time.perf_counter()
    if subject.acts:
        key = next(iter(subject.processor.norm_stats))
        how = {"pruner": row.pruner, "positions": row.positions, "unnorm_key": key}
        action = predict_action(*asked, **how)
        ttft, made = action.ttft_ms, len(action.token_ids or "")
        rate = 1e3 * (made - 1) / (action.total_ms - ttft) if made > 1 else None
    else:
        how = {"pruner": row.pruner, "positions": row.positions}
        *_, last = stream_generate(*asked, max_tokens=tokens, **how)
        ttft, rate = last.ttft_ms, last.decode_tokens_per_second or None
    total = (time.perf_counter() - start) * 1e3
    peak = mx.get_peak_memory() / 1e6
    return {
        "ttft_ms": ttft,
        "total_ms": total,
        "decode_tokens_per_second": rate,
        "peak_memory_mb": peak,
        "stages_ms": dataclasses.asdict(_stages(subject, row, asked)),
    }


def _stages(subject: Subject, row: Row, asked: tuple):
    if not subject.acts:
        return measure_stages(*asked, row.pruner, row.positions)
    key = next(iter(subject.processor.norm_stats))
    steps = len(subject.processor.bounds("action", key).low)
    return control.measure_stages(*asked, row.pruner, row.positions, None, steps)


def count_stages(
    subject: Subject, row: Row, images: list, pruner: Pruner | None = None
) -> tuple[dict[str, Cost], int, int]:
    """The cost of each stage up to the first token, N and K. Evaluates little.

    pruner: instead of the row's.
    """
    model, pruner = subject.model, pruner or row.pruner
    pixels = mx.array(subject.processor.pixels(images))
    if subject.acts:
        observation = control.observe(subject.processor, images, row.prompt)
        features = control.encode(model, observation, pruner.needs)
        patches = control.see(model, observation, pruner, features)
        sequence = control.assemble(model, observation, patches, row.positions)
        total, kept = patches.total, patches.indices.shape[1]
        prefilled = sequence.embeddings

        def prefill(embeddings):
            hidden = model.hidden_states(embeddings, "causal", None)
            return model.logits(hidden[:, -1:])

    else:
        prompt = subject.processor.prompt(row.prompt, len(images))
        visual = see(model, pixels, pruner)
        total, kept = visual.total, visual.selection.keep
        prefilled = assemble(model, prompt, visual, "contiguous").embeddings

        def prefill(embeddings):
            where = dataclasses.replace(
                assemble(model, prompt, visual, "contiguous"), embeddings=embeddings
            )
            return first_logits(model, where)

    channels = model.encode(pixels).tokens.shape[-1]
    tokens = mx.zeros((len(images), kept, channels))
    costs = {
        "vision": count(lambda p: model.encode(p, pruner.needs).tokens, pixels),
        "project": count(model.project, tokens),
        "prefill": count(prefill, mx.zeros(prefilled.shape)),
    }
    return costs, total, kept


def limit_ms(costs: dict[str, Cost], rates: dict[str, float]) -> float:
    """The least time for these FLOPs and weights on a machine of these rates."""
    return 1e3 * sum(
        max(
            cost.flops / rates["flops_per_second"],
            cost.weights / rates["bytes_per_second"],
        )
        for cost in costs.values()
    )


class Benchmark:
    """A result file that grows round by round. Resumes what the file holds."""

    def __init__(
        self,
        file: Path,
        subjects: Sequence[Subject],
        rows: Sequence[Row],
        images: list,
        tokens: int,
    ):
        self.file, self.rows, self.images, self.tokens = file, rows, images, tokens
        self.subjects = {subject.name: subject for subject in subjects}
        self.result = self._opened()

    def _opened(self) -> dict:
        options = {"tokens": self.tokens, "rows": [vars(row) for row in self.rows]}
        if not self.file.exists():
            return {
                "schema": SCHEMA,
                "machine": describe(),
                "rates": measure_rates(),
                "options": options,
                "rows": [],
            }
        result = read_result(self.file)
        if result["options"] != options:
            raise InputError(
                f"{self.file} holds a benchmark of other rows; choose another file, or "
                "give the options it was started with"
            )
        return result

    def run(self, runs: int) -> dict:
        """Measures until every row has `runs` samples."""
        if not self.result["rows"]:
            self.result["rows"] = [self._prepared(row) for row in self._shown()]
            self._save()
        done = len(self.result["rows"][0]["samples"]["ttft_ms"])
        todo = max(0, runs - done) * len(self.rows)
        if todo and done:
            self._warm_up()
        with tqdm(total=todo, desc="measuring", unit="row", disable=None) as progress:
            for number in range(done, runs):
                self._round(number, progress)
        return self.result

    def _shown(self) -> Iterator[Row]:
        return iter(tqdm(self.rows, desc="warming up", unit="row", disable=None))

    def _subject(self, row: Row) -> Subject:
        return self.subjects[row.model].at(row.image_size)

    def _prepared(self, row: Row) -> dict:
        """What is known before measuring; runs the row once to warm it up."""
        subject = self._subject(row)
        costs, total, kept = count_stages(subject, row, self.images)
        run_once(subject, row, self.images, self.tokens)
        return {
            **vars(row),
            "visual_tokens": total,
            "kept": kept,
            "costs": {name: vars(cost) for name, cost in costs.items()},
            "limit_ms": limit_ms(costs, self.result["rates"]),
            "samples": {name: [] for name in SAMPLES},
        }

    def _warm_up(self) -> None:
        for row in self._shown():
            run_once(self._subject(row), row, self.images, self.tokens)

    def _round(self, number: int, progress) -> None:
        """Every row once, each round beginning with another."""
        order = list(range(len(self.rows)))
        first = number % len(order)
        samples = {}
        for index in order[first:] + order[:first]:
            row = self.rows[index]
            samples[index] = run_once(self._subject(row), row, self.images, self.tokens)
            progress.update()
        for index, sample in samples.items():
            for name, value in sample.items():
                self.result["rows"][index]["samples"][name].append(value)
        self._save()

    def _save(self) -> None:
        write_text(self.file, json.dumps(self.result, indent=1) + "\n")


def read_result(file: Path) -> dict:
    """A result file; `InputError` unless it is one of this schema."""
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError):
        raise InputError(
            f"{file} is no JSON file that can be read; expected a result of "
            "mlx_tokprune.bench"
        ) from None
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{file} has schema {schema!r}; expected {SCHEMA!r}")
    return result


def median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
