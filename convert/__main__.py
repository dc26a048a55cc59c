"""`python -m mlx_tokprune.convert`."""

from ..commands.convert import main

main()
