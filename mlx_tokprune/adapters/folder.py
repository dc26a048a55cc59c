from ..attach import prune_when_loaded as prune_when_loaded
