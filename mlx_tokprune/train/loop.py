"""The training loop: AdamW, schedules, resuming to the same bytes, processes."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

from ..errors import InputError
from ..files import replacing, write_text


@dataclass(frozen=True)
class Schedule:
    """How long, how fast, and how often is said and saved what.

    accumulate: batches whose gradients are one step's. clip: the largest norm of a
    gradient. Raises `InputError` for numbers that make no sense.
    """

    steps: int = 300
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    save_every: int = 50

    def __post_init__(self):
        counts = ("steps", "accumulate", "save_every")
        if any(getattr(self, name) < 1 for name in counts):
            raise InputError(f"{', '.join(counts)} are whole numbers from 1")
        if not 0 < self.learning_rate < 1 or self.weight_decay < 0 or self.clip <= 0:
            raise InputError(
                "expected a learning rate in (0, 1), a weight decay from 0 and a clip "
                "above 0"
            )


# (trainable module, seed of the batch, step) -> sum of losses, and of how many tokens
LossOf = Callable[[nn.Module, tuple[int, ...], int], tuple[mx.array, mx.array]]


class Loop:
    """Trains what is not frozen of `module`; its state is kept in `folder`.

    begin: the step at which `run` goes on.
    """

    def __init__(
        self, module: nn.Module, loss: LossOf, schedule: Schedule, folder: Path
    ):
        self.module, self.loss, self.schedule, self.folder = (
            *(module, loss, schedule),
            folder,
        )
        folder.mkdir(parents=True, exist_ok=True)
        self._group = mx.distributed.init()
        rate, steps = schedule.learning_rate, schedule.steps
        warm = max(1, steps // 40)
        rates = optim.join_schedules(
            [optim.linear_schedule(0, rate, warm), optim.cosine_decay(rate, steps)],
            [warm],
        )
        self._optimizer = optim.AdamW(rates, weight_decay=schedule.weight_decay)
        self._optimizer.init(module.trainable_parameters())
        self.losses: list[float] = []
        self.begin = self._resume()

    @property
    def is_first(self) -> bool:
        return self._group.rank() == 0

    def run(self, after: Callable[[int], None] | None = None) -> None:
        """All steps, from where an earlier run stopped. after: called with each."""
        steps, start = self.schedule.steps, time.perf_counter()
        shown = None if self.is_first else True
        tokens = 0.0
        with tqdm(range(self.begin, steps), desc="steps", disable=shown) as bar:
            for step in bar:
                loss, count = self._step(step)
                tokens += count
                self.losses.append(loss)
                rate = tokens / (time.perf_counter() - start)
                peak = mx.get_peak_memory() / 1e9
                bar.set_postfix(
                    loss=f"{loss:.3f}", rate=f"{rate:.0f}/s", peak=f"{peak:.1f} GB"
                )
                if (step + 1) % self.schedule.save_every == 0 or step + 1 == steps:
                    self._save(step + 1)
                if after:
                    after(step + 1)

    def _step(self, step: int) -> tuple[float, float]:
        """The mean loss of a step, and answer tokens that were learned from."""
        schedule, size, rank = self.schedule, self._group.size(), self._group.rank()
        sums = nn.value_and_grad(self.module, self.loss)
        total, count, gradients = 0.0, 0.0, None
        for part in range(schedule.accumulate):
            seed = (schedule.seed, step, part * size + rank)
            mx.random.seed(hash(seed) & 0xFFFFFFFF)
            (loss, tokens), found = sums(self.module, seed, step)
            if gradients is not None:
                found = tree_map(mx.add, gradients, found)
            gradients, total, count = found, total + loss, count + tokens
            mx.eval(gradients, total, count)
        if size > 1:
            total, count = map(mx.distributed.all_sum, (total, count))
            gradients = tree_map(mx.distributed.all_sum, gradients)
        gradients = tree_map(lambda g: g / count, gradients)
        gradients, _ = optim.clip_grad_norm(gradients, schedule.clip)
        self._optimizer.update(self.module, gradients)
        mx.eval(self.module.trainable_parameters(), self._optimizer.state)
        loss = (total / count).item()
        if not math.isfinite(loss):
            raise InputError(
                f"the loss of step {step} is not finite; choose a lower learning rate, "
                "or look for damaged data"
            )
        return loss, count.item()

    # What is kept -------------------------------------------------------------------

    def _resume(self) -> int:
        state = self.folder / "state.json"
        if not state.exists():
            return 0
        known = json.loads(state.read_text())
        if known["schedule"] != dataclasses.asdict(self.schedule):
            raise InputError(
                f"{self.folder} holds a training with other settings; choose another "
                "folder, or give those it was started with"
            )
        arrays = mx.load(str(self.folder / f"state-{known['step']}.safetensors"))
        parts: dict[str, list] = {"weights": [], "optimizer": []}
        for name, array in arrays.items():
            part, _, inner = name.partition("/")
            parts[part].append((inner, array))
        self.module.load_weights(parts["weights"], strict=False)
        self._optimizer.state = tree_unflatten(parts["optimizer"])
        self.losses = known["losses"]
        return known["step"]

    def _save(self, step: int) -> None:
        """A file of its own for each step, which the state then names."""
        if not self.is_first:
            return
        arrays = {}
        for part, tree in (
            ("weights", self.module.trainable_parameters()),
            ("optimizer", self._optimizer.state),
        ):
            arrays |= {f"{part}/{name}": array for name, array in tree_flatten(tree)}
        mx.save_safetensors(str(self.folder / f"state-{step}.safetensors"), arrays)
        schedule = dataclasses.asdict(self.schedule)
        state = {"step": step, "schedule": schedule, "losses": self.losses}
        write_text(self.folder / "state.json", json.dumps(state))
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != f"state-{step}.safetensors":
                old.unlink()


@contextlib.contextmanager
def recomputed(model, wanted: bool) -> Iterator[None]:
    """Compute the language model's layers again in the backward pass, for less memory.

    mlx-lm changes the class of the layers, of every model in the process; it is
    changed back.
    """
    from mlx_lm.tuner.trainer import grad_checkpoint

    layer = model.decoder.layers[0]
    kind, call = type(layer), type(layer).__call__
    if wanted:
        grad_checkpoint(layer)
    try:
        yield
    finally:
        kind.__call__ = call


def check_same(file: Path, settings: dict) -> None:
    """A folder holds one training: other settings are refused once it has begun."""
    settings, folder = json.loads(json.dumps(settings)), file.parent
    begun = (folder / "state.json").exists() or any(folder.glob("episodes/*/*"))
    if begun and file.exists() and json.loads(file.read_text()) != settings:
        raise InputError(
            f"{file.parent} holds a training with other settings; choose another "
            "folder, or give those it was started with"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings))


def draw_losses(losses: list[float], file: Path, what: str = "the answers") -> None:
    """The loss of each step and a running mean, as a PNG, where there is matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, alpha=0.3, label="loss")
    width = max(1, len(losses) // 20)
    means = [
        sum(losses[max(0, i - width) : i + 1]) / len(losses[max(0, i - width) : i + 1])
        for i in range(len(losses))
    ]
    axes.plot(means, label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel=f"cross entropy of {what}, nats")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replacing(file) as stream:
        figure.savefig(stream, format="png")
