"""Rows of a benchmark and how they are measured: interleaved, resumable, honest.

TTFT is unfenced and starts with a decoded picture; stages are fenced, in a run of their
own. Every round measures each row once, so that a machine that slows down slows all.
"""

import hashlib
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
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
    Newer,
    Optional,
    Table,
    budgets,
    mismatch,
    read_result,
)
from ..measure.subject import Asked, OwnSubject
from ..pipeline import DEFAULT_POSITIONS
from ..pipeline.planning import plan_for
from ..pipeline.timing import STAGES
from ..pruners import Plan, Pruner, as_plan, read_plan
from ..pruners.registry import Options

SCHEMA = "mlx_tokprune.bench/1"
_TIMES = ("ttft_ms", "total_ms", "decode_tokens_per_second", "peak_memory_mb")
SAMPLES = (*_TIMES, "calls", "tokens", "stages_ms")
_COST = dict.fromkeys(("flops", "bytes", "weights", "launches"), NUMBER)
# What a file holds; docs/results.md says what it means.
SHAPE = {
    "machine": {**MACHINE, "cores": int, "system": str},
    "rates": {"flops_per_second": NUMBER, "bytes_per_second": NUMBER},
    "options": {"tokens": int, "rows": [dict]},
    "rows": [
        {
            **{"model": str, "image_size": int, "prompt": str, "method": str},
            **{"keep_ratio": Optional(NUMBER), "positions": str},
            **{"visual_tokens": int, "kept": int, "limit_ms": NUMBER},
            "draft": Newer(str),
            "costs": {name: _COST for name in ("vision", "project", "prefill")},
            "samples": {
                **{name: [NUMBER] for name in _TIMES},
                "decode_tokens_per_second": [Optional(NUMBER)],
                "stages_ms": [dict.fromkeys(STAGES, NUMBER)],
                **dict.fromkeys(("calls", "tokens"), Newer([int])),
            },
        }
    ],
}


@dataclass(frozen=True)
class Case:
    """What is measured: everything but the machine.

    method: or a plan as it is written. keep_ratio: `None` where that says how many
    tokens stay. picture: its number. draft: what drafts the answer, by its name.
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
    """Every combination of methods and ratios, and plans, in sizes besides the own.

    Unpruned rows are always there: of each size, and of lower ones than the model's.
    All are measured without a draft, and with each of `drafts`.
    """
    found, everything = [], (subjects, prompts, range(pictures))
    for subject, prompt, picture in itertools.product(*everything):
        pruned = {subject.image_size, *sizes}
        for size in sorted({*pruned, *subject.lower_sizes}):
            about = (subject.name, size, prompt)
            found.append(Case(*about, "none", 1.0, positions, picture))
            for method in methods if size in pruned else ():
                own = (options or {}).get(method, {})
                for ratio in budgets(method, ratios, own):
                    case = Case(*about, method, ratio, positions, picture, own)
                    found.append(case)
            for text in plans if size in pruned else ():
                names = [pruner.method for pruner in read_plan(text)]
                own = {k: v for n in names for k, v in (options or {})[n].items()}
                found.append(Case(*about, text, None, positions, picture, own))
    both = itertools.product(found, (None, *drafts))
    return [replace(case, draft=draft) for case, draft in both]


# Measuring --------------------------------------------------------------------------


def run_once(subject: OwnSubject, asked: Asked, tokens: int) -> dict:
    """One sample of each quantity; `tokens` is how many are generated."""
    mx.reset_peak_memory()
    times = subject.run(asked, tokens)
    peak = mx.get_peak_memory() / 1e6
    stages = subject.run(asked, 1, stages=True)["stages_ms"]
    return {**times, "peak_memory_mb": peak, "stages_ms": stages}


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
        subjects: Sequence[OwnSubject],
        cases: Sequence[Case],
        images: list,
        tokens: int,
        drafts: Mapping[str, Drafts] | None = None,
    ):
        self.file, self.cases, self.images, self.tokens = file, cases, images, tokens
        self.drafts = drafts or {}
        self.subjects = {subject.name: subject for subject in subjects}
        self.result = self._opened()

    def _opened(self) -> dict:
        options = {
            "tokens": self.tokens,
            "rows": [_described(case) for case in self.cases],
            "weights": {n: fingerprint(s.model) for n, s in self.subjects.items()},
            "pictures": [_hash(image) for image in self.images],
            "scorers": self._scorers(),
            "drafts": {name: _drafter(drafts) for name, drafts in self.drafts.items()},
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
        """What tells the scorers of the rows apart, and of the drafts' pruners."""
        plans = [
            *(case.pruners for case in self.cases),
            *map(_pruners, self.drafts.values()),
        ]
        found = (p.scorer for plan in plans for p in plan if p.scorer is not None)
        return sorted({fingerprint(scorer) for scorer in found})

    def run(self, runs: int) -> dict:
        """Measures until every row has `runs` samples."""
        if not self.result["rows"]:
            self.result["rows"] = [self._prepared(case) for case in self._shown()]
            self._save()
        done = len(self.result["rows"][0]["samples"]["ttft_ms"])
        todo = max(0, runs - done) * len(self.cases)
        if todo and done:
            self._warm_up()
        with tqdm(total=todo, desc="measuring", unit="row", disable=None) as progress:
            for number in range(done, runs):
                self._round(number, progress)
        return self.result

    def _shown(self) -> Iterator[Case]:
        return iter(tqdm(self.cases, desc="warming up", unit="row", disable=None))

    def _measured(self, case: Case) -> dict:
        return run_once(*self._of(case), self.tokens)

    def _of(self, case: Case) -> tuple:
        subject = self.subjects[case.model].at(case.image_size)
        images = [self.images[case.picture]]
        plan = plan_for(subject.model, case.pruners)
        drafts = self.drafts[case.draft] if case.draft else None
        return subject, Asked(images, case.prompt, plan, case.positions, drafts)

    def _prepared(self, case: Case) -> dict:
        """What is known before measuring; runs the row once to warm it up."""
        subject, asked = self._of(case)
        counted = subject.count(asked)
        self._measured(case)
        return {
            **_described(case),
            "visual_tokens": counted.tokens.total,
            "kept": round(counted.tokens.left),
            "mean_kept": counted.tokens.mean,
            "cache_bytes": counted.cache_bytes,
            "costs": {name: vars(cost) for name, cost in counted.costs.items()},
            "limit_ms": limit_ms(counted.costs, self.result["rates"]),
            "samples": {name: [] for name in SAMPLES},
        }

    def _warm_up(self) -> None:
        for case in self._shown():
            self._measured(case)

    def _round(self, number: int, progress) -> None:
        """Every row once, each round beginning with another."""
        order = list(range(len(self.cases)))
        first = number % len(order)
        samples = {}
        for index in order[first:] + order[:first]:
            samples[index] = self._measured(self.cases[index])
            progress.update()
        for index, sample in samples.items():
            for name, value in sample.items():
                self.result["rows"][index]["samples"][name].append(value)
        self._save()

    def _save(self) -> None:
        write_text(self.file, json.dumps(self.result, indent=1) + "\n")


def _pruners(drafts: Drafts) -> Plan:
    return as_plan(getattr(drafts, "pruner", None))


def _drafter(drafts: Drafts) -> list[str]:
    """Its settings, and the weights of a model that drafts."""
    own = [fingerprint(drafts.model)] if isinstance(drafts, ModelDrafts) else []
    return [repr(drafts), *own]


def _hash(image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]


def _described(case: Case) -> dict:
    """As JSON; what every row has alike is left out."""
    fields = dict(vars(case)) | {"options": dict(case.options)}
    plain = {"picture": 0, "options": {}, "draft": None}
    return {k: v for k, v in fields.items() if k not in plain or v != plain[k]}


def read_bench(file: str | Path) -> dict:
    """A result file; `InputError` unless it is of this schema, whole and consistent."""
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
    """Whether `other` is the unpruned row to compare `row` with."""
    case = ("model", "image_size", "prompt", "positions", "picture")
    plain = other["method"] == "none" and not other.get("draft")
    return plain and all(other.get(k) == row.get(k) for k in case)


def median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
