"""Measure the time that `RepeatPruner` saves and costs in mlx-vlm on a screenshot.

    pip install -e '.[test]'
    python benchmarks/random_vlm.py /tmp/qwen
    python benchmarks/pixel_pruning.py --model /tmp/qwen --runs 5

Without `--model`, runs the tiny test model of each family. The screenshot is drawn: a
title bar, a side bar, lines of text, a photograph of noise. "noise" has no repeats: it
shows the cost of the search. Runs with and without the pruner take turns, after a
warm-up. Figures are medians, and medians of the ratios of each round.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import mlx_tokprune  # noqa: F401  # before MLX

import mlx.core as mx  # isort: skip
import numpy as np
from PIL import Image, ImageDraw

from mlx_tokprune.attach.mlx_vlm import attach
from mlx_tokprune.attach.pixels import RepeatPruner

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
STEPS = ("processor", "tower", "first token")


def screenshot(width: int, height: int) -> Image.Image:
    found = Image.new("RGB", (width, height), (250, 250, 250))
    draw, rng = ImageDraw.Draw(found), np.random.default_rng(0)
    bar, side = height // 14, width // 5
    draw.rectangle((0, 0, width, bar), fill=(60, 63, 80))
    draw.text((8, bar // 4), "Report - Editor", fill=(230, 230, 230))
    draw.rectangle((0, bar, side, height), fill=(235, 236, 240))
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz     "))
    for number in range(8):
        draw.text((10, bar + 12 + 22 * number), f"Item {number}", fill=(40, 40, 40))
    for top in range(bar + 20, height // 2, 18):
        line = "".join(rng.choice(letters, rng.integers(20, 60)))
        draw.text((side + 24, top), line, fill=(20, 20, 20))
    box = (width // 4, height // 4)
    noise = rng.integers(0, 256, (box[1], box[0], 3), np.uint8)
    found.paste(Image.fromarray(noise), (side + 30, height * 5 // 8))
    return found


def steps(model, processor, text: str, file: str) -> list[float]:
    """Return seconds of the processor, of embeddings (the tower) and to first token."""
    import mlx_vlm
    from mlx_vlm.utils import prepare_inputs

    start = time.perf_counter()
    inputs = dict(prepare_inputs(processor, images=[file], prompts=text))
    mx.eval([value for value in inputs.values() if isinstance(value, mx.array)])
    looked = time.perf_counter()
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    pixels = inputs.pop("pixel_values")
    found = model.get_input_embeddings(ids, pixels, mask=mask, **inputs)
    mx.eval(found.inputs_embeds)
    seen = time.perf_counter()
    asked = (model, processor, text)
    next(iter(mlx_vlm.stream_generate(*asked, image=[file], max_tokens=1)))
    return [looked - start, seen - looked, time.perf_counter() - seen]


def measure(model, processor, file: str, runs: int, threshold: float) -> None:
    from mlx_vlm.prompt_utils import apply_chat_template

    text = apply_chat_template(processor, model.config, "what is it ?", num_images=1)
    times, kept = {False: [], True: []}, None
    for number in range(runs + 1):
        for pruned in (False, True) if number % 2 else (True, False):
            handle = None
            if pruned:
                handle = attach(model, processor, RepeatPruner(threshold))
            found = steps(model, processor, text, file)
            if handle is not None:
                (kept,) = handle.last
                handle.detach()
            if number:
                times[pruned].append(found)
    print(f"  {Path(file).stem}: {kept.encoded} of {kept.total} groups in the tower")
    for number, step in enumerate(STEPS):
        before, after = (np.array(times[p])[:, number] for p in (False, True))
        print(
            f"    {step}: {statistics.median(before) * 1e3:.0f} ms, "
            f"{statistics.median(after) * 1e3:.0f} ms with; "
            f"{statistics.median(after / before):.2f} "
            f"({min(after / before):.2f}-{max(after / before):.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id (default: tiny models)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threshold", type=float, default=0.0)
    names = ["screenshot", "noise"]
    parser.add_argument("--pictures", nargs="+", choices=names, default=names)
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folders = {args.model: args.model} if args.model else tiny(Path(made))
        width, height = args.size or ((840, 560) if args.model else (240, 160))
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        pictures = {"screenshot": screenshot(width, height)}
        pictures["noise"] = Image.fromarray(noise)
        pictures = {name: pictures[name] for name in args.pictures}
        for name, folder in folders.items():
            import mlx_vlm

            model, processor = mlx_vlm.load(str(folder))
            print(
                f"{name}, {width} x {height}, {args.runs} runs, {mx.default_device()}"
            )
            for what, picture in pictures.items():
                file = str(Path(made) / f"{what}.png")
                picture.save(file)
                measure(model, processor, file, args.runs, args.threshold)


def tiny(folder: Path) -> dict[str, Path]:
    """Write the tiny test models for larger images; return their folders by name."""
    import dataclasses
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from vlm.families import FAMILIES

    for name in QWEN:
        family = FAMILIES[name]
        files = {n: c | {"max_pixels": 1 << 20} for n, c in family.files.items()}
        dataclasses.replace(family, files=files).write(folder / name)
    return {name: folder / name for name in QWEN}


if __name__ == "__main__":
    main()
