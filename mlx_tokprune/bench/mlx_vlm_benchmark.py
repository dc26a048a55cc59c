"""Times of a model in mlx-vlm: unpruned, pruned, and on smaller pictures.

Interleaved: every round measures each row once, so that a machine that slows down slows
all. TTFT is mlx-vlm's time from the decoded picture to the first token.
"""

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..errors import InputError, printable
from ..files import write_text
from ..measure.machine import describe, format_versions
from ..measure.mlx_vlm_subject import MlxVlmSubject
from ..measure.results import MACHINE, NUMBER_OR_NULL, Row, read_result
from ..measure.tables import Table
from .speed_table import saved

_MOST = 1e30  # limit of a valid time, rate, or FLOPs
SCHEMA = "mlx_tokprune.bench.guest/1"
_NOTE = (
    "TTFT: from the decoded picture to the first token, median (least-most). "
    "Ceiling: saved share of the FLOPs of tower and prompt. max_pixels: a "
    "smaller picture with at most as many tokens, not pruned. MB: the peak of "
    "MLX's arrays, weights included."
)
_SAMPLES = ("ttft_ms", "total_ms", "decode_tokens_per_second", "peak_memory_mb")
SHAPE = {
    "machine": MACHINE,
    "model": str,
    "positions": str,
    "rows": [
        {
            **{"label": str, "picture": int, "prompt": str, "flops": NUMBER_OR_NULL},
            **{"visual_tokens": int, "kept": int, "prompt_tokens": int},
            "samples": {name: [NUMBER_OR_NULL] for name in _SAMPLES},
        }
    ],
}


def measure(
    subject: MlxVlmSubject,
    rows: Sequence[Row],
    images: Sequence,
    prompts: Sequence[str],
    tokens: int,
    runs: int,
    output: Path,
) -> dict:
    """Write and return the result of `runs` rounds, after one round to warm up.

    tokens: number of generated tokens. Raises `InputError` if `output` exists and is no
    such result.
    """
    if output.exists():
        read_mlx_vlm(output)
    cases = list(itertools.product(rows, range(len(images)), prompts))
    lines: list[dict] = [{} for _ in cases]
    total = len(cases) * (runs + 1)
    with tqdm(total=total, desc="measuring", unit="row", disable=None) as bar:
        for run in range(runs + 1):
            first = run % len(cases)
            order = [*range(first, len(cases)), *range(first)]
            for number in order:
                row, picture, prompt = cases[number]
                reply = subject.ask(row, images[picture], prompt, tokens)
                if not lines[number]:
                    cost = subject.cost(row, images[picture], prompt, reply.kept)
                    lines[number] = {
                        **{"label": row.label, "picture": picture, "prompt": prompt},
                        **{"visual_tokens": reply.total, "kept": reply.kept},
                        "prompt_tokens": reply.prompt,
                        "flops": cost and sum(part.flops for part in cost.values()),
                        "samples": {name: [] for name in _SAMPLES},
                    }
                for name in _SAMPLES if run else ():
                    lines[number]["samples"][name].append(getattr(reply, name))
                bar.update()
    result = {
        **{"schema": SCHEMA, "machine": describe(), "model": subject.name},
        **{"positions": subject.kind_of_positions, "tokens": tokens, "rows": lines},
    }
    write_text(output, json.dumps(result, indent=1) + "\n", SCHEMA)
    return result


def read_mlx_vlm(file: str | Path) -> dict:
    """Return a result file of `measure`.

    Raises `InputError` for a file that is none, and for rows without an unpruned one.
    """
    result = read_result(file, SCHEMA, SHAPE)
    if not result["rows"]:
        raise InputError(f"{file} is damaged: it has no rows")
    for row in result["rows"]:
        base = _base(row, result["rows"])
        if base is None or not _fits(row, base):
            raise InputError(
                f"{file} is damaged: its rows do not fit together; expected as many "
                "samples of each, and an unpruned row for every other"
            )
    return result


def _fits(row: dict, base: dict) -> bool:
    """Return whether a row is as long as its base, and its times are possible."""
    counts = {len(values) for values in row["samples"].values()}
    names = ("ttft_ms", "total_ms", "peak_memory_mb")
    numbers = [value for name in names for value in row["samples"][name]]
    rates = [r for r in row["samples"]["decode_tokens_per_second"] if r is not None]
    rates += [] if row["flops"] is None else [row["flops"]]
    return (
        counts == {len(base["samples"]["ttft_ms"])} != {0}
        and all(number is not None and 0 < number < _MOST for number in numbers)
        and all(0 < rate < _MOST for rate in rates)
    )


def _base(row: dict, rows: list[dict]) -> dict | None:
    case = ("picture", "prompt")
    same = (r for r in rows if all(r[name] == row[name] for name in case))
    return next((r for r in same if r["label"] == "none"), None)


def tabulate(result: dict) -> Table:
    """Build the table of medians and of savings over the unpruned model."""
    machine = result["machine"]
    versions = format_versions(machine)
    runs = len(result["rows"][0]["samples"]["ttft_ms"])
    summary = (
        f"{printable(result['model'])} in mlx-vlm, {result['positions']} positions; "
        f"{machine['device']}, {versions}; n={runs}, interleaved."
    )
    columns = ("method", "visual tokens kept", "prompt tokens", "TTFT ms")
    columns += ("saved", "ceiling", "tok/s", "MB")
    rows = [_cells(row, _base(row, result["rows"]) or row) for row in result["rows"]]
    return Table(columns, rows, [summary], [_NOTE])


def _cells(row: dict, base: dict) -> list[str]:
    samples, savings = row["samples"], ["", ""]
    times = samples["ttft_ms"]
    rates = [r for r in samples["decode_tokens_per_second"] if r]
    if row is not base:
        savings[0] = f"{100 * saved(row, base):.0f} %"
        if row["flops"] and base["flops"]:
            savings[1] = f"{100 * (1 - row['flops'] / base['flops']):.0f} %"
    return [
        *(printable(row["label"]), f"{row['kept']}", f"{row['prompt_tokens']}"),
        f"{statistics.median(times):.0f} ({min(times):.0f}-{max(times):.0f})",
        *savings,
        f"{statistics.median(rates):.1f}" if rates else "",
        f"{statistics.median(samples['peak_memory_mb']):.0f}",
    ]
