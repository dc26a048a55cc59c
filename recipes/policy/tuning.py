"""Fine-tuning a policy under pruning whose choice is learned with it.

Tokens that are not chosen are there, behind a gate; the scores are those of inference,
so that what is trained is a plain checkpoint. It learns to act from few tokens as it
did from all of them, where the pruned policy itself gets to.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_tokprune.act.policy import Policy
from mlx_tokprune.checkpoints.fingerprint import fingerprint
from mlx_tokprune.checkpoints.opening import open_checkpoint
from mlx_tokprune.errors import InputError
from mlx_tokprune.models.openvla import OpenVLA
from mlx_tokprune.pruners import Pruner
from mlx_tokprune.train.gate import annealed, log_gate, tamed
from mlx_tokprune.train.loop import Loop, Schedule, check_same, draw_losses
from mlx_tokprune.train.lora import Adapter, fused_modules
from mlx_tokprune.train.shares import draw_count

from .choosing import METHODS, lightvla_gate, trimvla_gate
from .collecting import Collector, rounds_of
from .student import (
    Labelled,
    action_log_shares,
    blurred,
    build_policy,
    build_processor,
    told,
    write_checkpoint,
)

_SCALE = 2.0  # of the adapter
_RANGE = (0.5, 2.5)  # of the share: between these, batches and episodes draw theirs


@dataclass(frozen=True)
class Tuning:
    """The settings that a policy is tuned under.

    keep_ratio: the share that trimvla is tuned for; lightvla has a count of its own.
    rank: of LoRA on the language model, beside a projector of which all is trained; 0
    trains all of both. whole: the share of batches that see every token. noise: on the
    scores, falling to 0. temperature: of the choice's gradient, from the first to the
    second. choice: weight of that gradient. distill: how much of the target are the
    actions of the policy itself with every token, as it was; the rest are the expert's.
    tower: whether the towers learn, too. demonstrations, corrections: episodes of each
    task, and of each of `rounds` of DAgger, evenly over the training; the expert acts
    in `mixed` of their steps.
    """

    method: str = "trimvla"
    keep_ratio: float = 0.1
    batch: int = 16
    rank: int = 0
    whole: float = 0.1
    noise: float = 0.5
    temperature: tuple[float, float] = (1.0, 0.3)
    choice: float = 2.0
    distill: float = 1.0
    tower: bool = False
    demonstrations: int = 36
    corrections: int = 8
    rounds: int = 2
    mixed: float = 0.1

    def __post_init__(self):
        if self.method not in METHODS:
            raise InputError(
                f"method {self.method!r} is not tuned; expected {' or '.join(METHODS)}"
            )
        if not 0 < self.keep_ratio < 1:
            raise InputError(f"keep ratio {self.keep_ratio:g} is outside (0, 1)")
        counts = ("batch", "demonstrations", "corrections", "rounds")
        if any(getattr(self, name) < 1 for name in counts) or self.rank < 0:
            raise InputError(f"{', '.join(counts)} are whole numbers from 1")

    def keep(self, rng: np.random.Generator, total: int) -> int:
        """How many of `total` tokens stay, evenly in the logarithm; fewer than all."""
        least, most = (times * self.keep_ratio for times in _RANGE)
        return draw_count(rng, least, most, total)


class Tuner:
    """Tunes a policy; its state, and the episodes, are kept in `folder`."""

    def __init__(
        self, model: str | Path, tuning: Tuning, schedule: Schedule, folder: Path
    ):
        self.tuning, self.schedule, self.folder = tuning, schedule, folder
        self.collector, self.policy = Collector(folder), open_policy(model)
        check_started(folder, tuning, self.policy)
        self._teacher = open_policy(model) if tuning.distill else self.policy
        self._teacher.freeze()
        mx.random.seed(schedule.seed)
        _thaw(self.policy, tuning.rank, tuning.tower)
        self._loop = Loop(self.policy, self._loss, schedule, folder)
        self._episodes: list = []
        self._shares: np.ndarray | None = None

    def run(self, output: Path, snapshots: tuple[int, ...] = ()) -> None:
        """All steps; writes `output`, and step-STEP in the folder after `snapshots`."""
        loop = self._loop
        self.collector.demonstrate(self.tuning.demonstrations)

        def between(step: int) -> None:
            self._correct(step)
            snapshot = self.folder / f"step-{step}"
            if step in snapshots and not snapshot.exists():
                write_checkpoint(self.weights(), snapshot)

        between(loop.begin)
        self._load(loop.begin)
        loop.run(between)
        write_checkpoint(self.weights(), output)
        draw_losses(loop.losses, self.folder / "loss.png", "the actions")

    def weights(self) -> dict[str, mx.array]:
        """Return a checkpoint's weights, adapters in the weights that they adapt."""
        found = dict(tree_flatten(self.policy.parameters()))
        for path, tensors in fused_modules(self.policy).items():
            found = {n: a for n, a in found.items() if not n.startswith(f"{path}.")}
            found |= tensors
        return found

    # Learning -----------------------------------------------------------------------

    def _loss(self, policy: nn.Module, seed: tuple[int, ...], step: int):
        rng = np.random.default_rng(seed)
        size = self.tuning.batch
        batch = self.collector.draw(rng, size, self._episodes, self._shares)
        losses = self.losses(batch, rng, step)
        return mx.sum(losses), mx.array(float(losses.size))

    def losses(self, batch: Labelled, rng: np.random.Generator, step: int) -> mx.array:
        """Return (B, A) of each action, under the choice of this step."""
        policy = self.policy
        features = policy.encode(batch.pixels).tokens
        visual, total, gate = policy.project(features), features.shape[1], None
        here = mx.broadcast_to(mx.arange(total), features.shape[:2])
        if rng.random() >= self.tuning.whole:
            gate, here = self._gate(visual, batch, rng, step)
            visual = mx.take_along_axis(visual, here[..., None], axis=1)
        log_shares = act(policy, visual, here, total, batch, gate)
        return -mx.sum(self._target(batch) * log_shares, axis=-1)

    def _target(self, batch: Labelled) -> mx.array:
        """Return shares of bins (B, A, 255): the expert's and the tuned policy's."""
        share, target = self.tuning.distill, blurred(batch.classes)
        if not share:
            return target
        teacher = self._teacher
        visual = teacher.project(teacher.encode(batch.pixels).tokens)
        every = mx.broadcast_to(mx.arange(visual.shape[1]), visual.shape[:2])
        known = act(teacher, visual, every, visual.shape[1], batch)
        return share * mx.stop_gradient(mx.exp(known)) + (1 - share) * target

    def _gate(
        self, visual: mx.array, batch: Labelled, rng: np.random.Generator, step: int
    ) -> tuple[mx.array, mx.array]:
        """Return what is added to scores of tokens (B, M), and which they are."""
        tuning, steps = self.tuning, self.schedule.steps
        noise = annealed(tuning.noise, 0.0, step, steps)
        how = (noise, annealed(*tuning.temperature, step, steps))
        if tuning.method == "trimvla":
            keep = tuning.keep(rng, visual.shape[1])
            gate, here = trimvla_gate(self.policy, visual, batch, keep, *how)
        else:
            gate, here = lightvla_gate(self.policy, visual, batch, *how)
        gate, share = tamed(gate), tuning.choice
        return log_gate(share * gate + (1 - share) * mx.stop_gradient(gate)), here

    # Episodes -----------------------------------------------------------------------

    def _correct(self, step: int) -> None:
        """Before a step: a round of DAgger with the pruned policy, where it is due."""
        tuning, collector = self.tuning, self.collector
        if step in rounds_of(tuning.rounds, self.schedule.steps):
            collector.correct(step, tuning.corrections, tuning.mixed, self._actor)
            self._load(step)

    def _load(self, step: int) -> None:
        self._episodes = self.collector.load(step)
        self._shares = self.collector.shares(step)

    def _actor(self, rng: np.random.Generator, seed: int) -> Policy:
        keep = None
        if self.tuning.method == "trimvla":
            keep = self.tuning.keep(rng, self.policy.args.visual_tokens)
        pruner = Pruner(self.tuning.method, keep_tokens=keep)
        return Policy(self.policy, build_processor(), pruner=pruner, compile=False)


def act(policy: OpenVLA, visual, here, total: int, batch: Labelled, gate=None):
    """Return (B, A, 255) log shares of bins, from tokens `here` (B, M) of `total`."""
    sequence, rows = told(policy, visual, here, total, batch, gate)
    read = policy.decoder.read(sequence, rows=sequence.embeddings.shape[1])
    return action_log_shares(policy, read.hidden, rows)


def check_started(folder: Path, settings, policy: OpenVLA) -> None:
    """Refuse a folder that another training, or one of another policy, began."""
    known = {"trains": type(settings).__name__, "model": fingerprint(policy)}
    check_same(folder / "settings.json", known | dataclasses.asdict(settings))


def open_policy(model: str | Path) -> OpenVLA:
    """Build a policy of the demo policy's shape with a checkpoint's weights."""
    policy = build_policy()
    load_as_demo(policy, model, "demo-policy")
    return policy


def load_as_demo(policy: nn.Module, model: str | Path, kind: str) -> None:
    """Return a checkpoint's weights in float32, for a policy that has them all.

    `InputError` unless they are those of such a policy, which `kind` names.
    """
    family, checkpoint, _ = open_checkpoint(model)
    weights = family.to_mlx_layout(checkpoint.load())
    try:
        policy.load_weights([(n, a.astype(mx.float32)) for n, a in weights.items()])
    except ValueError:
        raise InputError(f"{model} has not the shape of {kind}") from None


def _thaw(policy: OpenVLA, rank: int, tower: bool) -> None:
    """Freeze all but projector and language model, or its adapters.

    The first layer's queries and keys stay as they are: they are trimvla's scores,
    which the loss on actions would shake.
    """
    policy.freeze()
    if rank:
        Adapter(rank, _SCALE).add_to(policy)
    else:
        policy.language_model.unfreeze()
    policy.projector.unfreeze()
    if tower:
        policy.vision_backbone.unfreeze()
    first = policy.layers[0].self_attn
    first.q_proj.freeze()
    first.k_proj.freeze()
