"""Pruners that merge: every source token becomes part of a kept token."""

import mlx.core as mx

from ..errors import InputError
from ..features import Features, Selection
from .registry import Options, in_ranges, register
from .saliency import keep_highest, keep_marked, normalize, squared_norm


def grid_within(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """Return the largest (h, w) with at most `keep` cells, of an aspect within 2:1.

    The cells divide the whole `grid`. Of equally many cells the squarest wins, then
    the grid with fewer rows.
    """
    height, width = grid
    best, best_rank = (1, 1), (1, 0.0)
    for h in range(1, min(height, keep) + 1):
        # More columns than this would make cells narrower than 1:2.
        w = min(width, keep // h, int(2 * width * h / height))
        if w == 0:
            continue
        aspect = (height / h) / (width / w)
        aspect = min(aspect, 1 / aspect)
        if aspect >= 0.5 and (h * w, aspect) > best_rank:
            best, best_rank = (h, w), (h * w, aspect)
    return best


def average(members: mx.array) -> mx.array:
    """Return weights with rows that sum to 1 from membership (B, K, N), 0 or 1."""
    return members / mx.maximum(mx.sum(members, axis=-1, keepdims=True), 1)


def _check_threshold(options: Options, budget: bool) -> None:
    in_ranges(threshold=(-1, 1))(options, budget)
    if budget and "threshold" in options:
        raise InputError(
            "give a budget or a threshold, not both: a threshold chooses the number of "
            "tokens"
        )


@register("similarity", counting=("threshold",), check=_check_threshold)
def similarity(
    features: Features, *, keep: int | None, threshold: float = 0.8
) -> Selection:
    """Merge redundant tokens into the kept token they are most similar to (cosine).

    A token is redundant when a token of larger norm is similar to it: the gap criterion
    of density peaks clustering (Rodriguez and Laio, Science 2014) with the norm as
    density. The `keep` least redundant tokens are kept, or with a `threshold` the
    tokens whose similarity to every larger token is below it. Every other token joins
    the nearest kept one, and each group is averaged.
    """
    unit = normalize(features.tokens)
    cosine = unit @ unit.swapaxes(1, 2)
    size, place = squared_norm(features.tokens), mx.arange(cosine.shape[1])
    larger = size[:, None, :] > size[:, :, None]
    # Of identical tokens, as in padding, the first counts as larger.
    same = size[:, None, :] == size[:, :, None]
    larger = larger | (same & (place[None, :] < place[:, None]))
    redundancy = mx.max(mx.where(larger, cosine, -2.0), axis=-1)
    if keep is None:
        chosen = keep_marked(redundancy < threshold)
    else:
        chosen = keep_highest(-redundancy, keep)
    kept = chosen.indices
    to_kept = mx.take_along_axis(cosine, kept[..., None], axis=1)
    # A kept token must stay in its own group, also beside an identical twin.
    own = kept[..., None] == place
    near = mx.where(own, 3.0, to_kept)
    if chosen.mask is not None:
        near = mx.where(chosen.mask[..., None], near, -3.0)
    group = mx.argmax(near, axis=1)
    members = group[:, None, :] == mx.arange(chosen.keep)[None, :, None]
    return Selection(kept, average(members.astype(mx.float32)), chosen.mask)


def cells_within(grid: tuple[int, int], keep: int) -> int:
    """Return the number of cells of `grid_within`."""
    rows, columns = grid_within(grid, keep)
    return rows * columns


@register("spatial", aliases=("spatial_pool",), needs=("grid",), fits=cells_within)
def spatial(features: Features, *, keep: int) -> Selection:
    """Average neighbouring tokens on the largest grid with at most `keep` cells.

    The grid may have fewer cells than the budget; the reported count is that of the
    cells.
    """
    grid = features.grid or (1, features.total)
    (height, width), (h, w) = grid, grid_within(grid, keep)
    rows = mx.arange(height) * h // height
    columns = mx.arange(width) * w // width
    cell = (rows[:, None] * w + columns[None]).reshape(-1)
    members = (cell[None] == mx.arange(h * w)[:, None]).astype(mx.float32)
    batch = features.tokens.shape[0]
    weights = mx.broadcast_to(average(members[None]), (batch, h * w, height * width))
    return Selection(_cell_centers(grid, (h, w), batch), weights)


def _cell_centers(
    grid: tuple[int, int], cells: tuple[int, int], batch: int
) -> mx.array:
    """Return the token in the middle of each cell, (B, h * w) int32, ascending."""
    rows, columns = (_middles(n, k) for n, k in zip(grid, cells, strict=True))
    centers = (rows[:, None] * grid[1] + columns[None]).reshape(1, -1)
    return mx.broadcast_to(centers.astype(mx.int32), (batch, centers.size))


def _middles(total: int, parts: int) -> mx.array:
    """Return the middle (parts,) of each run of i < total by i * parts // total."""
    edges = (mx.arange(parts + 1) * total + parts - 1) // parts
    return (edges[:-1] + edges[1:]) // 2
