"""Kept for folders that `attach` wrote before 0.2."""

from ..attach import prune_when_loaded as prune_when_loaded
