"""Whether a scorer was trained for a model, told by sizes and by signs of weights.

Signs stay when a model is rounded, quantized in its language model or fine-tuned a
little; of two models that were trained apart about half of them differ.
"""

import functools
import logging
import re

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...errors import InputError
from .scorers import SCORERS

log = logging.getLogger("mlx_tokprune")

_DIGITS = 64
_SIGNS = 4 * _DIGITS
_WRITTEN = re.compile(f"[0-9a-f]{{{_DIGITS}}}")
_STEP = 2654435761  # a large prime: places all over a tensor
_MOST = _SIGNS // 4  # that differ in one model


def signs_of(model) -> str | None:
    """The signs of 256 weights outside the language model, in hexadecimal digits.

    `None` of a model without float matrices there.
    """
    found = [
        array
        for name, array in sorted(tree_flatten(model.parameters()))
        if not name.startswith("language_model.")
        and ".layer_scale" not in name  # in float32 those are folded into others
        and array.ndim > 1
        and mx.issubdtype(array.dtype, mx.floating)
    ]
    if not found:
        return None
    some = (found[i % len(found)].reshape(-1) for i in range(_SIGNS))
    picked = [flat[i * _STEP % flat.size] > 0 for i, flat in enumerate(some)]
    bits = "".join("1" if sign else "0" for sign in mx.stack(picked).tolist())
    return f"{int(bits, 2):0{_DIGITS}x}"


def read_signs(known) -> str | None:
    """Signs as a file has them; `ValueError` for what are none."""
    if known is not None and not (isinstance(known, str) and _WRITTEN.fullmatch(known)):
        raise ValueError("what it says of its model are no signs")
    return known


def same_model(one: str | None, other: str | None) -> bool:
    """Whether two models can be the same; so where one is not known."""
    if one is None or other is None:
        return True
    return (int(one, 16) ^ int(other, 16)).bit_count() <= _MOST


def check_fits(scorer: nn.Module, model, place: str, name: str) -> None:
    """Raise `InputError` for a trained scorer of tokens of another size.

    Warns, once, where the model has other weights. name: of the scorer, for people.
    """
    if type(scorer) not in SCORERS.values():
        return
    width = model.feature_size if place == "tower" else model.args.text["hidden_size"]
    own = {"channels": width, "sizes": list(getattr(model, "block_sizes", ()))}
    for size, number in own.items():
        found = scorer.settings.get(size, number)
        if found != number:
            raise InputError(
                f"the scorer of {name} was trained for another model: its {size} are "
                f"{found}, not {number}"
            )
    if not same_model(scorer.model_signs, model.signs):
        _warn_of(name)


@functools.lru_cache
def _warn_of(name: str) -> None:  # once
    log.warning(
        "the scorer of %s was trained for a model with other weights: what it keeps "
        "here means little until it is trained for this one",
        name,
    )
