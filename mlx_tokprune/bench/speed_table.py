"""Table of a benchmark, with a row per case."""

import statistics

from ..errors import printable
from ..measure.machine import format_versions
from ..measure.tables import Table
from ..pipeline.timing import STAGES
from .benchmark import is_base, median

_NOISE = "~"  # before a saving above its ceiling

_COLUMNS = (
    *("model", "px", "method", "tokens kept (layer mean)", "TTFT ms", "saved"),
    *("ceiling", "faster", "limit", "x limit", "pre", "vision", "prune", "project"),
    *("prefill", "no vision*", "tok/s", "calls", "tok/call", "total ms", "MB"),
    "cache MB",
)
NOTE = (
    "TTFT: from decoded picture and prompt to the first token id; median "
    "(least-most). Saved: of the unpruned TTFT of the same model, picture, size and "
    "prompt, median of the rounds; ceiling: the same in FLOPs, and a saving above it "
    f"is marked {_NOISE}, as noise; faster: unpruned TTFT over this one. Limit: "
    "FLOPs over the measured matmul rate or weights over the measured bandwidth, "
    "whichever is larger, ms. "
    "Stages, ms: of a run of its own that waits for the device after each stage, so "
    "that their sum exceeds TTFT. Calls: of this language model, without a drafting "
    "model's, the prompt's included; tokens per call after the prompt's. Cache: keys "
    "and values of the prompt. "
    "* Project and prefill alone; some published tables call it TTFT; not a TTFT."
)


def tabulate(result: dict) -> Table:
    """Build the table, with the machine before it and the column notes after it."""
    rows = result["rows"]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    ordered = sorted(rows, key=lambda row: prompts.index(row["prompt"]))
    cells = [_cells(row, rows) for row in ordered]
    return Table(_COLUMNS, cells, [describe(result)], [NOTE], left=(0, 2))


def describe(result: dict) -> str:
    """Return one sentence on the machine, the versions and the number of runs."""
    machine, rates = result["machine"], result["rates"]
    versions = format_versions(machine)
    runs = len(result["rows"][0]["samples"]["ttft_ms"]) if result["rows"] else 0
    return (
        f"{machine['device']}, {machine['cores']} cores, {machine['system']}; "
        f"{versions}, commit {machine['commit']}; matmul "
        f"{rates['flops_per_second'] / 1e9:.0f} GFLOP/s, bandwidth "
        f"{rates['bytes_per_second'] / 1e9:.1f} GB/s; n={runs}, interleaved."
    )


def unpruned(row: dict, rows: list[dict]) -> dict:
    """Return the row of the same model, size and prompt that keeps every token."""
    return next(other for other in rows if is_base(other, row))


def saved(row: dict, base: dict) -> float:
    """Return the saved share of the unpruned TTFT, as the median over the rounds."""
    pairs = zip(row["samples"]["ttft_ms"], base["samples"]["ttft_ms"], strict=True)
    return 1 - statistics.median(pruned / whole for pruned, whole in pairs)


def flops(row: dict) -> float:
    """Return a row's FLOPs up to the first token."""
    return sum(cost["flops"] for cost in row["costs"].values())


def stage(row: dict, name: str) -> float | None:
    """Return the median time of a stage in ms, `None` if it was not measured."""
    return median([sample.get(name) for sample in row["samples"]["stages_ms"]])


def _cells(row: dict, rows: list[dict]) -> list[str]:
    samples = row["samples"]
    names = [printable(row["model"]), str(row["image_size"]), label(row)]
    if not samples["ttft_ms"]:
        return [*names, "not measured"]
    *stages, project, prefill = (stage(row, name) for name in STAGES)
    both = None if project is None or prefill is None else project + prefill
    return [
        *names,
        f"{row.get('mean_kept', row['kept']):.4g}/{row['visual_tokens']}",
        *_ttft(row, unpruned(row, rows)),
        *map(_number, (*stages, project, prefill, both)),
        _number(median(samples["decode_tokens_per_second"])),
        *_calls(samples),
        _number(median(samples["total_ms"])),
        f"{max(samples['peak_memory_mb']):.0f}",
        f"{row.get('cache_bytes', 0) / 1e6:.2f}",
    ]


def _ttft(row: dict, base: dict) -> list[str]:
    """Return the cells from `TTFT ms` to `x limit`."""
    times, limit = row["samples"]["ttft_ms"], row["limit_ms"]
    ttft, share = statistics.median(times), saved(row, base)
    ceiling = 1 - flops(row) / flops(base)
    noise = f"{_NOISE} " if share > ceiling else ""
    savings = ["", "", ""]
    if base is not row:
        savings = [f"{noise}{_percent(share)}", _percent(ceiling)]
        savings.append(f"{1 / (1 - share):.2f}x")
    spread = f"{ttft:.1f} ({min(times):.1f}-{max(times):.1f})"
    return [spread, *savings, f"{limit:.1f}", f"{ttft / limit:.1f}"]


def _calls(samples: dict) -> tuple[str, str]:
    """Return the cells `calls` and `tok/call`."""
    calls, tokens = samples.get("calls"), samples.get("tokens")
    if not calls or not tokens:
        return "", ""
    pairs = zip(calls, tokens, strict=True)
    each = median([(t - 1) / (c - 1) if c > 1 else None for c, t in pairs])
    return f"{statistics.median(calls):g}", "" if each is None else f"{each:.2f}"


def label(row: dict) -> str:
    """Return the method, its keep ratio and the drafting method."""
    draft = row.get("draft")
    return f"{_pruned(row)}, draft {printable(draft)}" if draft else _pruned(row)


def _pruned(row: dict) -> str:
    ratio = row["keep_ratio"]
    if ratio is None:
        plan = any(mark in row["method"] for mark in ":@+")
        return row["method"] if plan else f"{row['method']} own count"
    return row["method"] if ratio == 1 else f"{row['method']} {ratio:g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
