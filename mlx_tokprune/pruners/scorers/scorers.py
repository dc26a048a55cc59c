"""Scorers: small networks from `Features` to a score (B, N) for each visual token.

A pruner keeps the highest; how many comes from outside, and scorers are told the share
as the extra `budget` (B,). One scorer serves every budget. A scorer of which
`own_count` is true learned which scores are above 0: those tokens stay, so the last
layer's bias is its threshold, and it is told no budget. `model_signs` tells the model
that it was trained for from others (`fitting.py`).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...features import Features

_FREQUENCIES = 4  # of a token's place, along each side
_BUDGET_SINES = 256
_UNTOLD = 0.5


def gelu(x: mx.array) -> mx.array:
    """Exact; MLX's own is compiled, which counting and Core ML cannot look into."""
    return x * (1 + mx.erf(x * 0.5**0.5)) / 2


def sines(values: mx.array, count: int, longest: float) -> mx.array:
    """(...,) -> (..., count): sines and cosines of growing periods up to `longest`."""
    half = count // 2
    rates = np.exp(np.arange(half) * (-math.log(longest) / max(1, half - 1))) * math.pi
    angles = values[..., None] * mx.array(rates.astype(np.float32))
    return mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)


def places(features: Features) -> mx.array:
    """(N, 4 * frequencies): where each token is, in rows and columns of its picture."""
    height, width = features.grid or (1, features.total // features.pictures)
    rates = 2.0 ** np.arange(_FREQUENCIES) * math.pi
    rows = np.repeat((np.arange(height) + 0.5) / height, width)
    columns = np.tile((np.arange(width) + 0.5) / width, height)
    angles = np.concatenate([rows[:, None] * rates, columns[:, None] * rates], axis=1)
    found = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return mx.array(np.tile(found, (features.pictures, 1)).astype(np.float32))


class Attend(nn.Module):
    """A pre-norm transformer block; tokens of `mask` (B, T) false are not seen."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        shape = (*x.shape[:2], self.heads, -1)
        parts = mx.split(self.qkv(self.norm1(x)), 3, axis=-1)
        q, k, v = (part.reshape(shape).swapaxes(1, 2) for part in parts)
        products = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            products = mx.where(mask[:, None, None], products, -1e9)
        mixed = mx.softmax(products, axis=-1) @ v
        x = x + self.out(mixed.swapaxes(1, 2).reshape(x.shape))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Adaptive(nn.Module):
    """Scores at the tower for any budget, without the question.

    The budget, as sines through a small network, attends to the visual tokens once; a
    token's score comes from itself, its place and what the budget found. The plan of
    AdaLLaVA (arXiv 2503.10621) after the tower.
    """

    at = "tower"
    needs: ClassVar[tuple[str, ...]] = ()
    own_count = False
    model_signs: str | None = None

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.settings = {"channels": channels, "width": width}
        self.norm = nn.LayerNorm(channels)
        self.token = nn.Linear(channels, width)
        self.place = nn.Linear(4 * _FREQUENCIES, width)
        self.budget = [nn.Linear(_BUDGET_SINES, width), nn.Linear(width, width)]
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.join = nn.Linear(2 * width, width)
        self.score = nn.Linear(width, 1)

    def __call__(self, features: Features) -> mx.array:
        tokens = self.norm(features.tokens.astype(mx.float32))
        x = self.token(tokens) + self.place(places(features))
        asked = told(self.budget, features)
        products = asked[:, None] @ self.key(x).swapaxes(1, 2) * asked.shape[-1] ** -0.5
        found = mx.softmax(products, axis=-1) @ self.value(x) + asked[:, None]
        found = mx.broadcast_to(found, x.shape)
        joined = self.join(mx.concatenate([x, found], axis=-1))
        return self.score(gelu(joined))[..., 0]


class Constant(Adaptive):
    """`Adaptive` that is not told its budget: to see what that is worth."""

    def __call__(self, features: Features) -> mx.array:
        rest = {k: v for k, v in features.extras.items() if k != "budget"}
        return super().__call__(dataclasses.replace(features, extras=rest))


class Inside(nn.Module):
    """Scores at the tower for any budget, which is a token in its attention blocks.

    The tower stays as it is: what goes into each of its attention blocks, and at last
    what comes out of it, is read again by a narrow block, in which the budget is one
    more key and value, and a query that reads. A token's score comes from it and the
    budget's token after the last of them.
    The plan of AdaLLaVA (arXiv 2503.10621) inside the tower.
    """

    at = "tower"
    needs: ClassVar[tuple[str, ...]] = ("blocks",)
    own_count = False
    model_signs: str | None = None

    def __init__(
        self, channels: int, sizes: Sequence[int], width: int = 48, heads: int = 4
    ):
        super().__init__()
        self.settings = {
            **{"channels": channels, "sizes": list(sizes)},
            **{"width": width, "heads": heads},
        }
        every = (*sizes, channels)
        self.inputs = [[nn.LayerNorm(size), nn.Linear(size, width)] for size in every]
        self.place = nn.Linear(4 * _FREQUENCIES, width)
        self.budget = [nn.Linear(_BUDGET_SINES, width), nn.Linear(width, width)]
        self.blocks = [Attend(width, heads) for _ in every]
        self.norm_out = nn.LayerNorm(width)
        self.join = nn.Linear(2 * width, width)
        self.score = nn.Linear(width, 1)

    def __call__(self, features: Features) -> mx.array:
        sizes = self.settings["sizes"]
        read = mx.concatenate([features.extras["blocks"], features.tokens], axis=-1)
        parts = mx.split(read.astype(mx.float32), np.cumsum(sizes).tolist(), axis=-1)
        x, asked = self.place(places(features)), told(self.budget, features)[:, None]
        for (norm, narrow), block, part in zip(
            self.inputs, self.blocks, parts, strict=True
        ):
            joined = block(mx.concatenate([x + narrow(norm(part)), asked], axis=1))
            x, asked = joined[:, :-1], joined[:, -1:]
        found = mx.broadcast_to(self.norm_out(asked), x.shape)
        joined = self.join(mx.concatenate([self.norm_out(x), found], axis=-1))
        return self.score(gelu(joined))[..., 0]


class Asking(nn.Module):
    """Scores at the prompt: which visual tokens does this question need?

    Visual tokens with their places, the prompt behind them and the budget read each
    other in a few small transformer blocks.
    """

    at = "prompt"
    needs: ClassVar[tuple[str, ...]] = ("text",)
    own_count = False
    model_signs: str | None = None

    def __init__(self, channels: int, width: int = 96, depth: int = 2, heads: int = 4):
        super().__init__()
        self.settings = {
            **{"channels": channels, "width": width},
            **{"depth": depth, "heads": heads},
        }
        self.norm, self.norm_text = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.token = nn.Linear(channels, width)
        self.place = nn.Linear(4 * _FREQUENCIES, width)
        self.text = nn.Linear(channels, width)
        self.budget = nn.Linear(_BUDGET_SINES, width)
        self.blocks = [Attend(width, heads) for _ in range(depth)]
        self.norm_out = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)

    def __call__(self, features: Features) -> mx.array:
        tokens = self.norm(features.tokens.astype(mx.float32))
        text = self.norm_text(features.extras["text"].astype(mx.float32))
        width = self.settings["width"]
        asked = self.budget(sines(budget(features), _BUDGET_SINES, 1e-3))[:, None]
        x = self.token(tokens) + self.place(places(features)) + asked
        order = sines(mx.arange(text.shape[1]), width, 1e-2)
        y = self.text(text) + order + asked
        joined = mx.concatenate([x, *self.besides(features), y], axis=1)
        mask = features.extras.get("text_mask")
        if mask is not None:  # in training, where questions are padded
            before = joined.shape[1] - text.shape[1]
            seen = mx.ones((len(joined), before), mx.bool_)
            mask = mx.concatenate([seen, mask], axis=1)
        for block in self.blocks:
            joined = block(joined, mask)
        return self.score(self.norm_out(joined[:, : x.shape[1]]))[..., 0]

    def besides(self, features: Features) -> list[mx.array]:
        """(B, n, width) tokens that are read, too."""
        return []


class Acting(Asking):
    """`Asking` of a policy, which also reads what the robot did last, as one token.

    actions: how many numbers an action has.
    """

    needs: ClassVar[tuple[str, ...]] = ("text", "action_previous")

    def __init__(
        self,
        channels: int,
        actions: int,
        width: int = 96,
        depth: int = 2,
        heads: int = 4,
    ):
        super().__init__(channels, width, depth, heads)
        self.settings |= {"actions": actions}
        self.action = nn.Linear(actions, width)

    def besides(self, features: Features) -> list[mx.array]:
        return [self.action(features.extras["action_previous"])[:, None]]


def budget(features: Features) -> mx.array:
    """(B,) the share of tokens to keep; a half where nobody says."""
    share = features.extras.get("budget")
    return mx.full((len(features.tokens),), _UNTOLD) if share is None else share


def untold(scorer: nn.Module, share: float) -> None:
    """Have it score without a budget as it did when it was told this share."""
    if isinstance(scorer, Constant):
        return
    first = scorer.budget if isinstance(scorer, Asking) else scorer.budget[0]
    before, after = sines(mx.array([share, _UNTOLD]), _BUDGET_SINES, 1e-3)
    first.bias = first.bias + first.weight @ (before - after)


def told(layers: list[nn.Linear], features: Features) -> mx.array:
    """(B, width) the budget, as sines through a small network."""
    first, second = layers
    return second(gelu(first(sines(budget(features), _BUDGET_SINES, 1e-3))))


SCORERS: dict[str, type[nn.Module]] = {
    "adaptive": Adaptive,
    "inside": Inside,
    "constant": Constant,
    "asking": Asking,
    "acting": Acting,
}
