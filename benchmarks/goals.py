"""Measure the demo's accuracy with tokens kept by the goals that scorers learn.

    python benchmarks/goals.py --pictures 128 --goals gradient 0 1 2 3 "1 2 3"

Each image has eight questions; the images are those that a training run would draw next
after the 4,096 of the shipped scorers. A goal is a value of `mlx_tokprune train prune
--imitate`: `gradient`, which knows the correct answer, or layers whose attention is
summed. The question's own goal keeps tokens as a scorer at the prompt would; the mean
of the goals of an image's questions, or of their squares (`--sharpen 2`), keeps them as
a scorer at the tower would. Nothing is learned, so the accuracy is one that a scorer
could approach. `best` is, of the eight top tokens of `gradient`, the one token that
makes the correct answer most probable. `--scorers` are trained scorers. Figures are
percent of correct answers; those for one token are also by the question's first two
words.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx_tokprune  # isort: skip  (loads the BLAS before MLX)

import mlx.core as mx
import numpy as np

from mlx_tokprune.pruners.scorers import load_scorer
from mlx_tokprune.train.batches import Batch, Batches
from mlx_tokprune.train.packing import Questions, answer_logits
from mlx_tokprune.train.samples import read_samples
from mlx_tokprune.train.scorer import GRADIENT, Lesson, ScorerLoss, goal_of, score

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/ is not installed

from recipes.demo.packing import exact_matches

KNOWN = 4096  # training images of the shipped scorers
COUNTS = (16, 7, 3, 1)  # numbers of kept tokens


def right(model, batch: Batch, scores: mx.array, keep: int) -> np.ndarray:
    """Return (Q,) correctness of answers from the `keep` best tokens of each row."""
    kept = mx.sort(mx.argsort(-scores, axis=1)[:, :keep], axis=1)
    visual = model.project(batch.features.tokens)[0][kept]
    rows = (
        part.swapaxes(0, 1) for part in (batch.questions.ids, batch.questions.targets)
    )
    asked, total = Questions(*rows), batch.features.total
    logits = answer_logits(model, batch.prefix, visual, kept, asked, total)
    return np.array(exact_matches(logits, asked)[0][:, 0])


def orders(losses: dict[str, ScorerLoss], learned: dict, model, item, batch: Batch):
    """Yield name, budget (`None`: any) and (Q, N) scores of one image."""
    for name, loss in losses.items():
        goal = loss.goals(item, False)
        yield f"{name}, its question's", None, goal
        sharp = goal**2 / mx.sum(goal**2, axis=1, keepdims=True)
        for power, shares in (("", goal), (" of squares", sharp)):
            mean = mx.broadcast_to(mx.mean(shares, axis=0), goal.shape)
            yield f"{name}, mean{power}", None, mean
        if name == GRADIENT:
            yield "best", 1, loss.goals(item, True)
    for name, scorer in learned.items():
        for keep in COUNTS:
            made = score(model, scorer, batch, keep)
            shape = len(item.pairs), made.shape[1]
            yield name, keep, mx.broadcast_to(made, shape)


def measure(goals: Sequence[str], pictures: int, scorers: Sequence[str], folder: str):
    model, processor = mlx_tokprune.load(folder)
    items = read_samples("demo", KNOWN + pictures).items[KNOWN:]
    batches = Batches(model, processor, items)
    losses = {
        name: ScorerLoss(
            model, batches, Lesson(1, imitate=goal_of(name.split()), alone=1)
        )
        for name in goals
    }
    learned = {name: load_scorer(name) for name in scorers}
    found: dict[str, dict[int, list]] = {}
    for item in items:
        batch = batches.of([item], [item.pairs])
        for name, only, scores in orders(losses, learned, model, item, batch):
            for keep in (only,) if only else COUNTS:
                hits = right(model, batch, scores, keep)
                found.setdefault(name, {}).setdefault(keep, []).append(hits)
    kinds = np.array([" ".join(q.split()[:2]) for item in items for q, _ in item.pairs])
    names = sorted(set(kinds))
    heads = [
        *(f"{count} tokens" for count in COUNTS),
        *(f"1: {name}" for name in names),
    ]
    print(f"| {len(kinds)} questions | " + " | ".join(heads) + " |")
    print("|---|" + "---:|" * len(heads))
    for name, parts in found.items():
        hits = {keep: np.concatenate(some) for keep, some in parts.items()}
        cells = [f"{100 * hits[k].mean():.1f}" if k in hits else "" for k in COUNTS]
        cells += [f"{100 * hits[1][kinds == kind].mean():.1f}" for kind in names]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pictures", type=int, default=128)
    help_ = "gradient, or layers (quoted, where several)"
    parser.add_argument("--goals", nargs="*", default=["gradient", "1"], help=help_)
    parser.add_argument("--scorers", nargs="*", default=[])
    args = parser.parse_args()
    measure(args.goals, args.pictures, args.scorers, args.model)


if __name__ == "__main__":
    main()
