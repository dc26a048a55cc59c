"""Training loop: optimizer steps, learning rates, and resumable state."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

from ..checkpoints.shards import load_tensors
from ..errors import InputError
from ..files import read_json, write_arrays, write_picture, write_text
from ..models.protocol import VisionModel

_SCHEMA = "mlx_tokprune.training/1"  # of settings.json


@dataclass(frozen=True)
class Schedule:
    """Number of steps, learning rate, and save interval of a training.

    accumulate: batches whose gradients are summed in one step. clip: largest norm of a
    gradient. Raises `InputError` for a value out of range.
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


def warm_cosine(
    rate: float, steps: int, floor: float = 0.0
) -> Callable[[mx.array], mx.array]:
    """Return the learning rate by step: a linear warm-up, then a cosine.

    The warm-up takes a fortieth of `steps`; the cosine ends at `floor` times `rate`.
    """
    warm_up = max(1, steps // 40)
    rise = optim.linear_schedule(0, rate, warm_up)
    fall = optim.cosine_decay(rate, steps, floor * rate)
    return optim.join_schedules([rise, fall], [warm_up])


# (trainable module, seed of the batch, step) -> sum of losses, number of tokens
LossOf = Callable[[Any, tuple[int, ...], int], tuple[mx.array, mx.array]]


class Loop:
    """Training loop of a module's unfrozen weights, with its state in `folder`.

    optimizer: AdamW with `warm_cosine` rates when `None`. begin: first step of `run`.
    Raises `InputError` where the state in `folder` has another schedule.
    Nothing is compiled, unlike in mlx_lm.tuner: batches differ in shape, and each shape
    is compiled anew. A compiled loss takes 0.41 s in place of 0.43, a compiled update 6
    ms in place of 18 (LoRA on the demo, two busy CPU cores, median of 11:
    `benchmarks/training_step.py --compile --batch 4 --questions 2`).
    """

    def __init__(
        self,
        module: nn.Module,
        loss: LossOf,
        schedule: Schedule,
        folder: Path,
        optimizer: optim.Optimizer | None = None,
    ):
        self.module, self.loss, self.schedule = module, loss, schedule
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._group = mx.distributed.init()
        rates = warm_cosine(schedule.learning_rate, schedule.steps)
        decay = schedule.weight_decay
        self.optimizer = optimizer or optim.AdamW(rates, weight_decay=decay)
        self.optimizer.init(module.trainable_parameters())
        self.losses: list[float] = []
        self.begin = self._resume()

    @property
    def is_first(self) -> bool:
        """True in the process that writes files: rank 0 of a distributed training."""
        return self._group.rank() == 0

    def run(
        self, after: Callable[[int], None] | None = None, title: str = "steps"
    ) -> None:
        """Run the remaining steps; call `after` with the number of steps done.

        Raises `InputError` for a loss that is not finite.
        """
        steps, start = self.schedule.steps, time.perf_counter()
        hidden = None if self.is_first else True  # `None`: shown on a terminal only
        tokens = 0.0
        with tqdm(range(self.begin, steps), desc=title, disable=hidden) as bar:
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
        """Train one step; return its mean loss and its number of tokens."""
        total, count, gradients = self._gradients(step)
        self._apply(gradients, count)
        mx.eval(self._state())
        loss = cast(float, (total / count).item())
        if not math.isfinite(loss):
            raise InputError(
                f"the loss of step {step} is not finite; choose a lower learning rate, "
                "or check the data"
            )
        return loss, cast(float, count.item())

    def _gradients(self, step: int) -> tuple[mx.array, mx.array, dict]:
        """Return sums over the batches of a step: losses, tokens, gradients."""
        schedule, size, rank = self.schedule, self._group.size(), self._group.rank()
        sums = nn.value_and_grad(self.module, self.loss)
        total: Any = 0.0  # an array after the first batch, as the rest
        count: Any = 0.0
        gradients: Any = None
        for part in range(schedule.accumulate):
            # One seed for each process and part: a resumed step draws its batch again.
            seed = (schedule.seed, step, part * size + rank)
            mx.random.seed(hash(seed) & 0xFFFFFFFF)
            (loss, tokens), new = sums(self.module, seed, step)
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
            total, count = total + loss, count + tokens
            mx.eval(gradients, total, count)
        if size > 1:
            total, count = map(mx.distributed.all_sum, (total, count))
            gradients = tree_map(mx.distributed.all_sum, gradients)
        return total, count, gradients

    def _apply(self, gradients: dict, count: mx.array) -> None:
        """Move the weights by the mean gradient, clipped."""
        gradients = tree_map(lambda g: g / count, gradients)
        gradients, _ = optim.clip_grad_norm(gradients, self.schedule.clip)
        self.optimizer.update(self.module, gradients)

    # State on disk ------------------------------------------------------------------

    def _state(self) -> dict[str, mx.array]:
        """Arrays that a step changes; running statistics are not trainable."""
        trained = dict(tree_flatten(self.module.trainable_parameters()))
        weights = tree_flatten(self.module.parameters())
        changed = [(n, a) for n, a in weights if n in trained or "running_" in n]
        parts = {"weights": changed, "optimizer": tree_flatten(self.optimizer.state)}
        return {f"{part}/{n}": a for part, named in parts.items() for n, a in named}

    def _resume(self) -> int:
        """Load the state in `folder`, if there is one; return the first step to run."""
        file = self.folder / "state.json"
        if not file.exists():
            return 0
        state = read_json(file)
        if state.get("schedule") != dataclasses.asdict(self.schedule):
            raise _other_settings(self.folder)
        try:
            arrays = load_tensors(self.folder / f"state-{state['step']}.safetensors")
            parts: dict[str, list] = {"weights": [], "optimizer": []}
            for name, array in arrays.items():
                part, _, inner = name.partition("/")
                parts[part].append((inner, array))
            self.module.load_weights(parts["weights"], strict=False)
            self.optimizer.state = tree_unflatten(parts["optimizer"])
            self.losses = list(state["losses"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the state of the training in {self.folder} is damaged ({error}); "
                "remove the folder to begin again"
            ) from None
        return state["step"]

    def _save(self, step: int) -> None:
        """Write the arrays of a step to a new file, then the state that names it."""
        if not self.is_first:
            return
        arrays = self.folder / f"state-{step}.safetensors"
        write_arrays(arrays, self._state())
        schedule = dataclasses.asdict(self.schedule)
        state = {"step": step, "schedule": schedule, "losses": self.losses}
        write_text(self.folder / "state.json", json.dumps(state))
        for old in self.folder.glob("state-*.safetensors"):
            if old != arrays:
                old.unlink()


@contextlib.contextmanager
def recomputed(model: VisionModel, wanted: bool) -> Iterator[None]:
    """Recompute the language model's layers in the backward pass, for less memory.

    mlx-lm changes the layers' class for every model in the process; the block's end
    restores the class.
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
    """Write `settings` to `file`.

    Raises `InputError` where a training with other settings has begun in that folder,
    and for a file that is no settings of a training.
    """
    settings, folder = json.loads(json.dumps(settings)), file.parent
    settings = {"schema": _SCHEMA, **settings}
    states = ("state.json", "*/state.json", "episodes/*/*")
    started = any(any(folder.glob(pattern)) for pattern in states)
    if started and file.exists():
        if {"schema": _SCHEMA, **read_json(file)} != settings:
            raise _other_settings(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings), _SCHEMA)


def _other_settings(folder: Path) -> InputError:
    return InputError(
        f"{folder} holds a training with other settings; choose another folder, or "
        "the settings that it was started with"
    )


def draw_losses(losses: list[float], file: Path, what: str = "the answers") -> None:
    """Draw the loss of each step and its running mean as a PNG, given matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, alpha=0.3, label="loss")
    width = max(1, len(losses) // 20)
    means = [np.mean(losses[max(0, i - width) : i + 1]) for i in range(len(losses))]
    axes.plot(means, label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel=f"cross entropy of {what}, nats")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_picture(file, figure)
