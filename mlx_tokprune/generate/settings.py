"""`Settings` of text generation, with the names and defaults of mlx-lm."""

import math
from dataclasses import dataclass

from ..checkpoints.quantization import GROUPS
from ..errors import InputError, as_number
from ..models.language import PREFILL_STEP
from ..models.protocol import VisionModel
from ..pipeline import DEFAULT_POSITIONS, check_positions
from ..pruners import check_seed


@dataclass(frozen=True)
class Settings:
    """Settings of text generation; names and defaults are those of mlx-lm.

    positions: `original` keeps each token's position before pruning, `contiguous`
    closes the gaps. Raises `InputError` for values out of range.
    """

    positions: str = DEFAULT_POSITIONS
    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 0.0
    seed: int | None = None
    prefill_step_size: int = PREFILL_STEP
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __post_init__(self):
        if self.seed is not None:
            check_seed(self.seed)
        check_positions(self.positions)
        for name, value in vars(self).items():
            optional = name in ("seed", "kv_bits") and value is None
            if name != "positions" and not optional:
                kind = float if name in ("temp", "top_p") else int
                object.__setattr__(self, name, as_number(value, name, kind))
        if self.max_tokens < 1:
            raise InputError(
                f"cannot generate {self.max_tokens} tokens; the least is 1"
            )
        temp, top_p = self.temp, self.top_p
        if not (math.isfinite(temp) and temp >= 0 and 0 <= top_p <= 1):
            raise InputError(
                f"temperature {temp:g} and top-p {top_p:g} are out of range; expected "
                "a temperature of at least 0 and a top-p in [0, 1]"
            )
        if self.prefill_step_size < 1 or self.quantized_kv_start < 0:
            raise InputError(
                "a prefill step has at least 1 token, and a cache is quantized from "
                "token 0 or later"
            )
        if self.kv_bits not in (None, 4, 8) or self.kv_group_size not in GROUPS:
            raise InputError(
                f"cannot quantize the cache to {self.kv_bits or 8} bits in groups of "
                f"{self.kv_group_size}; expected 4 or 8 bits, and 32, 64 or 128"
            )

    @property
    def quantization(self) -> dict:
        """Cache quantization as keyword arguments of mlx-lm's functions."""
        names = ("kv_bits", "kv_group_size", "quantized_kv_start")
        return {name: getattr(self, name) for name in names}

    def check(self, model: VisionModel) -> None:
        """Raise `InputError` unless this model's cache can be quantized like this."""
        text = model.args.text
        size = text["hidden_size"] // text["num_attention_heads"]
        if self.kv_bits and size % self.kv_group_size:
            divisors = [str(group) for group in GROUPS if size % group == 0]
            raise InputError(
                f"groups of {self.kv_group_size} do not divide this model's keys of "
                f"{size} numbers; groups that do are {', '.join(divisors) or 'none'}"
            )
