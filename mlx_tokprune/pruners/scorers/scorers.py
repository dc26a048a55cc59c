"""Scorers: small networks from `Features` to a score (B, N) for each visual token.

A pruner keeps the highest scores. The count comes from outside; the scorer gets its
share as the extra `budget` (B,), so one scorer serves every budget. A scorer with
`own_count` keeps the scores above 0: the bias of its last layer is the learned
threshold, and it gets no budget. `model_signs` identifies the model that it was
trained for (`fitting.py`). Names of submodules are keys of the weights on disk.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...features import Features

_FREQUENCIES = 4  # of the position code, along each side
_BUDGET_SINES = 256
_DEFAULT_BUDGET = 0.5


def gelu(x: mx.array) -> mx.array:
    """Apply the exact GELU.

    MLX's `nn.gelu` is compiled: the counting of operations and the Core ML export
    cannot trace into it.
    """
    return x * (1 + mx.erf(x * 0.5**0.5)) / 2


def sines(values: mx.array, count: int, longest: float) -> mx.array:
    """Encode values (...,) as sines and cosines (..., count) of growing periods.

    longest: the last period, relative to the first.
    """
    half = count // 2
    rates = np.exp(np.arange(half) * (-math.log(longest) / max(1, half - 1))) * math.pi
    angles = values[..., None] * mx.array(rates.astype(np.float32))
    return mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)


def places(features: Features) -> mx.array:
    """Return position codes (N, 4 * frequencies) of row and column in the picture."""
    height, width = features.grid or (1, features.total // features.pictures)
    rates = 2.0 ** np.arange(_FREQUENCIES) * math.pi
    rows = np.repeat((np.arange(height) + 0.5) / height, width)
    columns = np.tile((np.arange(width) + 0.5) / width, height)
    angles = np.concatenate([rows[:, None] * rates, columns[:, None] * rates], axis=1)
    codes = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return mx.array(np.tile(codes, (features.pictures, 1)).astype(np.float32))


class AttentionBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        """Transform x (B, T, width); false values of `mask` (B, T) hide keys."""
        shape = (*x.shape[:2], self.heads, -1)
        parts = mx.split(self.qkv(self.norm1(x)), 3, axis=-1)
        q, k, v = (part.reshape(shape).swapaxes(1, 2) for part in parts)
        products = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            products = mx.where(mask[:, None, None], products, -1e9)
        mixed = mx.softmax(products, axis=-1) @ v
        x = x + self.out(mixed.swapaxes(1, 2).reshape(x.shape))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Scorer(nn.Module):
    """Base of scorers.

    at, needs: place, and names of the extras that are read there. own_count: whether
    the scores above 0 are kept. settings: arguments of the constructor.
    """

    at: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    own_count = False
    model_signs: str | None = None
    settings: dict[str, Any]

    def __call__(self, features: Features) -> mx.array:
        """Return scores (B, N)."""
        raise NotImplementedError


class AdaptiveScorer(Scorer):
    """A scorer at the tower for any budget, which does not read the prompt.

    The budget, as sines through a small network, attends to the visual tokens once. A
    token's score is a function of the token, its position and that result. After
    AdaLLaVA (arXiv 2503.10621), behind the tower.
    """

    at = "tower"

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
        """Return scores (B, N)."""
        tokens = self.norm(features.tokens.astype(mx.float32))
        x = self.token(tokens) + self.place(places(features))
        query = embed_budget(self.budget, features)
        products = query[:, None] @ self.key(x).swapaxes(1, 2) * query.shape[-1] ** -0.5
        context = mx.softmax(products, axis=-1) @ self.value(x) + query[:, None]
        context = mx.broadcast_to(context, x.shape)
        joined = self.join(mx.concatenate([x, context], axis=-1))
        return self.score(gelu(joined))[..., 0]


class ConstantScorer(AdaptiveScorer):
    """An `AdaptiveScorer` without the budget: the control of its benefit."""

    def __call__(self, features: Features) -> mx.array:
        """Return scores (B, N), equal for every budget."""
        rest = {k: v for k, v in features.extras.items() if k != "budget"}
        return super().__call__(dataclasses.replace(features, extras=rest))


class TowerScorer(Scorer):
    """A scorer at the tower for any budget, which reads the tower's blocks.

    The tower is not changed. The input of each of its attention blocks, and its output,
    go through a narrow block of the scorer, in which the budget is one more token. A
    token's score is a function of the token and the budget's token after the last
    block. After AdaLLaVA (arXiv 2503.10621), inside the tower.
    """

    at = "tower"
    needs = ("blocks",)

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
        self.blocks = [AttentionBlock(width, heads) for _ in every]
        self.norm_out = nn.LayerNorm(width)
        self.join = nn.Linear(2 * width, width)
        self.score = nn.Linear(width, 1)

    def __call__(self, features: Features) -> mx.array:
        """Return scores (B, N)."""
        sizes = self.settings["sizes"]
        read = mx.concatenate([features.extras["blocks"], features.tokens], axis=-1)
        parts = mx.split(read.astype(mx.float32), np.cumsum(sizes).tolist(), axis=-1)
        x = self.place(places(features))
        share = embed_budget(self.budget, features)[:, None]
        for (norm, narrow), block, part in zip(
            self.inputs, self.blocks, parts, strict=True
        ):
            joined = block(mx.concatenate([x + narrow(norm(part)), share], axis=1))
            x, share = joined[:, :-1], joined[:, -1:]
        context = mx.broadcast_to(self.norm_out(share), x.shape)
        joined = self.join(mx.concatenate([self.norm_out(x), context], axis=-1))
        return self.score(gelu(joined))[..., 0]


class PromptScorer(Scorer):
    """A scorer at the prompt, which reads the question.

    Visual tokens with their positions, the prompt behind them and the budget attend to
    each other in a few small transformer blocks.
    """

    at = "prompt"
    needs = ("text",)

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
        self.blocks = [AttentionBlock(width, heads) for _ in range(depth)]
        self.norm_out = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)

    def __call__(self, features: Features) -> mx.array:
        """Return scores (B, N)."""
        tokens = self.norm(features.tokens.astype(mx.float32))
        text = self.norm_text(features.extras["text"].astype(mx.float32))
        width = self.settings["width"]
        share = self.budget(sines(budget(features), _BUDGET_SINES, 1e-3))[:, None]
        x = self.token(tokens) + self.place(places(features)) + share
        order = sines(mx.arange(text.shape[1]), width, 1e-2)
        y = self.text(text) + order + share
        joined = mx.concatenate([x, *self.extra_tokens(features), y], axis=1)
        mask = features.extras.get("text_mask")
        if mask is not None:  # in training, where questions are padded
            before = joined.shape[1] - text.shape[1]
            visible = mx.ones((len(joined), before), mx.bool_)
            mask = mx.concatenate([visible, mask], axis=1)
        for block in self.blocks:
            joined = block(joined, mask)
        return self.score(self.norm_out(joined[:, : x.shape[1]]))[..., 0]

    def extra_tokens(self, features: Features) -> list[mx.array]:
        """Return further tokens (B, n, width) to attend to: none."""
        return []


class ActionScorer(PromptScorer):
    """A `PromptScorer` for policies, which also reads the last action as one token.

    actions: numbers of an action.
    """

    needs = ("text", "action_previous")

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

    def extra_tokens(self, features: Features) -> list[mx.array]:
        """Return the last action as one token (B, 1, width)."""
        return [self.action(features.extras["action_previous"])[:, None]]


def budget(features: Features) -> mx.array:
    """Return the share of tokens to keep (B,), 0.5 without the extra `budget`."""
    share = features.extras.get("budget")
    return mx.full((len(features.tokens),), _DEFAULT_BUDGET) if share is None else share


def fold_budget(scorer: nn.Module, share: float) -> None:
    """Make a scorer without a budget score as it does with the budget `share`."""
    if isinstance(scorer, ConstantScorer):
        return
    first = scorer.budget if isinstance(scorer, PromptScorer) else scorer.budget[0]
    before, after = sines(mx.array([share, _DEFAULT_BUDGET]), _BUDGET_SINES, 1e-3)
    first.bias = first.bias + first.weight @ (before - after)


def embed_budget(layers: list[nn.Linear], features: Features) -> mx.array:
    """Return the budget as (B, width): sines through two layers."""
    first, second = layers
    return second(gelu(first(sines(budget(features), _BUDGET_SINES, 1e-3))))


SCORERS: dict[str, type[Scorer]] = {
    "adaptive": AdaptiveScorer,
    "inside": TowerScorer,
    "constant": ConstantScorer,
    "asking": PromptScorer,
    "acting": ActionScorer,
}
