"""Measure the stages of one action on full-size OpenVLA by keep ratio.

    python benchmarks/random_checkpoint.py OpenVLA-7B /tmp/OpenVLA-4 --dtype float32 \
        --layers 4
    python benchmarks/openvla_stages.py /tmp/OpenVLA-4

The checkpoint may have fewer than OpenVLA's 32 language model layers, so that it fits
in memory. Then prefill and decode are measured with all its layers and with half of
them, and a straight line through both gives 32: a + b * layers. Preprocessing and
vision do the same work at every ratio, so the scaled table takes one median of all
runs. Runs are interleaved: every ratio is measured once before any is measured again.
"""

import argparse
import contextlib
import statistics
from collections import defaultdict
from pathlib import Path

import mlx_tokprune
from mlx_tokprune import predict_action
from mlx_tokprune.models.openvla import ModelArgs, OpenVLA
from mlx_tokprune.models.vit import ViTConfig
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.processing.processor import ActionProcessor
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.pruners import Pruner
from mlx_tokprune.runtime import device_name

import mlx.core as mx  # isort: skip
import numpy as np  # isort: skip

LAYERS = 32
PROMPT = 20  # ids that Llama-2's tokenizer gives a short instruction, question included
INSTRUCTION = "pick up the red block"
STAGES = ("preprocess", "vision", "prune", "project", "prefill", "decode")
BEFORE_DECODE = STAGES[:-1]
SAME_WORK = ("preprocess", "vision")
# Milliseconds by (layers, keep ratio, name of the time).
Times = dict[tuple[int, float, str], float]


class ShortPrompt(ActionProcessor):
    """Processor with prompts as long as Llama-2's.

    The tiny tokenizer has an id per letter.
    """

    def prompt(self, instruction: str) -> Prompt:
        start, ids = super().prompt(instruction).segments
        return Prompt((start, ids[-PROMPT:]))


# Measuring ---------------------------------------------------------------------------


@contextlib.contextmanager
def first_layers(model: OpenVLA, layers: int):
    """Run the model with the first `layers` layers of its language model."""
    inner = model.language_model.model
    whole = inner.layers
    inner.layers = whole[:layers]
    try:
        yield
    finally:
        inner.layers = whole


def measure(model: OpenVLA, processor, ratios: list[float], runs: int) -> Times:
    """Return medians of interleaved runs, after one warm-up of each shape."""
    picture = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    images = [load_image(picture)]
    found: dict[tuple, list[float]] = defaultdict(list)
    for number in range(runs + 1):
        for ratio in ratios:
            for key, value in measure_once(model, processor, images, ratio).items():
                found[key] += [value] if number else []
    return {key: statistics.median(values) for key, values in found.items()}


def measure_once(model: OpenVLA, processor, images: list, ratio: float) -> Times:
    """Return times of fenced stages at both depths and of one whole unfenced action."""
    key, times = next(iter(processor.norm_stats)), {}
    asked = (model, processor, images, INSTRUCTION)
    how = {"unnorm_key": key, "pruner": Pruner("norm", ratio), "positions": "original"}
    for layers in depths(model):
        with first_layers(model, layers):
            stages = predict_action(*asked, **how, stages=True).stages_ms
        for name, value in stages.items():
            times[layers, ratio, name] = value
    action = predict_action(*asked, **how)
    times[layers, ratio, "ttft"] = action.ttft_ms
    times[layers, ratio, "total"] = action.total_ms
    return times


def depths(model: OpenVLA) -> tuple[int, int]:
    return len(model.layers) // 2, len(model.layers)


def scale(times: Times, less: int, more: int, ratios: list[float]) -> Times:
    """Return the times with 32 layers, from a line through both depths."""
    scaled: Times = {}
    for ratio in ratios:
        for name in STAGES:
            scaled[LAYERS, ratio, name] = times[more, ratio, name]
        for name in SAME_WORK:
            alike = [v for (_, _, other), v in times.items() if other == name]
            scaled[LAYERS, ratio, name] = statistics.median(alike)
        for name in ("prefill", "decode"):
            low, high = times[less, ratio, name], times[more, ratio, name]
            per_layer = (high - low) / (more - less)
            scaled[LAYERS, ratio, name] = high + per_layer * (LAYERS - more)
        ttft = sum(scaled[LAYERS, ratio, name] for name in BEFORE_DECODE)
        scaled[LAYERS, ratio, "ttft"] = ttft
        scaled[LAYERS, ratio, "total"] = ttft + scaled[LAYERS, ratio, "decode"]
    return scaled


# Counting ----------------------------------------------------------------------------


def count_flops(args: ModelArgs, keep: int) -> dict[str, float]:
    """Return the FLOPs of each stage before the first token, with 32 layers.

    Counts two per weight and token, and four per channel and pair of tokens in
    attention.
    """
    text, tokens = args.text, 1 + keep + PROMPT
    width, inner = text["hidden_size"], text["intermediate_size"]
    narrow = width * text["num_key_value_heads"] // text["num_attention_heads"]
    weights = 2 * width * (width + narrow) + 3 * width * inner
    layer = 2 * weights * tokens + 4 * width * tokens**2
    return {
        "vision": sum(map(tower_flops, args.towers)),
        "project": 2 * projector_weights(args) * keep,
        "prefill": LAYERS * layer + 2 * width * text["vocab_size"],
    }


def tower_flops(tower: ViTConfig) -> float:
    """Return the FLOPs of a tower without its last block, which does not run."""
    width, patches = tower.embed_dim, tower.side**2
    tokens = patches + tower.prefix
    weights = 4 * width**2 + 2 * width * tower.hidden
    block = 2 * weights * tokens + 4 * width * tokens**2
    return 2 * 3 * tower.patch_size**2 * width * patches + (tower.depth - 1) * block


def projector_weights(args: ModelArgs) -> int:
    channels = sum(tower.embed_dim for tower in args.towers)
    width, fused = args.text["hidden_size"], len(args.towers) > 1
    inner = 4 * channels if fused else width
    return channels * inner + inner * width + fused * width**2


# Printing ----------------------------------------------------------------------------


def print_table(title: str, ratios: list[float], rows: dict[str, list[float]]) -> None:
    """Print one row per name and one column per ratio, with digits by size."""
    print(f"\n{title:38}" + "".join(f"{100 * ratio:>10.0f} %" for ratio in ratios))
    for name, values in rows.items():
        shown = (f"{v:12.0f}" if abs(v) >= 1e3 else f"{v:12.3g}" for v in values)
        print(f"  {name:36}" + "".join(shown))


def rows_of(times: Times, layers: int, ratios: list[float], names) -> dict:
    return {name: [times[layers, r, name] for r in ratios] for name in names}


def time_rows(times: Times, layers: int, ratios: list[float]) -> dict:
    rows = rows_of(times, layers, ratios, (*STAGES, "ttft", "total"))
    return rows | {"actions/s": [1e3 / value for value in rows["total"]]}


def saved(values: list[float]) -> list[float]:
    """Return the percentage by which each value is below the first."""
    return [100 * (1 - value / values[0]) for value in values]


def print_report(
    model: OpenVLA, times: Times, scaled: Times, ratios: list[float], counts: list[int]
) -> None:
    less, more = depths(model)
    rows = time_rows(times, more, ratios)
    print_table(f"measured, {more} of {LAYERS} layers, ms", ratios, rows)
    rows = rows_of(times, less, ratios, ("prefill", "decode"))
    print_table(f"measured, {less} of {LAYERS} layers, ms", ratios, rows)
    known = "MEASURED" if more == LAYERS else "SCALED, not measured"
    rows = time_rows(scaled, LAYERS, ratios)
    print_table(f"{LAYERS} layers, {known}, ms", ratios, rows)
    shares = {
        name: [
            100 * scaled[LAYERS, r, name] / scaled[LAYERS, r, "total"] for r in ratios
        ]
        for name in STAGES
    }
    print_table(f"{LAYERS} layers, {known}, % of total", ratios, shares)
    flops = [count_flops(model.args, keep) for keep in counts]
    sums = [sum(stages.values()) for stages in flops]
    rows = {name: [f[name] / 1e9 for f in flops] for name in flops[0]}
    rows["sum"] = [value / 1e9 for value in sums]
    print_table(f"{LAYERS} layers, counted, GFLOP to first token", ratios, rows)
    rows = {
        f"TTFT, {known}": saved([scaled[LAYERS, r, "ttft"] for r in ratios]),
        "ceiling by FLOP count": saved(sums),
        f"total, {known}": saved([scaled[LAYERS, r, "total"] for r in ratios]),
    }
    print_table(f"{LAYERS} layers, % saved", ratios, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[1, 0.5, 0.25, 0.1], metavar="R"
    )
    args = parser.parse_args()
    model, processor = mlx_tokprune.load(args.folder)
    processor = ShortPrompt(**vars(processor))
    times = measure(model, processor, args.ratios, args.runs)
    total = model.args.towers[0].side ** 2
    counts = [Pruner("norm", ratio).count(total) for ratio in args.ratios]
    dtype = str(model.vision_backbone.featurizer.pos_embed.dtype).split(".")[-1]
    print(
        f"{device_name()}, MLX {mx.__version__}, {dtype}, n={args.runs}, norm, medians"
    )
    print(f"{total} visual tokens, kept {counts}, and {1 + PROMPT} of text")
    scaled = scale(times, *depths(model), args.ratios)
    print_report(model, times, scaled, args.ratios, counts)


if __name__ == "__main__":
    main()
