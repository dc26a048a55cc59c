"""Train the demo model in PyTorch: a twin of `python -m recipes.demo`.

    recipe="python -m recipes.demo.in_torch"
    $recipe prepare --folder FOLDER
    $recipe train --folder FOLDER --output OUT --minutes 10
    $recipe finish --folder FOLDER --weights OUT/weights.npz --output CHECKPOINT

All commands need torch. `prepare` and `finish` also need MLX; `train` needs tokenizers,
Pillow and matplotlib, but not MLX. Stages, pictures, questions, losses
(`recipes/torch_vlm.py`) and optimizer are those of `recipes/demo/recipe.py`. A stage
ends after its steps or its share of the time. The learning rate follows whichever comes
first, and unused time goes to later stages. `train` writes OUT/weights.npz at intervals
and OUT/begun.npz at the end of each stage. To resume from there, repeat the command.
"""

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mlx_tokprune.scenes.pictures import CANVAS
from mlx_tokprune.scenes.questions import KINDS, ask
from mlx_tokprune.train.layout import padded_arrays
from recipes.demo import stages as recipe
from recipes.demo.pairs import pairs_of
from recipes.demo.stages import STAGES, Stage

from .. import torch_vlm

_JUDGED = 1_000_000  # second number of the seed of the held-out pictures
_EVERY = 10.0, 60.0  # seconds between progress lines, and between evaluations


# Batches ------------------------------------------------------------------------------


class Steps(torch.utils.data.Dataset):
    """Dataset of batches by index of the stage and step."""

    def __init__(self, folder: Path, stages: list[Stage]):
        self.stages, self.told = stages, json.loads((folder / "told.json").read_text())
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    @functools.cached_property
    def encode(self):
        @functools.lru_cache(maxsize=1 << 16)
        def encode(text: str) -> list[int]:
            return self._tokenizer.encode(text, add_special_tokens=False).ids

        return encode

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, int, dict]:
        number, step = place
        stage = self.stages[number]
        batch = self.arrays(recipe.draw_step(stage, number, step))
        if stage.loss == "language":
            batch["keep"] = int(recipe.choices_of(number, step).choice(recipe.KEPT))
        return number, step, batch

    def arrays(self, drawn: recipe.SceneArrays) -> dict:
        batch: dict = {"cells": drawn.cells}
        if drawn.pixels is not None and drawn.fine is not None:
            # uint8 takes a quarter of the bytes of float32.
            batch["pixels"] = np.rint(drawn.pixels * 255).astype(np.uint8)
            batch["fine"] = drawn.fine
        if drawn.questions is not None:
            batch |= self.questions(drawn.questions)
        return batch

    def questions(self, rows) -> dict[str, np.ndarray]:
        about = self.encode, self.told["suffix"], self.told["end"]
        ids, targets, _ = padded_arrays(pairs_of(rows, *about))
        return {"ids": ids, "targets": targets}

    def judged(self, pictures: int, canvas: int, most: int) -> tuple[dict, list[list]]:
        """Return a held-out batch and its questions, one of each kind per picture."""
        seed = recipe.TRAINING, _JUDGED
        drawn = recipe.draw_scenes(seed, pictures, canvas, most)
        rng = np.random.default_rng((*seed, 1))
        rows = [[ask(rng, scene, kind) for kind in KINDS] for scene in drawn.scenes]
        return self.arrays(drawn) | self.questions(rows), rows


def on(device: str, batch):
    """Return a batch as tensors on the device, in the types that the losses read."""
    if isinstance(batch, dict):
        return {name: on(device, part) for name, part in batch.items()}
    if isinstance(batch, int):
        return batch
    moved = torch.as_tensor(batch).to(device, non_blocking=True)
    return moved.float() / 255 if moved.dtype == torch.uint8 else moved.long()


# Learning -----------------------------------------------------------------------------


class AdamW:
    """AdamW as in MLX, without bias correction of its averages.

    A weight without a gradient still decays, as in MLX.
    """

    def __init__(self, weights: list[Tensor], decay: float = 0.01):
        self.weights, self.decay = weights, decay
        self.first, self.second, self.none = (
            [torch.zeros_like(w) for w in weights] for _ in range(3)
        )

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """Update the weights; return the gradients' norm before it is clipped to 1."""
        norm = torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        pairs = zip(self.weights, self.none, strict=True)
        found = [none if w.grad is None else w.grad for w, none in pairs]
        torch._foreach_lerp_(self.first, found, 0.1)
        torch._foreach_mul_(self.second, 0.98)
        torch._foreach_addcmul_(self.second, found, found, 0.02)
        down = torch._foreach_sqrt(self.second)
        torch._foreach_add_(down, 1e-8)
        torch._foreach_mul_(self.weights, 1 - rate * self.decay)
        torch._foreach_addcdiv_(self.weights, self.first, down, -rate)
        for weight in self.weights:
            weight.grad = None
        return norm


def rate_of(stage: Stage, done: float) -> float:
    """Return the learning rate after the share `done`, 0 to 1, of a stage."""
    warm, last = stage.warm_up / stage.steps, 0.03
    if done < warm:
        return stage.learning_rate * done / warm
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, done - warm)))
    return stage.learning_rate * (last + (1 - last) * fall)


class Run:
    """Training run with a time limit of `args.minutes`."""

    def __init__(self, args):
        self.args, self.begin = args, time.time()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        self.stages = [
            dataclasses.replace(s, steps=max(1, int(s.steps * args.scale)))
            for s in STAGES
        ]
        self.steps = Steps(args.folder, self.stages)
        weights, told = dict(np.load(args.folder / "start.npz")), self.steps.told
        self.number = 0  # index of the first unfinished stage
        if (begun := args.output / "begun.npz").is_file():
            weights = dict(np.load(begun))
            self.number = int(weights.pop("stage"))
        self.student = torch_vlm.Student(weights, told["config"], told["prefix"])
        self.student.to(self.device)
        self.judged = functools.cache(self._judged)

    def say(self, *words) -> None:
        print(f"{time.time() - self.begin:5.0f} s", *words, flush=True)

    def places(self) -> Iterator[tuple[int, int]]:
        """Yield stage indices and steps to draw, without those of finished stages.

        Batches are drawn ahead of training, and a stage can end early.
        """
        for number, stage in enumerate(self.stages):
            for step in range(stage.steps):
                if number < self.number:
                    break
                yield number, step

    def train(self) -> None:
        more = {"multiprocessing_context": "fork"} if self.args.workers else {}
        drawn = torch.utils.data.DataLoader(
            self.steps,
            batch_size=None,
            sampler=self.places(),
            num_workers=self.args.workers,
            pin_memory=self.device == "cuda",
            **more,
        )
        begun, asked = -1, time.time()
        for number, step, batch in drawn:
            if number < self.number:
                continue  # drawn before its stage ended
            if number > begun:
                self.start_stage(number)
                begun = number
            self.waited += time.time() - asked
            if self.learn(self.stages[number], step, batch) >= 1:
                self.number = number + 1
                self.judge(self.stages[number], step)
                self.save("weights")
                self.save("begun", stage=self.number)
            asked = time.time()
            if self.number == len(self.stages):
                break

    def start_stage(self, number: int) -> None:
        stage, now = self.stages[number], time.time()
        torch.manual_seed(number)
        costs = [_cost(stage) for stage in self.stages[number:]]
        left = self.begin + 60 * self.args.minutes - now
        self.start, self.seconds = now, max(1e-3, left * costs[0] / sum(costs))
        alone = stage.loss == "align"
        self.student.train(not alone)
        for name, weight in self.student.all.items():
            weight.requires_grad_(not alone or name.startswith("vlm/mm_projector"))
        trained = [w for w in self.student.all.values() if w.requires_grad]
        self.optimizer, self.waited = AdamW(trained), 0.0
        self.losses: collections.deque[Tensor] = collections.deque(maxlen=100)
        self.said = self.told = now
        self.say(f"{stage.name}: {stage.steps} steps or {self.seconds:.0f} s")

    def learn(self, stage: Stage, step: int, batch: dict) -> float:
        """Train one step; return the share of the stage that is done."""
        batch = on(self.device, batch)
        if "keep" in batch:
            size = (
                len(batch["ids"]),
                batch["keep"],
                self.steps.told["config"]["hidden_size"],
            )
            shape = batch["cells"]["shape"].shape
            batch["uniform"] = torch.rand(shape, device=self.device)
            batch["normal"] = torch.randn(size, device=self.device)
        with self.precision():
            loss = self.student(stage.loss, batch)
        loss.backward()
        passed = (time.time() - self.start) / self.seconds
        self.optimizer.step(rate_of(stage, max(step / stage.steps, passed)))
        self.losses.append(loss.detach())
        now = time.time()
        if now - self.said > _EVERY[0]:
            mean = torch.stack(list(self.losses)).mean().item()
            waited = 100 * self.waited / (now - self.start)
            about = f"step {step + 1}, loss {mean:.3f}, waited {waited:.0f} %"
            self.say(f"{stage.name}: {about}")
            self.said = now
        if now - self.told > _EVERY[1]:
            self.judge(stage, step)
            self.save("weights")
            self.told = now
        return max((step + 1) / stage.steps, (now - self.start) / self.seconds)

    def precision(self):
        half = self.device == "cuda" and self.args.precision == "bfloat16"
        return torch.autocast(self.device, torch.bfloat16, half)

    # Judging ------------------------------------------------------------------------

    def _judged(self, canvas: int, most: int) -> tuple[dict, list[list]]:
        batch, rows = self.steps.judged(self.args.judged, canvas, most)
        return on(self.device, batch), rows

    @torch.no_grad()
    def judge(self, stage: Stage, step: int) -> None:
        """Print the accuracy on held-out pictures, in percent."""
        batch, rows = self.judged(stage.canvas, stage.most)
        student, training = self.student, self.student.training
        student.eval()
        with self.precision():
            oracle = stage.loss == "language"
            tokens = None if oracle else student.see(batch["pixels"])[0]
            if stage.loss == "tower":
                right = cells_right(student, tokens, batch["cells"])
            else:
                cells = batch["cells"]
                visual = student.oracle(cells) if oracle else student.project(tokens)
                about = torch_vlm.every(visual), visual.shape[1], batch["ids"]
                right = answers_right(
                    student.answer_logits(visual, *about), batch, rows
                )
        student.train(training)
        loss = self.losses[-1].item()
        words = ", ".join(f"{name} {100 * share:.1f}" for name, share in right.items())
        self.say(f"{stage.name}: {step + 1} steps, loss {loss:.3f}; {words}")

    def save(self, name: str, **more: int) -> None:
        self.args.output.mkdir(parents=True, exist_ok=True)
        partial = self.args.output / "partial.npz"
        np.savez(partial, **self.student.arrays(), **more)
        os.replace(partial, self.args.output / f"{name}.npz")


def _cost(stage: Stage) -> int:
    """Return the steps of a stage, doubled for training on full pictures."""
    full = stage.loss != "language" and stage.canvas == CANVAS
    return stage.steps * (2 if full else 1)


def cells_right(student, tokens: Tensor, cells: dict) -> dict[str, float]:
    """Return the accuracy of helper heads on cells that have their label."""
    right = {}
    for name in ("shape", "color", "word"):
        known = cells[name] > (-1 if name == "word" else 0)
        said = student.cell(tokens, name).argmax(-1)
        right[name] = (said == cells[name])[known].float().mean().item()
    return right


def answers_right(logits: Tensor, batch: dict, rows) -> dict[str, float]:
    """Return the share of right answers by kind of question, and of `all`.

    An answer is right where each of its tokens has the highest logit.
    """
    used = batch["targets"] != recipe.IGNORE
    exact = ((logits.argmax(-1) == batch["targets"]) | ~used).all(-1).cpu().numpy()
    asked = np.array([[question is not None for question in row] for row in rows])
    shares = (exact & asked).sum(0) / asked.sum(0).clip(1)
    everything = (exact & asked).sum() / asked.sum()
    return dict(zip(KINDS, shares.tolist(), strict=True)) | {"all": everything}


# Commands -----------------------------------------------------------------------------


def prepare(args) -> None:
    """Write the input of `train`: initial weights, tokenizer, config and prompt."""
    from mlx.utils import tree_flatten

    from recipes.demo.recipe import Trainer
    from recipes.demo.student import DEMO_CONFIG

    trainer = Trainer(args.folder)
    weights = dict(tree_flatten(trainer.student.parameters()))
    np.savez(args.folder / "start.npz", **{n: np.array(a) for n, a in weights.items()})
    told = {"config": DEMO_CONFIG, "prefix": trainer.prefix, "end": trainer.end}
    told["suffix"] = trainer.student.vlm.prompt_suffix
    (args.folder / "told.json").write_text(json.dumps(told, indent=2) + "\n")
    print(f"wrote {args.folder}")


def train(args) -> None:
    run = Run(args)
    run.train()
    run.say(f"wrote {args.output / 'weights.npz'}")


def finish(args) -> None:
    """Write a checkpoint of the trained weights."""
    import mlx.core as mx

    from recipes.demo.export import export
    from recipes.demo.student import Student

    config = json.loads((args.folder / "told.json").read_text())["config"]
    student = Student(config)
    arrays = np.load(args.weights)
    student.load_weights([(name, mx.array(a)) for name, a in arrays.items()])
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    export(student, tokenizer, args.output, config)
    print(f"wrote {args.output}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "train", "finish"):
        some = commands.add_parser(name)
        some.add_argument("--folder", type=Path, required=True)
        if name == "finish":
            some.add_argument("--weights", type=Path, required=True)
        if name != "prepare":
            some.add_argument("--output", type=Path, required=True)
        if name == "train":
            some.add_argument("--minutes", type=float, default=10.0, help="at most")
            some.add_argument("--scale", type=float, default=1.0, help="of the steps")
            cores = os.cpu_count() or 1
            some.add_argument("--workers", type=int, default=max(0, cores - 2))
            precisions = ("bfloat16", "float32")
            some.add_argument("--precision", choices=precisions, default="bfloat16")
            some.add_argument("--judged", type=int, default=128, help="pictures")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    needed = {"train": ("start.npz", "told.json", "tokenizer.json")}
    needed["finish"] = needed["train"][1:]
    for name in needed.get(args.command, ()):
        if not (args.folder / name).is_file():
            parser.error(f"{args.folder} has no {name}; run prepare first")
    if args.command == "finish" and not args.weights.is_file():
        parser.error(f"{args.weights} does not exist; expected train's weights.npz")
    if args.command == "train":
        if not (args.minutes > 0 and args.scale > 0 and args.judged > 0):
            parser.error("minutes, scale and judged are numbers above 0")
    elif args.command == "finish" and args.output.exists():
        parser.error(f"{args.output} already exists; choose a new folder")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes draw, not threads
    {"prepare": prepare, "train": train, "finish": finish}[args.command](args)


if __name__ == "__main__":
    main()
