"""Measure accuracy and bytes of weights and cache in 16, 8 and 4 bits under pruning.

    python benchmarks/quantization.py --pictures 512
    python benchmarks/quantization.py --pictures 512 --adapter-path DIR --bits 4

`convert` quantizes the language model of `demo`. The cache is quantized after the
prompt, from the first answer token on. Bytes of weights are the file's size; bytes of
the cache are those that a prompt of the demo fills.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import mlx_tokprune  # isort: skip  (loads the BLAS before MLX)

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.convert import convert
from mlx_tokprune.evaluate.__main__ import main as evaluate
from mlx_tokprune.files import DEMO
from mlx_tokprune.measure.subject import subject_of
from mlx_tokprune.pipeline import run
from mlx_tokprune.pipeline.planning import plan_for
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import read_plan

PLANS = ("norm:0.25", "demo-adaptive:0.11")
GROUP = 32
SETTINGS = ((16, 16), (8, 16), (4, 16), (16, 8), (16, 4), (4, 4))


def cache_bytes(model: str, bits: int, plan: str | None) -> int:
    """Return bytes of the cache after a prompt about a demo image.

    bits: bits per value; 16 for an unquantized cache in float16.
    """
    from mlx_lm.generate import maybe_quantize_kv_cache

    subject = subject_of("it", *mlx_tokprune.load(model, mx.float16))
    scene = subject.scene([load_image(PICTURES[0].path)], PICTURES[0].question)
    chosen = plan_for(subject.model, read_plan(plan) if plan else ())
    cache = subject.model.decoder.make_cache()
    cache = run(subject.model, scene, chosen, cache=cache)[0].cache
    if bits < 16:
        maybe_quantize_kv_cache(cache, 0, GROUP, bits)
    held = 0.0  # mlx-lm allocates more than it fills
    for inner in (layer.inner for layer in cache):
        for _, array in tree_flatten([inner.keys, inner.values]):
            held += array.nbytes * inner.offset / array.shape[2]
    return round(held)


def answers(model: str, bits: int, pictures: int, adapter: str | None) -> dict:
    """Return the rows of `evaluate` by label."""
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/e.json"
        asked = ["--model", model, "--data", "demo", "--pictures", str(pictures)]
        asked += ["--plans", *PLANS, "--output", output]
        asked += ["--adapter-path", adapter] if adapter else []
        if bits < 16:
            asked += ["--kv-bits", str(bits), "--kv-group-size", str(GROUP)]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluate(asked)
        rows = json.loads(Path(output).read_text())["rows"]
    return {row["label"]: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--adapter-path", help="on top of the quantized weights")
    parser.add_argument("--bits", type=int, help="of weights: only these")
    args = parser.parse_args()
    print("| weights | cache | plan | accuracy | weights, MB | cache, kB |")
    print("|---:|---:|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as made:
        models = {16: str(DEMO / "checkpoint")}
        for bits in (8, 4):
            models[bits] = f"{made}/{bits}"
            how = {"quantize": True, "q_bits": bits, "q_group_size": GROUP}
            convert("demo", models[bits], **how)
        for weights, cache in SETTINGS:
            if args.bits not in (None, weights):
                continue
            model = models[weights]
            size = (Path(model) / "model.safetensors").stat().st_size / 1e6
            found = answers(model, cache, args.pictures, args.adapter_path)
            for label, row in found.items():
                plan = None if label == "none" else label
                held = cache_bytes(model, cache, plan) / 1e3
                share = row["accuracy"]["all"]
                names = ("value", "low", "high")
                value, low, high = (100 * share[name] for name in names)
                shown = f"{value:.1f} ({low:.1f}-{high:.1f})"
                cells = (weights, cache, label, shown, f"{size:.2f}", f"{held:.0f}")
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
