"""A benchmark for people: a Markdown table, one row per combination."""

import statistics

from ..errors import printable
from .benchmark import is_base, median

_NOISE = "~"  # before a saving above its ceiling

_COLUMNS = (
    *("model", "px", "method", "kept", "TTFT ms", "saved", "ceiling", "faster"),
    *("limit", "x limit", "pre", "vision", "prune", "project", "prefill"),
    *("no vision*", "tok/s", "calls", "tok/call", "total ms", "MB", "cache MB"),
)
NOTE = (
    "TTFT: from decoded picture and prompt to the first token id, unfenced; median "
    "(least-most). Saved: of the unpruned TTFT of the same model, picture, size and "
    "prompt, median of the rounds; ceiling: the same in FLOPs, and a saving above it "
    f"is marked {_NOISE}, as noise; faster: unpruned TTFT over this one. Kept: visual "
    "tokens, mean over the language model's layers. Limit: FLOPs over the measured "
    "matmul rate or weights over the measured bandwidth, whichever is larger, ms. "
    "Stages are fenced, ms. Calls: of this language model, not of one that "
    "drafts, the prompt's, too, and tokens in each that follows. Cache: keys and "
    "values of the prompt. "
    "* Project and prefill alone, what some published tables call TTFT; not a TTFT."
)


def markdown(result: dict) -> str:
    """The machine, the table and what its columns mean."""
    rows = result["rows"]
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---|" + "---:|" * 1 + "---|"]
    lines[1] += "---:|" * (len(_COLUMNS) - 3)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    for prompt in prompts:
        lines += [_line(row, rows) for row in rows if row["prompt"] == prompt]
    return "\n".join([describe(result), "", *lines, "", NOTE])


def describe(result: dict) -> str:
    """One sentence on where the figures come from."""
    machine, rates = result["machine"], result["rates"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    runs = len(result["rows"][0]["samples"]["ttft_ms"]) if result["rows"] else 0
    return (
        f"{machine['device']}, {machine['cores']} cores, {machine['system']}; "
        f"{versions}, commit {machine['commit']}; matmul "
        f"{rates['flops_per_second'] / 1e9:.0f} GFLOP/s, bandwidth "
        f"{rates['bytes_per_second'] / 1e9:.1f} GB/s; n={runs}, interleaved."
    )


def unpruned(row: dict, rows: list[dict]) -> dict:
    """The row of the same model, size and prompt that keeps every token."""
    return next(other for other in rows if is_base(other, row))


def saved(row: dict, base: dict) -> float:
    """The share of TTFT saved: median of the rounds, each row beside the unpruned."""
    pairs = zip(row["samples"]["ttft_ms"], base["samples"]["ttft_ms"], strict=True)
    return 1 - statistics.median(pruned / whole for pruned, whole in pairs)


def flops(row: dict) -> float:
    """Up to the first token."""
    return sum(cost["flops"] for cost in row["costs"].values())


def stage(row: dict, name: str) -> float | None:
    return median([sample.get(name) for sample in row["samples"]["stages_ms"]])


def _line(row: dict, rows: list[dict]) -> str:
    base = unpruned(row, rows)
    times = row["samples"]["ttft_ms"]
    if not times:
        return f"| {row['model']} | {row['image_size']} | {label(row)} | not measured |"
    ttft = statistics.median(times)
    pruned, share = base is not row, saved(row, base)
    ceiling = 1 - flops(row) / flops(base)
    noise = f"{_NOISE} " if share > ceiling else ""
    stages = [stage(row, n) for n in ("preprocess", "vision", "prune", "project")]
    prefill = stage(row, "prefill")
    cells = [
        printable(row["model"]).replace("|", "/"),
        row["image_size"],
        label(row),
        f"{row.get('mean_kept', row['kept']):.4g}/{row['visual_tokens']}",
        f"{ttft:.1f} ({min(times):.1f}-{max(times):.1f})",
        f"{noise}{_percent(share)}" if pruned else "",
        _percent(ceiling) if pruned else "",
        f"{1 / (1 - share):.2f}x" if pruned else "",
        f"{row['limit_ms']:.1f}",
        f"{ttft / row['limit_ms']:.1f}",
        *map(_number, (*stages, prefill)),
        _number(stages[3] + prefill),
        _number(median(row["samples"]["decode_tokens_per_second"])),
        *_calls(row["samples"]),
        _number(median(row["samples"]["total_ms"])),
        f"{max(row['samples']['peak_memory_mb']):.0f}",
        f"{row.get('cache_bytes', 0) / 1e6:.2f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _calls(samples: dict) -> tuple[str, str]:
    """Calls of the language model, and tokens in each of those that decode."""
    calls, tokens = samples.get("calls"), samples.get("tokens")
    if not calls or not tokens:
        return "", ""
    pairs = zip(calls, tokens, strict=True)
    each = median([(told - 1) / (ran - 1) if ran > 1 else None for ran, told in pairs])
    return f"{statistics.median(calls):g}", "" if each is None else f"{each:.2f}"


def label(row: dict) -> str:
    """Method and keep ratio, and what drafts."""
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
