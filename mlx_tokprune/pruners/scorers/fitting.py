"""Check that a scorer was trained for a model, by sizes and by signs of weights.

Rounding, quantization of the language model and light fine-tuning keep the signs; of
two models that were trained apart, about half of the signs differ.
"""

import functools
import logging
import re
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...errors import InputError
from ...features import HasParameters
from .scorers import SCORERS

log = logging.getLogger("mlx_tokprune")

_DIGITS = 64
_SIGNS = 4 * _DIGITS
_WRITTEN = re.compile(f"[0-9a-f]{{{_DIGITS}}}")
_STEP = 2654435761  # a large prime: spreads the picked weights over a tensor
_MOST = _SIGNS // 4  # signs that may differ in one model


def signs_of(model: HasParameters) -> str | None:
    """Return the signs of 256 weights outside the language model, as 64 hex digits.

    `None` for a model without float matrices there.
    """
    tensors = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    matrices = [
        array
        for name, array in sorted(tensors)
        if not name.startswith("language_model.")
        and ".layer_scale" not in name  # in float32 these are folded into other weights
        and array.ndim > 1
        and mx.issubdtype(array.dtype, mx.floating)
    ]
    if not matrices:
        return None
    flats = (matrices[i % len(matrices)].reshape(-1) for i in range(_SIGNS))
    picked = [flat[i * _STEP % flat.size] > 0 for i, flat in enumerate(flats)]
    bits = "".join(
        "1" if sign else "0" for sign in cast(list, mx.stack(picked).tolist())
    )
    return f"{int(bits, 2):0{_DIGITS}x}"


def read_signs(value: object) -> str | None:
    """Return the signs of a file, or `None`; `ValueError` for any other value."""
    if value is None:
        return None
    if not (isinstance(value, str) and _WRITTEN.fullmatch(value)):
        raise ValueError(f"its model signs are not {_DIGITS} hexadecimal digits")
    return value


def same_model(one: str | None, other: str | None) -> bool:
    """Return whether two models can be the same; true without the signs of one."""
    if one is None or other is None:
        return True
    return (int(one, 16) ^ int(other, 16)).bit_count() <= _MOST


def check_fits(scorer: nn.Module, model: Any, place: str, name: str) -> None:
    """Raise `InputError` for a scorer that was trained for tokens of another size.

    Logs a warning, once, if the model has other weights. name: the scorer's name in
    messages.
    """
    if type(scorer) not in SCORERS.values():
        return
    width = model.feature_size if place == "tower" else model.args.text["hidden_size"]
    own = {"channels": width, "sizes": list(getattr(model, "block_sizes", ()))}
    for size, number in own.items():
        trained = scorer.settings.get(size, number)
        if trained != number:
            raise InputError(
                f"the scorer of {name} was trained for another model: its {size} are "
                f"{trained}, not {number}"
            )
    if not same_model(scorer.model_signs, model.signs):
        _warn_of(name)


@functools.lru_cache
def _warn_of(name: str) -> None:  # the cache makes it warn once per name
    log.warning(
        "the scorer of %s was trained for a model with other weights: what it keeps "
        "here means little until it is trained for this one",
        name,
    )
