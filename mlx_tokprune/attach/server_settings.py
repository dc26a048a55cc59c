"""Budgets of a server: its live settings, and what the body of a request asks for."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import InputError
from ..pruners import Pruner
from .budgets import Budget, with_budget

LOW, HIGH = 85, 1  # as many tokens as OpenAI's low detail; all tokens
_NAMES = {  # settings of each detail
    "low": ("detail_low",),
    "high": ("detail_high",),
    "auto": ("keep_ratio", "visual_tokens"),
}
HELP = {
    "keep_ratio": "Share of a prompt's visual tokens to keep, in (0, 1].",
    "visual_tokens": "Visual tokens of a prompt to keep, in place of keep_ratio.",
    "detail_low": "Budget of a picture of detail low: a share up to 1, or a count.",
    "detail_high": "Budget of a picture of detail high: a share up to 1, or a count.",
}


def read_budget(pruner: Pruner, number: Any) -> Any:
    """Return the budget of a number: up to 1 a keep ratio, above it a count.

    Raises `InputError` for anything that is neither.
    """
    count = isinstance(number, (int, float)) and number > 1
    whole = count and number == number // 1  # 85.0, as command lines have it
    budget: Any = (None, int(number) if whole else number) if count else (number, None)
    with_budget(pruner, budget)
    return budget


class Settings:
    """Live budgets of a server, as `/v1/settings` shows and changes them.

    pruner: its budget is the default, and that of detail `auto`. low, high: of other
    details. Raises `InputError` for details that are no budgets.
    """

    def __init__(self, pruner: Pruner, low: float = LOW, high: float = HIGH):
        self.pruner = pruner
        budget = self._read([pruner.keep_ratio, pruner.keep_tokens])
        details = {"low": read_budget(pruner, low), "high": read_budget(pruner, high)}
        self._start: dict[str, Budget] = {"auto": budget} | details
        self._budgets = self._start

    def current(self) -> dict[str, float | None]:
        """Return the values by name."""
        return _values(self._budgets)

    def schema(self) -> list[dict[str, Any]]:
        """Return rows such as those of mlx-vlm's own settings."""
        row = {"type": "float_or_none", "reload_kinds": [], "allowed": None}
        default = _values(self._start)
        return [
            {"name": n, "help": HELP[n], "default": default[n], **row} for n in HELP
        ]

    def change(
        self, values: Mapping[str, Any], replace: bool = False
    ) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """Set `values` by name; return those that were set, and those refused.

        replace: return all others to the values that the server was started with.
        """
        applied, rejected = {}, []
        budgets = dict(self._start if replace else self._budgets)
        for detail, names in _NAMES.items():
            changes = {name: values[name] for name in names if name in values}
            try:
                if changes:
                    budgets[detail] = self._read([changes.get(name) for name in names])
                applied |= changes
            except InputError as error:
                rejected += [{"name": name, "reason": str(error)} for name in changes]
        self._budgets = budgets
        return applied, rejected

    def _read(self, values: list[Any]) -> Budget:
        """Return the budget of a setting, or of `keep_ratio` and `visual_tokens`."""
        if all(value is None for value in values):
            return (1.0, None)
        if len(values) == 1:
            return read_budget(self.pruner, values[0])
        with_budget(self.pruner, budget := (values[0], values[1]))
        return budget

    def budgets(self, body: Mapping[str, Any], details: list[str]) -> tuple:
        """Return the budgets of a request: one, or one for each picture.

        body: the request's JSON. details: those of its pictures. Raises `InputError`
        for budgets that are out of range or exclude each other.
        """
        values = [body.get(name) for name in _NAMES["auto"]]
        levels = [detail for detail in details if detail != "auto"]
        if values == [None, None]:
            return tuple(self._budgets[d] for d in (details if levels else ["auto"]))
        if levels:
            name = _NAMES["auto"][values[0] is None]
            raise InputError(
                f"{name} and detail {levels[0]!r} both set a budget; expected one"
            )
        return (self._read(values),)


def _values(budgets: Mapping[str, Budget]) -> dict[str, float | None]:
    """Return budgets as the values of the settings, by name."""
    ratio, tokens = budgets["auto"]
    details = {f"detail_{name}": budgets[name] for name in ("low", "high")}
    values = {name: budget[1] or budget[0] for name, budget in details.items()}
    return {"keep_ratio": ratio, "visual_tokens": tokens, **values}


def details_of(body: Mapping[str, Any]) -> Iterator[str]:
    """Yield `detail` of each picture in the messages or input items of a request.

    In mlx-vlm's order. Raises `InputError` for details that there are not.
    """
    messages = body.get("messages")
    entries = body.get("input") if messages is None else messages
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict):
            continue
        if messages is not None and entry.get("role") != "user":
            continue
        parts = entry.get("content") or entry.get("output")
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("image_url", "input_image"):
                continue
            inner = part.get("image_url")  # OpenAI's chat completions have it here
            place = inner if isinstance(inner, dict) else part
            detail = place.get("detail") or "auto"
            if detail not in [*_NAMES]:
                raise InputError(
                    f"detail {detail!r:.40} is none of a picture's; expected low, high "
                    "or auto"
                )
            yield detail
