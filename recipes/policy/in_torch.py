"""Train the demo policy on one GPU: a PyTorch twin of `python -m recipes.policy run`.

    recipe="python -m recipes.policy.in_torch"
    $recipe prepare --folder FOLDER
    $recipe train --folder FOLDER --output OUT --minutes 10
    $recipe finish --weights OUT/weights.npz --output CHECKPOINT

`prepare` and `finish` need MLX. `train` needs torch, MuJoCo and Meta-World, and nothing
of MLX. Plan, losses, optimizer, average, and how visual tokens are dropped are those of
`recipes/policy/cloning.py`. A process a task acts in its worlds
(`recipes/policy/workers.py`), all episodes of a round at once, while the training goes
on: in a round the budget is drawn for each look, there for each episode. Colours are
shaken, which is not so there, since renderers differ a little. Steps end early where
the time is over: the learning rate and the rounds follow what comes first.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.demo.in_torch import AdamW

from ..torch_pi0 import PATCHES, rotate
from ..torch_vlm import to_mlx, to_torch
from . import chunks_in_torch as chunks
from .workers import SEEDS, Workers

_SPREAD = 2.5  # bins by which a label is blurred
_TOWERS = ("featurizer", "fused_featurizer")
_EVERY = 10.0  # seconds between lines


# The twin -----------------------------------------------------------------------------


class Twin(torch.nn.Module):
    """The policy. weights: by MLX's names and in its layout. told: of `prepare`."""

    def __init__(self, weights: dict[str, np.ndarray], told: dict):
        super().__init__()
        self.told, self.text = told, told["config"]["text_config"]
        self.all = torch.nn.ParameterDict(
            {
                name.replace(".", "/"): torch.nn.Parameter(to_torch(name, array))
                for name, array in weights.items()
            }
        )

    def arrays(self, tensors=None) -> dict[str, np.ndarray]:
        """Return the weights, or others in their order, as they were passed."""
        names = [name.replace("/", ".") for name in self.all]
        pairs = zip(names, tensors or self.all.values(), strict=True)
        return {name: to_mlx(name, tensor) for name, tensor in pairs}

    def get(self, name: str) -> Tensor:
        return self.all[name.replace(".", "/")]

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = f"{name}.bias".replace(".", "/")
        bias = self.all[bias] if bias in self.all else None
        return F.linear(x, self.get(f"{name}.weight"), bias)

    def encode(self, pixels: Tensor) -> Tensor:
        """Map pictures (B, S, S, 3) in [0, 1] to (B, N, C1 + C2)."""
        about = self.told["preprocessor"]
        means, stds = (
            torch.tensor(about[n], device=pixels.device) for n in ("means", "stds")
        )
        seen = (
            self._tower((pixels - mean) / std, name)
            for name, mean, std in zip(_TOWERS, means, stds, strict=True)
        )
        return torch.cat(list(seen), dim=-1)

    def _tower(self, pixels: Tensor, name: str) -> Tensor:
        sizes, root = (
            self.told["config"]["vision_config"][name],
            f"vision_backbone.{name}",
        )
        kernel = self.get(f"{root}.patch_embed.proj.weight")
        bias = self.get(f"{root}.patch_embed.proj.bias")
        x = F.conv2d(pixels.permute(0, 3, 1, 2), kernel, bias, sizes["patch_size"])
        x = x.flatten(2).transpose(1, 2) + self.get(f"{root}.pos_embed")
        more = [f"{root}.{token}_token" for token in ("cls", "reg")]
        more = [self.get(n) for n in more if n.replace(".", "/") in self.all]
        first = [token.expand(len(x), -1, -1) for token in more]
        x = torch.cat([*first, x], dim=1)
        for number in range(sizes["depth"] - 1):  # of the second to last block
            x = self._block(x, f"{root}.blocks.{number}", sizes["num_heads"])
        return x[:, x.shape[1] - (pixels.shape[1] // sizes["patch_size"]) ** 2 :]

    def _block(self, x: Tensor, name: str, heads: int) -> Tensor:
        def norm(which: str) -> Tensor:
            about = (self.get(f"{name}.{which}.{p}") for p in ("weight", "bias"))
            return F.layer_norm(x, x.shape[-1:], *about, 1e-6)

        def scaled(y: Tensor, which: str) -> Tensor:
            scale = f"{name}.{which}.scale_factor".replace(".", "/")
            return y * self.all[scale] if scale in self.all else y

        parts = self.linear(norm("norm1"), f"{name}.attn.qkv").chunk(3, -1)
        q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + scaled(self.linear(y, f"{name}.attn.proj"), "ls1")
        y = F.gelu(self.linear(norm("norm2"), f"{name}.mlp.fc1"))
        return x + scaled(self.linear(y, f"{name}.mlp.fc2"), "ls2")

    def project(self, tokens: Tensor) -> Tensor:
        x = F.gelu(self.linear(tokens, "projector.fc1"))
        return self.linear(F.gelu(self.linear(x, "projector.fc2")), "projector.fc3")

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.get("language_model.model.embed_tokens.weight"))

    def _heads(self, x: Tensor, name: str) -> Tensor:
        heads = self.text["num_attention_heads"], -1
        return self.linear(x, name).unflatten(-1, heads).transpose(1, 2)

    def scores(self, visual: Tensor, batch: dict) -> Tensor:
        """trimvla's (B, K), with padding of the prompts left out."""
        text, root = (
            self.embed(batch["prompts"]).detach(),
            "language_model.model.layers.0",
        )
        queries, keys = (
            self._heads(
                F.rms_norm(x, x.shape[-1:], None, 1e-6), f"{root}.self_attn.{n}"
            )
            for x, n in ((visual, "q_proj"), (text, "k_proj"))
        )
        order = torch.arange(text.shape[1], device=text.device)
        asked = order < batch["lengths"][:, None]
        found = (queries @ keys.transpose(-1, -2)).float() * queries.shape[-1] ** -0.5
        found = torch.where(asked[:, None, None], found, -1e9)
        return torch.logsumexp(found, dim=-1).mean(1)

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the action bins, and how far trimvla's scores are off.

        batch: pixels, prompts, lengths, classes, keep, noise and scored, as `Batch` in
        `recipes/policy/student.py`.
        """
        features = self.encode(batch["pixels"])
        indices = self._choose(features, batch)
        kept = features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))
        visual = self.project(kept)
        shares, received = self._read(visual, indices, features.shape[1], batch)
        bins = torch.arange(shares.shape[-1], device=shares.device)
        distance = (bins - batch["classes"][..., None]) / _SPREAD
        blurred = torch.softmax(-0.5 * distance.square(), dim=-1)
        loss = -(blurred * shares).sum(-1).mean()
        target = received / received.sum(-1, keepdim=True)
        scores = self.scores(visual.detach(), batch)
        alike = target * (target.clamp_min(1e-9).log() - scores.log_softmax(-1))
        return loss, alike.sum(-1).mean()

    @torch.no_grad()
    def _choose(self, features: Tensor, batch: dict) -> Tensor:
        size, total = features.shape[:2]
        if batch["keep"] == total:
            return torch.arange(total, device=features.device).expand(size, -1)
        scores = batch["noise"]
        if batch["scored"]:
            scores = self.scores(self.project(features), batch) + 0.5 * scores
        order = scores.argsort(1, descending=True)[:, : batch["keep"]]
        return order.sort(1).values

    def _read(self, visual, indices, total: int, batch: dict):
        """Return log shares of bins (B, A, 255) and what tokens receive (B, K)."""
        told, classes, device = self.told, batch["classes"], visual.device
        (size, keep, _), numbers = visual.shape, classes.shape[1]
        prompts, lengths = batch["prompts"], batch["lengths"]
        last = told["words"] + told["bins"] - 1
        room = prompts.new_full((size, numbers - 1), told["pad"])
        where = lengths[:, None] + torch.arange(numbers - 1, device=device)
        ids = torch.cat([prompts, room], 1).scatter(1, where, last - classes[:, :-1])
        start = self.embed(ids.new_full((size, 1), told["start"]))
        x = torch.cat([start, visual.to(start.dtype), self.embed(ids)], dim=1)
        rest = 1 + total + torch.arange(ids.shape[1], device=device)
        zero = indices.new_zeros(size, 1)
        places = torch.cat([zero, 1 + indices, rest.expand(size, -1)], dim=1)
        half = x.shape[-1] // self.text["num_attention_heads"] // 2
        rates = 10000.0 ** (-torch.arange(half, device=device) / half)
        angles = places[:, None, :, None] * rates
        turn, length = (angles.cos(), angles.sin()), x.shape[1]
        rows = keep + lengths[:, None] + torch.arange(numbers, device=device)
        order = torch.arange(length, device=device)
        later, received = order > rows[..., None], []
        for number in range(self.text["num_hidden_layers"]):
            name = f"language_model.model.layers.{number}"
            y = self._norm(x, f"{name}.input_layernorm")
            q, k, v = (self._heads(y, f"{name}.self_attn.{n}_proj") for n in "qkv")
            q, k = rotate(q, *turn), rotate(k, *turn)
            if number:
                with torch.no_grad():
                    at = rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1])
                    found = q.gather(2, at) @ k.transpose(-1, -2)
                    found = found.float() * q.shape[-1] ** -0.5
                    found = found.masked_fill(later[:, None], -1e9).softmax(-1)
                    received.append(found.mean((1, 2))[:, 1 : 1 + keep])
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = y.transpose(1, 2).flatten(2)
            x = x + self.linear(y, f"{name}.self_attn.o_proj")
            y = self._norm(x, f"{name}.post_attention_layernorm")
            gate, up = (self.linear(y, f"{name}.mlp.{n}_proj") for n in ("gate", "up"))
            x = x + self.linear(F.silu(gate) * up, f"{name}.mlp.down_proj")
        x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
        logits = self.linear(
            self._norm(x, "language_model.model.norm"), "language_model.lm_head"
        )
        logits = logits[..., told["words"] + 1 : last + 1].flip(-1).float()
        return logits.log_softmax(-1), torch.stack(received).mean(0)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.get(f"{name}.weight")
        return F.rms_norm(x, x.shape[-1:], weight, self.text["rms_norm_eps"])

    @torch.no_grad()
    def act(self, batch: dict) -> Tensor:
        """Return (B, A) classes, one by one; `classes` of the batch are not read."""
        features = self.encode(batch["pixels"])
        indices = self._choose(features, batch)
        at = indices[..., None].expand(-1, -1, features.shape[-1])
        visual, classes = self.project(features.gather(1, at)), batch["classes"].clone()
        for number in range(classes.shape[1]):
            about = features.shape[1], batch | {"classes": classes}
            shares = self._read(visual, indices, *about)[0]
            classes[:, number] = shares[:, number].argmax(-1)
        return classes


# Training -----------------------------------------------------------------------------


class Run(chunks.Run):
    """A training of so many minutes at most."""

    def __init__(self, args, workers=None):
        self.begin, self.args = time.time(), args
        self.told = json.loads((args.folder / "told.json").read_text())
        plan, self.tasks = dict(self.told["plan"]), list(self.told["prompts"])
        for name in ("demonstrations", "steps", "round_every", "first_round"):
            plan[name] = max(1, int(plan[name] * args.scale))
        plan["corrections"] = max(1, int(plan["corrections"] * args.scale))
        self.plan, self.data = plan, [{} for _ in self.tasks]
        self.shares = np.full(len(self.tasks), 1 / len(self.tasks))
        self.frames = np.zeros(len(self.tasks))  # of each task in the last round
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        self.rng = np.random.default_rng(0)
        self.workers = workers or Workers(self.tasks, 1, 1)
        until = time.time() + 20 * args.minutes  # a third of the time
        for end in self.workers.ends:
            end.send(("demonstrate", until, plan["demonstrations"]))
        prompts = list(self.told["prompts"].values())
        longest = max(map(len, prompts))
        padded = [p + [self.told["pad"]] * (longest - len(p)) for p in prompts]
        self.ids = torch.tensor(padded, device=self.device)
        self.lengths = torch.tensor(list(map(len, prompts)), device=self.device)
        weights = dict(np.load(args.folder / "start.npz"))
        self.twin = Twin(weights, self.told).to(self.device)
        self.weights = list(self.twin.all.values())
        self.average = [w.detach().clone() for w in self.weights]

    def add(self, task: int, frames, actions, states) -> None:
        """Labelled frames of a task."""
        if self.data[task]:  # demonstrations are there, this is a round's
            self.frames[task] = len(frames)
        edges = np.linspace(-1, 1, self.told["bins"])
        classes = np.digitize(np.clip(actions, -1, 1), edges) - 1
        classes = np.clip(classes, 0, self.told["bins"] - 2).astype(np.int64)
        for name, array in (("frames", frames), ("classes", classes)):
            new, old = (
                torch.from_numpy(array).to(self.device),
                self.data[task].get(name),
            )
            self.data[task][name] = new if old is None else torch.cat([old, new])

    def batch(self, pixels: Tensor, tasks: Tensor, scored: float) -> dict:
        keep = int(self.rng.choice(chunks.KEEP, p=chunks.SHARES))
        return {
            "pixels": pixels,
            "prompts": self.ids[tasks],
            "lengths": self.lengths[tasks],
            "keep": keep,
            "noise": self.noise(len(pixels)),
            "scored": self.rng.random() < scored,
        }

    def draw(self) -> dict:
        """Frames of tasks by their shares, moved by a few pixels, colours shaken."""
        count = len(self.tasks)
        counts = self.rng.multinomial(self.plan["batch"], self.shares)
        frames, classes = [], []
        for some, number in zip(self.data, counts.tolist(), strict=True):
            rows = torch.randint(len(some["frames"]), (number,), device=self.device)
            frames.append(some["frames"][rows])
            classes.append(some["classes"][rows])
        tasks = torch.from_numpy(np.repeat(np.arange(count), counts)).to(self.device)
        batch = self.batch(self.shaken(torch.cat(frames)), tasks, 0.6)
        return batch | {"classes": torch.cat(classes)}

    def train(self) -> None:
        plan, seconds = self.plan, 60 * self.args.minutes
        while not all(self.data):
            self.collect(wait=True)
        optimizer = AdamW(self.weights, plan["weight_decay"])
        start, step, said, done = time.time(), 0, time.time(), 0.0
        shown: collections.deque[Tensor] = collections.deque(maxlen=50)
        left = max(1e-3, self.begin + seconds - start)
        rounds = range(plan["first_round"], plan["steps"], plan["round_every"])
        waiting = [number / plan["steps"] for number in rounds]
        acting: Iterator[None] = iter(())
        while done < 1:
            if next(acting, self) is self and waiting and done >= waiting[0]:
                waiting.pop(0)
                acting = self.correct(len(waiting))
            passed = (time.time() - start) / left
            done = min(1.0, max(step / plan["steps"], passed))
            warm = min(1.0, (step + 1) / 300)
            rate = plan["learning_rate"] * warm * 0.5 * (1 + math.cos(math.pi * done))
            with torch.autocast(self.device, torch.bfloat16, self.device == "cuda"):
                loss, off = self.twin(self.draw())
            (loss + plan["scores_weight"] * off).backward()
            optimizer.step(rate)
            share = 1 - min(0.999, (step + 1) / (step + 51))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.weights, share)
            shown.append(torch.stack([loss, off]).detach())
            step += 1
            done = max(step / plan["steps"], (time.time() - start) / left)
            if time.time() - said > _EVERY or done >= 1:
                said = time.time()
                losses = torch.stack(list(shown)).mean(0).tolist()
                self.say(
                    f"step {step}: {losses[0]:.3f} nats, scores {losses[1]:.3f} off"
                )
                self.save()
        for _ in acting:  # what workers still say is read before they are asked again
            time.sleep(0.001)
        self.finish_with(self.args.judged)

    def correct(self, number: int) -> Iterator[None]:
        """DAgger with the averaged weights; then shares as `Collector` has them."""
        about = self.plan["corrections"], self.plan["mixed"]
        yield from self.episodes(SEEDS[1] + 1000 * number, *about)
        squares = self.frames**2
        self.shares = (squares / squares.sum() + 1 / len(squares)) / 2

    def finish_with(self, robots: int) -> None:
        """Episodes without an expert, for a look; then the worlds are closed."""
        for _ in self.episodes(SEEDS[2], robots, None) if robots else ():
            time.sleep(0.001)
        for end in self.workers.ends:
            end.send(None)

    def answer(self, frames, states, tasks, whole: bool):
        """Return the averaged weights' actions (B, 1, 4), and that none was damaged."""
        numbers = torch.from_numpy(tasks).to(self.device)
        pixels = torch.from_numpy(frames).to(self.device).float() / 255
        batch = self.batch(pixels, numbers, 0.7)
        batch["noise"] = batch["noise"] * (not batch["scored"])
        batch["keep"] = PATCHES if whole else batch["keep"]
        batch["classes"] = numbers.new_zeros(len(tasks), 4)
        with torch.no_grad():
            kept = [weight.detach().clone() for weight in self.weights]
            torch._foreach_copy_(self.weights, self.average)
            classes = self.twin.act(batch)
            torch._foreach_copy_(self.weights, kept)
        middle = (classes + 0.5) * 2 / (self.told["bins"] - 1) - 1
        return middle[:, None].float().cpu().numpy(), 0

    def save(self) -> None:
        self.args.output.mkdir(parents=True, exist_ok=True)
        partial = self.args.output / "partial.npz"
        np.savez(partial, **self.twin.arrays(self.average))
        os.replace(partial, self.args.output / "weights.npz")


# Commands -----------------------------------------------------------------------------


def prepare(args) -> None:
    """Write what `train` needs: first weights, plan, sizes and prompts."""
    import mlx_tokprune  # isort: skip  # noqa: F401  (loads the BLAS before MLX)
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from recipes.policy import student
    from recipes.policy.cloning import Cloning
    from recipes.policy.worlds import TASKS

    mx.random.seed(0)
    weights = dict(tree_flatten(student.build_policy().parameters()))
    args.folder.mkdir(parents=True, exist_ok=True)
    np.savez(args.folder / "start.npz", **{n: np.array(a) for n, a in weights.items()})
    prompts = {n: student.prompt_ids(task.instruction) for n, task in TASKS.items()}
    told = {"config": student.CONFIG, "preprocessor": student.PREPROCESSOR}
    told |= {"plan": dataclasses.asdict(Cloning()), "prompts": prompts}
    told |= {"words": student.TEXT_TOKENS, "bins": student.BINS}
    told |= {"start": student.START, "pad": student.PAD}
    (args.folder / "told.json").write_text(json.dumps(told, indent=2) + "\n")
    print(f"wrote {args.folder}")


def finish(args) -> None:
    """Write the checkpoint of trained weights."""
    import mlx_tokprune  # isort: skip  # noqa: F401  (loads the BLAS before MLX)
    import mlx.core as mx

    from recipes.policy.student import write_checkpoint

    weights = {name: mx.array(a) for name, a in np.load(args.weights).items()}
    write_checkpoint(weights, args.output)
    print(f"wrote {args.output}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "train", "finish"):
        some = commands.add_parser(name)
        if name == "finish":
            some.add_argument("--weights", type=Path, required=True)
        else:
            some.add_argument("--folder", type=Path, required=True)
        if name != "prepare":
            some.add_argument("--output", type=Path, required=True)
        if name == "train":
            help_ = "at most, without the last round's end and --judged"
            some.add_argument("--minutes", type=float, default=10.0, help=help_)
            some.add_argument("--scale", type=float, default=1.0, help="of the plan")
            help_ = "episodes of each task that are played at the end"
            some.add_argument("--judged", type=int, default=12, help=help_)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "finish":
        if not args.weights.is_file():
            parser.error(f"{args.weights} does not exist; expected train's weights.npz")
        if args.output.exists():
            parser.error(f"{args.output} already exists; choose a new folder")
    if args.command == "train":
        if not (args.folder / "start.npz").is_file():
            parser.error(f"{args.folder} has no start.npz; run prepare first")
        if not (args.minutes > 0 and args.scale > 0 and args.judged >= 0):
            parser.error("minutes and scale are numbers above 0, judged from 0")
        Run(args).train()
        print(f"wrote {args.output / 'weights.npz'}")
    else:
        {"prepare": prepare, "finish": finish}[args.command](args)


if __name__ == "__main__":
    main()
