"""Measure the accuracy that an adapter recovers after low-bit quantization and pruning.

    mlx_tokprune convert --hf-path demo --mlx-path low -q --q-bits 2 --q-group-size 32
    mlx_tokprune train lora --model low --dequantize --iters 60 --output adapter
    python benchmarks/low_bits.py --models low --adapter-paths adapter --pictures 128

Data are held-out images of the demo with one question of each kind. Answers are greedy;
intervals are 95 % (bootstrap over images). MLX multiplies quantized weights slowly on a
CPU, so the models compute with the dequantized values. The quantized weights answer
about the first `--checked` images, and the largest difference of any logit is printed.
"""

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlx_tokprune  # isort: skip  (loads the BLAS before MLX)

import mlx.core as mx
import numpy as np

from mlx_tokprune.features import Features
from mlx_tokprune.measure.intervals import of_share
from mlx_tokprune.pipeline import Scene, prune_at_tower
from mlx_tokprune.pipeline.planning import plan_for
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.pruners import read_plan
from mlx_tokprune.scenes.held_out import held_out
from mlx_tokprune.train.lora import replace_quantized
from mlx_tokprune.train.packing import Questions, answer_logits

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/ is not installed

from recipes.demo.packing import exact_matches, pack

PLANS = ("none", "norm:0.25")


def asked(
    model, processor, pictures: int, size: int
) -> Iterator[tuple[Features, Questions]]:
    """Yield the features of up to `size` images and the questions about them."""

    def ids(text: str) -> list[int]:
        return processor.tokenizer.encode(text, add_special_tokens=False)

    (end,) = ids("<|im_end|>")
    drawn = list(held_out(pictures))
    for start in range(0, len(drawn), size):
        images, rows = zip(*drawn[start : start + size], strict=True)
        packed = pack(rows, ids, model.prompt_suffix, end)
        features = model.encode(mx.array(processor.pixels(images)))
        mx.eval(features.tokens)
        yield features, packed


def logits_of(model, prefix, text: str, features: Features, questions: Questions):
    """Return (B, Q, L, V) logits under a plan at the tower."""
    plan = plan_for(model, read_plan(text)) if text != "none" else ()
    scene = Scene(None, Prompt(((),) * (len(features.tokens) + 1)))
    visual = prune_at_tower(model, scene, plan, features)
    seen = (visual.embeddings, visual.indices, questions, features.total)
    logits = answer_logits(model, prefix, *seen)
    mx.eval(logits)
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="quantized folders")
    parser.add_argument("--adapter-paths", nargs="*", default=[], help="one for each")
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--checked", type=int, default=4)
    args = parser.parse_args()
    plain, processor = mlx_tokprune.load("demo")
    prefix = processor.tokenizer.encode(plain.prompt_prefix, add_special_tokens=False)
    models, stored = {"16 bits": plain}, {}
    for name, adapter in itertools.zip_longest(args.models, args.adapter_paths):
        for path in dict.fromkeys((None, adapter)):
            label = f"{name} + {path}" if path else name
            stored[label] = mlx_tokprune.load(name, adapter_path=path)[0]
            models[label] = copy.deepcopy(stored[label])
            replace_quantized(models[label])
    right = {(label, plan): [] for label in models for plan in PLANS}
    about: list[int] = []
    for features, questions in asked(plain, processor, args.pictures, 32):
        first = about[-1] + 1 if about else 0
        for (label, plan), found in right.items():
            logits = logits_of(models[label], prefix, plan, features, questions)
            matches, used = map(np.array, exact_matches(logits, questions))
            found += matches[used].tolist()
        about += (np.nonzero(used)[0] + first).tolist()
    print(f"{len(about)} questions about {args.pictures} held-out pictures")
    print("| language model | plan | accuracy |\n|---|---|---:|")
    for (label, plan), found in right.items():
        low, high = of_share(found, about)
        share = sum(found) / len(found)
        shown = f"{100 * share:.1f} ({100 * low:.1f}-{100 * high:.1f})"
        print(f"| {label} | {plan} | {shown} |", flush=True)
    for features, questions in asked(plain, processor, args.checked, args.checked):
        for label, model in stored.items():
            times, found = [], []
            for one in (model, models[label]):
                start = time.perf_counter()
                found.append(logits_of(one, prefix, PLANS[1], features, questions))
                times.append((time.perf_counter() - start) / args.checked)
            error = mx.max(mx.abs(found[0] - found[1])) / mx.max(mx.abs(found[1]))
            same, used = (exact_matches(each, questions) for each in found)
            equal = np.array_equal(np.array(same[0]), np.array(used[0]))
            print(
                f"{label}: {args.checked} pictures on the quantized weights "
                f"{times[0]:.2f} s each, on their values {times[1]:.3f} s; logits "
                f"differ by {error.item():.1e} of the largest, "
                f"{'the same' if equal else 'other'} answers are right"
            )


if __name__ == "__main__":
    main()
