"""One path from pixels and a prompt to the first token, with pruning as a value."""

from .run import (
    DEFAULT_POSITIONS,
    POSITIONS,
    Look,
    Scene,
    VisualTokens,
    ask,
    assemble,
    check_positions,
    encode,
    grouped,
    look,
    prune_at_prompt,
    prune_at_tower,
    run,
    tower_needs,
)

__all__ = [
    "DEFAULT_POSITIONS",
    "POSITIONS",
    "Look",
    "Scene",
    "VisualTokens",
    "ask",
    "assemble",
    "check_positions",
    "encode",
    "grouped",
    "look",
    "prune_at_prompt",
    "prune_at_tower",
    "run",
    "tower_needs",
]
