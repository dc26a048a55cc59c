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
from ...learned import SCORERS, save_scorer
from ...pruners import count_kept
from ..packing import answer_losses, divergence, packed, unpruned_logits
from .batches import Batch, Batches
from .data import Sample, Samples
from .gate import LEAKS, log_gate, schedule, straight_through, tamed
from .loop import Loop, Schedule, draw_losses, recomputed


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
    where a scorer has to know as much. sharpen: the power of that attention.
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
    sharpen: float = 1.0

    def __post_init__(self):
        if not 0 < self.least <= self.most <= 1:
            raise InputError(
                f"keep ratios {self.least:g} to {self.most:g} are out of order; "
                "expected two in (0, 1], the smaller first"
            )
        if not 0 < self.sharpen <= 16:
            raise InputError(f"sharpen {self.sharpen:g} is outside (0, 16]")

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
        self._goals: dict[Hashable, mx.array] = {}

    def __call__(self, scorer: nn.Module, seed: tuple[int, ...], step: int):
        lesson = self._lesson
        batch = self._batches.draw(seed, lesson.pictures, lesson.questions)
        rng = np.random.default_rng((*seed, 1))
        keep = lesson.keep(rng, step, batch.features.total)
        scores = score(self._model, scorer, batch, keep)
        if lesson.imitate is not None:
            if scorer.at == "tower":
                goal = mx.concatenate([self._goal(item) for item in batch.samples])
            else:
                goal = self._attention(batch, lesson.imitate).flatten(0, 1)
            logs = scores - mx.logsumexp(scores, axis=1, keepdims=True)
            return -mx.sum(goal * logs), mx.array(float(len(scores)))
        known = (self._model, batch.prefix, batch.features.tokens, batch.questions)
        noise = schedule(lesson.noise, 0.0, step, lesson.steps)
        scores = scores + noise * mx.random.gumbel(scores.shape)
        warm, cold = lesson.temperature
        gate = straight_through(scores, keep, schedule(warm, cold, step, lesson.steps))
        leak = LEAKS[step >= lesson.leaky * lesson.steps]
        logits = unpruned_logits(*known, log_gate(tamed(gate), leak))
        losses, used = answer_losses(logits, batch.questions)
        if lesson.distill:
            whole = mx.stop_gradient(unpruned_logits(*known))
            losses = losses + lesson.distill * divergence(whole, logits)
        return mx.sum(losses * used), mx.sum(used)

    def _goal(self, item: Sample) -> mx.array:
        """(1, N) what all questions about a picture attend to, computed once."""
        if item.picture not in self._goals:
            batch = self._batches.of([item], [item.pairs])
            goal = mx.mean(self._attention(batch, self._lesson.imitate), axis=1)
            mx.eval(goal)
            self._goals[item.picture] = goal
        return self._goals[item.picture]

    def _attention(self, batch: Batch, layer: int) -> mx.array:
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
            if number == layer:
                where = (rows, sequence.positions, sequence.mask)
                seen.append(self._model.decoder.attention_to(number, hidden, *where))

        self._model.decoder.read(sequence, watch=watch)  # lazy: no later layer runs
        attention = seen[0][..., sequence.visual[0]]
        shares = attention / mx.sum(attention, axis=-1, keepdims=True)
        sharp = shares**self._lesson.sharpen
        return mx.stop_gradient(sharp / mx.sum(sharp, axis=-1, keepdims=True))


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
    layers = len(model.decoder.layers)
    if lesson.imitate is not None and not 0 <= lesson.imitate < layers:
        raise InputError(
            f"there is no layer {lesson.imitate} to imitate; expected 0 to {layers - 1}"
        )
    model.freeze()
    mx.random.seed(schedule.seed)
    scorer = scorer_for(model, kind)
    needs = scorer.needs if scorer.at == "tower" else ()
    batches = Batches(model, processor, samples.items, needs)
    loop = Loop(scorer, ScorerLoss(model, batches, lesson), schedule, folder)
    with recomputed(model, checkpoint):
        loop.run()
    if loop.is_first:
        trained = {**dataclasses.asdict(lesson), **dataclasses.asdict(schedule)}
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
