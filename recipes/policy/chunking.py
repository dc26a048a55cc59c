"""How the small pi0-FAST is trained: chunks of the expert's actions, in FAST's code.

First its visual tokens learn to be those of the demo policy, then it clones the
expert, with visual tokens dropped in most batches and rounds of DAgger between. What is
learned from is `collecting.py`'s, the loop is `train/loop.py`'s.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_tokprune.act.policy import Policy
from mlx_tokprune.errors import InputError
from mlx_tokprune.files import write_text
from mlx_tokprune.processing.actions import Bounds
from mlx_tokprune.processing.fast import FastCode
from mlx_tokprune.pruners import Pruner
from mlx_tokprune.train.loop import Loop, Schedule, draw_losses

from .collecting import Collector
from .demonstrations import Episodes
from .pi0fast import (
    HORIZON,
    PAD,
    STEPS,
    Batch,
    build_policy,
    build_processor,
    learn_code,
    losses,
    misaligned,
    prompt_ids,
    read_code,
    warm_start,
    write_checkpoint,
)
from .tuning import check_started, load_as_demo, open_policy
from .worlds import TASKS

FIRST = HORIZON // 2  # actions that are done before looking again
_KEEP = (64, 40, 24, 16, 8)  # visual tokens that stay in a batch
_KEEP_SHARES = (0.4, 0.2, 0.18, 0.12, 0.1)
_JITTER = 0.03  # of a state in [-1, 1], so that it is not learned by heart
_ROUND = 4  # answers of a batch are padded to a multiple of so many tokens


@dataclass(frozen=True)
class Chunking:
    """The sizes of a training by demonstrations and corrections.

    teacher: the policy that it begins with. align: steps that learn its visual tokens.
    start: the folder of a policy of its own shape to go on with instead.
    demonstrations, corrections: episodes of each task, and of each in a round of
    DAgger, of which there are `rounds` evenly over the last two thirds; the expert
    acts in `mixed` of their steps. scores_weight: of the loss that teaches trimvla's
    scores.
    """

    teacher: str = "demo-policy"
    start: str | None = None
    batch: int = 32
    align: int = 500
    demonstrations: int = 100
    corrections: int = 8
    rounds: int = 3
    mixed: float = 0.1
    scores_weight: float = 0.1

    def __post_init__(self):
        counts = ("batch", "demonstrations", "corrections")
        if any(getattr(self, name) < 1 for name in counts):
            raise InputError(f"{', '.join(counts)} are whole numbers from 1")
        if min(self.align, self.rounds) < 0 or not 0 <= self.mixed <= 1:
            raise InputError("align and rounds are whole numbers from 0, mixed a share")

    def rounds_of(self, steps: int) -> tuple[int, ...]:
        """Return the steps before which the policy is corrected."""
        whole = self.rounds + 1
        return tuple(
            steps // 3 + 2 * steps * number // (3 * whole)
            for number in range(self.rounds)
        )


class Chunker:
    """Trains a policy; its state, and the episodes, are kept in `folder`."""

    def __init__(self, chunking: Chunking, schedule: Schedule, folder: Path):
        self.chunking, self.schedule, self.folder = chunking, schedule, folder
        self.collector = Collector(folder, HORIZON)
        self._teacher = open_policy(chunking.teacher)
        check_started(folder, chunking, self._teacher)
        self._teacher.freeze()
        mx.random.seed(schedule.seed)
        self.policy = build_policy()
        if chunking.start:
            load_as_demo(self.policy, chunking.start, "a policy of `chunks`")
        else:
            warm_start(self.policy, self._teacher)
        self._loop = Loop(self.policy, self._loss, schedule, folder)
        self._episodes: list[tuple[Episodes, list]] = []
        self._answers: list[np.ndarray] = []

    def run(self, output: Path) -> None:
        """All steps; writes `output`."""
        self.collector.demonstrate(self.chunking.demonstrations)
        self._learn_code()
        self._correct(self._loop.begin)
        self._load(self._loop.begin)
        self._loop.run(self._correct)
        self.write(output)
        draw_losses(self._loop.losses, self.folder / "loss.png")

    def write(self, output: Path) -> None:
        weights = dict(tree_flatten(self.policy.parameters()))
        write_checkpoint(weights, self.folder / "fast", self.bounds, output)

    def _learn_code(self) -> None:
        """FAST's code and the range of the state, from the demonstrations."""
        fast, file = self.folder / "fast", self.folder / "bounds.json"
        if not (fast.exists() and file.exists()):
            shown = [some for some, _ in self.collector.load(-1)]
            learn_code(np.concatenate([some.actions for some in shown]), fast)
            states = np.concatenate([some.states for some in shown])
            found = [states.min(0).tolist(), states.max(0).tolist()]
            write_text(file, json.dumps(found))
        self.code: FastCode = read_code(fast)
        low, high = map(np.array, json.loads(file.read_text()))
        self.bounds = Bounds(low, high, np.ones(len(low), bool))
        self.processor = build_processor(self.code, self.bounds)

    # Learning -----------------------------------------------------------------------

    def _loss(self, policy: nn.Module, seed: tuple[int, ...], step: int):
        rng = np.random.default_rng(seed)
        batch = self.draw(rng)
        if step < self.chunking.align:
            off = misaligned(self.policy, self._teacher, batch.pixels)
            return off, mx.array(1.0)
        loss, count, off = losses(self.policy, batch)
        return loss + self.chunking.scores_weight * off * count, count

    def draw(self, rng: np.random.Generator) -> Batch:
        size = self.chunking.batch
        about = (rng, size, self._episodes)
        frames, tasks, places = self.collector.pick(*about)
        states = np.stack([self._episodes[i][0].states[n] for i, n in places])
        answers = np.stack([self._answers[i][n] for i, n in places])
        longest = (answers >= 0).sum(1).max()
        answers = answers[:, : -(-longest // _ROUND) * _ROUND]
        keep = int(rng.choice(_KEEP, p=_KEEP_SHARES))
        return Batch(
            mx.array(frames).astype(mx.float32) / 255,
            *self._prompts(tasks, states, rng),
            mx.array(answers),
            keep,
            mx.array(rng.gumbel(size=(size, _KEEP[0])).astype(np.float32)),
            scored=keep < _KEEP[0] and bool(rng.random() < 0.6),
        )

    def _prompts(self, tasks, states, rng) -> tuple[mx.array, mx.array]:
        """Return (B, P) ids, padded behind, and their lengths (B,)."""
        states = self.bounds.from_units_unclipped(states)
        states = states + rng.normal(0, _JITTER, states.shape)
        prompts = [
            prompt_ids(list(TASKS.values())[task].instruction, state)
            for task, state in zip(tasks, states, strict=True)
        ]
        lengths = [len(ids) for ids in prompts]
        padded = np.full((len(prompts), max(lengths)), PAD, np.int32)
        for row, ids in enumerate(prompts):
            padded[row, : len(ids)] = ids
        return mx.array(padded), mx.array(lengths)

    # Episodes -----------------------------------------------------------------------

    def _correct(self, step: int) -> None:
        """Before a step: a round of DAgger, where it is due."""
        chunking, collector = self.chunking, self.collector
        if step in chunking.rounds_of(self.schedule.steps):
            collector.correct(step, chunking.corrections, chunking.mixed, self._actor)
            self._load(step)

    def _load(self, step: int) -> None:
        self._episodes = self.collector.load(step)
        self._answers = [self._encoded(some.actions) for some, _ in self._episodes]

    def _encoded(self, chunks: np.ndarray) -> np.ndarray:
        """(n, T) answers as token ids, padded behind by -1."""
        padded = np.full((len(chunks), STEPS), -1, np.int32)
        for row, chunk in enumerate(chunks):
            ids = self.processor.answer(chunk)
            padded[row, : len(ids)] = ids
        return padded

    def _actor(self, rng: np.random.Generator, seed: int) -> Policy:
        keep = int(rng.choice(_KEEP, p=_KEEP_SHARES))
        method = "trimvla" if rng.random() < 0.7 else "random"
        pruner = Pruner(method, keep_tokens=keep, seed=seed)
        how = {"pruner": pruner, "compile": False, "first": FIRST}
        # What is no answer yet is padded, and corrected.
        relaxed = dataclasses.replace(self.processor, strict=False)
        return Policy(self.policy, relaxed, **how)
