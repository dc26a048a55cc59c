"""How far one visual token can go on the demo: the best that there is, and scorers.

    python benchmarks/one_token.py --pictures 128 --scorers demo-asking

Eight questions about each picture; the pictures are the next that a training would draw
behind the 4,096 of the shipped scorers. `best` is the token that makes the right answer
most probable, found with the answer known, of the eight that the question attends to
most in the second layer; `attention` is the one that it attends to most there. Right
answers in percent, all and by the question's first two words.
"""

import argparse
from collections.abc import Sequence

import mlx_tokprune  # isort: skip  (loads the BLAS before MLX)

import mlx.core as mx
import numpy as np

from mlx_tokprune.learned import load_scorer
from mlx_tokprune.train.packing import Questions, answer_logits, exact_matches
from mlx_tokprune.train.tune.batches import Batch, Batches
from mlx_tokprune.train.tune.data import read_samples
from mlx_tokprune.train.tune.scorer import Lesson, ScorerLoss, score

KNOWN = 4096  # pictures that the shipped scorers learned from


def right(model, batch: Batch, scores: mx.array) -> np.ndarray:
    """(Q,) whether each answer about one picture is right, from a row's best token."""
    best = mx.argmax(scores, axis=1, keepdims=True)
    visual = model.project(batch.features.tokens)[0][best]
    rows = (
        part.swapaxes(0, 1) for part in (batch.questions.ids, batch.questions.targets)
    )
    asked = Questions(*rows)
    total = batch.features.total
    logits = answer_logits(model, batch.prefix, visual, best, asked, total)
    return np.array(exact_matches(logits, asked)[0][:, 0])


def measure(pictures: int, scorers: Sequence[str]) -> None:
    model, processor = mlx_tokprune.load("demo")
    items = read_samples("demo", KNOWN + pictures).items[KNOWN:]
    batches = Batches(model, processor, items)
    goals = ScorerLoss(model, batches, Lesson(1, imitate=(1,), alone=1))
    learned = {name: load_scorer(name) for name in scorers}
    found: dict[str, list] = {}
    kinds = [" ".join(pair[0].split()[:2]) for item in items for pair in item.pairs]
    for item in items:
        batch = batches.of([item], [item.pairs])
        chosen = {
            "best": goals.goals(item, True),
            "attention": goals.goals(item, False),
        }
        for name, scorer in learned.items():
            made = score(model, scorer, batch, 1)
            chosen[name] = mx.broadcast_to(made, (len(item.pairs), made.shape[1]))
        for name, scores in chosen.items():
            found.setdefault(name, []).append(right(model, batch, scores))
    names = sorted(set(kinds))
    print(f"| {len(kinds)} questions | all | " + " | ".join(names) + " |")
    print("|---|" + "---:|" * (1 + len(names)))
    for name, parts in found.items():
        hits = np.concatenate(parts)
        of = [hits, *(hits[np.array(kinds) == kind] for kind in names)]
        print(f"| `{name}` | " + " | ".join(f"{100 * h.mean():.1f}" for h in of) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--scorers", nargs="*", default=["demo-asking"])
    args = parser.parse_args()
    measure(args.pictures, args.scorers)


if __name__ == "__main__":
    main()
