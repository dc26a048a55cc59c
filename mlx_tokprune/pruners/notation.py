"""Plans as one line of text: `norm:0.5@tower+attention:0.5@2`.

Each place is METHOD[:BUDGET][@PLACE]. A budget up to 1 is a keep ratio, a larger one a
number of tokens; the place is tower, prompt or a number of layers, else the method's.
"""

from typing import cast

from ..errors import InputError
from .plans import Plan
from .pruner import Pruner
from .registry import Options, Place, get_method


def read_pruner(text: str, options: Options | None = None, seed: int = 0) -> Pruner:
    """One place of a plan; of the `options` it takes those that its method has.

    Raises `InputError` where it is none.
    """
    rest, at_sign, place = text.rpartition("@")
    rest = rest if at_sign else text
    method, colon, budget = rest.rpartition(":")
    try:
        amount = float(budget) if colon else None
    except ValueError:
        amount = None
    method = rest if amount is None else method
    if not method or (at_sign and not place):
        raise InputError(
            f"{text!r} is no place of a plan; expected METHOD[:BUDGET][@PLACE], such "
            "as norm:0.5@tower"
        )
    known = get_method(method)
    own = {name: v for name, v in (options or {}).items() if name in known.options}
    how = {"at": read_place(place) if at_sign else None, "seed": seed, "options": own}
    if amount is None:
        if known.lacks_budget(own):
            raise InputError(
                f"method {method!r} needs a budget: say {method}:0.5, or another"
            )
        return Pruner(method, **how)
    if amount <= 1:
        return Pruner(method, amount, **how)
    if not amount.is_integer():
        raise InputError(
            f"{text!r} keeps {amount:g} tokens; expected a ratio up to 1, or a whole "
            "number of tokens"
        )
    return Pruner(method, keep_tokens=int(amount), **how)


def read_plan(text: str, options: Options | None = None, seed: int = 0) -> Plan:
    """All places of a plan, as they are written."""
    return tuple(read_pruner(part, options, seed) for part in text.split("+"))


def read_place(text: str) -> Place:
    """What a pruner's `at` is; it checks it."""
    return int(text) if text.isdecimal() else cast(Place, text)
