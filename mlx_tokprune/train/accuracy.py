"""Exact-match accuracy on held-out pictures, by method, budget and kind of question.

Pictures come from seeds that training never uses. Controls: the most common answer of
each question's form, and a blank picture.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..features import Features
from ..models.fastvlm import FastVLM
from ..pipeline import Scene, encode, prune_at_tower
from ..prompt import Prompt
from ..pruners import Pruner, as_plan, list_pruners
from .batches import make_batch
from .packing import answer_logits, exact_matches, pack
from .questions import KINDS, Question, ask
from .scenes import CANVAS

HELD_OUT = 9  # first number of every held-out seed; training uses 1
RATIOS = (1.0, 0.5, 0.25, 0.11)
_BATCH = 32

Row = dict[str, float]


def held_out(pictures: int) -> Iterator[tuple[mx.array, list[list[Question | None]]]]:
    """Batches of pixels and one question of each kind (or `None`) per picture."""
    for start in range(0, pictures, _BATCH):
        size = min(_BATCH, pictures - start)
        batch = make_batch((HELD_OUT, start), size, CANVAS, 5)
        rng = np.random.default_rng((HELD_OUT, start, 1))
        yield (
            batch.pixels,
            [[ask(rng, s, kind) for kind in KINDS] for s in batch.scenes],
        )


def rows(ratios: Sequence[float] = RATIOS) -> list[Pruner]:
    """Every method at every ratio below 1, after the unpruned model."""
    methods = [m for m in list_pruners("tower") if m != "none"]
    budgets = [r for r in ratios if r < 1]
    return [Pruner("none"), *(Pruner(m, r) for r in budgets for m in methods)]


def measure(
    model: FastVLM,
    processor,
    pictures: int = 512,
    pruners: Sequence[Pruner] | None = None,
    positions: str = "original",
) -> dict[str, Row]:
    """Accuracy by kind for each pruner, named `method@ratio`, and for the controls.

    Each row also has `all` (over all questions), `n` and `kept` tokens. The tower runs
    once per picture for all rows.
    """
    pruners = pruners if pruners is not None else rows()

    def ids(text: str) -> list[int]:
        return processor.tokenizer.encode(text, add_special_tokens=False)

    (end,), prefix = ids("<|im_end|>"), ids(model.prompt_prefix)

    tallies = {_label(p): _Tally() for p in pruners} | {"blank picture": _Tally()}
    everything: list[Question] = []
    blank = model.encode(mx.zeros((1, CANVAS, CANVAS, 3)))
    batches = tqdm(held_out(pictures), total=-(-pictures // _BATCH), disable=None)
    for pixels, asked in batches:
        questions = pack(asked, ids, model.prompt_suffix, end)
        everything += [q for row in asked for q in row if q is not None]
        # One sample of as many places as there are pictures: each by itself.
        scene = Scene(pixels, Prompt(((),) * (len(pixels) + 1)))
        features = encode(model, scene, tuple(pruners))

        def answer(label, pruner, features, questions=questions, scene=scene):
            visual = prune_at_tower(model, scene, as_plan(pruner), features)
            logits = answer_logits(
                *(model, prefix, visual.embeddings, visual.indices),
                *(questions, features.total, positions),
            )
            tallies[label].add(*exact_matches(logits, questions), visual.keep)

        for pruner in pruners:
            answer(_label(pruner), pruner, features)
        shape = (len(pixels), *blank.tokens.shape[1:])
        dark = Features(mx.broadcast_to(blank.tokens, shape), blank.grid)
        answer("blank picture", Pruner("none"), dark)
    table = {label: tally.row() for label, tally in tallies.items()}
    return table | {"most common answer": _most_common(everything)}


def _label(pruner: Pruner) -> str:
    return (
        "none" if pruner.method == "none" else f"{pruner.method}@{pruner.keep_ratio:g}"
    )


class _Tally:
    def __init__(self):
        self.right = np.zeros(len(KINDS))
        self.asked = np.zeros(len(KINDS))
        self.kept = 0

    def add(self, right: mx.array, asked: mx.array, kept: int) -> None:
        self.right += np.array(mx.sum(right & asked, axis=0))
        self.asked += np.array(mx.sum(asked, axis=0))
        self.kept = kept

    def row(self) -> Row:
        row = {k: r / n for k, r, n in zip(KINDS, self.right, self.asked, strict=True)}
        total = self.asked.sum()
        return row | {"all": self.right.sum() / total, "n": total, "kept": self.kept}


def _most_common(questions: list[Question]) -> Row:
    """What always giving the commonest answer to a question's first two words gets."""
    forms: dict[tuple, Counter] = {}
    for q in questions:
        form = (q.kind, *q.prompt.split()[:2])
        forms.setdefault(form, Counter())[q.answer] += 1
    right = Counter({k: 0 for k in KINDS})
    asked = Counter(q.kind for q in questions)
    for form, answers in forms.items():
        right[form[0]] += answers.most_common(1)[0][1]
    row = {k: right[k] / asked[k] for k in KINDS}
    total = sum(asked.values())
    return row | {"all": sum(right.values()) / total, "n": total, "kept": 0}


def markdown(table: dict[str, Row]) -> str:
    """The table for people: share of right answers, in percent."""
    lines = ["| | kept | " + " | ".join((*KINDS, "all")) + " |"]
    lines.append("|---|---:|" + "---:|" * (len(KINDS) + 1))
    for label, row in table.items():
        cells = " | ".join(f"{100 * row[k]:.1f}" for k in (*KINDS, "all"))
        lines.append(f"| {label} | {row['kept']:.0f} | {cells} |")
    return "\n".join(lines)
