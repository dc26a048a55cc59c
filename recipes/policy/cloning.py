"""Training of the demo policy: demonstrations, cloning, and DAgger rounds.

Visual tokens are dropped in most batches, at random or by noisy trimvla scores, so that
one policy serves several budgets. Every batch and every episode has its own seed and
state is saved as it goes, so a run that is stopped goes on where it was.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_tokprune.act.policy import Policy
from mlx_tokprune.pruners import Pruner
from mlx_tokprune.train.loop import Loop, Schedule, check_same

from .collecting import Collector
from .demonstrations import Episodes
from .student import Batch, build_policy, build_processor, losses

_KEEP = (64, 40, 24, 16, 8)  # visual tokens that stay in a batch
_KEEP_SHARES = (0.4, 0.2, 0.18, 0.12, 0.1)
_SAVE_EVERY = 100


@dataclass(frozen=True)
class Cloning:
    """Settings of a training.

    mixed: share of the steps of a round of corrections in which the expert acts.
    """

    demonstrations: int = 140  # episodes of each task
    steps: int = 16_000
    batch: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    round_every: int = 600  # steps between rounds of corrections
    first_round: int = 1600
    corrections: int = 12  # episodes of each task in a round
    mixed: float = 0.1
    scores_weight: float = 0.1

    def scaled(self, scale: float) -> "Cloning":
        """Return settings with every count multiplied by `scale`, at least 1."""

        def of(value: int) -> int:
            return max(1, int(value * scale))

        return dataclasses.replace(
            self,
            demonstrations=of(self.demonstrations),
            steps=of(self.steps),
            round_every=of(self.round_every),
            first_round=of(self.first_round),
            corrections=of(self.corrections),
        )


class Trainer:
    """Trainer of a policy; its state and its episodes are kept in `folder`."""

    def __init__(self, folder: Path, cloning: Cloning):
        self.folder, self.cloning = folder, cloning
        self.collector = Collector(folder)
        check_same(folder / "settings.json", dataclasses.asdict(cloning))
        mx.random.seed(0)
        self.policy = build_policy()
        schedule = Schedule(
            cloning.steps, cloning.learning_rate, save_every=_SAVE_EVERY
        )
        about = (self._loss, schedule, folder, AveragingAdamW(cloning))
        self.loop = Loop(self.policy, *about)
        self._episodes: list[tuple[Episodes, list]] = []
        self._shares: np.ndarray | None = None

    def run(self) -> None:
        """Run the remaining steps and their rounds of corrections."""
        self.collector.demonstrate(self.cloning.demonstrations)
        self._correct(self.loop.begin)
        self._load(self.loop.begin)
        self.loop.run(self._correct, "cloning")

    def averaged(self) -> dict[str, mx.array]:
        """Return the running average of the weights, which is shipped."""
        return dict(tree_flatten(self.loop.optimizer.state["average"]))

    # Learning -----------------------------------------------------------------------

    def _loss(self, policy: nn.Module, seed: tuple[int, ...], step: int):
        loss, off = losses(self.policy, self._draw(step))
        return loss + self.cloning.scores_weight * off, mx.array(1.0)

    def _draw(self, step: int) -> Batch:
        rng = np.random.default_rng((1, step))
        size = self.cloning.batch
        shown = self.collector.draw(rng, size, self._episodes, self._shares)
        keep = int(rng.choice(_KEEP, p=_KEEP_SHARES))
        return Batch(
            **vars(shown),
            keep=keep,
            noise=mx.array(rng.gumbel(size=(size, _KEEP[0])).astype(np.float32)),
            scored=bool(rng.random() < 0.6),
        )

    def _correct(self, step: int) -> None:
        """Before a step that is due: a DAgger round with the averaged weights."""
        cloning = self.cloning
        past = step - cloning.first_round
        if past < 0 or past % cloning.round_every or step == cloning.steps:
            return
        weights = self.policy.parameters()
        self.policy.update(self.loop.optimizer.state["average"])
        self.collector.correct(step, cloning.corrections, cloning.mixed, self._actor)
        self.policy.update(weights)
        self._load(step)

    def _load(self, step: int) -> None:
        self._episodes = self.collector.load(step)
        if self.cloning.first_round <= step < self.cloning.steps:
            self._shares = self.collector.shares(step)

    def _actor(self, rng: np.random.Generator, seed: int) -> Policy:
        keep = int(rng.choice(_KEEP, p=_KEEP_SHARES))
        method = "trimvla" if rng.random() < 0.7 else "random"
        pruner = Pruner(method, keep_tokens=keep, seed=seed)
        return Policy(self.policy, build_processor(), pruner=pruner, compile=False)


class AveragingAdamW(optim.AdamW):
    """AdamW with a running average of the weights in its state."""

    def __init__(self, cloning: Cloning):
        steps = range(cloning.steps)
        rates = mx.array([_rate(cloning, step) for step in steps])
        shares = [1 - min(0.999, (step + 1) / (step + 51)) for step in steps]
        self._shares = mx.array(shares)
        decay = cloning.weight_decay
        super().__init__(rates.__getitem__, betas=[0.9, 0.98], weight_decay=decay)

    def init(self, parameters: dict) -> None:
        super().init(parameters)
        self.state.setdefault("average", parameters)

    def update(self, model: nn.Module, gradients: dict) -> None:
        share = self._shares[self.step]
        super().update(model, gradients)
        self.state["average"] = tree_map(
            lambda average, weight: average + share * (weight - average),
            self.state["average"],
            model.trainable_parameters(),
        )


def _rate(cloning: Cloning, step: int) -> float:
    """Return the learning rate: a warm-up times half a cosine to zero."""
    warm_up = min(1.0, (step + 1) / 300)
    cosine = math.cos(math.pi * (step / cloning.steps))
    return cloning.learning_rate * warm_up * 0.5 * (1 + cosine)
