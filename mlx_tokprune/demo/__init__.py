"""Convert, prune, generate and act on the embedded models."""
