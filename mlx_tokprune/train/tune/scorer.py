"""Training a scorer on a model that stays as it is: which tokens answer the questions?

The loss is the language model's on the answers, with every token there and a gate on
those that are not kept; how many are kept is drawn anew for each batch.
"""

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...errors import InputError
from ...features import Features
from ...learned import SCORERS, load_scorer, save_scorer
from ...pruners import count_kept
from ..packing import Questions, answer_logits, answer_losses, packed
from .batches import Batch, Batches
from .data import Sample, Samples
from .gate import LEAKS, log_gate, schedule, straight_through, tamed
from .loop import Loop, Schedule, draw_losses, recomputed

_ALONE = 8  # tokens of a question that are tried alone


@dataclass(frozen=True)
class Lesson:
    """What a scorer learns under.

    questions: of a picture; a scorer at the prompt learns from one, unless it imitates,
    and one at the tower imitates what all that there are attend to.
    least, most: shares of tokens that are kept, between which each batch draws its own,
    evenly in the logarithm. curriculum: the share of the steps in which `least` comes
    down from 1. leaky: the share, the first, in which closed gates leak. noise: of a
    Gumbel distribution, falling to 0. temperature: of the gate's gradient, from the
    first to the second. distill: weight of the divergence from the unpruned model's
    answers. imitate: the number of a layer of the language model, whose attention from
    the prompt's last tokens is imitated in the place of all that: no layer has run
    where a scorer has to know as much. alone: batches that keep at most so many tokens
    imitate how probable each token makes the answer when it is the only one. sharpen:
    the power of that attention, or that probability.
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
    imitate: int | None = None
    alone: int = 0
    sharpen: float = 1.0

    def __post_init__(self):
        if not 0 < self.least <= self.most <= 1:
            raise InputError(
                f"keep ratios {self.least:g} to {self.most:g} are out of order; "
                "expected two in (0, 1], the smaller first"
            )
        if not 0 < self.sharpen <= 16:
            raise InputError(f"sharpen {self.sharpen:g} is outside (0, 16]")
        if self.alone < 0 or (self.alone and self.imitate is None):
            raise InputError(
                f"alone {self.alone}: expected a number of tokens from 0, and a layer "
                "to imitate where more are kept"
            )

    def keep(self, rng: np.random.Generator, step: int, total: int) -> int:
        """How many of `total` tokens this batch keeps, fewer than all."""
        least = schedule(1.0, self.least, step, round(self.curriculum * self.steps))
        least = min(least, self.most) if self.curriculum else self.least
        share = np.exp(rng.uniform(np.log(least), np.log(self.most)))
        return min(count_kept(total, float(share)), total - 1)


class ScorerLoss:
    """The loss of a scorer on batches; a `LossOf` of the training loop."""

    def __init__(self, model, batches: Batches, lesson: Lesson):
        self._model, self._batches, self._lesson = model, batches, lesson
        self._goals: dict[tuple[Hashable, bool], mx.array] = {}

    def __call__(self, scorer: nn.Module, seed: tuple[int, ...], step: int):
        lesson = self._lesson
        batch = self._batches.draw(seed, lesson.pictures, lesson.questions)
        rng = np.random.default_rng((*seed, 1))
        keep = lesson.keep(rng, step, batch.features.total)
        scores = score(self._model, scorer, batch, keep)
        if lesson.imitate is not None:
            goal = self._goal(batch, scorer.at, keep <= lesson.alone)
            logs = scores - mx.logsumexp(scores, axis=1, keepdims=True)
            return -mx.sum(goal * logs), mx.array(float(len(scores)))
        visual = mx.stop_gradient(self._model.project(batch.features.tokens))
        noise = schedule(lesson.noise, 0.0, step, lesson.steps)
        scores = scores + noise * mx.random.gumbel(scores.shape)
        warm, cold = lesson.temperature
        gate = straight_through(scores, keep, schedule(warm, cold, step, lesson.steps))
        leak = LEAKS[step >= lesson.leaky * lesson.steps]
        logits = self._logits(batch, visual, log_gate(tamed(gate), leak))
        losses, used = answer_losses(logits, batch.questions)
        if lesson.distill:
            whole = mx.stop_gradient(self._logits(batch, visual, None))
            losses = losses + lesson.distill * _divergence(whole, logits)
        return mx.sum(losses * used), mx.sum(used)

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
            goal = self._alone(batch) if alone else self._attention(batch)
            mx.eval(goal)
            self._goals[key] = goal[0]
        return self._goals[key]

    def _alone(self, batch: Batch) -> mx.array:
        """(B, Q, N) shares of what each token alone makes the answer's probability.

        Tried are the tokens that a question attends to most; the others have none.
        """
        total = batch.features.total
        attention = self._attention(batch).flatten(0, 1)
        tried = mx.argsort(-attention, axis=1)[:, :_ALONE]
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
        goal = mx.put_along_axis(mx.zeros_like(attention), tried, shares, axis=1)
        return mx.stop_gradient(goal.reshape(*batch.prompt.shape[:2], total))

    def _attention(self, batch: Batch) -> mx.array:
        """(B, Q, N) shares of what each question attends to, sharpened."""
        visual, seen = self._model.project(batch.features.tokens), []
        total = batch.features.total
        every = mx.broadcast_to(mx.arange(total), visual.shape[:2])
        asked = (batch.prefix, visual, every, batch.questions, total)
        sequence = packed(self._model, *asked)
        _, count, length = batch.prompt.shape
        last = mx.sum(batch.prompt, axis=-1) - 1 + mx.arange(count) * length
        rows = len(batch.prefix) + total + last

        def watch(number: int, hidden: mx.array) -> None:
            if number == self._lesson.imitate:
                where = (rows, sequence.positions, sequence.mask)
                seen.append(self._model.decoder.attention_to(number, hidden, *where))

        self._model.decoder.read(sequence, watch=watch)  # lazy: no later layer runs
        attention = seen[0][..., sequence.visual[0]]
        shares = attention / mx.sum(attention, axis=-1, keepdims=True)
        sharp = shares**self._lesson.sharpen
        return mx.stop_gradient(sharp / mx.sum(sharp, axis=-1, keepdims=True))

    def _logits(self, batch: Batch, visual: mx.array, gate: mx.array | None):
        total = batch.features.total
        every = mx.broadcast_to(mx.arange(total), visual.shape[:2])
        asked = (batch.questions, total, "original", gate)
        return answer_logits(self._model, batch.prefix, visual, every, *asked)


def train_scorer(
    loaded: tuple,
    kind: str,
    samples: Samples,
    lesson: Lesson,
    schedule: Schedule,
    folder: Path,
    output: Path,
    checkpoint: bool = False,
    start: str | None = None,
) -> nn.Module:
    """Train a scorer for a `(model, processor)` and write it to `output`.

    folder: keeps the state of the training, which goes on from there. checkpoint: see
    `recomputed`. start: a scorer of this kind to go on from, by name or folder.
    """
    model, processor = loaded
    layers = len(model.decoder.layers)
    if lesson.imitate is not None and not 0 <= lesson.imitate < layers:
        raise InputError(
            f"there is no layer {lesson.imitate} to imitate; expected 0 to {layers - 1}"
        )
    model.freeze()
    mx.random.seed(schedule.seed)
    scorer = scorer_for(model, kind)
    if start is not None:
        scorer = _started(start, scorer)
    needs = scorer.needs if scorer.at == "tower" else ()
    batches = Batches(model, processor, samples.items, needs)
    loop = Loop(scorer, ScorerLoss(model, batches, lesson), schedule, folder)
    with recomputed(model, checkpoint):
        loop.run()
    if loop.is_first:
        trained = {**dataclasses.asdict(lesson), **dataclasses.asdict(schedule)}
        trained |= {"start": start} if start else {}
        save_scorer(scorer, output, trained)
        draw_losses(loop.losses, folder / "loss.png")
    return scorer


def scorer_for(model, kind: str) -> nn.Module:
    """A new scorer for this model; `InputError` where it cannot have one."""
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


def _started(start: str, scorer: nn.Module) -> nn.Module:
    """The scorer of `start`, which has to be of this new one's kind and size."""
    found = load_scorer(start)
    if type(found) is not type(scorer) or found.settings != scorer.settings:
        names = {kind: name for name, kind in SCORERS.items()}
        has, wanted = (f"{names[type(s)]!r} {s.settings}" for s in (found, scorer))
        raise InputError(f"{start} is a scorer {has}; expected {wanted}")
    return found


def _divergence(whole: mx.array, logits: mx.array) -> mx.array:
    """(B, Q, L) KL of the unpruned distributions from these, in nats."""
    known = whole - mx.logsumexp(whole, axis=-1, keepdims=True)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.sum(mx.exp(known) * (known - found), axis=-1)


def score(model, scorer: nn.Module, batch: Batch, keep: int) -> mx.array:
    """What a scorer says: (B, N) of pictures, (B * Q, N) of each with a question."""
    features, share = batch.features, keep / batch.features.total
    if scorer.at == "tower":
        extras = {"budget": mx.full((len(features.tokens),), share)} | features.extras
        return scorer(Features(features.tokens, features.grid, extras=extras))
    _, count, _ = batch.prompt.shape
    length = int(np.array(mx.max(mx.sum(batch.prompt, axis=-1))))
    embeddings = mx.stop_gradient(model.project(features.tokens))
    embeddings = mx.repeat(embeddings, count, axis=0)
    text = model.decoder.embed(batch.questions.ids[..., :length].flatten(0, 1))
    extras = {
        "budget": mx.full((len(embeddings),), share),
        "text": mx.stop_gradient(text),
        "text_mask": batch.prompt[..., :length].flatten(0, 1),
    }
    return scorer(Features(embeddings, features.grid, extras=extras))
