"""Budgets of a server: its live settings, and what the body of a request asks for."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import InputError
from ..pruners import Pruner
from .budgets import Budget, with_budget

LOW, HIGH = 85, 1  # OpenAI's low detail is as many tokens; all tokens
_DETAILS = ("low", "high", "auto")
HELP = {
    "keep_ratio": "Share of a prompt's visual tokens to keep, in (0, 1].",
    "visual_tokens": "Visual tokens of a prompt to keep, in place of keep_ratio.",
    "detail_low": "Budget of a picture of detail low: a share up to 1, or a count.",
    "detail_high": "Budget of a picture of detail high: a share up to 1, or a count.",
}


def read_budget(pruner: Pruner, number: Any) -> Budget:
    """Return the budget of a number: up to 1 a keep ratio, above it a count.

    Raises `InputError` for anything that is neither.
    """
    whole = isinstance(number, float) and number.is_integer()
    real = isinstance(number, (int, float)) and not isinstance(number, bool)
    budget: Any = (None, int(number) if whole else number)
    if not real or number <= 1 or number != number:
        budget = (number, None)
    with_budget(pruner, budget)
    return budget


class Settings:
    """Live budgets of a server, as `/v1/settings` shows and changes them.

    pruner: its budget is the default, and that of detail `auto`. low, high: of other
    details. Raises `InputError` for details that are no budgets.
    """

    def __init__(self, pruner: Pruner, low: float = LOW, high: float = HIGH):
        self.pruner, self._lock = pruner, threading.Lock()
        ratio, tokens = pruner.keep_ratio, pruner.keep_tokens
        ratio = 1.0 if ratio is None and tokens is None else ratio
        details = {"detail_low": read_budget(pruner, low)}
        details |= {"detail_high": read_budget(pruner, high)}
        self._start = {"default": (ratio, tokens)} | details
        self._budgets = self._start

    def current(self) -> dict[str, float | None]:
        """Return the values by name."""
        return _values(self._budgets)

    def schema(self) -> list[dict[str, Any]]:
        """Return rows such as those of mlx-vlm's own settings."""
        row = {"type": "float_or_none", "reload_kinds": [], "allowed": None}
        default = _values(self._start)
        return [
            {"name": name, "help": help_, "default": default[name], **row}
            for name, help_ in HELP.items()
        ]

    def change(
        self, values: Mapping[str, Any], replace: bool = False
    ) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """Set `values` by name; return those that were set, and those refused.

        replace: return all others to the values that the server was started with.
        """
        applied, rejected = {}, []
        pair = {n: values[n] for n in ("keep_ratio", "visual_tokens") if n in values}
        with self._lock:
            budgets = dict(self._start if replace else self._budgets)
            for name in ("default", "detail_low", "detail_high"):
                names = pair if name == "default" else {name} & values.keys()
                if not names:
                    continue
                try:
                    if name == "default":
                        budget = (pair.get("keep_ratio"), pair.get("visual_tokens"))
                        budget = (1.0, None) if budget == (None, None) else budget
                        with_budget(self.pruner, budget)
                    else:
                        budget = read_budget(self.pruner, values[name])
                except InputError as error:
                    rejected += [{"name": n, "reason": str(error)} for n in names]
                    continue
                budgets[name] = budget
                applied |= {n: values[n] for n in names}
            self._budgets = budgets
        return applied, rejected

    def budgets(self, body: Mapping[str, Any], details: list[str]) -> tuple:
        """Return the budgets of a request: one, or one for each picture.

        body: the request's JSON. details: those of its pictures. Raises `InputError`
        for budgets that are out of range or exclude each other.
        """
        budgets = self._budgets
        pair = (body.get("keep_ratio"), body.get("visual_tokens"))
        levels = [detail for detail in details if detail != "auto"]
        if pair == (None, None):
            by_detail = {"auto": budgets["default"]}
            by_detail |= {name: budgets[f"detail_{name}"] for name in ("low", "high")}
            return tuple(by_detail[d] for d in details if levels) or (
                by_detail["auto"],
            )
        if levels:
            name = "visual_tokens" if pair[0] is None else "keep_ratio"
            raise InputError(
                f"{name} and detail {levels[0]!r} both set a budget; expected one"
            )
        with_budget(self.pruner, pair)
        return (pair,)


def _values(budgets: Mapping[str, Budget]) -> dict[str, float | None]:
    """Return budgets as the values of the settings, by name."""
    ratio, tokens = budgets["default"]
    values: dict[str, float | None] = {"keep_ratio": ratio, "visual_tokens": tokens}
    for name in ("detail_low", "detail_high"):
        ratio, tokens = budgets[name]
        values[name] = tokens if ratio is None else ratio
    return values


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
            if isinstance(part, dict) and part.get("type") in (
                *("image_url", "input_image", "image"),
            ):
                yield _detail(part)


def _detail(part: Mapping[str, Any]) -> str:
    """Return `detail` of a picture, in its part or in `image_url`, as OpenAI has it."""
    inner = part.get("image_url")
    detail = inner.get("detail") if isinstance(inner, dict) else None
    detail = part.get("detail") if detail is None else detail
    if detail is not None and detail not in _DETAILS:
        raise InputError(
            f"detail {detail!r:.40} is none of a picture's; expected low, high or auto"
        )
    return detail or "auto"
