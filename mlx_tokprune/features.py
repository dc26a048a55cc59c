"""The interface between towers and pruners: `Features` in, `Selection` out.

Shapes use B samples, N visual tokens in raster order, K kept tokens, C channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx

# Extras with a value, or a row, for each visual token.
PER_TOKEN = ("attention", "attention_middle", "blocks", "keys", "scores")
PER_TOKEN += ("scores_previous",)
# Extras at the prompt that a policy's episode carries from one step to the next.
EPISODE_EXTRAS = ("action_previous",)


class HasParameters(Protocol):
    """Model with MLX arrays as parameters: an `nn.Module`, also as a `VisionModel`."""

    def parameters(self) -> Any:
        """Return the arrays in nested dicts and lists."""
        ...


@dataclass(frozen=True)
class Features:
    """The visual tokens that a pruner chooses from.

    tokens: (B, N, C), of the `pictures` of a sample one after another, each in raster
        order.
    grid: (H, W) of one picture, N = pictures * H * W; `None` if tokens were dropped.
    extras: inputs of a method by name, where the model provides them at that place:

        attention (B, N): attention that each token receives, mean over heads. At the
            tower: in its last attention block, mean over queries (from the class token
            if the tower has one). In the language model: from the last prompt token,
            in the last layer before the place.
        attention_middle (B, N): attention received in a middle block of the tower.
        blocks (B, N, d): inputs of the tower's attention blocks, concatenated; of a
            finer grid, all inputs in the token's cell.
        keys (B, N, d): keys of the tower's last attention block, or of the last layer
            before the place without rotary positions, heads concatenated.
        text_mask (B, T): in training, false for the padding of shorter texts.
        text (B, T, D): the prompt after the visual tokens, in the space of the tokens:
            embeddings, or hidden states inside the language model.
        text_attention (B, T, N): inside the language model, attention from `text` to
            the visual tokens, in the last layer before the place, mean over heads.
        queries, text_keys (B, heads, N, d) and (B, heads, T, d): of visual tokens and
            of text in the language model's first layer, without rotary positions.
        scores_previous (B, N): attention from the last actions of an episode.
        action_previous (B, A): the robot's last action in [-1, 1]; zeros at first.
        budget (B,): the share of tokens to keep, an input of scorers.
        scores (B, N): output of the pruner's scorer.

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
        """N, the number of visual tokens."""
        return self.tokens.shape[1]

    def arrays(self) -> list[mx.array]:
        """Return tokens and extras in one list, for evaluation."""
        return [self.tokens, *self.extras.values()]

    def each(self, change: Callable[[mx.array], mx.array]) -> "Features":
        """Return a copy with `change` applied to every array."""
        extras = {name: change(array) for name, array in self.extras.items()}
        return replace(self, tokens=change(self.tokens), extras=extras)

    @property
    def fixed(self) -> "Features":
        """A copy without gradients: the choice of tokens is not differentiable."""
        return self.each(mx.stop_gradient)


@dataclass(frozen=True)
class Selection:
    """The kept visual tokens, and the weights of merged ones.

    indices: (B, K) int32, ascending: the kept token, or for a merging method the
        token whose position a merged token takes.
    weights: (B, K, N) for methods that merge, `None` for selectors. Rows sum to 1,
        except in methods whose docstring names another sum.
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
        """K, the number of kept tokens."""
        return self.indices.shape[1]

    def apply(self, values: mx.array) -> mx.array:
        """Gather or merge values per token: (B, N, D) -> (B, K, D)."""
        return keep_rows(values, self.indices if self.weights is None else self.weights)

    def assignment(self) -> mx.array | None:
        """Return the kept token (0..K-1) with the largest weight of each token, (B, N).

        int32; -1 for a dropped token. `None` for selectors.
        """
        if self.weights is None:
            return None
        most = mx.argmax(self.weights, axis=1).astype(mx.int32)
        return mx.where(mx.max(self.weights, axis=1) > 0, most, -1)

    def arrays(self) -> dict[str, mx.array]:
        """Return the fields that are not `None`, by name."""
        fields = {"indices": self.indices, "weights": self.weights, "mask": self.mask}
        return {name: array for name, array in fields.items() if array is not None}


def keep_rows(values: mx.array, chosen: mx.array) -> mx.array:
    """Gather (B, N, D) by indices (B, K) or merge by weights (B, K, N) to (B, K, D)."""
    if chosen.ndim == 3:
        return chosen.astype(values.dtype) @ values
    return mx.take_along_axis(values, chosen[..., None], axis=1)


def place_marked(marked: mx.array, count: int) -> mx.array:
    """Return the places of true values in rows (B, N) bool, as (B, count) int32.

    A row with fewer than `count` ends with N; more are cut.
    """
    total = marked.shape[1]
    places = mx.where(marked, mx.arange(total), total)
    return mx.sort(places, axis=1)[:, :count].astype(mx.int32)
