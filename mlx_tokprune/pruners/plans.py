"""Plans: pruners at several places, in order, and their token counts."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from ..errors import InputError
from .pruner import Pruner

Plan = tuple[Pruner, ...]
Pruners = Pruner | Iterable[Pruner] | None


def as_plan(pruners: Pruners, layers: int | None = None) -> Plan:
    """Return one pruner, several or none as a plan, in the order of their places.

    layers: depth of the language model, to split a pruner with several places; without
    it such a pruner stays whole. Pruners that keep everything are left out. Raises
    `InputError` for anything but pruners, and for two pruners at one place.
    """
    alone = isinstance(pruners, Pruner) or not isinstance(pruners or (), Iterable)
    members: list[Any] = [pruners] if alone else list(cast(Iterable, pruners or ()))
    for pruner in members:
        if not isinstance(pruner, Pruner):
            raise InputError(f"a pruner is a `Pruner`, not {type(pruner).__name__}")
    pruning = (p for p in members if not p.keeps_all)
    spread = [(p,) if layers is None else p.spread(layers) for p in pruning]
    plan = sorted(itertools.chain(*spread), key=_order)
    for first, second in itertools.pairwise(plan):
        if first.at == second.at:
            raise InputError(
                f"{first.method!r} and {second.method!r} both prune at {first.at!r}; "
                "expected one pruner for each place"
            )
    return tuple(plan)


@dataclass(frozen=True)
class Counts:
    """Visual tokens of one place in the prompt, over all its pictures.

    total: before pruning. projected: after the tower. entering: at the language model's
    input. left: after its last layer. mean: over its layers. Inside the language model
    a pruner chooses among the tokens of all places; `left` and `mean` are averages
    over the places.
    """

    total: int
    projected: int
    entering: int
    left: float
    mean: float


def count_tokens(
    plan: Plan,
    grid: tuple[int, int],
    pictures: int,
    layers: int,
    own: int | None = None,
    places: int = 1,
) -> Counts:
    """Return the token counts of a plan for `pictures` grids, from shapes alone.

    own: number of tokens that a method with its own count kept of all pictures.
    places: places in the prompt, with `pictures` pictures each.
    """
    each = grid[0] * grid[1]
    projected = entering = each * pictures
    held = []  # tokens in each layer
    for pruner in plan:
        counted = own if pruner.has_own_count else None
        if pruner.place == "tower":
            projected = counted or pruner.count_on(grid) * pictures
            entering = projected
        elif pruner.place == "prompt":
            entering = counted or pruner.count(entering)
    left = entering * places
    for pruner in plan:
        if isinstance(pruner.at, int):
            held += [left] * (pruner.at - len(held))
            left = pruner.count(left)
    held += [left] * (layers - len(held))
    mean = sum(held) / max(1, len(held)) / places
    return Counts(each * pictures, projected, entering, left / places, mean)


def _order(pruner: Pruner) -> float:
    if isinstance(pruner.at, str):
        return ("tower", "prompt").index(pruner.at) - 2
    return pruner.at[0] if isinstance(pruner.at, tuple) else pruner.at
