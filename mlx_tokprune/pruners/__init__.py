"""Pruners, plans and pruning methods: the choice of the visual tokens to keep."""

from . import (  # noqa: F401  (registers the methods)
    absorbing,
    baseline,
    diversity,
    inside,
    merging,
    saliency,
    text,
)
from .notation import read_place, read_plan, read_pruner
from .plans import Counts, Plan, Pruners, as_plan, count_tokens
from .pruner import DEFAULT_METHOD, POLICY_METHOD, Pruner, check_seed, count_kept
from .registry import Place, get_method, is_registered, list_pruners, register

__all__ = [
    "DEFAULT_METHOD",
    "POLICY_METHOD",
    "Counts",
    "Place",
    "Plan",
    "Pruner",
    "Pruners",
    "as_plan",
    "check_seed",
    "count_kept",
    "count_tokens",
    "get_method",
    "is_registered",
    "list_pruners",
    "read_place",
    "read_plan",
    "read_pruner",
    "register",
]
