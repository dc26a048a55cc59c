"""Rows of measurements, and the reading of result files."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..pruners import Plan, Pruner, get_method
from ..pruners.registry import Options

MOST_BYTES = 1 << 30  # of a result file


@dataclass(frozen=True)
class Row:
    """A pruner, or several at different places, with the label of its table row.

    share: in mlx-vlm, the share of visual tokens to which the image is shrunk instead
    of pruning, which also shortens the tower's time.
    """

    label: str
    pruners: Plan
    share: float | None = None

    def described(self) -> dict:
        """Return the row as JSON: label, first pruner, other pruners and share."""
        first, *rest = [pruner.described() for pruner in self.pruners]
        row = {"label": self.label, "pruner": first}
        row |= {"others": rest} if rest else {}
        return row | ({"share": self.share} if self.share else {})


def make_rows(
    methods: Iterable[str],
    ratios: Sequence[float],
    counts: Sequence[int] = (),
    options: Mapping[str, Options] | None = None,
    plans: Mapping[str, Plan] | None = None,
) -> list[Row]:
    """Return rows: the unpruned model, methods at every budget, and plans.

    ratios, counts: budgets as keep ratios and as numbers of tokens. options: options of
    each method. plans: plans by label. Methods with their own count have one row;
    scorers with a learned count have an additional row for it.
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
    """Return the keep ratios of a method's rows; `None` stands for its own count."""
    entry, shares = get_method(method), [ratio for ratio in ratios if ratio < 1]
    if entry.counts_itself(options):
        return [None]
    return [None, *shares] if entry.learned_count else [*shares]


# Reading ----------------------------------------------------------------------------
# The shape of a file is a type, a tuple of types, a dict of named shapes, a list of one
# shape, or one of these classes.


@dataclass(frozen=True)
class NewerField:
    """Shape of a field that older files do not have."""

    of: object


@dataclass(frozen=True)
class Table:
    """Shape of an object with any names."""

    of: object


def read_result(file: str | Path, schema: str, shape: object) -> dict:
    """Return the JSON of a result file.

    Raises `InputError` unless the file has this schema and shape.
    """
    result = read_any(file)
    name = result.get("schema")
    if name != schema:
        raise InputError(f"{file} has schema {name!r}; expected {schema!r}")
    error = mismatch(result, shape, "")
    if error:
        raise InputError(f"{file} is damaged: {error}")
    return result


def read_any(file: str | Path) -> dict:
    """Return the JSON object of a file that may be a result.

    Raises `InputError` for a file that is no JSON object, or larger than 1 GiB.
    """
    file = Path(file)
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            raise ValueError
        result = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        result = None
    if not isinstance(result, dict):
        raise InputError(
            f"{file} is no JSON file that can be read; expected a result of "
            "mlx_tokprune bench or mlx_tokprune evaluate"
        )
    return result


def mismatch(value: Any, shape: Any, where: str) -> str | None:
    """Describe the first mismatch of a value and its shape; `None` without any.

    where: path of the value in the file.
    """
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
        names = " or ".join(kind.__name__ for kind in types if kind is not _NULL)
        return f"{where} is {str(value)[:40]!r}; expected {names}"
    return None


def _object_mismatch(value: Any, shape: Table | dict, where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where or 'it'} is {str(value)[:40]!r}; expected an object"
    fields = dict.fromkeys(value, shape.of) if isinstance(shape, Table) else shape
    for name, inner in fields.items():
        path = f"{where}.{name}" if where else name
        if isinstance(inner, NewerField):
            if name not in value:
                continue
            inner = inner.of
        if name not in value:
            return f"{path} is missing"
        error = mismatch(value[name], inner, path)
        if error:
            return error
    return None


_NULL = type(None)
NUMBER = (int, float)
NUMBER_OR_NULL = (*NUMBER, _NULL)
MACHINE = {
    "device": str,
    "versions": Table((str, _NULL)),
    "commit": (str, _NULL),
}
