"""Measure TTFT of a wide image: reference, pruned, without padding, and asked again.

    python benchmarks/first_token.py FOLDER [--picture FILE] [--runs 5]

FOLDER is a converted FastVLM. The image is 16:9 by default. A first question is asked
with reference preprocessing and no pruning, with `--padding skip`, with `norm` at a
keep ratio of 0.5, and with both; a second question follows each through a `Memory`. All
rows take turns within a round, in one process after a warm-up. Figures are medians;
ratios are medians of each round's ratio to the first row.
"""

import argparse
import statistics
from collections import defaultdict

import mlx_tokprune

import mlx.core as mx  # isort: skip
import numpy as np
from PIL import Image

from mlx_tokprune import Pruner, stream_generate
from mlx_tokprune.generate.memory import Memory
from mlx_tokprune.processing.image import load_image

FIRST, SECOND = "What is in this picture?", "And which colour is on the left?"
NONE, HALF = Pruner("none"), Pruner("norm", keep_ratio=0.5)
ROWS = {
    "reference": ("keep", NONE),
    "norm 0.5": ("keep", HALF),
    "padding skip": ("skip", NONE),
    "padding skip, norm 0.5": ("skip", HALF),
}


def sixteen_by_nine(width: int = 1920, height: int = 1080) -> Image.Image:
    """Return an image with detail in every part."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (17 + 9 * c) + y / (31 - 5 * c)) for c in range(3)]
    return Image.fromarray((127 + 127 * np.stack(waves, -1)).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--picture", help="default: a pattern of 1920 x 1080")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    picture = load_image(args.picture) if args.picture else sixteen_by_nine()
    model, processor = mlx_tokprune.load(args.folder)
    times, kept = defaultdict(list), {}
    for number in range(args.runs + 1):
        for name, (padding, pruner) in ROWS.items():
            memory = Memory()
            for question in (FIRST, SECOND):
                piece = next(
                    stream_generate(
                        model,
                        processor.at(processor.image_size, padding),
                        [picture],
                        question,
                        pruner=pruner,
                        memory=memory,
                        max_tokens=1,
                    )
                )
                row = name if question is FIRST else f"{name}, asked again"
                if number:  # the first round warms up
                    times[row].append(piece.ttft_ms)
                visual = piece.visual
                kept[row] = f"{visual.keep}/{visual.total}"
            mx.clear_cache()
    print(
        f"{args.folder}, {picture.width} x {picture.height} px, "
        f"{mx.device_info()['device_name']}, mlx {mx.__version__}, n={args.runs}"
    )
    print(f"{'':36}{'kept':>9}{'TTFT ms':>10}{'(least - most)':>18}{'ratio':>8}")
    base = times["reference"]
    for row, found in times.items():
        ratio = statistics.median(t / b for t, b in zip(found, base, strict=True))
        spread = f"({min(found):.0f} - {max(found):.0f})"
        print(
            f"{row:36}{kept[row]:>9}{statistics.median(found):10.0f}{spread:>18}"
            f"{ratio:8.3f}"
        )


if __name__ == "__main__":
    main()
