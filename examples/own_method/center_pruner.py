"""`center`: a pruning method in a package of its own."""

from collections.abc import Mapping

import mlx.core as mx

from mlx_tokprune import Features, InputError, Selection, register


def check(options: Mapping[str, float], has_budget: bool) -> None:
    """Refuse values that mean nothing before anything is computed."""
    spread = options.get("spread", 1.0)
    if not 0 < spread < float("inf"):
        raise InputError(f"spread {spread:g} is out of range; expected more than 0")


@register("center", needs=("grid",), check=check)
def center(features: Features, *, keep: int, spread: float = 1.0) -> Selection:
    """Control: keep the tokens closest to the middle of the picture.

    spread: how many times as wide as high the kept part is.
    """
    height, width = features.grid
    down = mx.arange(height) - (height - 1) / 2
    across = (mx.arange(width) - (width - 1) / 2) / spread
    distance = (mx.square(down)[:, None] + mx.square(across)[None]).reshape(-1)
    kept = mx.sort(mx.argsort(distance)[:keep]).astype(mx.int32)
    return Selection(mx.broadcast_to(kept, (features.tokens.shape[0], keep)))
