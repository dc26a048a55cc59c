"""Measure the cost of each pruner as a share of TTFT on a full-size model.

    python benchmarks/random_checkpoint.py 0.5B /tmp/FastVLM-0.5B
    python benchmarks/pruner_cost.py /tmp/FastVLM-0.5B --ratio 0.11

TTFT is unfenced and unpruned, from a decoded image to the first token id. A pruner's
time is from evaluated features to evaluated kept tokens. At the prompt it includes the
queries and keys of the first layer; inside the language model it includes the attention
that the pruner reads, on states of the right shape. Figures are medians of interleaved
runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx_tokprune
from mlx_tokprune import Features, Pruner, Selection, stream_generate
from mlx_tokprune.pipeline import Scene, VisualTokens, encode, prune_at_prompt
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import get_method, list_pruners
from mlx_tokprune.runtime import device_name

import mlx.core as mx  # isort: skip
import numpy as np  # isort: skip

QUESTION = "Describe the image."
RUNS = 5  # runs of each pruner in a round


def milliseconds(function: Callable) -> float:
    start = time.perf_counter()
    mx.eval(function())
    mx.synchronize()
    return (time.perf_counter() - start) * 1e3


def of_pruners(model, processor, picture, ratio: float) -> dict[str, Callable]:
    """Return, by method, a function that runs its pruner and returns lazy arrays."""
    image = load_image(picture)
    scene = Scene(mx.array(processor.pixels([image])), processor.prompt(QUESTION, 1))
    found = {}
    names = [m for m in list_pruners() if get_method(m).counts != "own"]
    pruners = [Pruner(m, ratio) for m in names if m != "none"]
    features = encode(model, scene, tuple(p for p in pruners if p.place == "tower"))
    embeddings = model.project(features.tokens)
    mx.eval(features.arrays(), embeddings)
    total = features.total
    every = Selection(mx.arange(total, dtype=mx.int32)[None])
    visual = VisualTokens(embeddings, every.indices, every, features.grid)
    for pruner in pruners:
        if pruner.place == "tower":
            found[pruner.method] = lambda p=pruner: p(features).apply(features.tokens)
        elif pruner.place == "prompt":
            found[pruner.method] = lambda p=pruner: (
                prune_at_prompt(model, scene, (p,), visual).embeddings
            )
        else:
            found[pruner.method] = inside(model, pruner, total)
    return found


def inside(model, pruner: Pruner, total: int) -> Callable:
    """Return a function that runs a pruner inside the language model.

    `total` visual tokens lie between 15 text tokens before and 15 after them; the
    attention is that of layer 1.
    """
    hidden = mx.random.normal((1, total + 30, model.args.text["hidden_size"]))
    where = slice(15, 15 + total)
    rows = {
        "attention": [[total + 29]],
        "text_attention": [[*range(15 + total, 30 + total)]],
    }
    mx.eval(hidden)

    def run() -> mx.array:
        extras = {
            name: model.decoder.attention_to(1, hidden, mx.array(asking))[..., where]
            for name, asking in rows.items()
            if name in pruner.reads
        }
        if "attention" in extras:
            extras["attention"] = extras["attention"][:, 0]
        extras["text"] = hidden[:, 15 + total :]
        tokens = hidden[:, where]
        return pruner(Features(tokens, None, extras=extras)).apply(tokens)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, default=0.11)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 1536])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    model, processor = mlx_tokprune.load(args.folder)
    picture = np.random.default_rng(0).integers(0, 255, (768, 1024, 3), np.uint8)
    print(f"{device_name()}, MLX {mx.__version__}, keep ratio {args.ratio:g}")
    for size in args.sizes:
        table(model, processor.at(size), picture, args.ratio, args.runs)


def table(model, processor, picture, ratio: float, runs: int) -> None:
    costs = of_pruners(model, processor, picture, ratio)
    total = (processor.image_size // model.stride) ** 2

    def ttft() -> float:
        answer = stream_generate(model, processor, [picture], QUESTION, max_tokens=1)
        return next(answer).ttft_ms

    ttft(), [mx.eval(prune()) for prune in costs.values()]  # warm up
    firsts: list[float] = []
    times: dict[str, list[float]] = {method: [] for method in costs}
    for _ in range(runs):
        firsts.append(ttft())
        for method, prune in costs.items():
            times[method] += [milliseconds(prune) for _ in range(RUNS)]
    whole = statistics.median(firsts)
    spread = f"{min(firsts):.0f}-{max(firsts):.0f}, n={runs}"
    print(f"\nN={total} ({processor.image_size} px), TTFT {whole:.0f} ms ({spread})")
    for method, found in times.items():
        median, spread = statistics.median(found), f"{min(found):.2f}-{max(found):.2f}"
        share = 100 * median / whole
        print(f"{method:16} {median:7.2f} ms ({spread}, n={len(found)}) {share:6.3f} %")


if __name__ == "__main__":
    main()
