"""`Settings` of text generation, with the names and defaults of mlx-lm."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..checkpoints.quantization import GROUPS
from ..errors import InputError, as_number
from ..models.language import PREFILL_STEP
from ..models.protocol import VisionModel
from ..pipeline import DEFAULT_POSITIONS, check_positions
from ..pruners import check_seed

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
_PENALTIES = ("repetition", "presence", "frequency")
# Kind, least and most of numbers: beyond, logits overflow or no token is left.
_NUMBERS: dict[str, tuple[type, float, float]] = {
    **dict.fromkeys(("max_tokens", "prefill_step_size"), (int, 1, math.inf)),
    **dict.fromkeys(("quantized_kv_start", "top_k"), (int, 0, math.inf)),
    **dict.fromkeys(("top_p", "min_p", "xtc_probability"), (float, 0, 1)),
    **{f"{name}_penalty": (float, -100, 100) for name in _PENALTIES},
    **{f"{name}_context_size": (int, 1, math.inf) for name in _PENALTIES},
    "temp": (float, 0, 1e9),
    **dict.fromkeys(("kv_bits", "kv_group_size"), (int, -math.inf, math.inf)),
    "max_kv_size": (int, 5, math.inf),
    "min_tokens_to_keep": (int, 1, math.inf),
    "xtc_threshold": (float, 0, 0.5),
    "repetition_penalty": (float, 0.01, 100),
}
_BIAS = 1000.0  # largest bias of a logit


@dataclass(frozen=True)
class Settings:
    """Settings of text generation; names and defaults are those of mlx-lm.

    positions: `original` keeps each token's position before pruning, `contiguous`
    closes the gaps. system_prompt: text in place of the chat template's own. stop:
    texts that end an answer, which is cut before them. max_kv_size: tokens in the
    cache; the prompt must fit, and later tokens replace its oldest but four. The other
    names are those of mlx-lm's `make_sampler` and `make_logits_processors`; penalties
    count the answer and the text of the prompt, but not visual tokens, which have no
    ids. Raises `InputError` for values out of range.
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
    max_kv_size: int | None = None
    system_prompt: str | None = None
    stop: str | Sequence[str] = ()
    top_k: int = 0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    presence_context_size: int = 20
    frequency_penalty: float | None = None
    frequency_context_size: int = 20

    def __post_init__(self):
        several = isinstance(self.stop, Iterable) and not isinstance(self.stop, str)
        stops = tuple(self.stop) if several else (self.stop,)
        object.__setattr__(self, "stop", stops)
        if not all(isinstance(text, str) and text for text in stops):
            raise InputError(f"stop texts {stops!r} are not texts with characters")
        if self.seed is not None:
            check_seed(self.seed)
            object.__setattr__(self, "seed", int(self.seed))
        check_positions(self.positions)
        for name, limits in _NUMBERS.items():
            self._check_number(name, *limits)
        self._check_bias()
        if self.kv_bits not in (None, 4, 8) or self.kv_group_size not in GROUPS:
            raise InputError(
                f"cannot quantize the cache to {self.kv_bits or 8} bits in groups of "
                f"{self.kv_group_size}; expected 4 or 8 bits, and 32, 64 or 128"
            )
        if self.max_kv_size is not None and self.kv_bits is not None:
            raise InputError("a cache of max_kv_size has no kv_bits; leave out one")
        if self.xtc_probability and not self.temp:
            raise InputError(
                "xtc_probability changes sampling only; expected a temp above 0"
            )

    def _check_number(self, name: str, kind: type, least: float, most: float) -> None:
        value = getattr(self, name)
        if value is None and self.__dataclass_fields__[name].default is None:
            return
        value = as_number(value, name, kind)
        object.__setattr__(self, name, value)
        is_off = name.endswith("penalty") and value == 0
        if not (least <= value <= most or is_off):
            limits = f"in [{least:g}, {most:g}]" if most < math.inf else f"from {least}"
            raise InputError(f"{name} {value} is out of range; expected one {limits}")

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias {self.logit_bias!r} is no dict by token id")
        for token, bias in self.logit_bias.items():
            number = isinstance(bias, (int, float)) and abs(bias) <= _BIAS
            if type(token) is not int or token < 0 or not number:
                raise InputError(
                    f"logit_bias {token!r}: {bias!r} is no token id with a number in "
                    f"[-{_BIAS:g}, {_BIAS:g}]"
                )

    @property
    def quantization(self) -> dict:
        """Cache quantization as keyword arguments of mlx-lm's functions."""
        names = ("kv_bits", "kv_group_size", "quantized_kv_start")
        return {name: getattr(self, name) for name in names}

    def sampler(self, tokenizer: Any) -> Sampler:
        """Return mlx-lm's sampler; XTC spares line ends and end tokens, as there."""
        from mlx_lm.sample_utils import make_sampler

        spared = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
        return make_sampler(
            *(self.temp, self.top_p, self.min_p, self.min_tokens_to_keep, self.top_k),
            *(self.xtc_probability, self.xtc_threshold, spared),
        )

    def processors(self, prompt_ids: Sequence[int]) -> list[LogitsProcessor]:
        """Return mlx-lm's logits processors of an answer, mostly none.

        They are called with the answer's tokens. prompt_ids: token ids before them,
        which mlx-lm's penalties count, too.
        """
        from mlx_lm.sample_utils import make_logits_processors

        names = [f"{name}_penalty" for name in _PENALTIES]
        names += [f"{name}_context_size" for name in _PENALTIES]
        options = {name: getattr(self, name) for name in ("logit_bias", *names)}
        before = mx.array(list(prompt_ids), mx.int32)

        def behind(process: LogitsProcessor) -> LogitsProcessor:
            return lambda ids, logits: process(mx.concatenate([before, ids]), logits)

        return [behind(process) for process in make_logits_processors(**options)]

    @property
    def only_temp_and_top_p(self) -> bool:
        """True if no other setting changes which tokens are chosen."""
        filters = self.temp and (self.top_k or self.min_p or self.xtc_probability)
        return not (filters or self.logit_bias or self.processors(()))

    def check(self, model: VisionModel) -> None:
        """Raise `InputError` for settings that do not fit this model."""
        text = model.args.text
        vocabulary = text["vocab_size"]
        count = max(self.top_k, self.min_tokens_to_keep)
        if count >= vocabulary:
            raise InputError(
                f"top_k and min_tokens_to_keep are below the model's {vocabulary} "
                f"tokens, not {count}"
            )
        if max(self.logit_bias, default=0) >= vocabulary:
            raise InputError(
                f"logit_bias has token {max(self.logit_bias)}; the model has tokens 0 "
                f"to {vocabulary - 1}"
            )
        size = text["hidden_size"] // text["num_attention_heads"]
        if self.kv_bits and size % self.kv_group_size:
            divisors = [str(group) for group in GROUPS if size % group == 0]
            raise InputError(
                f"groups of {self.kv_group_size} do not divide this model's keys of "
                f"{size} numbers; groups that do are {', '.join(divisors) or 'none'}"
            )
