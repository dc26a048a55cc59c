"""Train the small pi0-FAST on one GPU: a PyTorch twin of `recipes.policy chunks`.

    recipe="python -m recipes.policy.chunks_in_torch"
    $recipe prepare --state STATE --folder FOLDER
    $recipe train --folder FOLDER --output OUT
    $recipe finish --state STATE --weights OUT/weights.npz --output CHECKPOINT

STATE is the folder of a `recipes.policy chunks` that has collected its demonstrations,
learned its code, and perhaps done some steps, which are then the start. `check`
compares both losses on a batch. `train` needs torch, MuJoCo and Meta-World, and nothing
of MLX: it collects its own demonstrations, a process a task, and corrects the policy in
rounds of DAgger, which go on beside the training. The losses, how visual tokens are
dropped and what a batch is are those of `recipes/policy/pi0fast.py`; the
weights are averaged, and colours are shaken, since renderers differ a little.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..torch_pi0 import PATCHES, build
from .workers import HORIZON, SEEDS, Workers

KEEP, SHARES = (64, 40, 24, 16, 8), (0.4, 0.2, 0.18, 0.12, 0.1)
JITTER = 0.03
LONGEST = 40  # tokens of a chunk


# Training -----------------------------------------------------------------------------


class Run:
    """A training of so many seconds in all."""

    def __init__(self, args):
        import torch

        from mlx_tokprune.processing.fast import FastCode
        from recipes.policy.worlds import TASKS

        self.begin, self.args, self.tasks = time.time(), args, list(TASKS)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        self.rng = np.random.default_rng(0)
        self.workers = Workers(self.tasks)
        until = time.time() + args.demonstrate
        for end in self.workers.ends:
            end.send(("demonstrate", until, math.inf))
        self.say("worlds are there")
        self.told = dict(np.load(args.folder / "told.npz"))
        self.code = FastCode.read(
            args.folder / "fast_tokenizer.json",
            args.folder / "fast_processor_config.json",
        )
        weights = dict(np.load(args.folder / "start.npz"))
        self.last = len(weights["language_model.model.embed_tokens.weight"]) - 1
        self.twin = build(weights).to(self.device)
        self.weights = list(self.twin.parameters())
        self.average = [w.detach().clone() for w in self.weights]
        self.data: list[dict] = [{} for _ in self.tasks]
        self.stop, self.longest = int(self.told["stop"]), 0

    def say(self, *words) -> None:
        print(f"{time.time() - self.begin:5.0f} s", *words, flush=True)

    def add(self, task: int, frames, actions, states) -> None:
        """Labelled frames of a task."""
        import torch

        answers = np.full((len(actions), LONGEST), -1, np.int64)
        for row, chunk in enumerate(actions):
            codes = (self.last - code for code in self.code.encode(chunk))
            ids = [*self.told["head"], *codes, self.stop]
            answers[row, : len(ids)] = ids
        self.longest = max(self.longest, int((answers >= 0).sum(1).max()))
        arrays = {"frames": frames, "answers": answers, "states": states}
        for name, array in arrays.items():
            new = torch.from_numpy(array).to(self.device)
            old = self.data[task].get(name)
            self.data[task][name] = new if old is None else torch.cat([old, new])

    def prompts(self, states, tasks, jitter: float):
        import torch

        def of(name):
            return torch.from_numpy(self.told[name]).to(self.device)

        low, high = of("low").float(), of("high").float()
        states = 2 * (states - low) / (high - low) - 1
        states = states + jitter * torch.randn_like(states)
        bins = torch.floor((states + 1) * 128).clamp(-1, 255).long()
        first = int(self.told["first_bin"]) + 1
        ids = of("prompts")[tasks].scatter(1, of("slots")[tasks], first + bins)
        return ids, of("lengths")[tasks]

    def noise(self, rows: int):
        import torch

        flat = torch.rand(rows, PATCHES, device=self.device).clamp(1e-9, 1 - 1e-7)
        return -torch.log(-torch.log(flat))

    def draw(self) -> dict:
        import torch

        counts = self.rng.multinomial(self.args.batch, np.full(9, 1 / 9))
        parts: dict[str, list] = {"frames": [], "answers": [], "states": []}
        for some, count in zip(self.data, counts, strict=True):
            rows = torch.randint(len(some["frames"]), (int(count),), device=self.device)
            for name, list_ in parts.items():
                list_.append(some[name][rows])
        frames, answers, states = (torch.cat(p) for p in parts.values())
        tasks = torch.from_numpy(np.repeat(np.arange(9), counts)).to(self.device)
        prompts, lengths = self.prompts(states, tasks, JITTER)
        keep = int(self.rng.choice(KEEP, p=SHARES))
        return {
            "pixels": self.shaken(frames),
            "prompts": prompts,
            "lengths": lengths,
            "answers": answers[:, : self.longest],
            "keep": keep,
            "noise": self.noise(len(frames)),
            "scored": keep < PATCHES and self.rng.random() < 0.6,
        }

    def shaken(self, frames):
        """Return frames moved by up to 3 pixels, in other colours."""
        import torch

        pixels, shape = self.moved(frames).float(), (len(frames), 1, 1, 3)
        gain = 1 + 0.04 * torch.randn(shape, device=self.device)
        added = 4 * torch.randn(shape, device=self.device)
        return (pixels * gain + added).clamp(0, 255) / 255

    def moved(self, frames):
        """By up to 3 pixels; the edge is repeated."""
        import torch

        count, device = len(frames), self.device
        order = torch.arange(frames.shape[1], device=device)
        by = torch.randint(-3, 4, (2, count, 1), device=device)
        rows, columns = (order + by).clamp(0, frames.shape[1] - 1)
        one = torch.arange(count, device=device)[:, None, None]
        return frames[one, rows[:, :, None], columns[:, None]]

    def train(self) -> None:
        import torch

        args, weights = self.args, self.weights
        while not all(self.data):
            self.collect(wait=True)
        matrices = [w for w in weights if w.ndim > 1]
        groups = [{"params": matrices, "weight_decay": 0.05}]
        groups += [{"params": [w for w in weights if w.ndim < 2], "weight_decay": 0}]
        optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.98), fused=self.device == "cuda"
        )
        start, step, said, shown = time.time(), 0, 0.0, []
        whole = args.seconds - (start - self.begin)
        rounds = [0.15 + 0.7 * n / args.rounds for n in range(args.rounds)]
        acting: Iterator[None] = iter(())
        while (done := (time.time() - start) / whole) < 1:
            if next(acting, self) is self and rounds and done >= rounds[0]:
                rounds.pop(0)
                acting = self.episodes(SEEDS[1] + 1000 * len(rounds), args.robots, 0.1)
            rate = args.rate * min(1, (step + 1) / 200)
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * min(done, 1)))
            with torch.autocast(self.device, torch.bfloat16, self.device == "cuda"):
                wrong, count, off = self.twin(self.draw())
            optimizer.zero_grad(set_to_none=True)
            (wrong / count + 0.1 * off).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            share = 1 - min(0.998, (step + 1) / (step + 51))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, weights, share)
            shown.append((wrong / count).detach())
            step += 1
            if time.time() - said > 10:
                said = time.time()
                loss = torch.stack(shown[-50:]).mean().item()
                self.say(f"{step} steps, {loss:.3f} nats a token")
        self.save()
        self.say(f"{step} steps of {args.batch} frames")
        for _ in acting:  # ends first
            time.sleep(0.01)
        for _ in self.episodes(SEEDS[2], args.robots, None):
            time.sleep(0.01)
        for end in self.workers.ends:
            end.send(None)

    def collect(self, wait: bool = False) -> None:
        """Return the demonstrations that are there."""
        for number, end in enumerate(self.workers.ends):
            if not self.data[number] and (wait or end.poll()):
                episodes, *arrays = self.workers.hear(number)
                self.add(number, *arrays)
                frames = len(arrays[0])
                self.say(f"{self.tasks[number]}: {episodes} episodes, {frames} frames")

    # Acting -------------------------------------------------------------------------

    def episodes(self, seed: int, robots: int, mixed: float | None) -> Iterator[None]:
        """Run a round of DAgger with the averaged weights; `mixed` None: a check.

        While the worlds go on, it yields.
        """
        workers, damaged, looks = self.workers, 0, 0
        live = yield from workers.ask(
            {
                task: ("begin", range(first, first + robots), mixed is not None)
                for task in range(9)
                for first in [seed + 100_000 * task]
            }
        )
        while live := {task: count for task, count in live.items() if count}:
            seen = yield from workers.ask({task: ("look",) for task in live})
            frames, states = (
                np.concatenate([seen[task][part] for task in live]) for part in (0, 1)
            )
            tasks = np.repeat(list(live), list(live.values()))
            chunks, wrong = self.answer(frames, states, tasks, mixed is None)
            damaged, looks = damaged + wrong, looks + len(tasks)
            about = (mixed or 0.0, (seed, looks))
            orders = {t: ("act", chunks[tasks == t], *about) for t in live}
            live = yield from workers.ask(orders)
        won = {}
        ended = yield from workers.ask(dict.fromkeys(range(9), ("end",)))
        for task, (count, *arrays) in ended.items():
            won[self.tasks[task]] = int(count)
            if arrays:
                self.add(task, *arrays)
        frames = sum(len(some["frames"]) for some in self.data)
        self.say(
            f"won of {robots}: {won}; damaged {damaged} of {looks}; {frames} frames"
        )

    def answer(self, frames, states, tasks, whole: bool):
        """Return (B, H, 4) chunks, and how many answers were damaged."""
        import torch

        keep = PATCHES if whole else int(self.rng.choice(KEEP, p=SHARES))
        tasks = torch.from_numpy(tasks).to(self.device)
        states = torch.from_numpy(states).to(self.device)
        prompts, lengths = self.prompts(states, tasks, 0.0)
        pixels = torch.from_numpy(frames).to(self.device).float() / 255
        scored = bool(self.rng.random() < 0.7)
        noise = self.noise(len(tasks)) * (not scored)
        batch = {"pixels": pixels, "prompts": prompts, "lengths": lengths, "keep": keep}
        batch |= {"noise": noise, "scored": scored, "raw": True}
        ids = torch.zeros(len(tasks), 0, dtype=torch.long, device=self.device)
        room, ended = ids.new_zeros(len(tasks), 1), ids.new_zeros(len(tasks)).bool()
        with torch.no_grad():
            kept = [weight.detach().clone() for weight in self.weights]
            torch._foreach_copy_(self.weights, self.average)
            while ids.shape[1] < self.longest and not ended.all():
                logits = self.twin(batch | {"answers": torch.cat([ids, room], 1)})
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
                ended |= ids[:, -1] == self.stop
            torch._foreach_copy_(self.weights, kept)
        chunks, damaged = [], 0
        for said in ids.tolist():
            end = said.index(self.stop) if self.stop in said else len(said)
            codes = [self.last - number for number in said[2:end]]
            chunk, wrong = self.code.decode(codes, HORIZON, 4)
            chunks.append(chunk)
            damaged += wrong is not None
        return np.stack(chunks), damaged

    def save(self) -> None:
        names = [name.removeprefix("all.") for name, _ in self.twin.named_parameters()]
        arrays = (a.cpu().numpy() for a in self.average)
        named = zip((n.replace("/", ".") for n in names), arrays, strict=True)
        self.args.output.mkdir(parents=True, exist_ok=True)
        np.savez(self.args.output / "weights.npz", **dict(named))


# Commands -----------------------------------------------------------------------------


def prepare(args) -> None:
    """Write what `train` needs without MLX: start, prompts, code."""
    import shutil

    import mlx_tokprune  # isort: skip  # noqa: F401  (loads the BLAS before MLX)
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_tokprune.processing.actions import Bounds
    from recipes.policy import pi0fast
    from recipes.policy.tuning import open_policy
    from recipes.policy.worlds import TASKS

    state, folder = args.state, args.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "processor_config.json"):
        shutil.copy(state / "fast" / name, folder / f"fast_{name}")
    low, high = map(np.array, json.loads((state / "bounds.json").read_text()))
    code = pi0fast.read_code(state / "fast")
    processor = pi0fast.build_processor(code, Bounds(low, high, np.ones(4, bool)))
    told = [pi0fast.prompt_ids(t.instruction, np.zeros(4)) for t in TASKS.values()]
    words = processor.tokenizer
    middle, longest = words.known["128"], max(map(len, told))
    np.savez(
        folder / "told.npz",
        low=low,
        high=high,
        prompts=np.array([ids + [pi0fast.PAD] * (longest - len(ids)) for ids in told]),
        lengths=np.array(list(map(len, told))),
        slots=np.array([[n for n, i in enumerate(p) if i == middle] for p in told]),
        first_bin=words.known["-1"],
        head=np.array(words.encode("Action: ", add_special_tokens=False)),
        stop=processor.stop,
    )
    done = sorted(state.glob("state-*.safetensors"))
    if done:
        arrays = mx.load(str(done[-1]))
        weights = {n[8:]: a for n, a in arrays.items() if n.startswith("weights/")}
    else:
        policy = pi0fast.build_policy()
        pi0fast.warm_start(policy, open_policy("demo-policy"))
        weights = dict(tree_flatten(policy.parameters()))
    np.savez(folder / "start.npz", **{n: np.array(a) for n, a in weights.items()})


def finish(args) -> None:
    """Write the checkpoint of trained weights."""
    import mlx_tokprune  # isort: skip  # noqa: F401  (loads the BLAS before MLX)
    import mlx.core as mx

    from mlx_tokprune.processing.actions import Bounds
    from recipes.policy.pi0fast import write_checkpoint

    low, high = map(np.array, json.loads((args.state / "bounds.json").read_text()))
    weights = {name: mx.array(a) for name, a in np.load(args.weights).items()}
    bounds = Bounds(low, high, np.ones(4, bool))
    write_checkpoint(weights, args.state / "fast", bounds, args.output)


def check(args) -> None:
    """Both losses on a random batch, from `prepare`'s start."""
    import mlx_tokprune  # isort: skip  # noqa: F401  (loads the BLAS before MLX)
    import mlx.core as mx
    import torch

    from recipes.policy import pi0fast

    weights, rng = dict(np.load(args.folder / "start.npz")), np.random.default_rng(0)
    policy, twin = pi0fast.build_policy(), build(weights)
    policy.load_weights([(name, mx.array(a)) for name, a in weights.items()])
    answers = rng.integers(300, 800, (3, 9))
    answers[1, 6:] = -1
    arrays = {"pixels": rng.random((3, 112, 112, 3), dtype=np.float32)}
    arrays |= {"prompts": rng.integers(4, 30, (3, 19)), "answers": answers}
    arrays |= {"lengths": np.array([19, 16, 18])}
    arrays["noise"] = rng.gumbel(size=(3, PATCHES)).astype(np.float32)
    for keep, scored in ((64, False), (24, False), (16, True)):
        more = {"keep": keep, "scored": scored}
        batch = {name: mx.array(a) for name, a in arrays.items()} | more
        ours = pi0fast.losses(policy, pi0fast.Batch(**batch))
        batch = {name: torch.from_numpy(a) for name, a in arrays.items()} | more
        both = [[x.item() for x in part] for part in (ours, twin(batch))]
        print(keep, scored, both)
        np.testing.assert_allclose(*both, rtol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "check", "train", "finish"):
        some = commands.add_parser(name)
        if name in ("prepare", "finish"):
            some.add_argument("--state", type=Path, required=True)
        if name != "finish":
            some.add_argument("--folder", type=Path, required=True)
        if name == "finish":
            some.add_argument("--weights", type=Path, required=True)
        if name in ("train", "finish"):
            some.add_argument("--output", type=Path, required=True)
        if name == "train":
            some.add_argument("--seconds", type=float, default=160, help="of training")
            help_ = "seconds of collecting"
            some.add_argument("--demonstrate", type=float, default=15, help=help_)
            some.add_argument("--rounds", type=int, default=5, help="of DAgger")
            help_ = "episodes of each task in a round"
            some.add_argument("--robots", type=int, default=12, help=help_)
            some.add_argument("--batch", type=int, default=256)
            some.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    if args.command == "train":
        Run(args).train()
    else:
        {"prepare": prepare, "check": check, "finish": finish}[args.command](args)


if __name__ == "__main__":
    main()
