"""Choosing which visual tokens stay: `Pruner`, `list_pruners`, and the methods."""

from . import (  # noqa: F401  (registers them)
    absorbing,
    baseline,
    diversity,
    merging,
    recipes,
    saliency,
    text,
)
from .pruner import Plan, Pruner, Pruners, as_plan, check_seed, count_kept
from .registry import get_method, is_registered, list_pruners, register

__all__ = [
    "Plan",
    "Pruner",
    "Pruners",
    "as_plan",
    "check_seed",
    "count_kept",
    "get_method",
    "is_registered",
    "list_pruners",
    "register",
]
