"""Measure time and memory of one answer: ours beside mlx-vlm's and transformers'.

    pip install -e '.[parity]'
    python benchmarks/peers.py FOLDER [--runs 5] [--tokens 32] [--startup] [--json FILE]

FOLDER is a converted FastVLM. All sides run interleaved in this process after a
warm-up, greedily and without stop tokens, in float32 on CPU and in the stored type
elsewhere. TTFT is from the decoded image and the prompt to the first token id on the
host; decoding is from there to the last of `--tokens`. transformers gets the same
weights under its names, in a temporary folder. A peer that is not installed is left
out; without any peer the exit code is 2.

Importing mlx_tokprune on Linux puts its OpenBLAS under both sides on MLX, and its
allocator settings under the whole process. torch is imported before and keeps its own
BLAS, as in normal use; on our OpenBLAS torch is many times slower.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib import metadata, util
from pathlib import Path

import numpy as np
from PIL import Image
from sides import (
    IMAGE_TOKEN,
    MlxVlm,
    Ours,
    Task,
    Transformers,
    Unfit,
    write_transformers,
)

SCHEMA = "mlx_tokprune.peers/1"
RATIOS = (0.5, 0.25)  # keep ratios of `norm`, beside the peers' unpruned answer
SHORT = 0.5  # seconds
FIRST_TOKEN = "peers.py: first token"
LABELS = {
    "vision_ms": "vision tower ms",
    "ttft_ms": "TTFT ms",
    "decode_tokens_per_second": "decode tokens/s (more: faster)",
    "answer_ms": "whole answer ms",
    "peak_memory_mb": "peak MLX memory MB",
    "startup_s": "start-up s",
    "startup_rss_mb": "start-up peak RSS MB",
}
PACKAGES = ("mlx-tokprune", "mlx", "mlx-lm", "mlx-vlm", "torch", "transformers", "timm")


# Measuring --------------------------------------------------------------------------


PEERS = {  # transformers first: it repairs torchvision, which mlx-vlm imports too
    Transformers.name: (Transformers, ("torch", "transformers", "timm", "torchvision")),
    MlxVlm.name: (MlxVlm, ("mlx_vlm",)),
}


class Stopwatch:
    """Recorder of token ids and their times."""

    def __init__(self):
        self.ids: list[int] = []
        self.times: list[float] = []
        self.start = time.perf_counter()

    def __call__(self, token: int) -> None:
        self.times.append(time.perf_counter() - self.start)
        self.ids.append(token)


def time_tower(side, pixels: np.ndarray) -> float:
    """Return the milliseconds of the tower.

    A short run is repeated, because the first one finds another side's caches.
    """
    for _ in range(2):
        start = time.perf_counter()
        side.tower(pixels)
        seconds = time.perf_counter() - start
        if seconds > SHORT:
            break
    return seconds * 1e3


def measure_once(side, task: Task, pixels: np.ndarray, ratio: float) -> dict:
    """Return values by quantity; with pruning, the tower has no value of its own."""
    values, vision = {}, time_tower(side, pixels)
    if ratio == 1:
        values["vision_ms"] = vision
    found = []
    options = {"ratio": ratio} if ratio < 1 else {}

    def run() -> None:
        watch = Stopwatch()
        side.answer(task, watch, **options)
        found.append(watch)

    peak = side.peak_memory(run)
    times = found[0].times
    decoding = times[-1] - times[0]
    return values | {
        "ttft_ms": times[0] * 1e3,
        "decode_tokens_per_second": (len(times) - 1) / decoding if decoding else None,
        "answer_ms": times[-1] * 1e3,
        "peak_memory_mb": peak,
    }


def measure(sides: list, task: Task, pixels: np.ndarray, runs: int) -> dict:
    """Return lists of `runs` values by (side, keep ratio, quantity).

    The first round warms up and is not counted.
    """
    jobs = [(side, 1.0) for side in sides] + [(sides[0], ratio) for ratio in RATIOS]
    found = defaultdict(list)
    for number in range(runs + 1):
        turn = number % len(jobs)  # no side always follows the same one
        for side, ratio in jobs[turn:] + jobs[:turn]:
            for name, value in measure_once(side, task, pixels, ratio).items():
                if number and value is not None:
                    found[side.name, ratio, name].append(value)
    return found


def compare(ours: Ours, peer, task: Task, pixels: np.ndarray) -> dict:
    """Return how many leading ids equal ours, from our pixels and the peer's own."""
    expected, same, own = Stopwatch(), Stopwatch(), Stopwatch()
    ours.answer(task, expected)
    peer.answer(task, same, pixels=pixels)
    peer.answer(task, own)
    apart = np.abs(peer.pixels(task.image) - pixels).max()
    return {
        "tokens": task.tokens,
        "distinct": len(set(expected.ids)),  # few: weak evidence of the same work
        "equal_from_same_pixels": _leading(expected.ids, same.ids),
        "equal_from_own_pixels": _leading(expected.ids, own.ids),
        "pixels_apart_of_255": round(float(apart) * 255, 3),
        "ids": {"ours": expected.ids, "theirs": same.ids},
    }


def _leading(ours: list[int], theirs: list[int]) -> int:
    pairs = list(zip(ours, theirs, strict=True))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


# Start-up ---------------------------------------------------------------------------


def measure_startup(
    sides: dict[str, tuple], image: Path, runs: int, missing: dict
) -> dict:
    """Return seconds to the first token, and peak RSS, of fresh processes.

    sides: folder and prompt by name. Files are in the page cache after the warm-up.
    The reasons of sides that do not start go to `missing`.
    """
    found = defaultdict(list)
    for number in range(runs + 1):
        for name, (folder, prompt) in list(sides.items()):
            options = ["--first-token", name, "--image", image, "--prompt", prompt]
            try:
                values = _start([sys.executable, __file__, folder, *options])
            except Unfit as error:
                missing[f"{name}, start-up"] = str(error)
                del sides[name]
                continue
            for quantity, value in values.items():
                found[name, 1.0, quantity] += [value] if number else []
    return found


def _start(command: list) -> dict:
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        for line in child.stdout:
            if line.startswith(FIRST_TOKEN):
                seconds = time.perf_counter() - start
                peak = float(line.split()[-1])
        if child.wait():
            errors.seek(0)
            raise Unfit(f"failed: {errors.read().strip().splitlines()[-1]}")
    return {"startup_s": seconds, "startup_rss_mb": peak}


def first_token(args: argparse.Namespace) -> None:
    """Print a line when the first token is ready, as the child of `measure_startup`."""
    if args.first_token == MlxVlm.name:
        _preload_blas()
    kinds = {Ours.name: Ours} | {name: kind for name, (kind, _) in PEERS.items()}
    side = kinds[args.first_token](args.folder)
    image = Image.open(args.image).convert("RGB")

    def say(token: int) -> None:
        print(FIRST_TOKEN, _peak_rss(), flush=True)

    side.answer(Task(image, args.prompt, args.prompt, 1), say)


def _preload_blas() -> None:
    """Load our OpenBLAS under mlx-vlm without importing our package."""
    package = util.find_spec("mlx_tokprune").origin
    spec = util.spec_from_file_location("blas", Path(package).with_name("runtime.py"))
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.preload()


def _peak_rss() -> float:
    """Return the peak RSS in MB.

    On Linux, `getrusage` also counts the parent's memory before the child's program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# Reporting --------------------------------------------------------------------------


def make_rows(found: dict, peers: list[str]) -> list[dict]:
    """Return a row per peer, pruning and quantity."""
    rows = []
    for peer in peers:
        for side, ratio, quantity in found:
            if side != Ours.name:
                continue
            ours = _summary(found[Ours.name, ratio, quantity])
            theirs = _summary(found.get((peer, 1.0, quantity), []))
            rows.append(
                {
                    "peer": peer,
                    "quantity": quantity,
                    "ours_pruning": "none" if ratio == 1 else f"norm {ratio:g}",
                    "ours": ours,
                    "theirs": theirs,
                    "ratio": theirs and ours and ours["median"] / theirs["median"],
                }
            )
    return sorted(rows, key=lambda r: (peers.index(r["peer"]), -_ratio(r)))


def _ratio(row: dict) -> float:
    return float(row["ours_pruning"].split()[-1].replace("none", "1"))


def _summary(values: list[float]) -> dict | None:
    if not values:
        return None
    shown = {"median": statistics.median(values), "min": min(values)}
    return shown | {"max": max(values), "n": len(values)}


def describe_machine() -> dict:
    import mlx.core as mx

    from mlx_tokprune.runtime import device_name

    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "device": device_name(),
        "mlx_backend": mx.default_device().type.name,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def print_report(record: dict) -> None:
    machine, setup = record["machine"], record["setup"]
    print(
        f"{machine['device']}, {machine['cores']} cores, {machine['system']}, MLX on "
        f"{machine['mlx_backend']}, load {machine['load_average_at_start']} at start"
    )
    known = [f"{name} {v or 'not installed'}" for name, v in record["versions"].items()]
    print(", ".join(known))
    print(
        f"{setup['folder']}, {setup['dtype']}, {setup['visual_tokens']} visual tokens, "
        f"picture {setup['picture']}, {setup['tokens']} tokens, greedy\n"
        f"medians (min-max) of n={setup['runs']} interleaved runs, start-up of "
        f"n={setup['startup_runs']}"
    )
    for peer, reason in record["missing"].items():
        print(f"\n{peer}: {reason}")
    for peer, same in record["same_ids"].items():
        print(f"\nOurs beside {peer}{setup['peers'][peer]}")
        print(describe_ids(same))
        print(f"{'':42}{'ours':>24}{peer:>24}{'ours/theirs':>13}")
        for row in (r for r in record["rows"] if r["peer"] == peer):
            print(format_row(row))


def describe_ids(same: dict) -> str:
    def verdict(equal: int) -> str:
        if equal == same["tokens"]:
            return f"the same {equal} ids ({same['distinct']} distinct)"
        return f"ids DIFFER from number {equal + 1} of {same['tokens']} on"

    return (
        f"from the same pixels {verdict(same['equal_from_same_pixels'])}; "
        f"from its own, up to {same['pixels_apart_of_255']:g}/255 apart, "
        f"{verdict(same['equal_from_own_pixels'])}"
    )


def format_row(row: dict) -> str:
    label, pruning = LABELS[row["quantity"]], row["ours_pruning"]
    label = label if pruning == "none" else f"{pruning}: {label}"
    ratio = "n/a" if row["ratio"] is None else f"{row['ratio']:.3f}"
    return f"{label:42}{_cell(row['ours']):>24}{_cell(row['theirs']):>24}{ratio:>13}"


def _cell(value: dict | None) -> str:
    if value is None:
        return "n/a"
    median, low, high = (_digits(value[k]) for k in ("median", "min", "max"))
    return f"{median} ({low}-{high})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 1e3 else f"{value:.3g}"


# The command ------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="a converted FastVLM")
    add("--image", type=Path, help="a picture (default: one of the demo's)")
    add("--prompt", help="the question (default: the demo's)")
    add("--tokens", type=int, default=32, help="of each answer (default: 32)")
    add("--runs", type=int, default=5, help="after a warm-up (default: 5)")
    add("--startup", action="store_true", help="also time fresh processes")
    add("--startup-runs", type=int, default=3, help="of each side (default: 3)")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--first-token", help=argparse.SUPPRESS)
    return parser


def find_peers() -> tuple[list[str], dict[str, str]]:
    """Return the names of the installed peers, and what the other peers lack."""
    missing = {}
    for name, (_, modules) in PEERS.items():
        absent = [module for module in modules if util.find_spec(module) is None]
        if absent:
            missing[name] = f"not installed ({', '.join(absent)})"
    return [name for name in PEERS if name not in missing], missing


def load_peers(names, missing: dict, ours: Ours, args, scratch: Path) -> list:
    """Return the peers that run on this folder; add the other peers to `missing`."""
    sides = []
    for name in names:
        try:
            folder = args.folder
            if name == Transformers.name:
                write_transformers(ours, folder, scratch)
                folder = scratch
            sides.append(PEERS[name][0](folder))
        except (Unfit, ImportError, RuntimeError, ValueError) as error:
            missing[name] = f"left out: {str(error).splitlines()[0]}"
    return sides


def describe_peer(side) -> str:
    if side.name != Transformers.name:
        return ""
    import torch

    on = f"eager, on {side.device}, {torch.get_num_threads()} threads"
    return f" ({on}, its own BLAS)"


def run(args: argparse.Namespace, names: list[str], missing: dict) -> dict:
    """Measure all sides and return the record that `--json` writes."""
    from mlx_tokprune.checkpoints.embedded import PICTURES
    from mlx_tokprune.models.fastvlm import FastVLM
    from mlx_tokprune.processing.image import load_image
    from mlx_tokprune.processing.prompt import place_pictures

    machine = describe_machine()
    ours = Ours(args.folder)
    if not isinstance(ours.model, FastVLM):
        raise Unfit("only FastVLM is compared here")
    path = args.image or PICTURES[0].path
    image, question = load_image(path), args.prompt or PICTURES[0].question
    placed = place_pictures(question, 1, IMAGE_TOKEN)
    chat = f"{ours.processor.prefix}{placed}{ours.processor.suffix}"
    task, pixels = Task(image, question, chat, args.tokens), ours.pixels(image)
    with tempfile.TemporaryDirectory() as scratch:
        peers = load_peers(names, missing, ours, args, Path(scratch))
        if not peers:
            raise Unfit("; ".join(f"{name} is {why}" for name, why in missing.items()))
        used = [peer.name for peer in peers]
        same = {peer.name: compare(ours, peer, task, pixels) for peer in peers}
        found = measure([ours, *peers], task, pixels, args.runs)
        if args.startup:
            folders = {Transformers.name: Path(scratch)}
            sides = {Ours.name: (args.folder, question)}
            sides |= {name: (folders.get(name, args.folder), chat) for name in used}
            found |= measure_startup(sides, path, args.startup_runs, missing)
    tower = ours.model.vision_tower.vision_model.conv_exp.reparam_conv.weight
    return {
        "schema": SCHEMA,
        "machine": machine,
        "versions": versions(),
        "setup": {
            "folder": args.folder.name,
            "dtype": str(tower.dtype).removeprefix("mlx.core."),
            "visual_tokens": (ours.model.image_size // 64) ** 2,
            "picture": f"{image.width} x {image.height}",
            "prompt": question,
            "tokens": args.tokens,
            "runs": args.runs,
            "startup_runs": args.startup_runs if args.startup else 0,
            "peers": {peer.name: describe_peer(peer) for peer in peers},
        },
        "missing": missing,
        "same_ids": same,
        "rows": make_rows(found, used),
    }


def main() -> None:
    args = build_parser().parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.first_token:
        first_token(args)
        return
    names, missing = find_peers()
    if not names:
        print(
            "error: no peer is installed; run pip install 'mlx-tokprune[parity]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    if Transformers.name in names:
        import torch  # noqa: F401  (before our BLAS)
    from mlx_tokprune import InputError

    try:
        record = run(args, names, missing)
    except (Unfit, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print_report(record)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
