"""Training a scorer for a policy that stays as it is: which tokens do its actions need?

It imitates what the action tokens of the unpruned policy attend to, from what there is
before any layer has run: visual tokens with their places, the instruction, and what the
robot did last. `acting` reads all of that, `asking` all but the last.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_tokprune.act.policy import Policy
from mlx_tokprune.checkpoints.loading import load
from mlx_tokprune.errors import InputError, nearest
from mlx_tokprune.features import Features
from mlx_tokprune.measure.tables import Table
from mlx_tokprune.pruners import Pruner, count_kept
from mlx_tokprune.pruners.saliency import keep_highest
from mlx_tokprune.pruners.scorers import SCORERS, save_scorer
from mlx_tokprune.train.gate import annealed, log_gate, tamed
from mlx_tokprune.train.loop import Loop, Schedule, draw_losses
from mlx_tokprune.train.shares import check_shares, draw_count

from .choosing import gate_of
from .collecting import Collector, rounds_of
from .student import (
    Labelled,
    action_log_shares,
    build_processor,
    read_and_attend,
    told,
    trimvla_scores,
)
from .tuning import act, check_started, open_policy
from .worlds import ACTION_DIM

KINDS = ("acting", "asking")
BUDGETS = (0.1, 0.05)  # at which choices are compared on held-out frames
_BATCHES = 8  # of held-out frames


@dataclass(frozen=True)
class Scoring:
    """The lessons of a scorer and their sizes.

    scorer: its kind. layers: whose attention is imitated, the mean of several; those
    whose best tokens lose least on held-out frames when `None`. actions: weight of the
    divergence of the actions from few tokens, through a gate, from those from all; the
    rest is the imitation's. noise, temperature: of that gate, as in `Tuning`. least,
    most: shares of tokens that are kept, between which each batch draws its own, evenly
    in the logarithm. demonstrations, held_out, corrections: episodes of each task to
    learn from, to compare with, and of each of `rounds` in which the policy itself
    acts, at first with every token, then with those that the scorer keeps; the expert
    acts in `mixed` of their steps.
    """

    scorer: str = "acting"
    layers: tuple[int, ...] | None = None
    actions: float = 0.0
    noise: float = 0.25
    temperature: tuple[float, float] = (1.0, 0.3)
    least: float = 0.05
    most: float = 0.25
    batch: int = 32
    demonstrations: int = 24
    held_out: int = 4
    corrections: int = 6
    rounds: int = 2
    mixed: float = 0.1

    def __post_init__(self):
        if self.scorer not in KINDS:
            raise InputError(
                f"scorer {self.scorer!r} is not trained here; expected "
                f"{' or '.join(KINDS)}.{nearest(self.scorer, KINDS)}"
            )
        check_shares(self.least, self.most)
        if not 0 <= self.actions <= 1:
            raise InputError(f"actions {self.actions:g} is outside [0, 1]")
        counts = ("batch", "demonstrations", "held_out", "corrections", "rounds")
        if any(getattr(self, name) < 1 for name in counts):
            raise InputError(f"{', '.join(counts)} are whole numbers from 1")

    def keep(self, rng: np.random.Generator, total: int) -> int:
        """How many of `total` tokens stay, fewer than all."""
        return draw_count(rng, self.least, self.most, total)


class ScorerTrainer:
    """Trains a scorer; its state, and the episodes, are kept in `folder`."""

    def __init__(
        self, model: str | Path, scoring: Scoring, schedule: Schedule, folder: Path
    ):
        self.scoring, self.schedule, self.folder = scoring, schedule, folder
        self.collector = Collector(folder)
        self.held_out = Collector(folder / "held-out")
        self.policy = open_policy(model)
        check_started(folder, scoring, self.policy)
        self.policy.freeze()
        self.layers = scoring.layers
        depth = len(self.policy.decoder.layers)
        for layer in self.layers or ():
            if not 0 <= layer < depth:
                raise InputError(
                    f"there is no layer {layer} to imitate; expected 0 to {depth - 1}"
                )
        mx.random.seed(schedule.seed)
        channels = self.policy.args.text["hidden_size"]
        size = (ACTION_DIM,) if scoring.scorer == "acting" else ()
        self.scorer = SCORERS[scoring.scorer](channels, *size)
        self.scorer.model_signs = load(model, lazy=True)[0].signs
        self._loop = Loop(self.scorer, self._loss, schedule, folder)
        self._episodes: list = []
        self._shares: np.ndarray | None = None

    def run(self, output: Path) -> dict[str, list[float]]:
        """All steps; writes `output`. Returns what `compare` says at last."""
        scoring, loop = self.scoring, self._loop
        self.collector.demonstrate(scoring.demonstrations)
        self.held_out.demonstrate(scoring.held_out, skip=scoring.demonstrations)
        if self.layers is None:
            self.layers = self._best_layers()
        self._act(loop.begin)
        self._load(loop.begin)
        loop.run(self._act)
        found = self.compare([self.layers])
        about = dataclasses.asdict(scoring) | dataclasses.asdict(self.schedule)
        about |= {"layers": self.layers, "held_out_divergence": found}
        save_scorer(self.scorer, output, about)
        draw_losses(loop.losses, self.folder / "loss.png", "the attention")
        return found

    # What is compared ---------------------------------------------------------------

    def _best_layers(self) -> tuple[int, ...]:
        """Return the layers whose best tokens change held-out frames' actions least."""
        depth = len(self.policy.decoder.layers)
        choices = [*((layer,) for layer in range(depth)), tuple(range(1, depth))]
        found = self.compare(choices, learned=False)
        return min(choices, key=lambda layers: sum(found[_name(layers)]))

    def compare(
        self, choices: list[tuple[int, ...]], learned: bool = True
    ) -> dict[str, list[float]]:
        """Divergence of an action from that of all tokens on held-out frames, in nats.

        At each of `BUDGETS`, when it sees only the best tokens by the attention in each
        of `choices`, by trimvla and by the scorer.
        """
        rng, episodes = np.random.default_rng(0), self.held_out.load(-1)
        lost: dict[str, np.ndarray] = {}
        for _ in range(_BATCHES):
            batch = self.held_out.draw(rng, self.scoring.batch, episodes)
            visual = self._visual(batch)
            known = self._known(batch, visual)
            scores = {_name(c): self._goal(batch, visual, c) for c in choices}
            scores["trimvla"] = trimvla_scores(self.policy, visual, batch)
            for number, budget in enumerate(BUDGETS):
                keep = count_kept(visual.shape[1], budget)
                if learned:
                    scores[self.scoring.scorer] = self.scores(batch, visual, keep)
                for name, values in scores.items():
                    here = keep_highest(values, keep).indices
                    off = mx.mean(self._divergence(batch, visual, known, here)).item()
                    lost.setdefault(name, np.zeros(len(BUDGETS)))[number] += off
        return {n: (values / _BATCHES).round(4).tolist() for n, values in lost.items()}

    def _divergence(self, batch: Labelled, visual, known, here, gate=None) -> mx.array:
        """Return (B,) nats from bins `known` (B, A, 255) to those of tokens `here`."""
        few = mx.take_along_axis(visual, here[..., None], axis=1)
        found = act(self.policy, few, here, visual.shape[1], batch, gate)
        return mx.sum(mx.exp(known) * (known - found), axis=(1, 2))

    def _visual(self, batch: Labelled) -> mx.array:
        return self.policy.project(self.policy.encode(batch.pixels).tokens)

    def _whole(self, batch: Labelled, visual: mx.array):
        every = mx.broadcast_to(mx.arange(visual.shape[1]), visual.shape[:2])
        return told(self.policy, visual, every, visual.shape[1], batch)

    def _known(self, batch: Labelled, visual: mx.array) -> mx.array:
        """Return (B, A, 255) log shares of bins with every token."""
        sequence, rows = self._whole(batch, visual)
        length = sequence.embeddings.shape[1]
        hidden = self.policy.decoder.read(sequence, rows=length).hidden
        return mx.stop_gradient(action_log_shares(self.policy, hidden, rows))

    # Learning -----------------------------------------------------------------------

    def _loss(self, scorer: nn.Module, seed: tuple[int, ...], step: int):
        rng, scoring = np.random.default_rng(seed), self.scoring
        size = scoring.batch
        batch = self.collector.draw(rng, size, self._episodes, self._shares)
        visual = self._visual(batch)
        keep = scoring.keep(rng, visual.shape[1])
        scores = self.scores(batch, visual, keep)
        losses = mx.zeros(size)
        if scoring.actions < 1:
            logs = scores - mx.logsumexp(scores, axis=1, keepdims=True)
            imitated = -mx.sum(self._goal(batch, visual, self.layers) * logs, axis=1)
            losses = losses + (1 - scoring.actions) * imitated
        if scoring.actions:
            steps = self.schedule.steps
            noise = annealed(scoring.noise, 0.0, step, steps)
            how = (noise, annealed(*scoring.temperature, step, steps))
            gate, here = gate_of(scores, keep, *how)
            known, gate = self._known(batch, visual), log_gate(tamed(gate))
            off = self._divergence(batch, visual, known, here, gate)
            losses = losses + scoring.actions * off
        return mx.sum(losses), mx.array(float(size))

    def scores(self, batch: Labelled, visual: mx.array, keep: int) -> mx.array:
        """Return scores (B, N) of visual tokens (B, N, D), of which `keep` stay."""
        extras = {
            "budget": mx.full((len(visual),), keep / visual.shape[1]),
            "text": mx.stop_gradient(self.policy.decoder.embed(batch.prompts)),
            "text_mask": batch.asked,
            "action_previous": batch.before,
        }
        side = self.policy.image_size // self.policy.stride
        return self.scorer(Features(visual, (side, side), extras=extras))

    def _goal(self, batch: Labelled, visual: mx.array, layers) -> mx.array:
        """Return (B, N) shares of what the action tokens attend to."""
        sequence, rows = self._whole(batch, visual)
        _, received = read_and_attend(self.policy, sequence, rows, layers)
        found = received[:, 1:][:, : self.policy.args.visual_tokens]
        return mx.stop_gradient(found / mx.sum(found, axis=1, keepdims=True))

    # Episodes -----------------------------------------------------------------------

    def _act(self, step: int) -> None:
        """Before a step: a round of episodes of the policy, where it is due."""
        scoring, collector = self.scoring, self.collector
        if step in rounds_of(scoring.rounds, self.schedule.steps):
            actor = self._actor if step else self._whole_actor
            collector.correct(step, scoring.corrections, scoring.mixed, actor)
            self._load(step)

    def _load(self, step: int) -> None:
        self._episodes = self.collector.load(step)
        self._shares = self.collector.shares(step)

    def _actor(self, rng: np.random.Generator, seed: int) -> Policy:
        keep = self.scoring.keep(rng, self.policy.args.visual_tokens)
        how = {"at": "prompt", "scorer": self.scorer}
        return self._policy(Pruner("learned", keep_tokens=keep, **how))

    def _whole_actor(self, rng: np.random.Generator, seed: int) -> Policy:
        return self._policy(Pruner())

    def _policy(self, pruner: Pruner) -> Policy:
        return Policy(self.policy, build_processor(), pruner=pruner, compile=False)


def _name(layers: tuple[int, ...]) -> str:
    return f"attention in {', '.join(map(str, layers))}"


def markdown(found: dict[str, list[float]]) -> str:
    """Return the divergences of `compare` by keep ratio, as a Markdown table."""
    rows = [[name, *(f"{v:.3f}" for v in values)] for name, values in found.items()]
    return Table(["", *(f"{budget:g}" for budget in BUDGETS)], rows).markdown()
