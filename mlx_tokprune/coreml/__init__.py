"""Core ML packages of the pruned vision path: export, and use in `generate`."""
