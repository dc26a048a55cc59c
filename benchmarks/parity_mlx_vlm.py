"""Compare tower and logits of a converted folder with mlx-vlm's.

    pip install -e '.[parity]'
    python benchmarks/parity_mlx_vlm.py FOLDER [--runs 3]

Prints the largest difference of tower features and of logits relative to the largest
value, and the ratio of tower times, medians of interleaved runs in this process.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import mlx_tokprune
from mlx_tokprune.pipeline import Scene, assemble, look

import mlx.core as mx  # isort: skip


def relative(ours: mx.array, theirs: mx.array) -> float:
    difference = mx.abs(ours.astype(mx.float32) - theirs.astype(mx.float32))
    return float(mx.max(difference) / mx.max(mx.abs(theirs)))


def seconds(function, *args) -> float:
    start = time.perf_counter()
    mx.eval(function(*args))
    mx.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    import mlx_vlm
    from mlx_vlm.utils import load_model

    theirs = load_model(args.folder)
    ours, processor = mlx_tokprune.load(args.folder)
    theirs.update(_as_float32(theirs))
    mx.random.seed(1)
    pixels = mx.random.uniform(shape=(1, ours.image_size, ours.image_size, 3))
    prompt = processor.prompt("Describe the image.", 1)
    scene = Scene(pixels, prompt)

    def our_tower(p):
        return ours.encode(p).tokens

    def their_tower(p):
        return theirs.vision_tower(p)[1].flatten(1, 2)

    features = relative(our_tower(pixels), their_tower(pixels))
    sequence = assemble(ours, scene, look(ours, scene, ()), (), "contiguous")
    embeddings = sequence.embeddings
    our_logits = ours(mx.zeros((1, 0), mx.int32), input_embeddings=embeddings)
    ids = mx.array([[*prompt.segments[0], -200, *prompt.segments[1]]])
    inputs = theirs.get_input_embeddings(ids, pixels.transpose(0, 3, 1, 2))
    out = theirs.language_model(ids, inputs_embeds=inputs.inputs_embeds)
    logits = relative(our_logits, out.logits)

    times = {"ours": [], "mlx-vlm": []}
    for _ in range(args.runs):
        times["mlx-vlm"].append(seconds(their_tower, pixels))
        times["ours"].append(seconds(our_tower, pixels))
    medians = {name: statistics.median(t) for name, t in times.items()}
    print(
        json.dumps(
            {
                "features_relative": features,
                "logits_relative": logits,
                "tower_seconds": medians,
                "tower_spread": {n: [min(t), max(t)] for n, t in times.items()},
                "runs": args.runs,
                "tower_ratio": medians["ours"] / medians["mlx-vlm"],
                "mlx": mx.__version__,
                "mlx_vlm": mlx_vlm.__version__,
                "machine": platform.processor() or platform.machine(),
            },
            indent=1,
        )
    )


def _as_float32(model):
    from mlx.utils import tree_map

    def cast(a):
        return a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a

    return tree_map(cast, model.parameters())


if __name__ == "__main__":
    main()
