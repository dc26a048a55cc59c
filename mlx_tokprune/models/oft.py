"""Parts of OpenVLA-OFT (arXiv 2502.19645): an action head and a state projector.

Attribute names equal the keys of OpenVLA-OFT's separate checkpoint files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from .layers import gelu


@dataclass(frozen=True)
class OFTConfig:
    """Settings of an OFT policy.

    chunk: actions per forward pass. action_dim: numbers per action. pictures: number
    per observation. proprio_dim: numbers of robot state, 0 for none. film: whether the
    towers are conditioned on the prompt. rule: scaling of the actions, `bounds_q99` or
    `bounds`.
    """

    chunk: int = 8
    action_dim: int = 7
    pictures: int = 2
    proprio_dim: int = 8
    film: bool = False
    rule: str = "bounds_q99"

    @classmethod
    def from_dict(cls, config: Mapping) -> "OFTConfig":
        """Check the object `oft` of a config; other keys are ignored.

        Raises `InputError` for impossible values.
        """
        fields = cls.__dataclass_fields__
        values = {k: v for k, v in config.items() if k in fields}
        for name in ("chunk", "action_dim", "pictures", "proprio_dim"):
            value, least = values.get(name, 1), int(name != "proprio_dim")
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value < 1 << 12:
                raise InputError(
                    f"the setting oft {name} {value!r} is impossible; expected a whole "
                    f"number from {least} to 4095"
                )
        if values.get("rule", "bounds") not in ("bounds", "bounds_q99"):
            raise InputError(
                f"OpenVLA-OFT has no norm {values['rule']!r}; expected quantiles "
                "(bounds_q99) or min_max (bounds)"
            )
        return cls(**values)

    @property
    def slots(self) -> int:
        """Action slots in the sequence: one per number of the chunk."""
        return self.chunk * self.action_dim


class _ResidualBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.ffn = [nn.LayerNorm(dim), nn.Linear(dim, dim)]

    def __call__(self, x: mx.array) -> mx.array:
        norm, linear = self.ffn
        return x + nn.relu(linear(norm(x)))


class _MLPResNet(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, hidden)
        self.mlp_resnet_blocks = [_ResidualBlock(hidden) for _ in range(2)]
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class ActionHead(nn.Module):
    """Head from the action slots' hidden states to normalised actions."""

    def __init__(self, config: OFTConfig, hidden: int):
        super().__init__()
        self._chunk = config.chunk
        self.model = _MLPResNet(hidden * config.action_dim, hidden, config.action_dim)

    def __call__(self, states: mx.array) -> mx.array:
        """Return actions (B, chunk, A) of states (B, chunk * A, D)."""
        return self.model(states.reshape(states.shape[0], self._chunk, -1))


class ProprioProjector(nn.Module):
    """Projector from the robot's normalised state to one token."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def __call__(self, state: mx.array) -> mx.array:
        """Return the token (B, D) of a state (B, P)."""
        # `gelu` takes (B, T, D).
        return self.fc2(gelu(self.fc1(state)[None])[0])
