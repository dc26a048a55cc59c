"""Training a scorer on a model that stays as it is: which tokens answer the questions?

The loss is the language model's on the answers, with every token there and a gate on
those that are not kept; how many are kept is drawn anew for each batch, or learned.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoints.fingerprint import fingerprint
from ..errors import InputError, nearest
from ..features import Features
from ..pipeline.planning import plan_for
from ..pruners import Pruner, count_kept
from ..pruners.scorers import SCORERS, is_scorer, load_scorer, save_scorer, untold
from .batches import Batch, Batches
from .gate import LEAKS, above_threshold, annealed, log_gate, straight_through, tamed
from .loop import Loop, Schedule, draw_losses, recomputed
from .packing import (
    IGNORE,
    Questions,
    answer_logits,
    answer_losses,
    divergence,
    packed,
    unpruned_logits,
)
from .samples import Sample, Samples, check_started
from .shares import check_shares, draw_count

GRADIENT = "gradient"  # a goal that is imitated, where no layers are
_ALONE = 8  # tokens of a question that are tried alone
_AT_ONCE = 8  # questions whose gradient is computed at once
_STEP = 1.5  # from a number of tokens that is tried to the next


def goal_of(words: Sequence[str]) -> tuple[int, ...] | str:
    """What `Lesson` imitates, from words: `GRADIENT`, or numbers of layers."""
    if list(words) == [GRADIENT]:
        return GRADIENT
    if not all(word.isdecimal() for word in words):
        wrong = [word for word in words if not word.isdecimal() and word != GRADIENT]
        raise InputError(
            f"cannot imitate {' '.join(words)!r}; expected {GRADIENT!r} alone, or "
            f"numbers of layers.{nearest(wrong[0], [GRADIENT]) if wrong else ''}"
        )
    return tuple(sorted({int(word) for word in words}))


@dataclass(frozen=True)
class Lesson:
    """What a scorer learns under.

    questions: of a picture; a scorer at the prompt learns from one, unless it imitates,
    and one at the tower imitates the mean over all that there are.
    least, most: shares of tokens that are kept, between which each batch draws its own,
    evenly in the logarithm. curriculum: the share of the steps in which `least` comes
    down from 1. leaky: the share, the first, in which closed gates leak. noise: of a
    Gumbel distribution, falling to 0. temperature: of the gate's gradient, from the
    first to the second. distill: weight of the divergence from the unpruned model's
    answers. imitate: what is imitated in the place of all that: `GRADIENT`, how much
    each token moves the right answer's logits, or the attention from the prompt's last
    tokens, summed, of layers of the language model by their numbers, which run after a
    scorer prunes. alone: batches that keep at most so many tokens imitate how probable
    each token makes the answer when it is the only one.
    sharpen: the power of that gradient, attention or probability.
    sparsity, within: either has the scorer learn its count, and no share is drawn.
    sparsity: the price of keeping everything, in the loss of the answers. within: what
    is learned is how many a question needs of the order of the scorer that is begun
    with: the fewest with which an answer diverges from the unpruned one by at most so
    many nats, between `least` and `most`. There `sparsity` is the price of keeping a
    token that is not needed, that of missing one that is being 1.
    """

    steps: int
    pictures: int = 32
    questions: int = 5
    least: float = 0.05
    most: float = 0.25
    curriculum: float = 0.0
    noise: float = 0.5
    leaky: float = 0.1
    temperature: tuple[float, float] = (1.0, 0.3)
    distill: float = 0.0
    imitate: tuple[int, ...] | str = ()
    alone: int = 0
    sharpen: float = 1.0
    sparsity: float | None = None
    within: float | None = None

    def __post_init__(self):
        check_shares(self.least, self.most)
        if isinstance(self.imitate, str) and self.imitate != GRADIENT:
            raise InputError(
                f"cannot imitate {self.imitate!r}; expected {GRADIENT!r} or layers"
            )
        if not 0 <= self.curriculum <= 1:
            raise InputError(f"curriculum {self.curriculum:g} is outside [0, 1]")
        if not 0 <= self.distill <= 1e6:
            raise InputError(f"distill {self.distill:g} is outside [0, 1e6]")
        if not 0 < self.sharpen <= 16:
            raise InputError(f"sharpen {self.sharpen:g} is outside (0, 16]")
        if self.alone < 0 or (self.alone and not self.imitate):
            raise InputError(
                f"alone {self.alone}: expected a number of tokens from 0, and what to "
                "imitate where more are kept: layers, or gradient"
            )
        if self.imitate and self.own_count:
            raise InputError(
                "imitating learns an order, sparsity and within a count; "
                "expected one of them"
            )
        if self.sharpen != 1 and not self.imitate:
            raise InputError("sharpen is of what is imitated; say what")
        if self.distill and (self.imitate or self.within is not None):
            raise InputError(
                "distill is of the answers' loss, which imitate and within take the "
                "place of; expected one of them"
            )
        if self.sparsity is not None and not 0 < self.sparsity <= 1e6:
            raise InputError(f"sparsity {self.sparsity:g} is outside (0, 1e6]")
        if self.within is not None and not 0 < self.within <= 1e3:
            raise InputError(f"within {self.within:g} is outside (0, 1000]")

    @property
    def own_count(self) -> bool:
        """Whether how many tokens stay is learned, too."""
        return self.sparsity is not None or self.within is not None

    @property
    def middle(self) -> float:
        """The share that a scorer is told whose order is learned from."""
        return (self.least * self.most) ** 0.5

    def keep(self, rng: np.random.Generator, step: int, total: int) -> int:
        """How many of `total` tokens this batch keeps, fewer than all."""
        least = annealed(1.0, self.least, step, round(self.curriculum * self.steps))
        least = min(least, self.most) if self.curriculum else self.least
        return draw_count(rng, least, self.most, total)


class ScorerLoss:
    """The loss of a scorer on batches; a `LossOf` of the training loop.

    order: the scorer whose order of the tokens is learned from, under `within`.
    """

    def __init__(self, model, batches: Batches, lesson: Lesson, order=None):
        layers = len(model.decoder.layers)
        for layer in lesson.imitate if lesson.imitate != GRADIENT else ():
            if not 0 <= layer < layers:
                raise InputError(
                    f"there is no layer {layer} to imitate; expected 0 to "
                    f"{layers - 1}, or {GRADIENT}"
                )
        self._model, self._batches, self._lesson = model, batches, lesson
        self._order = order
        self._goals: dict[Hashable, mx.array] = {}  # of a picture, and what they are

    def __call__(self, scorer: nn.Module, seed: tuple[int, ...], step: int):
        lesson = self._lesson
        batch = self._batches.draw(seed, lesson.pictures, lesson.questions)
        rng = np.random.default_rng((*seed, 1))
        total = batch.features.total
        keep = None if lesson.own_count else lesson.keep(rng, step, total)
        scores = score(self._model, scorer, batch, keep)
        rows = mx.array(float(len(scores)))
        if lesson.within is not None:
            needed = self._needed(batch, scorer.at)
            price = mx.where(needed > 0, 1, lesson.sparsity or 1)
            losses = nn.losses.binary_cross_entropy(scores, needed, price)
            return losses * rows, rows
        if lesson.imitate:
            goal = self._goal(batch, scorer.at, keep <= lesson.alone)
            logs = scores - mx.logsumexp(scores, axis=1, keepdims=True)
            return -mx.sum(goal * logs), rows
        known = (self._model, batch.prefix, batch.features.tokens, batch.questions)
        noise = annealed(lesson.noise, 0.0, step, lesson.steps)
        scores = scores + noise * mx.random.gumbel(scores.shape)
        temperature = annealed(*lesson.temperature, step, lesson.steps)
        if keep is None:  # a logistic distribution's: scores stay where they are
            scores = scores - noise * mx.random.gumbel(scores.shape)
            gate = above_threshold(scores, temperature)
        else:
            gate = straight_through(scores, keep, temperature)
        leak = LEAKS[step >= lesson.leaky * lesson.steps]
        logits = unpruned_logits(*known, log_gate(tamed(gate), leak))
        losses, used = answer_losses(logits, batch.questions)
        if lesson.distill:
            whole = mx.stop_gradient(unpruned_logits(*known))
            losses = losses + lesson.distill * divergence(whole, logits)
        loss, count = mx.sum(losses * used), mx.sum(used)
        if lesson.sparsity is not None:
            loss = loss + lesson.sparsity * mx.mean(gate) * count
        return loss, count

    def _goal(self, batch: Batch, at: str, alone: bool) -> mx.array:
        """(B, N), the mean over a picture's questions, or (B * Q, N) of those asked."""
        goals = []
        for item, asked in zip(batch.samples, batch.asked, strict=True):
            goal = self.goals(item, alone)
            if at == "tower":
                goals.append(mx.mean(goal, axis=0, keepdims=True))
            else:
                goals.append(goal[mx.array([item.pairs.index(pair) for pair in asked])])
        return mx.concatenate(goals)

    def goals(self, item: Sample, alone: bool) -> mx.array:
        """(Q, N) of all questions about a picture, computed once."""
        key = (item.picture, alone)
        if key not in self._goals:
            batch = self._batches.of([item], [item.pairs])
            goal = self._alone(batch) if alone else self._imitated(batch)
            mx.eval(goal)
            self._goals[key] = goal[0]
        return self._goals[key]

    def _alone(self, batch: Batch) -> mx.array:
        """(B, Q, N) shares of what each token alone makes the answer's probability.

        Tried are the highest of what larger budgets imitate; the others have none.
        """
        total = batch.features.total
        first = self._imitated(batch).flatten(0, 1)
        tried = mx.argsort(-first, axis=1)[:, :_ALONE]
        visual = self._model.project(batch.features.tokens)
        visual = mx.repeat(visual, batch.prompt.shape[1], axis=0)
        visual = mx.take_along_axis(visual, tried[..., None], axis=1)
        ids, targets = (
            mx.repeat(part.flatten(0, 1)[:, None], tried.shape[1], axis=1)
            for part in (batch.questions.ids, batch.questions.targets)
        )
        asked = (Questions(ids, targets), total, "original", None, True)
        logits = answer_logits(self._model, batch.prefix, visual, tried, *asked)
        losses, used = answer_losses(logits, asked[0])
        summed = mx.sum(losses * used, axis=-1)
        shares = mx.softmax(-self._lesson.sharpen * summed, axis=1)
        goal = mx.put_along_axis(mx.zeros_like(first), tried, shares, axis=1)
        return mx.stop_gradient(goal.reshape(*batch.prompt.shape[:2], total))

    def _needed(self, batch: Batch, at: str) -> mx.array:
        """(B, N) of pictures, (B * Q, N) of each with a question: 1 where needed."""
        found = []
        for item, asked in zip(batch.samples, batch.asked, strict=True):
            if item.picture not in self._goals:
                alone = self._batches.of([item], [item.pairs])
                self._goals[item.picture] = self._needed_of(alone)
            needs = self._goals[item.picture]
            if at == "tower":
                found.append(mx.max(needs, axis=0))
            else:
                found += [needs[item.pairs.index(pair)] for pair in asked]
        return mx.stack(found)

    def _needed_of(self, batch: Batch) -> mx.array:
        """(Q, N) what each of the questions about one picture needs."""
        visual, lesson = self._model.project(batch.features.tokens)[0], self._lesson
        ids, targets = batch.questions.ids[0], batch.questions.targets[0]
        total = batch.features.total
        told = None if self._order.own_count else count_kept(total, lesson.middle)
        scores = score(self._model, self._order, batch, told)
        order = mx.argsort(-mx.broadcast_to(scores, (len(ids), total)), axis=1)

        def logits(some: mx.array, keep: int) -> mx.array:
            kept = mx.sort(order[some, :keep], axis=1)
            asked = Questions(ids[some, None], targets[some, None])
            given = (batch.prefix, visual[kept], kept, asked, total)
            return answer_logits(self._model, *given)

        left = np.arange(len(ids))
        keep, most = (count_kept(total, s) for s in (lesson.least, lesson.most))
        counts, whole = np.full(len(ids), most), logits(mx.array(left), total)
        while left.size and keep < most:
            some = mx.array(left)
            gap = divergence(whole[some], logits(some, keep))
            used = targets[some, None] != IGNORE
            near = np.array(mx.sum(gap * used, axis=(1, 2)) <= lesson.within)
            counts[left[near]], left = keep, left[~near]
            keep = max(keep + 1, int(keep * _STEP))
        needed = mx.argsort(order, axis=1) < mx.array(counts)[:, None]
        needed = needed.astype(mx.float32)
        mx.eval(needed)
        return needed

    def _imitated(self, batch: Batch) -> mx.array:
        """(B, Q, N) shares of what is imitated for each question, sharpened."""
        by_gradient = self._lesson.imitate == GRADIENT
        found = self._gradient(batch) if by_gradient else self._attention(batch)
        shares = found / mx.sum(found, axis=-1, keepdims=True)
        sharp = shares**self._lesson.sharpen
        return mx.stop_gradient(sharp / mx.sum(sharp, axis=-1, keepdims=True))

    def _gradient(self, batch: Batch) -> mx.array:
        """(B, Q, N) norms of the gradient of the right answer's logits.

        Of logits, since a probability near 1 has none, as Simonyan et al. have it for
        pixels (2014, https://arxiv.org/abs/1312.6034).
        """
        visual = self._model.project(batch.features.tokens)
        norms, count = [], batch.prompt.shape[1]
        for first in range(0, count, _AT_ONCE):  # memory is that of so many answers
            some = slice(first, first + _AT_ONCE)
            ids, targets = (
                batch.questions.ids[:, some],
                batch.questions.targets[:, some],
            )
            norms.append(self._moved(batch.prefix, visual, Questions(ids, targets)))
            mx.eval(norms)
        return mx.concatenate(norms, axis=1)

    def _moved(self, prefix, visual: mx.array, questions: Questions) -> mx.array:
        """(B, Q, N), each question in a sequence of its own."""
        size, count, _ = questions.ids.shape
        ids, targets = (
            part.flatten(0, 1)[:, None] for part in (questions.ids, questions.targets)
        )
        used, names = targets != IGNORE, mx.maximum(targets, 0)[..., None]
        total = visual.shape[1]
        every = mx.broadcast_to(mx.arange(total), (size * count, total))
        asked = every, Questions(ids, targets), total

        def answer(visual: mx.array) -> mx.array:
            logits = answer_logits(self._model, prefix, visual, *asked)
            return mx.sum(mx.take_along_axis(logits, names, axis=-1)[..., 0] * used)

        moved = mx.grad(answer)(mx.repeat(visual, count, axis=0))
        norms = mx.linalg.norm(moved.astype(mx.float32), axis=-1)
        return norms.reshape(size, count, total)

    def _attention(self, batch: Batch) -> mx.array:
        """(B, Q, N) of what each question's last token attends to."""
        visual, seen = self._model.project(batch.features.tokens), []
        total = batch.features.total
        every = mx.broadcast_to(mx.arange(total), visual.shape[:2])
        asked = (batch.prefix, visual, every, batch.questions, total)
        sequence = packed(self._model, *asked)
        _, count, length = batch.prompt.shape
        last = mx.sum(batch.prompt, axis=-1) - 1 + mx.arange(count) * length
        rows = len(batch.prefix) + total + last

        def watch(number: int, hidden: mx.array) -> None:
            if number in self._lesson.imitate:
                where = (rows, sequence.positions, sequence.mask)
                seen.append(self._model.decoder.attention_to(number, hidden, *where))

        self._model.decoder.read(sequence, watch=watch)  # lazy: no later layer runs
        return sum(seen)[..., sequence.visual[0]]


def train_scorer(
    loaded: tuple,
    kind: str,
    samples: Samples,
    lesson: Lesson,
    schedule: Schedule,
    folder: Path,
    output: Path,
    checkpoint: bool = False,
) -> nn.Module:
    """Train a scorer for a `(model, processor)` and write it to `output`.

    folder: keeps the state of the training, which goes on from there. checkpoint: see
    `recomputed`.
    """
    model, processor = loaded
    model.freeze()
    mx.random.seed(schedule.seed)
    scorer, order = scorer_for(model, kind), None
    if is_scorer(kind) and lesson.own_count:
        order = load_scorer(kind)
        if not scorer.own_count:
            untold(scorer, lesson.middle)
    elif lesson.within is not None:
        raise InputError(
            "within learns how many are needed of an order that is known; expected the "
            f"folder of a trained scorer, not {kind!r}"
        )
    scorer.own_count, scorer.model_signs = lesson.own_count, model.signs
    needs = scorer.needs if scorer.at == "tower" else ()
    batches = Batches(model, processor, samples.items, needs)
    loss = ScorerLoss(model, batches, lesson, order)
    settings = {"scorer": fingerprint(scorer), **dataclasses.asdict(lesson)}
    check_started(folder, model, samples, settings)
    loop = Loop(scorer, loss, schedule, folder)
    with recomputed(model, checkpoint):
        loop.run()
    if loop.is_first:
        trained = {**dataclasses.asdict(lesson), **dataclasses.asdict(schedule)}
        save_scorer(scorer, output, trained)
        draw_losses(loop.losses, folder / "loss.png")
    return scorer


def scorer_for(model, kind: str) -> nn.Module:
    """A new scorer for this model, or that of a folder, whose weights it begins with.

    `InputError` where the model cannot have one.
    """
    if is_scorer(kind):
        scorer = load_scorer(kind)
        plan_for(model, Pruner(kind, 0.5))
        return scorer
    made = SCORERS[kind]
    missing = [n for n in made.needs if n not in model.provides.get(made.at, ())]
    if missing:
        raise InputError(
            f"scorer {kind!r} reads {', '.join(missing)}, which this model does not "
            f"have at {made.at!r}; choose 'adaptive'"
        )
    if made.at == "prompt":
        return made(model.args.text["hidden_size"])
    sizes = (model.block_sizes,) if "blocks" in made.needs else ()
    return made(model.feature_size, *sizes)


def score(model, scorer: nn.Module, batch: Batch, keep: int | None) -> mx.array:
    """What a scorer says: (B, N) of pictures, (B * Q, N) of each with a question.

    keep: the budget that it is told, `None` for one that has its own count.
    """
    features = batch.features
    if scorer.at == "tower":
        extras = _told(keep, features.total, len(features.tokens)) | features.extras
        return scorer(Features(features.tokens, features.grid, extras=extras))
    _, count, _ = batch.prompt.shape
    length = int(np.array(mx.max(mx.sum(batch.prompt, axis=-1))))
    embeddings = mx.stop_gradient(model.project(features.tokens))
    embeddings = mx.repeat(embeddings, count, axis=0)
    text = model.decoder.embed(batch.questions.ids[..., :length].flatten(0, 1))
    extras = {
        **_told(keep, features.total, len(embeddings)),
        "text": mx.stop_gradient(text),
        "text_mask": batch.prompt[..., :length].flatten(0, 1),
    }
    return scorer(Features(embeddings, features.grid, extras=extras))


def _told(keep: int | None, total: int, batch: int) -> dict[str, mx.array]:
    return {} if keep is None else {"budget": mx.full((batch,), keep / total)}
