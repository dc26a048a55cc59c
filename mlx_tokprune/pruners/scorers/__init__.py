"""Scorers that learn which visual tokens to keep, and how they are kept on disk."""

from .fitting import check_fits, same_model, signs_of
from .scorers import SCORERS, Acting, Adaptive, Asking, Constant, Inside, untold
from .storage import counts_itself, is_scorer, load_scorer, save_scorer

__all__ = [
    "SCORERS",
    "Acting",
    "Adaptive",
    "Asking",
    "Constant",
    "Inside",
    "check_fits",
    "counts_itself",
    "is_scorer",
    "load_scorer",
    "same_model",
    "save_scorer",
    "signs_of",
    "untold",
]
