"""Benchmarks of pruned models: `python -m mlx_tokprune.bench`."""
