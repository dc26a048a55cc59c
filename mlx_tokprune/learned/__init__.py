"""Scorers that learn which visual tokens to keep, and how they are kept on disk."""

from .folder import is_scorer, load_scorer, save_scorer
from .scorers import SCORERS, Adaptive, Asking, Constant, Inside

__all__ = [
    "SCORERS",
    "Adaptive",
    "Asking",
    "Constant",
    "Inside",
    "is_scorer",
    "load_scorer",
    "save_scorer",
]
