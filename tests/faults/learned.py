"""Group 9: damaged scorers and adapters."""

import json
import shutil
from pathlib import Path
from random import Random

from . import damage
from .asks import right
from .case import Outcome, Place, perform

# Files of each folder: description and weights.
FILES = {
    "adaptive": ("scorer.json", "scorer.safetensors"),
    "asking": ("scorer.json", "scorer.safetensors"),
    "adapter": ("adapter_config.json", "adapters.safetensors"),
}


def run(rng: Random, place: Place) -> Outcome:
    name = rng.choice(list(FILES))
    folder = place.folder / "learned"
    shutil.copytree(place.base / name, folder)
    config, weights = (folder / file for file in FILES[name])
    kind = rng.choice((_values, _values, _values, _bytes, _bytes, _gone, _swapped))
    if kind is _swapped:
        other = rng.choice(list(FILES))
        shutil.copyfile(place.base / other / FILES[other][1], weights)
    else:
        kind(rng, config, weights)
    outcome = perform(*_asked(rng, name, folder, place), place)
    return Outcome(outcome.kind, f"{outcome.told}\n  {kind.__name__} of {name}")


def _asked(rng: Random, name: str, folder: Path, place: Place) -> tuple[str, list[str]]:
    if name == "adapter":
        command = rng.choice(("generate", "evaluate", "fuse"))
        return command, [*right(command, place), "--adapter-path", str(folder)]
    command = rng.choice(("generate", "evaluate", "convert"))
    argv = right(command, place)
    if command == "convert":
        return command, [*argv, "--prune", f"{folder}:0.5"]
    if command == "evaluate":
        return command, [*argv, "--methods", str(folder)]
    return command, [*argv, "--method", str(folder), "--keep-ratio", "0.5"]


# Faults -----------------------------------------------------------------------------


def _values(rng: Random, config: Path, weights: Path) -> None:
    times = rng.choice((1, 1, 2, 3))
    value = damage.changed(rng, json.loads(config.read_text()), times)
    config.write_bytes(damage.as_json(value))


def _bytes(rng: Random, config: Path, weights: Path) -> None:
    file = rng.choice((config, weights, weights))
    file.write_bytes(damage.damaged(rng, file.read_bytes()))


def _gone(rng: Random, config: Path, weights: Path) -> None:
    rng.choice((config, weights)).unlink()


def _swapped() -> None:
    """Stand for the fault of weights from another folder, which `run` copies."""
