"""Compare answers and vision time with and without `Temporal` on changed frames.

    python benchmarks/temporal.py [--pictures 64]

For each held-out image of the demo, a block of 128 x 128 pixels at a random place is
replaced by the same block of another image. The demo model answers its questions about
the changed frame twice: encoded whole, and encoded by `Temporal` after the unchanged
frame. Both ways take turns, after a warm-up.
"""

import argparse
import statistics
import time
from collections import defaultdict

import mlx_tokprune

import mlx.core as mx  # isort: skip
import numpy as np

from mlx_tokprune import Pruner, generate
from mlx_tokprune.evaluate.items import read_questions
from mlx_tokprune.generate.temporal import Temporal
from mlx_tokprune.measure.intervals import of_share
from mlx_tokprune.pipeline import Scene, look
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.processing.prompt import Prompt

BLOCK, PRUNER = 128, Pruner("norm", keep_ratio=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=64)
    args = parser.parse_args()
    model, processor = mlx_tokprune.load("demo")
    items = defaultdict(list)
    for item in read_questions("demo", args.pictures, None).items:
        items[item.picture].append(item)
    frames = {name: load_image(some[0].load()) for name, some in items.items()}
    rng = np.random.default_rng(0)
    agreed, asked_of, times, shares = [], [], defaultdict(list), []
    for name, frame in frames.items():
        other = frames[rng.choice(list(frames))].resize(frame.size)
        left, top = (int(rng.integers(0, side - BLOCK + 1)) for side in frame.size)
        box = (left, top, left + BLOCK, top + BLOCK)
        changed = frame.copy()
        changed.paste(other.crop(box), box)
        video = Temporal(PRUNER)
        before, after = (
            Scene(mx.array(processor.pixels([f])), Prompt(((), ())))
            for f in (frame, changed)
        )
        mx.eval(before.pixels, after.pixels)
        mx.eval(video(model, before, video.plan).embeddings)
        start = time.perf_counter()
        mx.eval(video(model, after, video.plan).embeddings)
        times["temporal"].append(time.perf_counter() - start)
        shares.append(video.encoded)
        start = time.perf_counter()
        mx.eval(look(model, after, video.plan).embeddings)
        times["whole"].append(time.perf_counter() - start)
        for item in items[name]:
            asked = (model, processor, [changed], item.question)
            whole = generate(*asked, pruner=PRUNER, max_tokens=16)
            again = generate(*asked, vision=video, max_tokens=16)
            agreed.append(whole == again)
            asked_of.append(name)
    low, high = of_share(agreed, asked_of)
    ratios = [t / w for t, w in zip(times["temporal"], times["whole"], strict=True)]
    print(
        f"{sum(agreed)} of {len(agreed)} answers are the same ({low:.1%} to "
        f"{high:.1%}); {statistics.mean(shares):.0%} of the cells encoded; "
        f"vision takes {statistics.median(ratios):.2f} of the time"
    )


if __name__ == "__main__":
    main()
