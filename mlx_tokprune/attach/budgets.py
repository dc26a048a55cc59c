"""Budgets of one request, which a server sets in place of the attached pruner's."""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace

from ..errors import InputError
from ..pruners import Pruner

Budget = tuple[float | None, int | None]  # keep ratio, or number of tokens
KEEP_ALL: Budget = (None, 1 << 31)  # of a pruner that could prune, unlike (1.0, None)
Group = tuple[int, tuple[int, int] | None, Pruner]  # tokens, their grid, their budget


@dataclass
class PromptRequest:
    """Request whose prompts are prepared in one context (`contextvars`).

    budgets: one for all visual tokens of a prompt, or one for each picture. total,
    keep: N and K of the prompt that was prepared last. error: reason why it was not.
    """

    budgets: tuple[Budget, ...]
    total: int = 0
    keep: int = 0
    error: str | None = None


REQUEST: ContextVar[PromptRequest | None] = ContextVar("tokprune_request", default=None)


def with_budget(pruner: Pruner, budget: Budget) -> Pruner:
    """Return the pruner with another budget; raise `InputError` for a bad one."""
    return replace(pruner, keep_ratio=budget[0], keep_tokens=budget[1])


def share_out(
    groups: Sequence[tuple[int, tuple[int, int] | None]], pruners: Sequence[Pruner]
) -> list[Group]:
    """Return the groups of visual tokens of a prompt with the pruner of each.

    pruners: one for all, or one for each picture. Equal budgets of pictures are pooled
    where a picture is not one group; raises `InputError` for unequal ones there.
    """
    if len(groups) in (0, len(pruners)):
        return [
            (*group, pruner) for group, pruner in zip(groups, pruners, strict=False)
        ]
    first, *others = pruners
    whole = any(grid for _, grid in groups)  # pooled tokens have no grid
    if any(pruner != first or whole for pruner in others):
        raise InputError(
            f"{len(pruners)} pictures have {len(groups)} runs of visual tokens in this "
            "model's prompt; expected one budget for all pictures"
        )
    if not others:
        return [(*group, first) for group in groups]
    if first.keep_tokens is not None:
        first = replace(first, keep_tokens=first.keep_tokens * len(pruners))
    return [(sum(size for size, _ in groups), None, first)]
