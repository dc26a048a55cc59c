"""Train the test bed's projector and adapter in PyTorch, on a GPU.

    python -m recipes.testbed --untrained
    python -m recipes.testbed.in_torch --minutes 4 --output weights

The MLX form is `recipes.testbed.run train lora --projector --method none`.
`tests/test_testbed.py` compares their losses: the language model's loss on the answers,
with several questions behind one picture and every visual token kept. Needs the extra
`parity`. Features of pictures are kept on the device, and a picture is drawn several
times with different questions.
"""

import argparse
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipes.testbed import scenes
from recipes.testbed.cache import cache_folder

IGNORE = -100
ASKED = 10  # questions stored for a picture; a step draws some of them
_SEED = 13
_MEANS = (103.939, 116.779, 123.68)
_STAGES = (3, 4, 6, 3)
_LINEAR = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Words:
    """Token ids of prompts and answers.

    prefix: ids before the picture. ask, answer: ids by text of the question or answer.
    """

    prefix: list[int]
    ask: dict[str, list[int]]
    answer: dict[str, list[int]]

    @classmethod
    def of(cls, processor) -> "Words":
        """Return the token ids of every question and answer, from a `Processor`."""
        ask, answer = {}, {}
        encode = processor.tokenizer.encode
        (end,) = encode("<|im_end|>", add_special_tokens=False)
        for question in scenes.QUESTIONS:
            prefix, ask[question] = map(list, processor.prompt(question, 1).segments)
        for word in scenes.ANSWERS:
            answer[word] = [*encode(word, add_special_tokens=False), end]
        return cls(prefix, ask, answer)

    @property
    def longest(self) -> int:
        return max(map(len, self.ask.values())) + max(map(len, self.answer.values()))

    def rows(self, pairs: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and targets, both (Q, L), of questions with their answers."""
        ids = np.zeros((len(pairs), self.longest), np.int64)
        targets = np.full_like(ids, IGNORE)
        for row, (question, word) in enumerate(pairs):
            before, answer = self.ask[question], self.answer[word]
            ids[row, : len(before) + len(answer)] = [*before, *answer]
            start = len(before) - 1
            targets[row, start : start + len(answer)] = answer
        return ids, targets


# The model --------------------------------------------------------------------------


def see(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Return features (B, N, 2048) as `models/resnet.py` does.

    pixels: (B, S, S, 3), 0 to 255.
    """

    def convolve(x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        kernel = weights[f"vision_tower.{name}.weight"]
        bias = weights[f"vision_tower.{name}.bias"]
        return F.conv2d(x, kernel, bias, stride, padding)

    means = torch.tensor(_MEANS, device=pixels.device)
    x = (pixels.flip(-1).float() - means).permute(0, 3, 1, 2)
    x = x.to(weights["vision_tower.stem.weight"].dtype)
    x = F.relu(convolve(x, "stem", 2, 3))
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
    for stage, depth in enumerate(_STAGES):
        for place in range(depth):
            name, stride = f"stages.{stage}.{place}", 2 if stage and not place else 1
            inner = F.relu(convolve(x, f"{name}.reduce", stride))
            inner = F.relu(convolve(inner, f"{name}.spatial", padding=1))
            beside = x if place else convolve(x, f"{name}.shortcut", stride)
            x = F.relu(convolve(inner, f"{name}.expand") + beside)
    return x.flatten(2).transpose(1, 2)


def places(side: int) -> Tensor:
    """Return position sines (N, 16), which `models/resnet_vlm.py` joins to features."""
    rates = 2.0 ** np.arange(4) * math.pi / 2
    middle = (np.arange(side) + 0.5) / side
    rows, columns = np.repeat(middle, side), np.tile(middle, side)
    angles = np.concatenate([rows[:, None] * rates, columns[:, None] * rates], axis=1)
    found = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return torch.tensor(found, dtype=torch.float32)


class Trainee(nn.Module):
    """Trainable projector and adapter of a frozen language model."""

    def __init__(
        self, weights: dict[str, Tensor], config: dict, rank: int, scale: float
    ):
        super().__init__()
        self.text, self.scale, self._frozen = config["text_config"], scale, weights
        self.projector = nn.ParameterDict()
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            value = weights[f"mm_projector.{name}"].float().clone()
            self.projector[name.replace(".", "_")] = nn.Parameter(value)
        self.adapter = nn.ParameterDict()
        for name in self.linears():
            rows, columns = weights[f"language_model.{name}.weight"].shape
            down = torch.empty(columns, rank).uniform_(-1, 1) / math.sqrt(columns)
            self.adapter[_safe(f"{name}.lora_a")] = nn.Parameter(down)
            self.adapter[_safe(f"{name}.lora_b")] = nn.Parameter(
                torch.zeros(rank, rows)
            )

    def linears(self) -> Iterator[str]:
        for layer in range(self.text["num_hidden_layers"]):
            for part, names in _LINEAR.items():
                yield from (f"model.layers.{layer}.{part}.{name}" for name in names)

    def _weight(self, name: str) -> Tensor:
        return self._frozen[f"language_model.{name}.weight"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        down = self.adapter[_safe(f"{name}.lora_a")].to(x.dtype)
        up = self.adapter[_safe(f"{name}.lora_b")].to(x.dtype)
        return F.linear(x, self._weight(name)) + self.scale * (x @ down) @ up

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(
            x, x.shape[-1:], self._weight(name), self.text["rms_norm_eps"]
        )

    def project(self, tokens: Tensor) -> Tensor:
        p = self.projector
        hidden = F.gelu(F.linear(tokens.float(), p["0_weight"], p["0_bias"]))
        return F.linear(hidden, p["2_weight"], p["2_bias"])

    def forward(self, tokens, prefix, ids, targets) -> Tensor:
        """Return the mean loss of the answers' tokens. ids, targets: (B, Q, L)."""
        embed = self._weight("model.embed_tokens")
        batch, questions, length = ids.shape
        visual = self.project(tokens).to(embed.dtype)
        before = embed[prefix].expand(batch, -1, -1)
        x = torch.cat([before, visual, embed[ids.reshape(batch, -1)]], dim=1)
        shared = before.shape[1] + visual.shape[1]
        turn = self._rotation(shared, questions, length, x)
        mask = _mask(shared, questions, length).to(x.device)
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -torch.inf)
        for layer in range(self.text["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            inner = self._norm(x, f"{name}.input_layernorm")
            x = x + self._attend(inner, f"{name}.self_attn", turn, mask)
            inner = self._norm(x, f"{name}.post_attention_layernorm")
            gate = F.silu(self._linear(inner, f"{name}.mlp.gate_proj"))
            inner = gate * self._linear(inner, f"{name}.mlp.up_proj")
            x = x + self._linear(inner, f"{name}.mlp.down_proj")
        used = targets.reshape(batch, -1) != IGNORE
        hidden = self._norm(x[:, shared:][used], "model.norm")
        logits = F.linear(hidden, embed).float()
        return F.cross_entropy(logits, targets.reshape(batch, -1)[used])

    def _attend(self, x: Tensor, name: str, turn, mask: Tensor) -> Tensor:
        heads, shared = (
            self.text[n] for n in ("num_attention_heads", "num_key_value_heads")
        )
        q, k, v = (
            self._linear(x, f"{name}.{part}").unflatten(-1, (count, -1)).transpose(1, 2)
            for part, count in (
                ("q_proj", heads),
                ("k_proj", shared),
                ("v_proj", shared),
            )
        )
        q, k = _rotate(q, *turn), _rotate(k, *turn)
        k, v = (y.repeat_interleave(heads // shared, dim=1) for y in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self._linear(mixed.transpose(1, 2).flatten(2), f"{name}.o_proj")

    def _rotation(self, shared: int, questions: int, length: int, x: Tensor):
        size = self.text["hidden_size"] // self.text["num_attention_heads"]
        half = torch.arange(0, size, 2, device=x.device) / size
        rates = self.text["rope_theta"] ** -half.float()
        where = [torch.arange(shared), shared + torch.arange(length).repeat(questions)]
        angles = torch.cat(where).to(x.device).float()[:, None] * rates
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def save(self, folder: Path) -> None:
        """Write float16 weights in the format of `train lora --projector`."""
        folder.mkdir(parents=True)
        named = {
            f"mm_projector.{n.replace('_', '.')}": p for n, p in self.projector.items()
        }
        for file, tensors in (
            ("projector.safetensors", named),
            ("adapters.safetensors", {_dotted(n): p for n, p in self.adapter.items()}),
        ):
            halves = {
                n: p.detach().half().cpu().contiguous() for n, p in tensors.items()
            }
            save_file(halves, folder / file, metadata={"format": "mlx"})
        rank = next(iter(self.adapter.values())).shape[-1]
        lora = {"rank": rank, "scale": self.scale, "dropout": 0.0}
        layers = self.text["num_hidden_layers"]
        config = {
            "fine_tune_type": "lora",
            "num_layers": layers,
            "lora_parameters": lora,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _safe(name: str) -> str:
    return name.replace(".", "/")


def _dotted(name: str) -> str:
    return name.replace("/", ".")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


def _mask(shared: int, questions: int, length: int) -> Tensor:
    """Return the attention mask (T, T), as `question_mask` in `train/layout.py`."""
    group = np.repeat(np.arange(questions + 1), [shared] + [length] * questions)
    causal = np.tril(np.ones((len(group), len(group)), bool))
    return torch.tensor(causal & ((group[:, None] == group) | (group == 0)))


# Training data ----------------------------------------------------------------------


class Pictures(torch.utils.data.IterableDataset):
    """Endless stream of pictures with ids and targets of `ASKED` questions each."""

    def __init__(self, words: Words):
        self.words = words

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        number, step = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            rng = np.random.default_rng((_SEED, number))
            scene = scenes.sample_scene(rng, "train")
            pairs: dict[tuple[str, str], None] = {}
            for _ in range(4):
                asked = scenes.ask(rng, scene)
                pairs |= dict.fromkeys((one.prompt, one.answer) for one in asked)
            rows = self.words.rows(list(pairs))
            again = rng.permutation(np.resize(np.arange(len(pairs)), ASKED))
            yield (np.asarray(scene.draw()), *(array[again] for array in rows))
            number += step


class Store:
    """Buffer of picture features on the device, which a thread fills."""

    def __init__(self, tower: dict, words: Words, size: int, workers: int, device):
        self.count, self._size = 0, size
        shape = (ASKED, words.longest)
        self.features = torch.empty(size, 256, 2048, dtype=torch.half, device=device)
        self.ids, self.targets = (
            torch.empty(size, *shape, dtype=torch.long, device=device) for _ in "it"
        )
        loader = torch.utils.data.DataLoader(
            Pictures(words),
            batch_size=16,
            num_workers=workers,
            pin_memory=device != "cpu",
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(tower, loader, device))
        self._thread.start()

    @torch.no_grad()
    def _fill(self, tower: dict, loader, device) -> None:
        number = 0
        for pixels, ids, targets in loader:
            if self._stop.is_set():
                return
            seen = see(tower, pixels.to(device, non_blocking=True))
            start = number % (self._size - len(seen) + 1)
            place = slice(start, start + len(seen))
            self.features[place] = seen.half()
            self.ids[place], self.targets[place] = ids.to(device), targets.to(device)
            if device != "cpu":
                torch.cuda.current_stream().synchronize()
            number += len(seen)
            self.count = min(number, self._size - len(seen))

    def draw(self, pictures: int, questions: int):
        chosen = torch.randint(self.count, (pictures,))
        rows = torch.rand(pictures, ASKED).argsort(dim=1)[:, :questions]
        where = chosen[:, None].to(self.ids.device), rows.to(self.ids.device)
        chosen = chosen.to(self.ids.device)
        return self.features[chosen], self.ids[where], self.targets[where]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write; must not exist")
    add("--base", type=Path, default=cache_folder("testbed") / "base")
    add("--words", type=Path, help="token ids, where mlx_tokprune cannot be loaded")
    add("--minutes", type=float, default=4.0)
    add("--learning-rate", type=float, default=1e-3)
    add("--rank", type=int, default=8)
    add("--scale", type=float, default=2.0, help="of the adapter")
    add("--batch", type=int, default=64, help="pictures")
    add("--questions", type=int, default=8, help="about each")
    add("--store", type=int, default=40000, help="pictures that are kept")
    add("--workers", type=int, default=14, help="processes that draw")
    args = parser.parse_args()
    words = _words(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    begin = time.time()
    config = json.loads((args.base / "config.json").read_text())
    weights = load_file(args.base / "model.safetensors", device=device)
    tower = {
        n: _to_torch(w, device) for n, w in weights.items() if n.startswith("vision")
    }
    frozen = {n: w.to(dtype) for n, w in weights.items() if not n.startswith("vision")}
    torch.manual_seed(_SEED)
    model = Trainee(frozen, config, args.rank, args.scale).to(device)
    store = Store(tower, words, args.store, args.workers, device)
    while store.count < 8 * args.batch:
        time.sleep(0.1)
    print(f"{time.time() - begin:.0f} s: first {store.count} pictures", flush=True)
    where = places(16).to(device)
    prefix = torch.tensor(words.prefix, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    start, step, losses, end = time.time(), 0, [], begin + 60 * args.minutes
    while (now := time.time()) < end:
        done = (now - start) / (end - start)
        rate = args.learning_rate * min(1, (step + 1) / 100)
        rate *= 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        seen, ids, targets = store.draw(args.batch, args.questions)
        tokens = torch.cat([seen.float(), where.expand(len(seen), -1, -1)], dim=-1)
        loss = model(tokens, prefix, ids, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        step += 1
        if step % 50 == 0:
            mean = torch.stack(losses[-50:]).mean().item()
            about = f"step {step}, {store.count} pictures, loss {mean:.3f}"
            print(f"{time.time() - begin:.0f} s: {about}", flush=True)
    model.save(args.output)
    print(f"wrote {args.output} after {step} steps", flush=True)
    store.close()


def _to_torch(weight: Tensor, device) -> Tensor:
    """Return a weight in PyTorch's layout, in float16 on a GPU, else float32."""
    weight = weight.half() if device == "cuda" else weight.float()
    if weight.ndim == 4:
        weight = weight.permute(0, 3, 1, 2).contiguous(
            memory_format=torch.channels_last
        )
    return weight


def _words(args) -> Words:
    if args.words:
        return Words(**json.loads(args.words.read_text()))
    from mlx_tokprune import load

    return Words.of(load(args.base)[1])


if __name__ == "__main__":
    main()
