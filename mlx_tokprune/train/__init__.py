"""Training under pruning: scorers of visual tokens, and adapters."""
