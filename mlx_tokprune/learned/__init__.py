"""Scorers that learn which visual tokens to keep, and how they are kept on disk."""

from .folder import counts_itself, is_scorer, load_scorer, save_scorer
from .scorers import SCORERS, Acting, Adaptive, Asking, Constant, Inside, untold

__all__ = [
    "SCORERS",
    "Acting",
    "Adaptive",
    "Asking",
    "Constant",
    "Inside",
    "counts_itself",
    "is_scorer",
    "load_scorer",
    "save_scorer",
    "untold",
]
