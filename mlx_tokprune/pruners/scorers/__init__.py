"""Scorers: networks that learn which visual tokens to keep, and their files."""

from .fitting import check_fits, same_model, signs_of
from .scorers import (
    SCORERS,
    ActionScorer,
    AdaptiveScorer,
    ConstantScorer,
    PromptScorer,
    Scorer,
    TowerScorer,
    fold_budget,
)
from .storage import counts_itself, is_scorer, load_scorer, save_scorer

__all__ = [
    "SCORERS",
    "ActionScorer",
    "AdaptiveScorer",
    "ConstantScorer",
    "PromptScorer",
    "Scorer",
    "TowerScorer",
    "check_fits",
    "counts_itself",
    "fold_budget",
    "is_scorer",
    "load_scorer",
    "same_model",
    "save_scorer",
    "signs_of",
]
