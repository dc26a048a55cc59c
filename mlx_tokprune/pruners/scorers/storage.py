"""A scorer on disk: a folder with `scorer.json` and `scorer.safetensors`."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...errors import InputError, nearest
from ...files import DEMO, new_folder, note_shadowed, object_of, read_json, write_arrays
from .fitting import read_signs
from .scorers import SCORERS, Scorer

CONFIG, WEIGHTS = "scorer.json", "scorer.safetensors"
BUDGET, OWN = "budget", "own"  # sources of the token count
# Scorers of the demo model, installed with the package.
EMBEDDED = {f"demo-{name}": DEMO / name for name in ("adaptive", "inside", "asking")}


def is_scorer(folder: str | Path) -> bool:
    """Return whether this is the folder of a scorer, or the name of an embedded one."""
    return (Path(EMBEDDED.get(str(folder), folder)) / CONFIG).is_file()


def counts_itself(folder: str | Path) -> bool:
    """Return whether the scorer of a folder learned its own count.

    Raises `InputError` for a damaged file.
    """
    folder = Path(EMBEDDED.get(str(folder), folder))
    return _counts(read_json(folder / CONFIG), folder) == OWN


def _counts(config: dict, folder: Path) -> str:
    counts = config.get("counts", BUDGET)
    if counts not in (BUDGET, OWN):
        raise InputError(
            f"{folder / CONFIG} says that {str(counts)[:40]!r} counts; expected "
            f"{BUDGET} or {OWN}"
        )
    return counts


def save_scorer(
    scorer: nn.Module, folder: str | Path, training: dict | None = None
) -> None:
    """Write a scorer to a new folder.

    training: description of the training, JSON-ready. Raises `InputError` if the folder
    exists, or for a scorer that is not in `SCORERS`.
    """
    kinds = {kind: name for name, kind in SCORERS.items()}
    if not isinstance(scorer, Scorer) or type(scorer) not in kinds:
        raise InputError(
            f"cannot write a scorer of class {type(scorer).__name__}; expected "
            f"{', '.join(kind.__name__ for kind in kinds)}"
        )
    config = {"scorer": kinds[type(scorer)], "settings": scorer.settings}
    config |= {"counts": OWN} if scorer.own_count else {}
    config |= {"model": scorer.model_signs} if scorer.model_signs else {}
    config |= {"trained": training} if training else {}
    with new_folder(folder) as made:
        (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        weights = dict(tree_flatten(scorer.parameters()))
        write_arrays(made / WEIGHTS, weights)


def load_scorer(folder: str | Path) -> Scorer:
    """Load the scorer of a folder.

    Raises `InputError` for a damaged folder or weights that are not finite.
    """
    if folder in EMBEDDED:
        note_shadowed(str(folder))
    folder = Path(EMBEDDED.get(str(folder), folder))
    config = read_json(folder / CONFIG)
    kind, settings = config.get("scorer"), object_of(config, "settings")
    if not isinstance(kind, str) or kind not in SCORERS:
        raise InputError(
            f"{folder / CONFIG} names the scorer {kind!r}; expected one of "
            f"{', '.join(SCORERS)}.{nearest(str(kind), SCORERS)}"
        )
    sizes = [v if isinstance(v, list) else [v] for v in settings.values()]
    try:
        if not all(isinstance(n, int) and 0 < n < 1 << 14 for v in sizes for n in v):
            raise ValueError("its sizes are no whole numbers from 1 to 16383")
        scorer = SCORERS[kind](**settings)
        scorer.own_count = _counts(config, folder) == OWN
        scorer.model_signs = read_signs(config.get("model"))
        scorer.load_weights(str(folder / WEIGHTS))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} is no scorer that can be read ({error})") from None
    tensors: Any = tree_flatten(scorer.parameters())
    for name, array in tensors:
        if not mx.all(mx.isfinite(array)).item():
            raise InputError(f"{folder}: {name} has numbers that are not finite")
    return scorer
