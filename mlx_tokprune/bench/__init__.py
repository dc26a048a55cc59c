"""Benchmarks that a sceptic can run: `python -m mlx_tokprune.bench`."""
