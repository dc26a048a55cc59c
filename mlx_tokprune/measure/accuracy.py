"""Result files of `evaluate`: their schema, reading and accuracies."""

from pathlib import Path

from ..errors import InputError
from . import results
from .results import MACHINE, NUMBER, NUMBER_OR_NULL, NewerField, Table

SCHEMA = "mlx_tokprune.evaluate/1"
_SHARE = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "n": int}
# Shape of an answer in the journal of an unfinished run.
ANSWER = {
    **{"answer": str, "accuracy": NUMBER_OR_NULL, "agrees": bool},
    **{"divergence": NUMBER, "kept": NUMBER, "flops": NUMBER_OR_NULL},
}
# docs/results.md documents the fields.
SHAPE = {
    "machine": MACHINE,
    "model": str,
    "image_size": int,
    "data": str,
    "questions": int,
    "run": {
        "weights": str,
        "positions": str,
        "rows": [{"label": str, "pruner": {"method": str}}],
    },
    "rows": [
        {
            **{"label": str, "kept": NUMBER, "flops": NUMBER_OR_NULL},
            **{"least": NewerField(NUMBER), "most": NewerField(NUMBER)},
            **{"accuracy": Table(_SHARE), "agreement": Table(_SHARE)},
            **{"needed": Table(_SHARE), "divergence": _SHARE},
        }
    ],
    "answers": [
        {
            **{"picture": str, "question": str, "answers": [str], "kind": str},
            **{"given": Table(str), "scores": Table(NUMBER_OR_NULL)},
        }
    ],
}


def read_result(file: Path) -> dict:
    """Return the JSON of a result file.

    Raises `InputError` unless the file has this schema and is complete.
    """
    result = results.read_result(file, SCHEMA, SHAPE)
    rows = result["rows"]
    alike = (_alike(rows, name) for name in ("accuracy", "needed"))
    if not all(alike) or not all("all" in row["agreement"] for row in rows):
        raise InputError(
            f"{file} is damaged: its rows have other kinds of questions, or no share "
            "of all of them"
        )
    return result


def _alike(rows: list[dict], name: str) -> bool:
    """Return whether the rows have equal kinds of shares: none, or "all" among them."""
    kinds = {tuple(row[name]) for row in rows}
    return len(kinds) == 1 and ("all" in min(kinds) or not min(kinds))


def accuracies(result: dict) -> dict[tuple, float]:
    """Return accuracies over all questions, by weights, positions, label and size."""
    run = result["run"]["weights"], result["run"]["positions"]
    return {
        (*run, row["label"], result["image_size"]): row["accuracy"]["all"]["value"]
        for row in result["rows"]
        if row["accuracy"]
    }
