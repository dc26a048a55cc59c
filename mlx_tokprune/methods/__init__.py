"""Table of the pruning methods, from their registrations and docstrings."""

import inspect
import re
from collections.abc import Callable

from ..pruners import get_method, list_pruners
from ..pruners.registry import Depths, Method, Place

COLUMNS = ("method", "place", "needs", "source", "options")
LEGEND = """\
place: where the method prunes without --at: at the tower (before the projector), at the
prompt (input of the language model), or after layers of the language model.
needs: what the model must provide there. grid: tokens on the grid of one picture; text:
the prompt's embeddings; attention: what each token receives; text_attention: the same
by word of the prompt; keys, queries, text_keys: of attention layers; own count: the
method chooses how many tokens to keep (budget or own count: unless there is a budget).
[NAME=DEFAULT]: options, set by --option NAME=VALUE. source: the paper."""
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


def method_rows() -> list[tuple[str, ...]]:
    """Return a row for each method: name, place, needs, source and options."""
    return [_row(get_method(name)) for name in list_pruners()]


def _row(method: Method) -> tuple[str, ...]:
    papers = _ARXIV.findall(method.function.__doc__ or "")
    counts = {"budget": "", "own": "own count", "either": "budget or own count"}
    needs = [*method.needs, *filter(None, [counts[method.counts]])]
    options = " ".join(map(_option(method), method.options))
    source = f"arXiv {papers[-1]}" if papers else ""
    return method.name, place_name(method.at), ", ".join(needs), source, options


def _option(method: Method) -> Callable[[str], str]:
    """Return a function from an option's name to `name=default`."""
    parameters = inspect.signature(method.function).parameters
    return lambda name: f"{name}={parameters[name].default}"


def place_name(place: Place | Depths) -> str:
    """Return a place as `--at` takes it, or the depths of several layers."""
    if isinstance(place, tuple):
        return ", ".join(f"{100 * depth:.0f} %" for depth in place) + " of layers"
    return f"layer {place}" if isinstance(place, int) else place
