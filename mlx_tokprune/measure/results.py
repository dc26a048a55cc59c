"""Result files: the rows that were measured, whole files, and what they come from."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..pruners import Plan, Pruner, get_method
from ..pruners.registry import Options

MOST_BYTES = 1 << 30  # of a result file


@dataclass(frozen=True)
class Row:
    """A pruner, or several at different places, under its label in tables.

    share: in mlx-vlm, the share of its tokens that the image is shrunk to instead,
    which spares the tower.
    """

    label: str
    pruners: Plan
    share: float | None = None

    def described(self) -> dict:
        """As JSON: the first pruner, the others if there are any, and the share."""
        first, *others = [pruner.described() for pruner in self.pruners]
        row = {"label": self.label, "pruner": first}
        row |= {"others": others} if others else {}
        return row | ({"share": self.share} if self.share else {})


def make_rows(
    methods: Iterable[str],
    ratios: Sequence[float],
    counts: Sequence[int] = (),
    options: Mapping[str, Options] | None = None,
    plans: Mapping[str, Plan] | None = None,
) -> list[Row]:
    """The unpruned model, every method at every ratio or number of tokens, and plans.

    Methods that choose their own count have one row, and scorers that learned one have
    it besides. options: of each method.
    """
    rows = [Row("none", (Pruner("none"),))]
    for method in methods:
        own = (options or {}).get(method, {})
        for ratio in budgets(method, ratios, own):
            budget = "own count" if ratio is None else f"{ratio:g}"
            pruner = Pruner(method, ratio, options=own)
            rows.append(Row(f"{method} {budget}", (pruner,)))
        for number in () if get_method(method).counts_itself(own) else counts:
            pruner = Pruner(method, keep_tokens=number, options=own)
            rows.append(Row(f"{method} {number} tokens", (pruner,)))
    rows += [Row(label, plan) for label, plan in (plans or {}).items()]
    return list({row.label: row for row in rows}.values())


def budgets(
    method: str, ratios: Iterable[float], options: Options
) -> list[float | None]:
    """The keep ratios of a method's rows; `None` where its own count says."""
    known, shares = get_method(method), [ratio for ratio in ratios if ratio < 1]
    if known.counts_itself(options):
        return [None]
    return [None, *shares] if known.learned_count else shares


# Reading ----------------------------------------------------------------------------
# The shape of a file: a type, a tuple of types, a dict of names, or a list of one
# shape. `Optional(x)` also takes null, `Table(x)` is an object of any names, and
# `Newer(x)` may be missing: older files do not have it.


@dataclass(frozen=True)
class Optional:
    of: object


@dataclass(frozen=True)
class Newer:
    of: object


@dataclass(frozen=True)
class Table:
    of: object


def read_result(file: str | Path, schema: str, shape: object) -> dict:
    """The JSON of a result file.

    Raises `InputError` unless it is of this `schema` and whole: of this `shape`.
    """
    result = read_any(file)
    found = result.get("schema")
    if found != schema:
        raise InputError(f"{file} has schema {found!r}; expected {schema!r}")
    wrong = mismatch(result, shape, "")
    if wrong:
        raise InputError(f"{file} is damaged: {wrong}")
    return result


def read_any(file: str | Path) -> dict:
    """The JSON object of a file that may be a result."""
    file = Path(file)
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            raise ValueError
        result = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        result = None
    if not isinstance(result, dict):
        raise InputError(
            f"{file} is no JSON file that can be read; expected a result of "
            "mlx_tokprune.bench or mlx_tokprune.evaluate"
        )
    return result


def mismatch(value, shape, where: str) -> str | None:
    """What is wrong with a value, in words; `None` where it has the shape."""
    if isinstance(shape, Optional):
        return None if value is None else mismatch(value, shape.of, where)
    if isinstance(shape, (Table, dict)):
        return _object_mismatch(value, shape, where)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where or 'it'} is {str(value)[:40]!r}; expected a list"
        parts = (mismatch(v, shape[0], f"{where}[{i}]") for i, v in enumerate(value))
        return next(filter(None, parts), None)
    number = isinstance(value, float) and not math.isfinite(value)
    types = shape if isinstance(shape, tuple) else (shape,)
    boolean = isinstance(value, bool) and bool not in types
    if number or boolean or not isinstance(value, types):
        names = " or ".join(kind.__name__ for kind in types)
        return f"{where} is {str(value)[:40]!r}; expected {names}"
    return None


def _object_mismatch(value, shape, where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where or 'it'} is {str(value)[:40]!r}; expected an object"
    fields = dict.fromkeys(value, shape.of) if isinstance(shape, Table) else shape
    for name, inner in fields.items():
        path = f"{where}.{name}" if where else name
        if isinstance(inner, Newer):
            if name not in value:
                continue
            inner = inner.of
        if name not in value:
            return f"{path} is missing"
        wrong = mismatch(value[name], inner, path)
        if wrong:
            return wrong
    return None


NUMBER = (int, float)
MACHINE = {"device": str, "versions": Table(Optional(str)), "commit": Optional(str)}
