"""Text settings of a checkpoint's config, as mlx-lm's models take them.

One reader for every family. A setting that changes the reference model (transformers),
and that mlx-lm's model of the architecture does not compute, is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..files import object_of
from .checks import LANGUAGE_SIZES, check_language, expect, is_number, is_size

_ORIGINAL, _SHARE = "original_max_position_embeddings", "partial_rotary_factor"
_SCALES = ("mscale", "mscale_all_dim")
# Numbers of each rope type: required, and optional.
_ROPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), (_ORIGINAL,)),
    "linear": (("factor",), (_ORIGINAL,)),
    "dynamic": (("factor",), (_ORIGINAL,)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "yarn": (("factor", _ORIGINAL), ("beta_fast", "beta_slow", *_SCALES)),
}
# Values that equal the absence of the number.
_NEUTRAL = {_SHARE: 1, "truncate": True, "mscale_all_dim": 0}
_SILU, _TANH = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu")  # Gemma: both by tanh
# Activations and rope types of the architectures in mlx-lm.
_ARCHITECTURES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "qwen2": (_SILU, tuple(_ROPES)),
    "llama": (_SILU, tuple(_ROPES)),
    "gemma": (_TANH, ("default", "dynamic")),
}
DEFAULT_THETA = 10000.0  # in transformers, for each of these architectures
# Fields whose value must be one wherever a config has them twice.
TEXT_FIELDS = (*LANGUAGE_SIZES, "rms_norm_eps", "rope_theta", "rope_scaling")
TEXT_FIELDS += ("max_position_embeddings",)
_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_text(text: Mapping[str, Any], architecture: str) -> dict:
    """Return checked text settings for mlx-lm's `ModelArgs` of an architecture.

    architecture: model type in mlx-lm ("qwen2", "llama" or "gemma"). Raises
    `InputError` for impossible sizes, and for settings that mlx-lm's model ignores.
    """
    text = flat_rope(text)
    check_language(text)
    activations, ropes = _ARCHITECTURES[architecture]
    for name in ("hidden_act", "hidden_activation"):
        value = text.get(name)
        right = value is None or value in activations
        expect(right, name, value, " or ".join(map(repr, activations)))
    _check_windows(text)
    if architecture == "qwen2":  # mlx-lm reads the field for Llama and Gemma only
        size = text["hidden_size"] // text["num_attention_heads"]
        value = text.get("head_dim", size)
        expect(value in (None, size), "head_dim", value, f"{size}")
    kind = object_of(text, "rope_scaling").get("rope_type", "default")
    expected = f"{', '.join(ropes)}, as mlx-lm has for {architecture}"
    expect(kind in ropes, "rope type", kind, expected)
    # mlx-lm's dynamic type takes no positions of single tokens.
    plain = {"rope_scaling": None} if kind == "dynamic" else {}
    plain |= {"layer_types": None, "model_type": architecture}
    return {"rope_theta": DEFAULT_THETA, **text, **plain}


def _check_windows(text: Mapping) -> None:
    """Raise `InputError` unless every layer attends to the whole context."""
    layers, kinds = text["num_hidden_layers"], text.get("layer_types")
    window = text.get("sliding_window", 4096)  # transformers' default
    if kinds is None and text.get("use_sliding_window"):
        first = text.get("max_window_layers", 28)  # transformers' default, too
        expect(isinstance(first, int), "max_window_layers", first, "a whole number")
        kinds = [_FULL if i < first else _SLIDING for i in range(layers)]
    if kinds is None:
        return
    right = isinstance(kinds, list) and len(kinds) == layers
    expect(right, "layer_types", kinds, f"a list of {layers}")
    expect(window is None or is_size(window), "sliding_window", window, "a number")
    wide = window is None or window >= text.get("max_position_embeddings", math.inf)
    for number, kind in enumerate(kinds):
        right = kind == _FULL or (kind == _SLIDING and wide)
        name, expected = f"layer {number} with sliding_window {window}", f"{_FULL!r}"
        expect(right, name, kind, f"{expected}, the only supported attention")


# Rotary positions --------------------------------------------------------------------


def flat_rope(text: Mapping[str, Any], notes: list[str] | None = None) -> dict:
    """Return text settings with transformers 5's `rope_parameters` moved out of it.

    The result has `rope_theta`, and `rope_scaling` unless the rope type is default, as
    mlx-lm, mlx-vlm and transformers 4 read them. notes: takes messages for the user.
    Raises `InputError` for unknown rope types, and for numbers that no program reads.
    """
    inner, outer = (object_of(text, f"rope_{n}") for n in ("parameters", "scaling"))
    if not inner and not outer and text.get(_SHARE) is None:
        return dict(text)
    scaling = _scaling(outer or inner, text)
    if inner and outer and _scaling(inner, text) != scaling:
        raise InputError(
            f"config.json says rope_scaling {outer!r} and rope_parameters {inner!r}; "
            "expected one of them, or equal values"
        )
    places = (inner, outer, text)
    thetas = [p["rope_theta"] for p in places if p.get("rope_theta") is not None]
    notes = [] if notes is None else notes
    if any(theta != thetas[0] for theta in thetas):
        notes.append(
            f"config.json gives rope_theta {' and '.join(map(repr, thetas))}; "
            f"{thetas[0]!r} in the rope parameters is used, as in transformers 5"
        )
    moved = ("rope_parameters", "rope_scaling")
    flat = {name: value for name, value in text.items() if name not in moved}
    flat |= {"rope_theta": thetas[0]} if thetas else {}
    if scaling["rope_type"] == "dynamic":
        notes.append(
            "the rope type 'dynamic' changes the positions of sequences beyond "
            "max_position_embeddings only; they are not changed here"
        )
    if scaling["rope_type"] != "default":
        flat["rope_scaling"] = scaling
    return flat


def _scaling(section: Mapping, text: Mapping) -> dict:
    """Return the checked `rope_type` of a section with its numbers."""
    kinds = [section[n] for n in ("rope_type", "type") if section.get(n) is not None]
    kind = kinds[0] if kinds else "default"
    right = kind in list(_ROPES) and all(other == kind for other in kinds)
    value = kind if len(kinds) < 2 else kinds
    expect(right, "rope type", value, f"one of {', '.join(_ROPES)}")
    rest = section.keys() - {"rope_type", "type", "rope_theta"}
    numbers: dict[str, Any] = {_SHARE: text.get(_SHARE)} | {
        n: section[n] for n in sorted(rest)
    }
    required, optional = _ROPES[kind]
    if _ORIGINAL in required:  # transformers takes the first of these
        lengths = (text.get(_ORIGINAL), section.get(_ORIGINAL))
        lengths += (text.get("max_position_embeddings"),)
        numbers[_ORIGINAL] = next((n for n in lengths if n is not None), None)
    neutral = [(name, None) for name in numbers] + list(_NEUTRAL.items())
    numbers = dict(pair for pair in numbers.items() if pair not in neutral)
    if not numbers.keys() >= set(_SCALES):  # transformers reads both or none
        numbers = {n: number for n, number in numbers.items() if n not in _SCALES}
    for name in (*required, *numbers):
        number, taken = numbers.get(name), name in (*required, *optional)
        right = taken and is_number(number) and number > 0
        expected = "a positive number" if taken else "none"
        expect(right, f"{name} of the rope type {kind}", number, expected)
    if kind == "llama3":
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        expect(low < high, "high_freq_factor", high, f"a number above {low}")
    return {"rope_type": kind, **numbers}
