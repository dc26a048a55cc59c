"""What a file of `evaluate` holds."""

from pathlib import Path

from ..errors import InputError
from . import results
from .results import MACHINE, NUMBER, Newer, Optional, Table

SCHEMA = "mlx_tokprune.evaluate/1"
_SHARE = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "n": int}
# What is kept of an answer until all are there.
ANSWER = {
    **{"answer": str, "accuracy": Optional(NUMBER), "agrees": bool},
    **{"divergence": NUMBER, "kept": NUMBER, "flops": Optional(NUMBER)},
}
# docs/results.md says what it means.
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
            **{"label": str, "kept": NUMBER, "flops": Optional(NUMBER)},
            **{"least": Newer(NUMBER), "most": Newer(NUMBER)},
            **{"accuracy": Table(_SHARE), "agreement": Table(_SHARE)},
            **{"needed": Table(_SHARE), "divergence": _SHARE},
        }
    ],
    "answers": [
        {
            **{"picture": str, "question": str, "answers": [str], "kind": str},
            **{"given": Table(str), "scores": Table(Optional(NUMBER))},
        }
    ],
}


def read_result(file: Path) -> dict:
    """A result file; `InputError` unless it is one of this schema, and whole."""
    result = results.read_result(file, SCHEMA, SHAPE)
    rows = result["rows"]
    same = (_alike(rows, name) for name in ("accuracy", "needed"))
    if not all(same) or not all("all" in row["agreement"] for row in rows):
        raise InputError(
            f"{file} is damaged: its rows have other kinds of questions, or no share "
            "of all of them"
        )
    return result


def _alike(rows: list[dict], name: str) -> bool:
    """Whether every row has the same shares, that of all questions or none at all."""
    kinds = {tuple(row[name]) for row in rows}
    return len(kinds) == 1 and ("all" in min(kinds) or not min(kinds))


def accuracies(result: dict) -> dict[tuple, float]:
    """Accuracy over all questions, by weights, positions, label and input size."""
    about = result["run"]["weights"], result["run"]["positions"]
    return {
        (*about, row["label"], result["image_size"]): row["accuracy"]["all"]["value"]
        for row in result["rows"]
        if row["accuracy"]
    }
