"""What each pruner costs, as a share of time to first token, on a full-size model.

    python benchmarks/random_checkpoint.py 0.5B /tmp/FastVLM-0.5B
    python benchmarks/pruner_cost.py /tmp/FastVLM-0.5B

TTFT is unfenced and unpruned, from a decoded picture to the first token id; a pruner's
time is from evaluated features to evaluated kept tokens. Medians of interleaved runs.
"""

import argparse
import statistics
import time
from pathlib import Path

import mlx_tokprune
from mlx_tokprune import Pruner, stream_generate
from mlx_tokprune.measure.machine import device_name
from mlx_tokprune.pruners import list_pruners

import mlx.core as mx  # isort: skip
import numpy as np  # isort: skip


def milliseconds(function) -> float:
    start = time.perf_counter()
    mx.eval(function())
    mx.synchronize()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    model, processor = mlx_tokprune.load(args.folder)
    picture = np.random.default_rng(0).integers(0, 255, (768, 1024, 3), np.uint8)
    image = [processor.pixels([mlx_tokprune.image.load_image(picture)])]
    features = model.encode(mx.array(image[0]), ("attention",))
    mx.eval(features.arrays())
    pruners = [Pruner(m, args.ratio) for m in list_pruners("tower") if m != "none"]

    def prune(pruner: Pruner) -> mx.array:
        return pruner(features).apply(features.tokens)

    def ttft() -> float:
        asked = ([picture], "Describe the image.")
        return next(stream_generate(model, processor, *asked, max_tokens=1)).ttft_ms

    ttft(), [mx.eval(prune(p)) for p in pruners]  # warm up
    firsts: list[float] = []
    costs: dict[str, list[float]] = {p.method: [] for p in pruners}
    for _ in range(args.runs):
        firsts.append(ttft())
        for pruner in pruners:
            repeats = [milliseconds(lambda p=pruner: prune(p)) for _ in range(5)]
            costs[pruner.method] += repeats
    whole = statistics.median(firsts)
    _, total, channels = features.tokens.shape
    print(f"{device_name()}, MLX {mx.__version__}, N={total}, C={channels}")
    print(f"TTFT {whole:.0f} ms ({min(firsts):.0f}-{max(firsts):.0f}, n={len(firsts)})")
    for method, times in costs.items():
        median, spread = statistics.median(times), f"{min(times):.2f}-{max(times):.2f}"
        share = 100 * median / whole
        print(f"{method:16} {median:7.2f} ms ({spread}, n={len(times)}) {share:6.3f} %")


if __name__ == "__main__":
    main()
