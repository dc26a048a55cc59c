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
# Numbers of each rope type: required, and optional.
_ROPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), (_ORIGINAL,)),
    "linear": (("factor",), (_ORIGINAL,)),
    "dynamic": (("factor",), (_ORIGINAL,)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "yarn": (
        ("factor", _ORIGINAL),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    ),
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
    _check_attention(text, architecture)
    scaling = object_of(text, "rope_scaling") or {"rope_type": "default"}
    kind = scaling["rope_type"]
    expected = f"{', '.join(ropes)}, as mlx-lm has for {architecture}"
    expect(kind in ropes, "rope type", kind, expected)
    unread = ("rope_scaling", "layer_types", "sliding_window")
    settings = {name: value for name, value in text.items() if name not in unread}
    settings.setdefault("rope_theta", DEFAULT_THETA)
    if kind not in ("default", "dynamic"):
        settings["rope_scaling"] = _for_mlx_lm(scaling)
    return settings | {"model_type": architecture}


def _check_attention(text: Mapping, architecture: str) -> None:
    """Raise `InputError` for windows, biases and head sizes that mlx-lm ignores."""
    _check_windows(text)
    if architecture == "qwen2":  # mlx-lm reads the field for Llama and Gemma only
        size, value = text["hidden_size"] // text["num_attention_heads"], "head_dim"
        expect(text.get(value) in (None, size), value, text.get(value), f"{size}")
    for name in ("attention_bias", "mlp_bias"):
        value = text.get(name, False)
        expect(isinstance(value, bool), name, value, "true or false")
    biased = architecture == "gemma" and text.get("attention_bias", False)
    expect(not biased, "attention_bias", True, "false, as mlx-lm's gemma has none")


def _check_windows(text: Mapping) -> None:
    """Raise `InputError` unless every layer attends to the whole context."""
    layers, kinds = text["num_hidden_layers"], text.get("layer_types")
    window = text.get("sliding_window", 4096)  # transformers' default
    if kinds is None and text.get("use_sliding_window"):
        first = text.get("max_window_layers", 28)
        expect(isinstance(first, int), "max_window_layers", first, "a whole number")
        kinds = [_FULL if i < first else _SLIDING for i in range(layers)]
    if kinds is None:
        return
    right = isinstance(kinds, list) and len(kinds) == layers
    expect(right, "layer_types", kinds, f"a list of {layers}")
    expect(window is None or is_size(window), "sliding_window", window, "a number")
    wide = window is None or window >= text.get("max_position_embeddings", math.inf)
    for number, kind in enumerate(kinds):
        if kind != _FULL and not (kind == _SLIDING and wide):
            raise InputError(
                f"config.json gives layer {number} {kind!r} with sliding_window "
                f"{window}; expected {_FULL!r}, the only supported attention"
            )


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
    return (
        flat if scaling["rope_type"] == "default" else flat | {"rope_scaling": scaling}
    )


def _scaling(section: Mapping, text: Mapping) -> dict:
    """Return the checked `rope_type` of a section with its numbers."""
    kinds = [section[n] for n in ("rope_type", "type") if section.get(n) is not None]
    kind = kinds[0] if kinds else "default"
    right = (
        isinstance(kind, str) and kind in _ROPES and kinds in ([], [kind], [kind] * 2)
    )
    value = kind if len(kinds) < 2 else kinds
    expect(right, "rope type", value, f"one of {', '.join(_ROPES)}")
    rest = section.keys() - {"rope_type", "type", "rope_theta"}
    numbers = {_SHARE: text.get(_SHARE)}
    numbers |= {name: section[name] for name in sorted(rest)}
    required, optional = _ROPES[kind]
    if _ORIGINAL in required:  # transformers takes the first of these
        lengths = (text.get(_ORIGINAL), section.get(_ORIGINAL))
        lengths += (text.get("max_position_embeddings"),)
        numbers[_ORIGINAL] = next((n for n in lengths if n is not None), None)
    numbers = {
        name: number
        for name, number in numbers.items()
        if number is not None and (name, number) not in _NEUTRAL.items()
    }
    for name in (*required, *numbers):
        number, taken = numbers.get(name), name in (*required, *optional)
        right = taken and is_number(number) and number > 0
        expected = "a positive number" if taken else "none"
        expect(right, f"{name} of the rope type {kind}", number, expected)
    if kind == "llama3":
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        expect(low < high, "high_freq_factor", high, f"a number above {low}")
    return {"rope_type": kind, **numbers}


def _for_mlx_lm(scaling: dict) -> dict:
    """Return rope settings under which mlx-lm computes what transformers does."""
    numbers = dict(scaling)
    if not {"mscale", "mscale_all_dim"} <= numbers.keys():
        numbers.pop("mscale", None)  # transformers reads both or none
        numbers.pop("mscale_all_dim", None)
    attention = numbers.pop("attention_factor", None)
    if attention is not None:
        # mlx-lm scales by 1 + 0.1 mscale log(factor), and not at all for factors to 1.
        growth = 0.1 * math.log(max(1, numbers["factor"]))
        expected = "none, or 1, for a factor up to 1"
        expect(growth > 0 or attention == 1, "attention_factor", attention, expected)
        scale = (attention - 1) / growth if growth else 1
        numbers |= {"mscale": scale, "mscale_all_dim": 0}
    return numbers
