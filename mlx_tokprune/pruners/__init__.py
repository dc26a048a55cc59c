"""Choosing which visual tokens stay: `Pruner`, `list_pruners`, and the methods."""

from . import baseline, merging, saliency, text  # noqa: F401  (registers them)
from .registry import (
    Pruner,
    check_seed,
    count_kept,
    get_method,
    list_pruners,
    register,
)

__all__ = [
    "Pruner",
    "check_seed",
    "count_kept",
    "get_method",
    "list_pruners",
    "register",
]
