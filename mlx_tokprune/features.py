"""The contract between vision towers and pruners: `Features` in, `Selection` out.

Shapes use B pictures, N visual tokens in raster order, K kept tokens, C channels.
"""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Features:
    """What a vision tower says about B pictures.

    tokens: (B, N, C) visual tokens in raster order.
    grid: (H, W) with H * W = N.
    attention: (B, N) attention that each token receives in the tower's last attention
        block, mean over heads and queries (from the class token where there is one).
    text: (B, T, D) embeddings that follow the visual tokens in the prompt.
    queries, keys: (B, heads, N, d) of the visual tokens and (B, heads, T, d) of the
        text, in the language model's first layer, without rotary positions.

    Extras are there only when the pruner asks for them. Prompt-stage pruners get
    projected tokens, those of all pictures of a sample after each other.
    """

    tokens: mx.array
    grid: tuple[int, int]
    attention: mx.array | None = None
    text: mx.array | None = None
    queries: mx.array | None = None
    keys: mx.array | None = None


@dataclass(frozen=True)
class Selection:
    """Which visual tokens stay, and what becomes of the others.

    indices: (B, K) int32, ascending: the kept token, or for a merging method the
        token whose place a merged token takes.
    weights: (B, K, N), rows sum to 1, for methods that merge; `None` for selectors.
    mask: (B, K) bool, false where a sample keeps fewer than K; `None` when all keep K.
    """

    indices: mx.array
    weights: mx.array | None = None
    mask: mx.array | None = None

    @property
    def keep(self) -> int:
        """K, the number of tokens that stay."""
        return self.indices.shape[1]

    def apply(self, values: mx.array) -> mx.array:
        """(B, N, D) -> (B, K, D): gather or merge anything that is per token."""
        if self.weights is not None:
            return self.weights.astype(values.dtype) @ values
        return mx.take_along_axis(values, self.indices[..., None], axis=1)

    def assignment(self) -> mx.array | None:
        """(B, N) int32: the kept token (0..K-1) each token went to; `None` if none."""
        if self.weights is None:
            return None
        return mx.argmax(self.weights, axis=1).astype(mx.int32)


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds of each stage, each measured between evaluated results."""

    preprocess: float
    vision: float
    prune: float
    project: float
    prefill: float
