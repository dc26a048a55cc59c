"""PyTorch twin of the demo model and its helpers, with the tensor names of MLX.

The MLX forms are `recipes/demo/student.py` and the losses of `recipes/demo/recipe.py`;
`tests/test_demo_in_torch.py` compares both. `recipes/demo/in_torch.py` trains the twin.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_tokprune.scenes.pictures import CANVAS, CELL
from mlx_tokprune.train.layout import IGNORE, question_mask

TOWER = "vlm.vision_tower.vision_model"
LANGUAGE = "vlm.language_model.model"
_FINE_STAGE = 2  # the third stage works at stride 16
_STATISTICS = ("running_mean", "running_var")


def _safe(name: str) -> str:
    return name.replace(".", "/")  # torch takes no dots in names


def to_torch(name: str, array: np.ndarray) -> Tensor:
    """Return an MLX-layout array as a channels-first tensor."""
    if array.ndim == 4:
        array = array.transpose(0, 3, 1, 2)
    elif ".layer_scale" in name:
        array = array.transpose(2, 0, 1)
    return torch.from_numpy(np.array(array, np.float32, order="C"))


def to_mlx(name: str, tensor: Tensor) -> np.ndarray:
    """Return a channels-first tensor as an MLX-layout array."""
    array = tensor.detach().float().cpu().numpy()
    if array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    elif ".layer_scale" in name:
        array = array.transpose(1, 2, 0)
    return np.array(array, order="C")


class Student(nn.Module):
    """FastVLM with helper heads and oracle.

    weights: arrays by MLX name, in MLX layout. config: as `DEMO_CONFIG`. prefix: token
    ids before the picture.
    """

    def __init__(self, weights: dict[str, np.ndarray], config: dict, prefix: list[int]):
        super().__init__()
        self.config, self.vision = config, config["vision_config"]
        self.all = nn.ParameterDict()
        for name, array in weights.items():
            tensor = to_torch(name, array)
            if name.endswith(_STATISTICS):
                self.register_buffer(_safe(name), tensor)
            else:
                self.all[_safe(name)] = nn.Parameter(tensor)
        self.register_buffer("prefix", torch.tensor(prefix), persistent=False)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the weights by MLX name, in MLX layout."""
        found = [*self.all.items(), *self.named_buffers()]
        named = ((n.replace("/", "."), t) for n, t in found if n != "prefix")
        return {name: to_mlx(name, tensor) for name, tensor in named}

    def get(self, name: str) -> Tensor:
        return self.all[_safe(name)]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = _safe(f"{name}.bias")
        bias = self.all[bias] if bias in self.all else None
        return F.linear(x, self.get(f"{name}.weight"), bias)

    def _convolve(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel, bias = self.get(f"{name}.weight"), _safe(f"{name}.bias")
        bias = self.all[bias] if bias in self.all else None
        groups = x.shape[1] // kernel.shape[1]
        return F.conv2d(x, kernel, bias, stride, kernel.shape[-1] // 2, 1, groups)

    # Tower --------------------------------------------------------------------------

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return visual tokens (B, N, C) and fine features (B, H, W, C').

        pixels: (B, S, S, 3) in [0, 1].
        """
        x, fine, number = pixels.permute(0, 3, 1, 2), None, 0
        for place, stride in enumerate((2, 2, 1)):
            name = f"{TOWER}.patch_embed.blocks.{place}.reparam_conv"
            x = F.gelu(self._convolve(x, name, stride))
        for stage, depth in enumerate(self.vision["layers"]):
            if self.vision["pos_embs_shapes"][stage] is not None:
                x = self._convolve(x, f"{TOWER}.network.{number}.reparam_conv")
                number += 1
            attends = self.vision["token_mixers"][stage] == "attention"
            for place in range(depth):
                name = f"{TOWER}.network.{number}.{place}"
                x = self._attention(x, name) if attends else self._mixer(x, name)
            fine = x if stage == _FINE_STAGE else fine
            number += 1
            if stage + 1 < len(self.vision["layers"]):
                name = f"{TOWER}.network.{number}.proj"
                x = F.gelu(self._convolve(x, f"{name}.0.lkb_reparam", 2))
                x = F.gelu(self._convolve(x, f"{name}.1.reparam_conv"))
                number += 1
        x = self._convolve(x, f"{TOWER}.conv_exp.reparam_conv")
        gate = x.mean((2, 3), keepdim=True)
        gate = F.relu(self._convolve(gate, f"{TOWER}.conv_exp.se.reduce"))
        gate = self._convolve(gate, f"{TOWER}.conv_exp.se.expand").sigmoid()
        x = F.gelu(x * gate)
        return x.flatten(2).transpose(1, 2), fine.permute(0, 2, 3, 1)

    def _mixer(self, x: Tensor, name: str) -> Tensor:
        x = self._convolve(x, f"{name}.token_mixer.reparam_conv")
        return x + self.get(f"{name}.layer_scale") * self._feed(x, f"{name}.convffn")

    def _attention(self, x: Tensor, name: str) -> Tensor:
        size, mixer = x.shape, f"{name}.token_mixer"
        flat = x.flatten(2).transpose(1, 2)
        about = (self.get(f"{name}.norm.{part}") for part in ("weight", "bias"))
        parts = self._linear(
            F.layer_norm(flat, size[1:2], *about, 1e-5), f"{mixer}.qkv"
        )
        heads = (-1, self.vision["head_dim"])
        q, k, v = (p.unflatten(-1, heads).transpose(1, 2) for p in parts.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        mixed = self._linear(mixed, f"{mixer}.proj").transpose(1, 2).reshape(size)
        x = x + self.get(f"{name}.layer_scale_1") * mixed
        return x + self.get(f"{name}.layer_scale_2") * self._feed(x, f"{name}.convffn")

    def _feed(self, x: Tensor, name: str) -> Tensor:
        x, norm = self._convolve(x, f"{name}.conv.conv"), f"{name}.conv.bn"
        known = (self.get_buffer(_safe(f"{norm}.{part}")) for part in _STATISTICS)
        about = (self.get(f"{norm}.{part}") for part in ("weight", "bias"))
        x = F.batch_norm(x, *known, *about, self.training, 0.1, 1e-5)
        return self._convolve(F.gelu(self._convolve(x, f"{name}.fc1")), f"{name}.fc2")

    # Language model -----------------------------------------------------------------

    def project(self, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self._linear(tokens, "vlm.mm_projector.0"))
        return self._linear(hidden, "vlm.mm_projector.2")

    def answer_logits(self, visual, indices, total: int, ids) -> Tensor:
        """Return logits (B, Q, L, V) of packed questions, as `train/packing.py`.

        Questions do not attend to each other. visual: (B, K, D), the tokens `indices`
        (B, K) of `total`. ids: (B, Q, L).
        """
        (batch, count, length), device = ids.shape, ids.device
        start, shared = len(self.prefix), len(self.prefix) + visual.shape[1]
        table = self.get(f"{LANGUAGE}.embed_tokens.weight")
        before = F.embedding(self.prefix, table).expand(batch, -1, -1)
        asked = F.embedding(ids.flatten(1), table)
        x = torch.cat([before, visual.to(table.dtype), asked], dim=1)
        first = torch.arange(start, device=device).expand(batch, -1)
        rest = start + total + torch.arange(length, device=device).repeat(count)
        places = torch.cat([first, start + indices, rest.expand(batch, -1)], dim=1)
        turn = self._rotation(places)
        mask = _mask(shared, count, length, device)
        for layer in range(self.config["num_hidden_layers"]):
            name = f"{LANGUAGE}.layers.{layer}"
            inner = self._norm(x, f"{name}.input_layernorm")
            x = x + self._attend(inner, f"{name}.self_attn", turn, mask)
            inner = self._norm(x, f"{name}.post_attention_layernorm")
            gate = F.silu(self._linear(inner, f"{name}.mlp.gate_proj"))
            inner = gate * self._linear(inner, f"{name}.mlp.up_proj")
            x = x + self._linear(inner, f"{name}.mlp.down_proj")
        hidden = self._norm(x[:, shared:], f"{LANGUAGE}.norm")
        return F.linear(hidden, table).float().unflatten(1, (count, length))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.get(f"{name}.weight")
        return F.rms_norm(x, x.shape[-1:], weight, self.config["rms_norm_eps"])

    def _attend(self, x: Tensor, name: str, turn, mask: Tensor) -> Tensor:
        heads, groups = (
            self.config[f"num_{n}_heads"] for n in ("attention", "key_value")
        )
        q, k, v = (
            self._linear(x, f"{name}.{part}_proj")
            .unflatten(-1, (n, -1))
            .transpose(1, 2)
            for part, n in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = _rotate(q, *turn), _rotate(k, *turn)
        k, v = (y.repeat_interleave(heads // groups, dim=1) for y in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self._linear(mixed.transpose(1, 2).flatten(2), f"{name}.o_proj")

    def _rotation(self, places: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config["hidden_size"] // self.config["num_attention_heads"]
        rates = torch.arange(0, size, 2, device=places.device).float() / size
        angles = places[:, None, :, None] * self.config["rope_theta"] ** -rates
        return angles.cos(), angles.sin()

    # Helpers ------------------------------------------------------------------------

    def oracle(self, cells: dict[str, Tensor]) -> Tensor:
        """Return oracle tokens (B, N, D) of cell labels (B, N)."""
        total = self._linear(_place(cells), "oracle.place")
        for name in ("shape", "color", "word", "tens", "units"):
            rows = cells[name] + (0 if name in ("shape", "color") else 1)
            total = total + F.embedding(rows, self.get(f"oracle.tables.{name}.weight"))
        return total * self.get("oracle.scale")

    def cell(self, tokens: Tensor, name: str) -> Tensor:
        """Return the logits of the helper head `name` for each cell."""
        return self._linear(tokens, f"heads.cell.{name}").float()

    # Losses -------------------------------------------------------------------------

    def forward(self, loss: str, batch: dict) -> Tensor:
        """Return the loss of a batch.

        loss: tower, language, align or joint. batch: cells {(B, N)} and, where the
        stage has them, pixels (B, S, S, 3) in [0, 1], fine {(B, H, W)}, ids and targets
        (B, Q, L); for `language` also keep, uniform (B, N) and normal (B, keep, D).
        """
        return getattr(self, f"{loss}_loss")(batch)

    def tower_loss(self, batch: dict) -> Tensor:
        tokens, fine = self.see(batch["pixels"])
        whole = batch["pixels"].shape[1] == CANVAS
        return self._cell_loss(tokens, batch, whole) + 0.5 * self._fine_loss(
            fine, batch
        )

    def language_loss(self, batch: dict) -> Tensor:
        visual, shapes = self.oracle(batch["cells"]), batch["cells"]["shape"]
        scores = 2.0 * (shapes > 0) + batch["uniform"]
        indices = scores.argsort(1, descending=True)[:, : batch["keep"]].sort(1).values
        kept = visual.gather(1, indices[..., None].expand(-1, -1, visual.shape[-1]))
        spread = kept.detach().std(unbiased=False)
        kept = kept + 0.05 * spread * batch["normal"]
        return self._answer_loss(kept, indices, batch)

    def align_loss(self, batch: dict) -> Tensor:
        with torch.no_grad():
            tokens, target = self.see(batch["pixels"])[0], self.oracle(batch["cells"])
        error = (self.project(tokens) - target).float().square().mean(-1)
        error = error / target.float().var(unbiased=False)
        occupied = batch["cells"]["shape"] > 0
        return _masked_mean(error, occupied) + 0.3 * _masked_mean(error, ~occupied)

    def joint_loss(self, batch: dict) -> Tensor:
        tokens, fine = self.see(batch["pixels"])
        answers = self._answer_loss(self.project(tokens), every(tokens), batch)
        helpers = 0.5 * self._cell_loss(tokens, batch, True)
        return 2 * answers + helpers + 0.2 * self._fine_loss(fine, batch)

    def _answer_loss(self, visual, indices, batch: dict) -> Tensor:
        total, targets = batch["cells"]["shape"].shape[1], batch["targets"]
        logits = self.answer_logits(visual, indices, total, batch["ids"])
        return F.cross_entropy(
            logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORE
        )

    def _cell_loss(self, tokens: Tensor, batch: dict, whole: bool) -> Tensor:
        labels = batch["cells"]
        occupied = labels["shape"] > 0

        def of(name: str, label: Tensor, weights: Tensor) -> Tensor:
            return _classify(self.cell(tokens, name), label, weights)

        weights = torch.where(occupied, 1.0, 0.3)
        loss = of("shape", labels["shape"], weights)
        loss = loss + of("color", labels["color"], labels["color"] > 0)
        for name in ("x", "y"):
            inside = labels[name] % (CELL // 8)
            loss = loss + 0.3 * of(f"{name}_inside", inside, occupied)
        for name in ("x", "y") if whole else ():
            loss = loss + 0.5 * of(name, labels[name], occupied)
        for name in ("word", "tens", "units"):
            loss = loss + of(name, labels[name], labels[name] >= 0)
        return loss

    def _fine_loss(self, fine: Tensor, batch: dict) -> Tensor:
        losses = (
            _classify(
                self._linear(fine, f"heads.fine.{name}").float(),
                label,
                torch.where(label > 0, 1.0, 0.1),
            )
            for name, label in batch["fine"].items()
        )
        return torch.stack(list(losses)).sum()


@functools.lru_cache(maxsize=256)
def _mask(shared: int, count: int, length: int, device) -> Tensor:
    return torch.from_numpy(question_mask(shared, count, length)).to(device)


def every(tokens: Tensor) -> Tensor:
    """Return indices (B, N) of all tokens (B, N, C)."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)


def _place(labels: dict[str, Tensor]) -> Tensor:
    """Return position features (B, N, 10) of each cell's thing, else of its centre."""
    side, occupied = CANVAS // CELL, labels["shape"] > 0
    cell = torch.arange(side * side, device=occupied.device)
    features = []
    for name, index in (("x", cell % side), ("y", cell // side)):
        middle = (index * CELL + CELL / 2) / CANVAS
        where = torch.where(occupied, (labels[name] * 8 + 4) / CANVAS, middle)
        features.append(2 * where - 1)
        for turns in (0.5, 1):
            angle = 2 * math.pi * turns * where
            features += [angle.sin(), angle.cos()]
    return torch.stack(features, dim=-1)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    one, two = x.float().chunk(2, dim=-1)
    turned = [one * cosine - two * sine, two * cosine + one * sine]
    return torch.cat(turned, dim=-1).to(x.dtype)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp_min(1)


def _classify(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of cross-entropies; labels below 0 need weight 0."""
    labels = labels.clamp(0, logits.shape[-1] - 1)
    losses = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
    return (losses * weights).sum() / weights.sum().clamp_min(math.ulp(1.0))
