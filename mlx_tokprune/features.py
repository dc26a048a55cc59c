"""The contract between what sees and what prunes: `Features` in, `Selection` out.

Shapes use B samples, N visual tokens in raster order, K kept tokens, C channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import mlx.core as mx

# Extras with a value, or a row, for each visual token.
PER_TOKEN = ("attention", "attention_middle", "blocks", "keys", "scores")
PER_TOKEN += ("scores_previous",)
# Extras at the prompt that a policy's episode carries from one step to the next.
EPISODE_EXTRAS = ("action_previous",)


@dataclass(frozen=True)
class Features:
    """The visual tokens that a pruner chooses from.

    tokens: (B, N, C), those of the `pictures` of a sample after each other, each in
        raster order.
    grid: (H, W) of one picture, N = pictures * H * W; `None` where some are gone.
    extras: what a method asked for by name, when the model has it at that place:

        attention (B, N): what each token receives, mean over heads. At the tower: in
            its last attention block, mean over queries (from the class token where
            there is one). In the language model: from the prompt's last token, in the
            last layer before the place.
        attention_middle (B, N): the same in a middle block of the tower.
        blocks (B, N, d): what goes into each attention block of the tower, joined; of a
            finer grid, all that is in the token's cell.
        keys (B, N, d): of the tower's last attention block, or of the last layer before
            the place without rotary positions, heads joined.
        text_mask (B, T): in training, where texts of a batch end; false is padding.
        text (B, T, D): the prompt after the visual tokens, in the space of the tokens:
            embeddings, or in the language model hidden states.
        text_attention (B, T, N): in the language model, from each of these to the
            visual tokens, in the last layer before the place, mean over heads.
        queries, text_keys (B, heads, N, d) and (B, heads, T, d): of visual tokens and
            of text in the language model's first layer, without rotary positions.
        scores_previous (B, N): what the last actions of an episode attended to.
        action_previous (B, A): what a robot did last, in [-1, 1]; zeros at first.
        budget (B,): the share of tokens to keep, which a scorer is told.
        scores (B, N): what the pruner's scorer says.

    Raises `ValueError` for shapes that do not fit together.
    """

    tokens: mx.array
    grid: tuple[int, int] | None
    pictures: int = 1
    extras: Mapping[str, mx.array] = field(default_factory=dict)

    def __post_init__(self):
        if self.tokens.ndim != 3:
            raise ValueError(f"tokens are (B, N, C), not {self.tokens.shape}")
        batch, total, _ = self.tokens.shape
        if self.grid and self.pictures * self.grid[0] * self.grid[1] != total:
            raise ValueError(
                f"{self.pictures} grids {self.grid} have other than {total} tokens"
            )
        for name, array in self.extras.items():
            size = (batch, total) if name in PER_TOKEN else (batch,)
            if array.shape[: len(size)] != size:
                raise ValueError(f"{name} has shape {array.shape}, not {size} in front")

    @property
    def total(self) -> int:
        """N."""
        return self.tokens.shape[1]

    def arrays(self) -> list[mx.array]:
        """All that is computed."""
        return [self.tokens, *self.extras.values()]

    def each(self, change: Callable[[mx.array], mx.array]) -> "Features":
        """The same with every array changed."""
        extras = {name: change(array) for name, array in self.extras.items()}
        return replace(self, tokens=change(self.tokens), extras=extras)

    @property
    def fixed(self) -> "Features":
        """What a choice by the language model is made from: it has no gradient."""
        return self.each(mx.stop_gradient)


@dataclass(frozen=True)
class Selection:
    """Which visual tokens stay, and what becomes of the others.

    indices: (B, K) int32, ascending: the kept token, or for a merging method the
        token whose place a merged token takes.
    weights: (B, K, N) for methods that merge, `None` for selectors. Rows sum to 1 but
        for methods that publish other sums, which say so.
    mask: (B, K) bool, false where a sample keeps fewer than K; `None` when all keep K.

    Raises `ValueError` for shapes that do not fit together.
    """

    indices: mx.array
    weights: mx.array | None = None
    mask: mx.array | None = None

    def __post_init__(self):
        shape = self.indices.shape
        if len(shape) != 2 or not mx.issubdtype(self.indices.dtype, mx.integer):
            raise ValueError(f"indices are (B, K) integers, not {shape}")
        if self.weights is not None and self.weights.shape[:2] != shape:
            raise ValueError(f"weights {self.weights.shape} do not fit {shape}")
        if self.mask is not None and self.mask.shape != shape:
            raise ValueError(f"mask {self.mask.shape} does not fit {shape}")

    @property
    def keep(self) -> int:
        """K, the number of tokens that stay."""
        return self.indices.shape[1]

    def apply(self, values: mx.array) -> mx.array:
        """(B, N, D) -> (B, K, D): gather or merge anything that is per token."""
        return keep_rows(values, self.indices if self.weights is None else self.weights)

    def assignment(self) -> mx.array | None:
        """(B, N) int32: the kept token (0..K-1) that most of each token went to.

        -1 where it went nowhere; `None` for selectors.
        """
        if self.weights is None:
            return None
        most = mx.argmax(self.weights, axis=1).astype(mx.int32)
        return mx.where(mx.max(self.weights, axis=1) > 0, most, -1)

    def arrays(self) -> dict[str, mx.array]:
        """Those of its fields that there are."""
        found = {"indices": self.indices, "weights": self.weights, "mask": self.mask}
        return {name: array for name, array in found.items() if array is not None}


def keep_rows(values: mx.array, chosen: mx.array) -> mx.array:
    """(B, N, D) -> (B, K, D) by indices (B, K) or by weights (B, K, N)."""
    if chosen.ndim == 3:
        return chosen.astype(values.dtype) @ values
    return mx.take_along_axis(values, chosen[..., None], axis=1)


def place_marked(marked: mx.array, count: int) -> mx.array:
    """(B, count) int32: the places of the `count` true values of each row (B, N)."""
    total = marked.shape[1]
    places = mx.where(marked, mx.arange(total), total)
    return mx.sort(places, axis=1)[:, :count].astype(mx.int32)
