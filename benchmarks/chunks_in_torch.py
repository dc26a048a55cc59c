"""Train the small pi0-FAST on one GPU: a PyTorch twin of `train.policy chunks`.

    script=benchmarks/chunks_in_torch.py
    python $script prepare --state STATE --folder FOLDER
    python $script train --folder FOLDER --output OUT
    python $script finish --state STATE --weights OUT/weights.npz --output CHECKPOINT

STATE is the folder of a `train.policy chunks` that has collected its demonstrations,
learned its code, and perhaps done some steps, which are then the start. `check`
compares both losses on a batch. `train` needs torch, MuJoCo and Meta-World, and nothing
of MLX: it collects its own demonstrations, a process a task, and corrects the policy in
rounds of DAgger, which go on beside the training. The losses, how visual tokens are
dropped and what a batch is are those of `mlx_tokprune/train/policy/pi0fast.py`; the
weights are averaged, and colours are shaken, since renderers differ a little.
"""

import argparse
import json
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Generator, Iterator
from pathlib import Path

import no_mlx  # noqa: F401
import numpy as np

KEEP, SHARES = (64, 40, 24, 16, 8), (0.4, 0.2, 0.18, 0.12, 0.1)
JITTER = 0.03
HORIZON, FIRST, LONGEST = 8, 4, 40  # actions of a chunk, done of it; tokens
WIDTH, HEADS, SIZE = 192, 6, 32  # of the language model, and of a head
TOWER, PATCHES = 128, 64
SEEDS = 1_001_000, 3_000_000, 80_000_000  # demonstrations, corrections, the check


# The twin -----------------------------------------------------------------------------


def build(weights: dict):
    """The policy as a torch module, from MLX-layout arrays."""
    import torch
    from torch import nn

    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            arrays = {k: torch.from_numpy(v).float() for k, v in weights.items()}
            self.all = nn.ParameterDict(
                {k.replace(".", "/"): nn.Parameter(v) for k, v in arrays.items()}
            )

        def get(self, name: str):
            return self.all[name.replace(".", "/")]

        def linear(self, x, name: str):
            bias = f"{name}.bias".replace(".", "/")
            bias = self.all[bias] if bias in self.all else None
            return nn.functional.linear(x, self.get(f"{name}.weight"), bias)

        def forward(self, batch: dict):
            return losses(self, batch)

    return Twin()


def encode(twin, pixels):
    import torch.nn.functional as functional

    size = len(pixels)
    kernel = twin.get("vision_tower.patch_embed.proj.weight").flatten(1)
    x = (pixels * 2 - 1).reshape(size, 8, 14, 8, 14, 3).transpose(2, 3)
    bias = twin.get("vision_tower.patch_embed.proj.bias")
    x = functional.linear(x.reshape(size, PATCHES, -1), kernel, bias)
    x = x + twin.get("vision_tower.pos_embed")

    def norm(x, name):
        about = twin.get(f"{name}.weight"), twin.get(f"{name}.bias")
        return functional.layer_norm(x, (TOWER,), *about, 1e-6)

    for number in range(4):
        root = f"vision_tower.blocks.{number}."
        y = norm(x, f"{root}norm1")
        parts = [twin.linear(y, f"{root}attn.{part}") for part in "qkv"]
        parts = [p.reshape(size, PATCHES, 4, 32).transpose(1, 2) for p in parts]
        y = functional.scaled_dot_product_attention(*parts).transpose(1, 2)
        x = x + twin.linear(y.reshape(size, PATCHES, TOWER), f"{root}attn.proj")
        y = twin.linear(norm(x, f"{root}norm2"), f"{root}mlp.fc1")
        y = functional.gelu(y, approximate="tanh")
        x = x + twin.linear(y, f"{root}mlp.fc2")
    x = norm(x, "vision_tower.norm")
    return twin.linear(x, "multi_modal_projector.linear")


def embed(twin, ids):
    import torch.nn.functional as functional

    table = twin.get("language_model.model.embed_tokens.weight")
    return functional.embedding(ids, table) * WIDTH**0.5


def rms(twin, x, name: str):
    y = x.float()
    y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return (y * (1 + twin.get(f"{name}.weight").float())).to(x.dtype)


def heads(twin, x, name: str):
    return twin.linear(x, name).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)


def scores_of(twin, visual, text, asked):
    """trimvla's scores (B, K)."""
    import torch

    def norm(x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    root = "language_model.model.layers.0.self_attn."
    queries = heads(twin, norm(visual), f"{root}q_proj")
    keys = heads(twin, norm(text), f"{root}k_proj")
    found = (queries @ keys.transpose(-1, -2)).float() * SIZE**-0.5
    found = torch.where(asked[:, None, None], found, -1e9)
    return torch.logsumexp(found, -1).mean(1)


def losses(twin, batch: dict):
    """(sum of cross-entropies, tokens, how far scores are off), or logits if `raw`."""
    import torch
    import torch.nn.functional as functional

    visual = encode(twin, batch["pixels"])
    (size, total, _), keep, device = visual.shape, batch["keep"], visual.device
    prompts, lengths, answers = (batch[n] for n in ("prompts", "lengths", "answers"))
    asked = torch.arange(prompts.shape[1], device=device) < lengths[:, None]
    places = torch.arange(total, device=device).expand(size, total)
    if keep < total:
        scores = batch["noise"]
        if batch["scored"]:
            with torch.no_grad():
                found = scores_of(twin, visual, embed(twin, prompts), asked)
                scores = found + 0.5 * scores
        places = scores.argsort(1, descending=True)[:, :keep].sort(1).values
    visual = visual.gather(1, places[..., None].expand(-1, -1, WIDTH))
    said = answers[:, :-1].clamp_min(0)
    where = lengths[:, None] + torch.arange(said.shape[1], device=device)
    ids = torch.cat([prompts, torch.zeros_like(said)], 1).scatter(1, where, said)
    x = torch.cat([visual, embed(twin, ids).to(visual.dtype)], 1)
    length = x.shape[1]
    rest = (total + torch.arange(ids.shape[1], device=device)).expand(size, -1)
    angles = torch.cat([places, rest], 1)[:, None, :, None].float()
    angles = angles * 10000.0 ** (-torch.arange(SIZE // 2, device=device) / SIZE * 2)
    turn = angles.cos(), angles.sin()
    order = torch.arange(length, device=device)
    mask = (order <= order[:, None])[None] | (order < (keep + lengths)[:, None, None])
    rows = torch.arange(answers.shape[1], device=device)
    rows = keep + lengths[:, None] - 1 + rows
    known, received = (answers >= 0).float(), 0
    watched = batch["scored"] and not batch.get("raw")
    for number in range(4):
        root = f"language_model.model.layers.{number}."
        y = rms(twin, x, f"{root}input_layernorm")
        q, k, v = (heads(twin, y, f"{root}self_attn.{part}_proj") for part in "qkv")
        q, k = rotate(q, *turn), rotate(k, *turn)
        if number and watched:
            with torch.no_grad():
                asking = q.gather(2, rows[:, None, :, None].expand(-1, HEADS, -1, SIZE))
                seen = mask.gather(1, rows[..., None].expand(-1, -1, length))[:, None]
                found = (asking @ k.transpose(-1, -2)).float() * SIZE**-0.5
                found = torch.where(seen, found, -1e9).softmax(-1).mean(1)
                received = received + (found[..., :keep] * known[..., None]).sum(1)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        y = y.transpose(1, 2).reshape(size, length, WIDTH)
        x = x + twin.linear(y, f"{root}self_attn.o_proj")
        y = rms(twin, x, f"{root}post_attention_layernorm")
        gate, up = (twin.linear(y, f"{root}mlp.{part}_proj") for part in ("gate", "up"))
        y = functional.gelu(gate, approximate="tanh") * up
        x = x + twin.linear(y, f"{root}mlp.down_proj")
    x = rms(twin, x, "language_model.model.norm")
    x = x.gather(1, rows[..., None].expand(-1, -1, WIDTH))
    table = twin.get("language_model.model.embed_tokens.weight")
    logits = functional.linear(x, table).float()
    if batch.get("raw"):
        return logits
    wrong = functional.cross_entropy(
        logits.flatten(0, 1), answers.clamp_min(0).flatten(), reduction="none"
    )
    off = torch.zeros((), device=device)
    if watched:
        target = received / received.sum(-1, keepdim=True)
        scores = scores_of(twin, visual.detach(), embed(twin, prompts).detach(), asked)
        alike = target.clamp_min(1e-9).log() - scores.log_softmax(-1)
        off = (target * alike).sum(-1).mean()
    return (wrong * known.flatten()).sum(), known.sum(), off


def rotate(x, cosine, sine):
    import torch

    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1).to(x.dtype)


# Worlds -------------------------------------------------------------------------------


def work(connection, task: str, horizon: int, first: int) -> None:
    """A process with the worlds of one task, which does what it is told.

    horizon: actions of a label. first: of a chunk, how many are done.
    """
    os.environ |= {"MUJOCO_GL": "egl", "OMP_NUM_THREADS": "1"}
    try:
        _work(connection, task, horizon, first)
    except Exception:
        connection.send(traceback.format_exc())


def _work(connection, task: str, horizon: int, first: int) -> None:
    from mlx_tokprune.train.policy.demonstrations import demonstrate, join
    from mlx_tokprune.train.policy.worlds import HORIZON as STEPS
    from mlx_tokprune.train.policy.worlds import TASKS, World

    worlds, index = [World(task)], list(TASKS).index(task)
    worlds[0].reset(0)
    worlds[0].frame()
    connection.send(task)
    while (asked := connection.recv()) is not None:
        what, *about = asked
        if what == "demonstrate":
            (until, most), parts = about, []
            while time.time() < until and len(parts) < most:
                seed = SEEDS[0] + 10_000 * index + len(parts)
                parts.append(demonstrate(worlds[0], seed, horizon))
            joined = join(parts)
            names = ("frames", "actions", "states")
            connection.send((len(parts), *(getattr(joined, n) for n in names)))
        elif what == "begin":
            seeds, labels = about
            worlds += [World(task) for _ in range(len(seeds) - len(worlds))]
            live, won, steps, found = worlds[: len(seeds)], 0, 0, []
            for world, seed in zip(live, seeds, strict=True):
                world.reset(seed)
            connection.send(len(live))
        elif what == "look":
            seen = [(world.frame(), world.hand()) for world in live]
            connection.send(tuple(map(np.stack, zip(*seen, strict=True))))
        elif what == "act":
            chunks, mixed, seed = about
            rng, going, steps = np.random.default_rng(seed), [], steps + first
            for world, begin, chunk in zip(live, seen, chunks, strict=True):
                for number in range(first):
                    expert = world.expert()
                    if labels:
                        frame, hand = (
                            begin if not number else (world.frame(), world.hand())
                        )
                        label = expert if horizon == 1 else world.ahead(horizon)
                        found.append((frame, label, hand))
                    if world.step(expert if rng.random() < mixed else chunk[number]):
                        break
                won += world.success
                going += [] if world.success else [world]
            live = going if steps < STEPS else []
            connection.send(len(live))
        elif what == "end":
            arrays = map(np.stack, zip(*found, strict=True)) if found else ()
            connection.send((won, *arrays))


class Workers:
    """A process for each task."""

    def __init__(self, tasks: list[str], horizon: int = HORIZON, first: int = FIRST):
        context, self.tasks, self.ends = multiprocessing.get_context("spawn"), tasks, []
        for task in tasks:
            mine, theirs = context.Pipe()
            about = theirs, task, horizon, first
            process = context.Process(target=work, args=about, daemon=True)
            process.start()
            self.ends.append(mine)
        for number, task in enumerate(tasks):
            if self.hear(number) != task:
                raise RuntimeError(f"{task} did not begin")

    def hear(self, number: int):
        said = self.ends[number].recv()
        if isinstance(said, str) and said not in self.tasks:
            raise RuntimeError(said)
        return said

    def ask(self, messages: dict[int, tuple]) -> Generator[None, None, dict]:
        """Yields until all have answered, and returns what."""
        for number, message in messages.items():
            self.ends[number].send(message)
        while not all(self.ends[number].poll() for number in messages):
            yield
        return {number: self.hear(number) for number in messages}


# Training -----------------------------------------------------------------------------


class Run:
    """A training of so many seconds in all."""

    def __init__(self, args):
        import torch

        from mlx_tokprune.fast import FastCode
        from mlx_tokprune.train.policy.worlds import TASKS

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
        """Moved by up to 3 pixels, and other colours."""
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
        """The demonstrations that are there."""
        for number, end in enumerate(self.workers.ends):
            if not self.data[number] and (wait or end.poll()):
                episodes, *arrays = self.workers.hear(number)
                self.add(number, *arrays)
                frames = len(arrays[0])
                self.say(f"{self.tasks[number]}: {episodes} episodes, {frames} frames")

    # Acting -------------------------------------------------------------------------

    def episodes(self, seed: int, robots: int, mixed: float | None) -> Iterator[None]:
        """A round of DAgger with the averaged weights, or a check if `mixed` is None.

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
        """(B, H, 4) chunks, and how many answers were damaged."""
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
    """What `train` needs, without MLX: start, prompts, code."""
    import shutil

    import mlx_tokprune  # isort: skip  # noqa: F401  (loads the BLAS before MLX)
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_tokprune.actions import Bounds
    from mlx_tokprune.train.policy import pi0fast
    from mlx_tokprune.train.policy.tuning import open_policy
    from mlx_tokprune.train.policy.worlds import TASKS

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
    """The checkpoint of trained weights."""
    import mlx_tokprune  # isort: skip  # noqa: F401  (loads the BLAS before MLX)
    import mlx.core as mx

    from mlx_tokprune.actions import Bounds
    from mlx_tokprune.train.policy.pi0fast import write_checkpoint

    low, high = map(np.array, json.loads((args.state / "bounds.json").read_text()))
    weights = {name: mx.array(a) for name, a in np.load(args.weights).items()}
    bounds = Bounds(low, high, np.ones(4, bool))
    write_checkpoint(weights, args.state / "fast", bounds, args.output)


def check(args) -> None:
    """Both losses on a random batch, from `prepare`'s start."""
    import mlx_tokprune  # isort: skip  # noqa: F401  (loads the BLAS before MLX)
    import mlx.core as mx
    import torch

    from mlx_tokprune.train.policy import pi0fast

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
