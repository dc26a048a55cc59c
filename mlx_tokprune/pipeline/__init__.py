"""The path from pixels and a prompt to the first token, with a pruning plan."""

from .run import (
    DEFAULT_POSITIONS,
    POSITIONS,
    Scene,
    VisionStep,
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
    "Scene",
    "VisionStep",
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
