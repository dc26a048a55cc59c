"""Tiny random checkpoints of mlx-vlm's families, for tests of the adapter."""
