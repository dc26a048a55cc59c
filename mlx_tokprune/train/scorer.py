"""Training of a scorer on a frozen model: which tokens answer the questions?

The loss is the language model's on the answers, with every token in the sequence and a
closed gate on each token that is not kept. Each batch draws its own number of kept
tokens, or the scorer learns that number.
"""

import dataclasses
import functools
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoints.fingerprint import fingerprint
from ..errors import InputError, nearest
from ..features import Features
from ..models.protocol import VisionModel
from ..pipeline.planning import plan_for
from ..processing.processor import AnyProcessor, check_answers
from ..pruners import Pruner, count_kept
from ..pruners.scorers import (
    SCORERS,
    Scorer,
    fold_budget,
    is_scorer,
    load_scorer,
    save_scorer,
)
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

GRADIENT = "gradient"  # the goal to imitate in place of layers
_ALONE = 8  # tokens of a question that are measured alone
_AT_ONCE = 8  # questions whose gradient is computed at once
_STEP = 1.5  # factor from one measured number of tokens to the next


def goal_of(words: Sequence[str]) -> tuple[int, ...] | str:
    """Return the goal that `Lesson` imitates, from words.

    Words are `GRADIENT` alone, or numbers of layers. Raises `InputError` for any other.
    """
    if list(words) == [GRADIENT]:
        return GRADIENT
    if not all(word.isdecimal() for word in words):
        unknown = [word for word in words if not word.isdecimal() and word != GRADIENT]
        raise InputError(
            f"cannot imitate {' '.join(words)!r}; expected {GRADIENT!r} alone, or "
            f"numbers of layers.{nearest(unknown[0], [GRADIENT]) if unknown else ''}"
        )
    return tuple(sorted({int(word) for word in words}))


@dataclass(frozen=True)
class Lesson:
    """Goal and settings of a scorer's training.

    The goal is the loss on the answers, unless `imitate` or `within` replaces it.
    Raises `InputError` for a value out of range, and for goals that exclude each other.

    steps: steps of the training. pictures: of a batch. questions: about each picture; a
    scorer at the prompt learns from one, unless it imitates, and a scorer at the tower
    imitates the mean over all questions.
    least, most: keep ratios, between which each batch draws its own, log-uniform.
    curriculum: fraction of the steps over which `least` falls from 1. leaky: first
    fraction of the steps, with the larger leak of closed gates (`gate.LEAKS`). noise:
    scale of Gumbel noise on the scores, falling to 0. temperature: of the gate's
    gradient, at the first and at the last step. distill: weight of the divergence from
    the unpruned model's answers.
    imitate: `GRADIENT`, the norm of the gradient of the correct answer's logits for
    each token; or numbers of language model layers, whose attention from the prompt's
    last token is summed. alone: batches that keep at most this number of tokens imitate
    the probability of the answer with one token alone. sharpen: power of the imitated
    gradient, attention or probability.
    sparsity, within: with either one, the scorer learns its own count, and no keep
    ratio is drawn. sparsity: penalty of keeping all tokens, added to the loss of the
    answers. within: learn how many tokens each question needs, in the order of the
    trained scorer: the fewest, between `least` and `most`, with which the answer
    diverges from the unpruned one by at most this number of nats. With `within`,
    `sparsity` is the penalty of a kept token that is not needed; a needed token that is
    missed costs 1.
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
                f"alone {self.alone}: expected a number of tokens from 0, and a goal "
                "to imitate where more are kept: layers, or gradient"
            )
        if self.imitate and self.own_count:
            raise InputError(
                "imitate learns an order, sparsity and within a count; "
                "expected one of them"
            )
        if self.sharpen != 1 and not self.imitate:
            raise InputError(
                f"sharpen {self.sharpen:g} has nothing to imitate; expected 1, or "
                "imitate with gradient or layers"
            )
        if self.distill and (self.imitate or self.within is not None):
            raise InputError(
                "distill adds to the loss of the answers, which imitate and within "
                "replace; expected one of them"
            )
        if self.sparsity is not None and not 0 < self.sparsity <= 1e6:
            raise InputError(f"sparsity {self.sparsity:g} is outside (0, 1e6]")
        if self.within is not None and not 0 < self.within <= 1e3:
            raise InputError(f"within {self.within:g} is outside (0, 1000]")

    @property
    def own_count(self) -> bool:
        """True where the scorer learns the number of kept tokens, too."""
        return self.sparsity is not None or self.within is not None

    @property
    def middle(self) -> float:
        """Budget of the scorer whose order is learned from: the geometric mean."""
        return (self.least * self.most) ** 0.5

    def keep(self, rng: np.random.Generator, step: int, total: int) -> int:
        """Draw how many of `total` tokens this batch keeps, fewer than all."""
        least = annealed(1.0, self.least, step, round(self.curriculum * self.steps))
        least = min(least, self.most) if self.curriculum else self.least
        return draw_count(rng, least, self.most, total)


class ScorerLoss:
    """Loss of a scorer on batches; a `LossOf` of the training loop.

    order: scorer whose order of the tokens is learned from, with `within`. Raises
    `InputError` for a layer to imitate that the model does not have.
    """

    def __init__(
        self,
        model: VisionModel,
        batches: Batches,
        lesson: Lesson,
        order: Scorer | None = None,
    ):
        layers = len(model.decoder.layers)
        for layer in () if isinstance(lesson.imitate, str) else lesson.imitate:
            if not 0 <= layer < layers:
                raise InputError(
                    f"there is no layer {layer} to imitate; expected 0 to "
                    f"{layers - 1}, or {GRADIENT}"
                )
        self._model, self._batches, self._lesson = model, batches, lesson
        self._order = order
        # Goals of all questions about a picture, computed once in a training.
        self._goals: dict[Hashable, mx.array] = {}

    def __call__(
        self, scorer: Scorer, seed: tuple[int, ...], step: int
    ) -> tuple[mx.array, mx.array]:
        """Return the sum of losses of a batch, and the number of its terms."""
        lesson = self._lesson
        batch = self._batches.draw(seed, lesson.pictures, lesson.questions)
        rng = np.random.default_rng((*seed, 1))
        total = batch.features.total
        keep = None if lesson.own_count else lesson.keep(rng, step, total)
        scores = score(self._model, scorer, batch, keep)
        rows = mx.array(float(len(scores)))
        if lesson.within is not None:
            needed = self._goal(batch, scorer.at)
            penalty = mx.where(needed > 0, 1, lesson.sparsity or 1)
            losses = nn.losses.binary_cross_entropy(scores, needed, penalty)
            return losses * rows, rows
        if lesson.imitate:
            goal = self._goal(batch, scorer.at, (keep or 0) <= lesson.alone)
            logs = scores - mx.logsumexp(scores, axis=1, keepdims=True)
            return -mx.sum(goal * logs), rows
        inputs = (self._model, batch.prefix, batch.features.tokens, batch.questions)
        noise = annealed(lesson.noise, 0.0, step, lesson.steps)
        scores = scores + noise * mx.random.gumbel(scores.shape)
        temperature = annealed(*lesson.temperature, step, lesson.steps)
        if keep is None:  # the difference of two is logistic: its mean is 0
            scores = scores - noise * mx.random.gumbel(scores.shape)
            gate = above_threshold(scores, temperature)
        else:
            gate = straight_through(scores, keep, temperature)
        leak = LEAKS[step >= lesson.leaky * lesson.steps]
        logits = unpruned_logits(*inputs, log_gate(cast(mx.array, tamed(gate)), leak))
        losses, used = answer_losses(logits, batch.questions)
        if lesson.distill:
            whole = mx.stop_gradient(unpruned_logits(*inputs))
            losses = losses + lesson.distill * divergence(whole, logits)
        loss, count = mx.sum(losses * used), mx.sum(used)
        if lesson.sparsity is not None:
            loss = loss + lesson.sparsity * mx.mean(gate) * count
        return loss, count

    def _goal(self, batch: Batch, at: str, alone: bool = False) -> mx.array:
        """Return goals: (B, N) at the tower, or (B * Q, N) at the prompt.

        At the tower: the mean over the questions, or the tokens that any of them needs.
        """
        goals, join = [], mx.mean if self._lesson.within is None else mx.max
        for item, pairs in zip(batch.samples, batch.pairs, strict=True):
            goal = self.goals(item, alone)
            if at == "tower":
                goals.append(join(goal, axis=0, keepdims=True))
            else:
                goals.append(goal[mx.array([item.pairs.index(pair) for pair in pairs])])
        return mx.concatenate(goals)

    def goals(self, item: Sample, alone: bool = False) -> mx.array:
        """Return the goals (Q, N) of all questions about a picture, computed once."""
        key = (item.picture, alone)
        if key not in self._goals:
            batch = self._batches.of([item], [item.pairs])
            if self._lesson.within is not None:
                goal = self._needed_of(batch)
            else:
                goal = (self._alone(batch) if alone else self._imitated(batch))[0]
            mx.eval(goal)
            self._goals[key] = goal
        return self._goals[key]

    def _alone(self, batch: Batch) -> mx.array:
        """Return shares (B, Q, N) of the answer's probability with one token alone.

        Only the `_ALONE` highest tokens of the goal of larger budgets are measured; all
        other shares are 0.
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
        questions, options = Questions(ids, targets), (total, "original", None, True)
        logits = answer_logits(
            *(self._model, batch.prefix, visual, tried, questions), *options
        )
        losses, used = answer_losses(logits, questions)
        summed = mx.sum(losses * used, axis=-1)
        shares = mx.softmax(-self._lesson.sharpen * summed, axis=1)
        goal = mx.put_along_axis(mx.zeros_like(first), tried, shares, axis=1)
        return mx.stop_gradient(goal.reshape(*batch.prompt.shape[:2], total))

    def _needed_of(self, batch: Batch) -> mx.array:
        """Return 1 for the tokens (Q, N) that each question about one picture needs."""
        visual, lesson = self._model.project(batch.features.tokens)[0], self._lesson
        questions = batch.questions[0]
        count, _ = questions.ids.shape
        total = batch.features.total
        scorer, within = self._order, lesson.within
        if scorer is None or within is None:
            raise InputError("within needs a number of nats, and a scorer's order")
        budget = None if scorer.own_count else count_kept(total, lesson.middle)
        scores = score(self._model, scorer, batch, budget)
        order = mx.argsort(-mx.broadcast_to(scores, (count, total)), axis=1)

        def logits(rows: mx.array, keep: int) -> mx.array:
            kept = mx.sort(order[rows, :keep], axis=1)
            inputs = (batch.prefix, visual[kept], kept, questions[rows, None], total)
            return answer_logits(self._model, *inputs)

        left = np.arange(count)
        keep, most = (count_kept(total, s) for s in (lesson.least, lesson.most))
        counts, whole = np.full(count, most), logits(mx.array(left), total)
        while left.size and keep < most:
            rows = mx.array(left)
            gap = divergence(whole[rows], logits(rows, keep))
            used = questions.targets[rows, None] != IGNORE
            near = np.array(mx.sum(gap * used, axis=(1, 2)) <= within)
            counts[left[near]], left = keep, left[~near]
            keep = max(keep + 1, int(keep * _STEP))
        needed = mx.argsort(order, axis=1) < mx.array(counts)[:, None]
        return needed.astype(mx.float32)

    def _imitated(self, batch: Batch) -> mx.array:
        """Return the sharpened shares (B, Q, N) to imitate for each question."""
        by_gradient = self._lesson.imitate == GRADIENT
        goals = self._gradient(batch) if by_gradient else self._attention(batch)
        shares = goals / mx.sum(goals, axis=-1, keepdims=True)
        sharp = shares**self._lesson.sharpen
        return mx.stop_gradient(sharp / mx.sum(sharp, axis=-1, keepdims=True))

    def _gradient(self, batch: Batch) -> mx.array:
        """Return norms (B, Q, N) of the gradient of the correct answer's logits.

        Logits, because a probability near 1 has no gradient; for pixels see Simonyan et
        al. (2014, https://arxiv.org/abs/1312.6034).
        """
        visual = self._model.project(batch.features.tokens)
        norms, count = [], batch.prompt.shape[1]
        for first in range(0, count, _AT_ONCE):  # bounds memory
            part = slice(first, first + _AT_ONCE)
            norms.append(self._moved(batch.prefix, visual, batch.questions[:, part]))
            mx.eval(norms)
        return mx.concatenate(norms, axis=1)

    def _moved(
        self, prefix: Sequence[int], visual: mx.array, questions: Questions
    ) -> mx.array:
        """Return the norms (B, Q, N), with a sequence for each question."""
        size, count, _ = questions.ids.shape
        ids, targets = (
            part.flatten(0, 1)[:, None] for part in (questions.ids, questions.targets)
        )
        used, names = targets != IGNORE, mx.maximum(targets, 0)[..., None]
        total = visual.shape[1]
        every = mx.broadcast_to(mx.arange(total), (size * count, total))
        inputs = every, Questions(ids, targets), total

        def answer(visual: mx.array) -> mx.array:
            logits = answer_logits(self._model, prefix, visual, *inputs)
            return mx.sum(mx.take_along_axis(logits, names, axis=-1)[..., 0] * used)

        moved = mx.grad(answer)(mx.repeat(visual, count, axis=0))
        norms = mx.linalg.norm(moved.astype(mx.float32), axis=-1)
        return norms.reshape(size, count, total)

    def _attention(self, batch: Batch) -> mx.array:
        """Return the attention (B, Q, N) from each question's last token."""
        visual, attention = self._model.project(batch.features.tokens), []
        total = batch.features.total
        every = mx.broadcast_to(mx.arange(total), visual.shape[:2])
        inputs = (batch.prefix, visual, every, batch.questions, total)
        sequence = packed(self._model, *inputs)
        _, count, length = batch.prompt.shape
        last = mx.sum(batch.prompt, axis=-1) - 1 + mx.arange(count) * length
        rows = len(batch.prefix) + total + last

        imitated = self._lesson.imitate

        def watch(number: int, hidden: mx.array) -> None:
            if not isinstance(imitated, str) and number in imitated:
                queries = (rows, sequence.positions, sequence.mask)
                read = self._model.decoder.attention_to(number, hidden, *queries)
                attention.append(read)

        self._model.decoder.read(sequence, watch=watch)  # lazy: no later layer runs
        return functools.reduce(operator.add, attention)[..., sequence.visual[0]]


def train_scorer(
    loaded: tuple[VisionModel, AnyProcessor],
    kind: str,
    samples: Samples,
    lesson: Lesson,
    schedule: Schedule,
    folder: Path,
    output: Path,
    checkpoint: bool = False,
) -> Scorer:
    """Train a scorer for a `(model, processor)` and write it to `output`.

    kind: name of `SCORERS`, or folder of a trained scorer, whose weights are trained
    further. folder: state of the training, from which it is resumed. checkpoint: see
    `recomputed`. Raises `InputError` where model, scorer and lesson do not fit.
    """
    model, processor = loaded[0], check_answers(loaded[1])
    model.freeze()
    mx.random.seed(schedule.seed)
    scorer, order = scorer_for(model, kind), None
    if is_scorer(kind) and lesson.own_count:
        order = load_scorer(kind)
        if not scorer.own_count:
            fold_budget(scorer, lesson.middle)
    elif lesson.within is not None:
        raise InputError(
            "within needs the order of tokens of a trained scorer; expected the "
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


def scorer_for(model: VisionModel, kind: str) -> Scorer:
    """Return a new scorer for this model, or the trained scorer of a folder.

    kind: name of `SCORERS`, or a folder. Raises `InputError` where the model lacks an
    input of the scorer.
    """
    if is_scorer(kind):
        scorer = load_scorer(kind)
        plan_for(model, Pruner(kind, 0.5))
        return scorer
    scorer_class = SCORERS[kind]
    provided = model.provides.get(scorer_class.at, ())
    missing = [name for name in scorer_class.needs if name not in provided]
    if missing:
        raise InputError(
            f"scorer {kind!r} reads {', '.join(missing)}, which this model does not "
            f"have at {scorer_class.at!r}; choose 'adaptive'"
        )
    if scorer_class.at == "prompt":
        return scorer_class(**{"channels": model.args.text["hidden_size"]})
    settings: dict[str, Any] = {"channels": model.feature_size}
    if "blocks" in scorer_class.needs:
        settings["sizes"] = model.block_sizes
    return scorer_class(**settings)


def score(
    model: VisionModel, scorer: Scorer, batch: Batch, keep: int | None
) -> mx.array:
    """Return a scorer's scores: (B, N) at the tower, (B * Q, N) at the prompt.

    keep: the budget that the scorer reads, in tokens; `None` for its own count.
    """
    features = batch.features
    if scorer.at == "tower":
        extras = _budget(keep, features.total, len(features.tokens))
        extras |= features.extras
        return scorer(Features(features.tokens, features.grid, extras=extras))
    _, count, _ = batch.prompt.shape
    length = int(np.array(mx.max(mx.sum(batch.prompt, axis=-1))))
    embeddings = mx.stop_gradient(model.project(features.tokens))
    embeddings = mx.repeat(embeddings, count, axis=0)
    text = model.decoder.embed(batch.questions.ids[..., :length].flatten(0, 1))
    extras = {
        **_budget(keep, features.total, len(embeddings)),
        "text": mx.stop_gradient(text),
        "text_mask": batch.prompt[..., :length].flatten(0, 1),
    }
    return scorer(Features(embeddings, features.grid, extras=extras))


def _budget(keep: int | None, total: int, batch: int) -> dict[str, mx.array]:
    """Return the extra `budget`, a keep ratio for each sample, if there is a budget."""
    return {} if keep is None else {"budget": mx.full((batch,), keep / total)}
