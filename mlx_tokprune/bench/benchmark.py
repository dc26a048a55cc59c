"""Rows of a benchmark and their measurement, interleaved and resumable.

TTFT is unfenced and starts with a decoded picture; stages are fenced, in a separate
run. Every round measures each row once, so that a machine that slows down slows all.
"""

import hashlib
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
from PIL import Image
from tqdm import tqdm

from ..checkpoints.fingerprint import fingerprint
from ..errors import InputError
from ..files import write_text
from ..generate.drafts import Drafts, ModelDrafts
from ..measure.cost import Cost
from ..measure.machine import describe, measure_rates
from ..measure.results import (
    MACHINE,
    NUMBER,
    NUMBER_OR_NULL,
    NewerField,
    Table,
    budgets,
    mismatch,
    read_result,
)
from ..measure.subject import OwnSubject, Request
from ..pipeline import DEFAULT_POSITIONS
from ..pipeline.planning import plan_for
from ..pipeline.timing import STAGES
from ..pruners import Plan, Pruner, as_plan, read_plan
from ..pruners.registry import Options

SCHEMA = "mlx_tokprune.bench/1"
_TIMES = ("ttft_ms", "total_ms", "decode_tokens_per_second", "peak_memory_mb")
SAMPLES = (*_TIMES, "calls", "tokens", "stages_ms")
_COST = dict.fromkeys(("flops", "bytes", "weights", "launches"), NUMBER)
# Shape of a result file; docs/results.md describes its fields.
SHAPE = {
    "machine": {**MACHINE, "cores": int, "system": str},
    "rates": {"flops_per_second": NUMBER, "bytes_per_second": NUMBER},
    "options": {"tokens": int, "rows": [dict]},
    "rows": [
        {
            **{"model": str, "image_size": int, "prompt": str, "method": str},
            **{"keep_ratio": NUMBER_OR_NULL, "positions": str},
            **{"visual_tokens": int, "kept": int, "limit_ms": NUMBER},
            "draft": NewerField(str),
            "costs": {name: _COST for name in ("vision", "project", "prefill")},
            "samples": {
                **{name: [NUMBER] for name in _TIMES},
                "decode_tokens_per_second": [NUMBER_OR_NULL],
                "stages_ms": [dict.fromkeys(STAGES, NUMBER)],
                **dict.fromkeys(("calls", "tokens"), NewerField([int])),
            },
        }
    ],
}


@dataclass(frozen=True)
class Case:
    """Row of the table: all that is measured but the machine.

    method: or the text of a plan. keep_ratio: `None` if the method or plan has the
    budget. picture: its number. draft: name of the drafts, `None` without.
    """

    model: str
    image_size: int
    prompt: str
    method: str
    keep_ratio: float | None
    positions: str = DEFAULT_POSITIONS
    picture: int = 0
    options: Options = field(default_factory=dict, hash=False)
    draft: str | None = None

    @property
    def pruners(self) -> Plan:
        """Plan of the row."""
        if self.keep_ratio == 1:
            return (Pruner("none"),)
        if self.keep_ratio is None:
            return read_plan(self.method, self.options)
        return (Pruner(self.method, self.keep_ratio, options=self.options),)


def make_cases(
    subjects: Sequence[OwnSubject],
    methods: Sequence[str],
    ratios: Sequence[float],
    sizes: Sequence[int],
    prompts: Sequence[str],
    positions: str,
    pictures: int = 1,
    options: Mapping[str, Options] | None = None,
    plans: Sequence[str] = (),
    drafts: Sequence[str] = (),
) -> list[Case]:
    """Return every combination of methods and ratios, and every plan, at each size.

    sizes: input sizes in pixels besides the model's own. pictures: their number.
    options: by method. drafts: names; each row is measured without a draft and with
    each of them. Unpruned rows are always included, also of the model's lower sizes.
    """
    cases = []
    everything = itertools.product(subjects, prompts, range(pictures))
    for subject, prompt, picture in everything:
        pruned = {subject.image_size, *sizes}
        for size in sorted({*pruned, *subject.lower_sizes}):
            start = (subject.name, size, prompt)
            cases.append(Case(*start, "none", 1.0, positions, picture))
            for method in methods if size in pruned else ():
                own = (options or {}).get(method, {})
                for ratio in budgets(method, ratios, own):
                    case = Case(*start, method, ratio, positions, picture, own)
                    cases.append(case)
            for text in plans if size in pruned else ():
                names = [pruner.method for pruner in read_plan(text)]
                own = {k: v for n in names for k, v in (options or {})[n].items()}
                cases.append(Case(*start, text, None, positions, picture, own))
    both = itertools.product(cases, (None, *drafts))
    return [replace(case, draft=draft) for case, draft in both]


# Measuring --------------------------------------------------------------------------


def run_once(subject: OwnSubject, request: Request, tokens: int) -> dict:
    """Measure one sample of each quantity.

    tokens: number of generated tokens. Times are in ms, memory in MB (1e6 bytes).
    """
    mx.reset_peak_memory()
    times = subject.run(request, tokens)
    peak = mx.get_peak_memory() / 1e6
    stages = subject.run(request, 1, stages=True)["stages_ms"]
    return {**times, "peak_memory_mb": peak, "stages_ms": stages}


def limit_ms(costs: dict[str, Cost], rates: dict[str, float]) -> float:
    """Return the least time in ms for these costs on a machine of these rates."""
    return 1e3 * sum(
        max(
            cost.flops / rates["flops_per_second"],
            cost.weights / rates["bytes_per_second"],
        )
        for cost in costs.values()
    )


class Benchmark:
    """Benchmark whose result file grows round by round, and is resumed if it exists.

    tokens: number of generated tokens. drafts: by name, as in the cases. Raises
    `InputError` for a file of another benchmark.
    """

    def __init__(
        self,
        file: Path,
        subjects: Sequence[OwnSubject],
        cases: Sequence[Case],
        images: Sequence[Image.Image],
        tokens: int,
        drafts: Mapping[str, Drafts] | None = None,
    ):
        self.file, self.cases, self.images, self.tokens = file, cases, images, tokens
        self.drafts = drafts or {}
        self.subjects = {subject.name: subject for subject in subjects}
        self.result = self._open()

    def _open(self) -> dict:
        """Return the result in the file, or a new one."""
        options = {
            "tokens": self.tokens,
            "rows": [_describe(case) for case in self.cases],
            "weights": {n: fingerprint(s.model) for n, s in self.subjects.items()},
            "pictures": [_hash(image) for image in self.images],
            "scorers": self._scorers(),
            "drafts": {name: _identity(drafts) for name, drafts in self.drafts.items()},
        }
        if not self.file.exists():
            return {
                "schema": SCHEMA,
                "machine": describe(),
                "rates": measure_rates(),
                "options": options,
                "rows": [],
            }
        result = read_bench(self.file)
        if result["options"] != options:
            raise InputError(
                f"{self.file} holds a benchmark of other rows, weights or pictures; "
                "choose another file, or give the options it was started with"
            )
        return result

    def _scorers(self) -> list[str]:
        """Return the fingerprints of the scorers of rows and drafts."""
        plans = [
            *(case.pruners for case in self.cases),
            *map(_pruners, self.drafts.values()),
        ]
        scorers = (p.scorer for plan in plans for p in plan if p.scorer is not None)
        return sorted({fingerprint(scorer) for scorer in scorers})

    def run(self, runs: int) -> dict:
        """Measure until every row has `runs` samples; return the result."""
        if not self.result["rows"]:
            self.result["rows"] = [
                self._prepare(case) for case in self._with_progress()
            ]
            self._save()
        done = len(self.result["rows"][0]["samples"]["ttft_ms"])
        todo = max(0, runs - done) * len(self.cases)
        if todo and done:
            self._warm_up()
        with tqdm(total=todo, desc="measuring", unit="row", disable=None) as progress:
            for number in range(done, runs):
                self._round(number, progress)
        return self.result

    def _with_progress(self) -> Iterator[Case]:
        return iter(tqdm(self.cases, desc="warming up", unit="row", disable=None))

    def _measure(self, case: Case) -> dict:
        return run_once(*self._inputs(case), self.tokens)

    def _inputs(self, case: Case) -> tuple[OwnSubject, Request]:
        subject = self.subjects[case.model].at(case.image_size)
        images = [self.images[case.picture]]
        plan = plan_for(subject.model, case.pruners)
        drafts = self.drafts[case.draft] if case.draft else None
        return subject, Request(images, case.prompt, plan, case.positions, drafts)

    def _prepare(self, case: Case) -> dict:
        """Return the row without samples; run it once to warm it up."""
        subject, request = self._inputs(case)
        counted = subject.count(request)
        self._measure(case)
        return {
            **_describe(case),
            "visual_tokens": counted.tokens.total,
            "kept": round(counted.tokens.left),
            "mean_kept": counted.tokens.mean,
            "cache_bytes": counted.cache_bytes,
            "costs": {name: vars(cost) for name, cost in counted.costs.items()},
            "limit_ms": limit_ms(counted.costs, self.result["rates"]),
            "samples": {name: [] for name in SAMPLES},
        }

    def _warm_up(self) -> None:
        for case in self._with_progress():
            self._measure(case)

    def _round(self, number: int, progress: tqdm) -> None:
        """Measure every row once; the first row changes from round to round."""
        order = list(range(len(self.cases)))
        first = number % len(order)
        samples = {}
        for index in order[first:] + order[:first]:
            samples[index] = self._measure(self.cases[index])
            progress.update()
        for index, sample in samples.items():
            for name, value in sample.items():
                self.result["rows"][index]["samples"][name].append(value)
        self._save()

    def _save(self) -> None:
        write_text(self.file, json.dumps(self.result, indent=1) + "\n", SCHEMA)


def _pruners(drafts: Drafts) -> Plan:
    return as_plan(getattr(drafts, "pruner", None))


def _identity(drafts: Drafts) -> list[str]:
    """Return the settings of drafts, and the weights of a drafting model."""
    own = [fingerprint(drafts.model)] if isinstance(drafts, ModelDrafts) else []
    return [repr(drafts), *own]


def _hash(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]


def _describe(case: Case) -> dict:
    """Return a case for JSON, without the options that have their default."""
    fields = dict(vars(case)) | {"options": dict(case.options)}
    plain = {"picture": 0, "options": {}, "draft": None}
    return {k: v for k, v in fields.items() if k not in plain or v != plain[k]}


def read_bench(file: str | Path) -> dict:
    """Return a result file of `bench`.

    Raises `InputError` for another schema, and for a file that is not consistent.
    """
    result = read_result(file, SCHEMA, SHAPE)
    rows = result["rows"]
    runs = {len(values) for row in rows for values in row["samples"].values()}
    positive = all(
        value > 0
        for row in rows
        for value in (row["limit_ms"], *row["samples"]["ttft_ms"])
    )
    flops = all(any(c["flops"] > 0 for c in row["costs"].values()) for row in rows)
    paired = all(any(is_base(other, row) for other in rows) for row in rows)
    sized = all(
        type(row.get("cache_bytes", 0)) is int
        and type(row.get("mean_kept", 0)) in NUMBER
        and not mismatch(row["costs"], Table(_COST), "")
        for row in rows
    )
    if not (len(runs) <= 1 and positive and flops and paired and sized):
        raise InputError(
            f"{file} is damaged: its rows do not fit together; expected as many "
            "samples in each, times above 0, and an unpruned row for every other"
        )
    return result


def is_base(other: dict, row: dict) -> bool:
    """Return whether `other` is the unpruned row to compare `row` with."""
    case = ("model", "image_size", "prompt", "positions", "picture")
    plain = other["method"] == "none" and not other.get("draft")
    return plain and all(other.get(k) == row.get(k) for k in case)


def median(values: Sequence[float | None]) -> float | None:
    """Return the median of the values that are not `None`, `None` without any."""
    numbers = [value for value in values if value is not None]
    return statistics.median(numbers) if numbers else None
