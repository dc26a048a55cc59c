"""Training of the demo model in MLX: stages, losses and resuming.

First the tower trains on small pictures with helper losses, and the language model
separately on oracle tokens. Then follow the tower on full pictures, the projector
alone, and all parts together. The tower's tokens are never pruned. Oracle tokens of
empty cells are dropped at random. Every batch has its own seed: a stopped run resumes.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_tokprune.scenes.held_out import TRAINING
from mlx_tokprune.scenes.pictures import CANVAS, CELL
from mlx_tokprune.train.loop import Loop, LossOf, Schedule, check_same, warm_cosine
from mlx_tokprune.train.packing import answer_logits

from .batches import SceneBatch, as_batch
from .packing import answer_loss, pack
from .stages import KEPT, STAGES, Stage, choices_of, draw_step
from .student import Student
from .tokens import build_tokenizer, encoder

_SAVE_EVERY = 200


class Trainer:
    """Trainer of a `Student` through the stages, with its state in `folder`."""

    def __init__(self, folder: Path, stages=STAGES, student: Student | None = None):
        self.folder = folder
        self.stages = stages
        mx.random.seed(0)
        self.student = student or Student()
        steps = [dataclasses.asdict(stage) for stage in stages]
        check_same(folder / "settings.json", {"stages": steps})
        self.tokenizer = build_tokenizer(folder / "tokenizer.json")
        self.encode = encoder(self.tokenizer)
        self.end = self.tokenizer.token_to_id("<|im_end|>")
        self._rng = np.random.default_rng(TRAINING)
        self.prefix = self.encode(self.student.vlm.prompt_prefix)
        self.losses: dict[str, Callable[[SceneBatch, Stage], mx.array]] = {
            "tower": self.tower_loss,
            "language": self.language_loss,
            "align": self.align_loss,
            "joint": self.joint_loss,
        }

    # Losses -------------------------------------------------------------------------

    def tower_loss(self, batch: SceneBatch, stage: Stage) -> mx.array:
        tokens, fine = self.student.see(batch.pixels)
        whole = stage.canvas == CANVAS
        return self._cell_loss(tokens, batch, whole) + 0.5 * self._fine_loss(
            fine, batch
        )

    def language_loss(self, batch: SceneBatch, stage: Stage) -> mx.array:
        visual = self.student.oracle(batch.cells)
        keep = int(self._rng.choice(KEPT))
        # Tokens of things are kept; those of empty cells are kept at random.
        scores = 2.0 * (batch.cells["shape"] > 0) + mx.random.uniform(
            shape=batch.cells["shape"].shape
        )
        indices = mx.sort(mx.argsort(-scores, axis=1)[:, :keep], axis=1)
        kept = mx.take_along_axis(visual, indices[..., None], axis=1)
        spread = mx.stop_gradient(mx.std(kept))
        kept = kept + 0.05 * spread * mx.random.normal(kept.shape)
        return self._answer_loss(kept, indices, batch)

    def align_loss(self, batch: SceneBatch, stage: Stage) -> mx.array:
        tokens = mx.stop_gradient(self.student.see(batch.pixels)[0])
        target = mx.stop_gradient(self.student.oracle(batch.cells))
        error = mx.square(self.student.vlm.project(tokens) - target)
        error = mx.mean(error, axis=-1) / mx.var(target)
        occupied = batch.cells["shape"] > 0
        return _masked_mean(error, occupied) + 0.3 * _masked_mean(error, ~occupied)

    def joint_loss(self, batch: SceneBatch, stage: Stage) -> mx.array:
        tokens, fine = self.student.see(batch.pixels)
        every = mx.broadcast_to(mx.arange(tokens.shape[1]), tokens.shape[:2])
        answers = self._answer_loss(self.student.vlm.project(tokens), every, batch)
        helpers = 0.5 * self._cell_loss(tokens, batch, True)
        return 2 * answers + helpers + 0.2 * self._fine_loss(fine, batch)

    def _answer_loss(self, visual, indices, batch: SceneBatch) -> mx.array:
        vlm, total = self.student.vlm, batch.cells["shape"].shape[1]
        asked = pack(batch.questions, self.encode, vlm.prompt_suffix, self.end)
        logits = answer_logits(vlm, self.prefix, visual, indices, asked, total)
        return answer_loss(logits, asked)

    def _cell_loss(self, tokens: mx.array, batch: SceneBatch, whole: bool) -> mx.array:
        heads, labels = self.student.heads.cell, batch.cells
        occupied = labels["shape"] > 0
        inside = {f"{k}_inside": labels[k] % (CELL // 8) for k in "xy"}
        weights = mx.where(occupied, 1.0, 0.3)
        loss = _classify(heads["shape"](tokens), labels["shape"], weights)
        colored = labels["color"] > 0
        loss = loss + _classify(heads["color"](tokens), labels["color"], colored)
        for name, label in inside.items():
            loss = loss + 0.3 * _classify(heads[name](tokens), label, occupied)
        for name in ("x", "y") if whole else ():
            loss = loss + 0.5 * _classify(heads[name](tokens), labels[name], occupied)
        for name in ("word", "tens", "units"):
            known = labels[name] >= 0
            loss = loss + _classify(heads[name](tokens), labels[name], known)
        return loss

    def _fine_loss(self, fine: mx.array, batch: SceneBatch) -> mx.array:
        return sum(
            _classify(
                self.student.heads.fine[name](fine), label, mx.where(label > 0, 1, 0.1)
            )
            for name, label in batch.fine.items()
        )

    # Running ------------------------------------------------------------------------

    def run(self) -> None:
        """Run all stages; load the stages that an earlier run finished."""
        for number, stage in enumerate(self.stages):
            self._freeze(stage)
            schedule = Schedule(
                stage.steps, stage.learning_rate, save_every=_SAVE_EVERY
            )
            folder = self.folder / f"stage-{number}"
            about = (self._loss_of(number, stage), schedule, folder)
            Loop(self.student, *about, optimizer_of(stage)).run(title=stage.name)

    def _loss_of(self, number: int, stage: Stage) -> LossOf:
        """Return the loss function of a stage. number: the stage's index."""

        def loss(student, seed, step: int) -> tuple[mx.array, mx.array]:
            mx.random.seed(number * 1_000_003 + step)
            self._rng = choices_of(number, step)
            batch = as_batch(draw_step(stage, number, step))
            return self.losses[stage.loss](batch, stage), mx.array(1.0)

        return loss

    def _freeze(self, stage: Stage) -> None:
        """Freeze all but the projector in an `align` stage, and nothing in others.

        An `align` stage also runs in evaluation mode, so that features do not change.
        """
        self.student.unfreeze()
        self.student.train(stage.loss != "align")
        if stage.loss == "align":
            self.student.freeze()
            for layer in self.student.vlm.mm_projector:
                layer.unfreeze()


def optimizer_of(stage: Stage) -> optim.AdamW:
    """Return AdamW with a warm-up and a cosine down to 3 % of the learning rate."""
    rates = warm_cosine(stage.learning_rate, stage.steps, 0.03)
    return optim.AdamW(rates, betas=[0.9, 0.98], weight_decay=0.01)


def _masked_mean(values: mx.array, mask: mx.array) -> mx.array:
    return mx.sum(values * mask) / mx.maximum(mx.sum(mask), 1)


def _classify(logits: mx.array, labels: mx.array, weights: mx.array) -> mx.array:
    """Return the weighted mean of cross-entropies; labels below 0 need weight 0."""
    labels = mx.clip(labels, 0, logits.shape[-1] - 1)
    losses = nn.losses.cross_entropy(logits, labels)
    return mx.sum(losses * weights) / mx.maximum(mx.sum(weights), math.ulp(1.0))
