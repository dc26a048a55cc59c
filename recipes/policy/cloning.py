"""How the demo policy is trained: demonstrations, cloning, and DAgger rounds.

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
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

from mlx_tokprune.act.policy import Policy
from mlx_tokprune.pruners import Pruner
from mlx_tokprune.train.loop import check_same

from .collecting import Collector
from .demonstrations import Episodes
from .student import Batch, build_policy, build_processor, losses

_KEEP = (64, 40, 24, 16, 8)  # visual tokens that stay in a batch
_KEEP_SHARES = (0.4, 0.2, 0.18, 0.12, 0.1)
_SAVE_EVERY = 100


@dataclass(frozen=True)
class Cloning:
    """How much of everything. The expert acts in `mixed` of the steps of a round."""

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
        """The same in small, to try it."""

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
    """Trains a policy in `folder`, which also holds the episodes."""

    def __init__(self, folder: Path, cloning: Cloning):
        self.folder, self.cloning = folder, cloning
        self.collector = Collector(folder)
        check_same(folder / "settings.json", dataclasses.asdict(cloning))
        mx.random.seed(0)
        self.policy = build_policy()
        self.average = dict(tree_flatten(self.policy.parameters()))
        self.optimizer = optim.AdamW(
            cloning.learning_rate, betas=[0.9, 0.98], weight_decay=cloning.weight_decay
        )
        self.step = 0
        self._restore()

    def run(self) -> None:
        """Goes on from what the folder holds to the end of the steps."""
        cloning, collector = self.cloning, self.collector
        collector.demonstrate(cloning.demonstrations)
        update, episodes = self._updater(), collector.load(self.step)
        shares = (
            collector.shares(self.step) if self.step > cloning.first_round else None
        )
        steps = range(self.step, cloning.steps)
        for step in tqdm(steps, desc="cloning", unit="step", disable=None):
            past = step - cloning.first_round
            if past >= 0 and past % cloning.round_every == 0:
                self._correct(step)
                episodes, shares = collector.load(step), collector.shares(step)
            self.optimizer.learning_rate = self._rate(step)
            update(self._draw(step, episodes, shares))
            mx.eval(self.policy.parameters(), self.optimizer.state)
            self._follow(step)
            self.step = step + 1
            if self.step % _SAVE_EVERY == 0 or self.step == cloning.steps:
                self._save()

    def averaged(self) -> dict[str, mx.array]:
        """The running average of the weights, which is what is shipped."""
        return self.average

    # Learning -----------------------------------------------------------------------

    def _updater(self):
        weight = self.cloning.scores_weight

        def total(batch: Batch) -> mx.array:
            loss, off = losses(self.policy, batch)
            return loss + weight * off

        gradient = nn.value_and_grad(self.policy, total)

        def update(batch: Batch) -> mx.array:
            loss, grads = gradient(batch)
            grads, _ = optim.clip_grad_norm(grads, 1.0)
            self.optimizer.update(self.policy, grads)
            return loss

        return update

    def _rate(self, step: int) -> float:
        """Warm-up, then half a cosine to nothing."""
        done = step / self.cloning.steps
        warm = min(1.0, (step + 1) / 300)
        return self.cloning.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))

    def _follow(self, step: int) -> None:
        """Moves the average towards the weights."""
        share = 1 - min(0.999, (step + 1) / (step + 51))
        weights = dict(tree_flatten(self.policy.parameters()))
        self.average = {
            name: array + share * (weights[name] - array)
            for name, array in self.average.items()
        }
        mx.eval(self.average)

    def _draw(
        self,
        step: int,
        episodes: list[tuple[Episodes, list]],
        shares: np.ndarray | None,
    ) -> Batch:
        rng = np.random.default_rng((1, step))
        size = self.cloning.batch
        shown = self.collector.draw(rng, size, episodes, shares)
        keep = int(rng.choice(_KEEP, p=_KEEP_SHARES))
        return Batch(
            **vars(shown),
            keep=keep,
            noise=mx.array(rng.gumbel(size=(size, _KEEP[0])).astype(np.float32)),
            scored=bool(rng.random() < 0.6),
        )

    def _correct(self, step: int) -> None:
        """A round of DAgger with the averaged weights and several budgets."""
        cloning, weights = self.cloning, tree_flatten(self.policy.parameters())
        self.policy.update(tree_unflatten(list(self.average.items())))
        self.collector.correct(step, cloning.corrections, cloning.mixed, self._actor)
        self.policy.update(tree_unflatten(weights))

    def _actor(self, rng: np.random.Generator, seed: int) -> Policy:
        keep = int(rng.choice(_KEEP, p=_KEEP_SHARES))
        method = "trimvla" if rng.random() < 0.7 else "random"
        pruner = Pruner(method, keep_tokens=keep, seed=seed)
        return Policy(self.policy, build_processor(), pruner=pruner, compile=False)

    # State --------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            **_prefixed("policy", self.policy.parameters()),
            **{f"average.{name}": array for name, array in self.average.items()},
            **_prefixed("optimizer", self.optimizer.state),
        }
        partial = self.folder / "partial.safetensors"
        mx.save_safetensors(str(partial), state, metadata={"step": str(self.step)})
        partial.rename(self.folder / "state.safetensors")

    def _restore(self) -> None:
        file = self.folder / "state.safetensors"
        if not file.exists():
            return
        state, metadata = mx.load(str(file), return_metadata=True)
        self.step = int(metadata["step"])
        parts: dict[str, list] = {"policy": [], "average": [], "optimizer": []}
        for name, array in state.items():
            part, _, rest = name.partition(".")
            parts[part].append((rest, array))
        self.policy.update(tree_unflatten(parts["policy"]))
        self.average = dict(parts["average"])
        self.optimizer.state = tree_unflatten(parts["optimizer"])


def _prefixed(part: str, tree) -> dict[str, mx.array]:
    return {f"{part}.{name}": array for name, array in tree_flatten(tree)}
