"""Plans: pruners at several places, in order, and what they leave."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InputError
from .pruner import Pruner

Plan = tuple[Pruner, ...]
Pruners = Pruner | Iterable[Pruner] | None


def as_plan(pruners: Pruners, layers: int | None = None) -> Plan:
    """One pruner, several or none as a plan: in the order of their places.

    layers: of the language model, for those of several places, which stay one pruner
    without it. Those that keep everything are left out. Raises `InputError` for
    anything else, and for two at one place.
    """
    given = [pruners] if isinstance(pruners, Pruner) else list(pruners or ())
    for pruner in given:
        if not isinstance(pruner, Pruner):
            raise InputError(f"a pruner is a `Pruner`, not {type(pruner).__name__}")
    pruning = (p for p in given if not p.keeps_all)
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
    """Visual tokens of a place in the prompt, of all its pictures together.

    total: before pruning. projected: after the tower. given: to the language model.
    left: after its last layer. mean: over its layers. Inside the language model those
    of all places are chosen from together, and these are their means.
    """

    total: int
    projected: int
    given: int
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
    """What a plan leaves of `pictures` of a grid of tokens, from shapes alone.

    own: what a method that counts for itself left of all of them. places: in the
    prompt, with so many pictures each.
    """
    each = grid[0] * grid[1]
    projected = given = each * pictures
    held = []  # by each layer
    for pruner in plan:
        counted = own if pruner.has_own_count else None
        if pruner.place == "tower":
            projected = counted or pruner.count_on(grid) * pictures
            given = projected
        elif pruner.place == "prompt":
            given = counted or pruner.count(given)
    left = given * places
    for pruner in plan:
        if isinstance(pruner.at, int):
            held += [left] * (pruner.at - len(held))
            left = pruner.count(left)
    held += [left] * (layers - len(held))
    mean = sum(held) / max(1, len(held)) / places
    return Counts(each * pictures, projected, given, left / places, mean)


def _order(pruner: Pruner) -> float:
    if isinstance(pruner.at, str):
        return ("tower", "prompt").index(pruner.at) - 2
    return pruner.at[0] if isinstance(pruner.at, tuple) else pruner.at
