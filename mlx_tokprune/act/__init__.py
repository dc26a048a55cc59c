"""Robot actions: one observation, control loops, action heads, drafts."""

from .policy import Policy
from .predict import Action, predict_action

__all__ = ["Action", "Policy", "predict_action"]
