"""Kept for folders that `attach` wrote before 0.2; import `mlx_tokprune.attach`."""
