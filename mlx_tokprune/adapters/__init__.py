"""Pruning in other people's runtimes. Nothing here is imported unless asked for."""

RUNTIMES = ("own", "mlx-vlm")
