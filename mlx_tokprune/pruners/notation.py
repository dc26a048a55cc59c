"""Plans as one line of text: `norm:0.5@tower+attention:0.5@2`.

Each pruner is METHOD[:BUDGET][@PLACE]. A budget up to 1 is a keep ratio, a larger one
a number of tokens. The place is tower, prompt or a number of layers, by default the
method's.
"""

from typing import Any, cast

from ..errors import InputError
from .plans import Plan
from .pruner import Pruner
from .registry import Options, Place, get_method


def read_pruner(text: str, options: Options | None = None, seed: int = 0) -> Pruner:
    """Read one pruner of a plan; the method takes the `options` that it has.

    Raises `InputError` for a text that is no METHOD[:BUDGET][@PLACE].
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
    registered = get_method(method)
    own = {n: v for n, v in (options or {}).items() if n in registered.options}
    fields: dict[str, Any] = {"at": read_place(place) if at_sign else None}
    fields |= {"seed": seed, "options": own}
    if amount is None:
        if registered.lacks_budget(own):
            raise InputError(
                f"method {method!r} needs a budget: say {method}:0.5, or another value"
            )
        return Pruner(method, **fields)
    if amount <= 1:
        return Pruner(method, amount, **fields)
    if not amount.is_integer():
        raise InputError(
            f"{text!r} keeps {amount:g} tokens; expected a ratio up to 1, or a whole "
            "number of tokens"
        )
    return Pruner(method, keep_tokens=int(amount), **fields)


def read_plan(text: str, options: Options | None = None, seed: int = 0) -> Plan:
    """Read all pruners of a plan, in the order of the text."""
    return tuple(read_pruner(part, options, seed) for part in text.split("+"))


def read_place(text: str) -> Place:
    """Return a place as `Pruner(at=...)` takes it, which checks it."""
    return int(text) if text.isdecimal() else cast(Place, text)
