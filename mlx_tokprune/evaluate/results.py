"""What a file of `evaluate` holds."""

from pathlib import Path

from ..measure import results
from ..measure.results import MACHINE, NUMBER, Optional, Table

SCHEMA = "mlx_tokprune.evaluate/1"
_SHARE = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "n": int}
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
            **{"accuracy": Table(_SHARE), "agreement": Table(_SHARE)},
            "divergence": _SHARE,
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
    return results.read_result(file, SCHEMA, SHAPE)


def accuracies(result: dict) -> dict[tuple[str, int], float]:
    """Accuracy over all questions, by label and input size."""
    return {
        (row["label"], result["image_size"]): row["accuracy"]["all"]["value"]
        for row in result["rows"]
        if row["accuracy"]
    }
