"""Inputs of the cases, made once per run by the commands themselves."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from . import packed, trainers
from .asks import PICTURES, POLICY, TINY, right
from .case import MODULES, Place, module_of

ACTION = " ".join(["0.1"] * 7)
RUNS = 5
# Options that make the commands to be killed run longer.
LONG = {
    "convert": [],
    "evaluate": ["--methods", "norm", "uniform", "similarity"],
    "bench": ["--runs", str(RUNS), "--methods", "norm", "uniform"],
}
RESULT = {"convert": "made", "evaluate": "e.json", "bench": "b.json"}


def prepare(base: Path) -> None:
    base.mkdir()
    _write_questions(base)
    _write_oft(base / "oft")
    place = Place.make(base / "place", base)
    os.chdir(base)
    with contextlib.redirect_stdout(io.StringIO()):
        module_of("bench").main([*right("bench", place), "--runs", "2"])
        _evaluate_and_keep_journal(right("evaluate", place))
        convert = module_of("convert").main
        quantized = ["--mlx-path", "quantized", "-q", "--q-group-size", "32"]
        convert(["--hf-path", str(TINY), *quantized])
        for scorer in ("adaptive", "asking"):
            argv = [*right("prune", place)[:-1], scorer, "--scorer", scorer]
            module_of("prune").main(argv)
        module_of("lora").main(right("lora", place))
        packed.prepare(base)
    trainers.prepare(base)


def _write_questions(base: Path) -> None:
    seen = [TINY / "image_1.png", TINY / "image_0.png"]
    asked = [
        {"image": str(path), "question": text, "answer": ["x", "y"], "kind": kind}
        for path in seen
        for text, kind in (("What?", "a"), ("Who is it?", "b"))
    ]
    acted = [
        {"image": str(PICTURES[POLICY]), "question": text, "answer": ACTION}
        for text in ("lift it", "push it")
    ]
    for name, entries in (("questions", asked), ("actions", acted)):
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (base / f"{name}.jsonl").write_text(lines)


def _write_oft(folder: Path) -> None:
    """Write a policy of two images and a robot state, with random heads."""
    import mlx.core as mx
    from conftest import OFT, copy_policy, side_tensors

    weights = mx.load(str(copy_policy(folder) / "model.safetensors")) | side_tensors()
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text()) | {"oft": OFT}
    (folder / "config.json").write_text(json.dumps(config))
    action = config["norm_stats"]["toy_robot"]["action"]
    proprio = {"q01": [-1.0] * 5, "q99": [2.0] * 5, "mask": [True] * 5}
    stats = {"toy_robot": {"action": action, "proprio": proprio}}
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))


def _evaluate_and_keep_journal(argv: list[str]) -> None:
    """Run `evaluate` and keep its journal, as a killed run would leave it."""
    module = module_of("evaluate")
    with mock.patch.object(module, "_remove_journals"):
        module.main(argv)


def undisturbed(base: Path, command: str) -> tuple[Path, float]:
    """Return the output folder and the seconds of an undisturbed long run.

    The first call runs the command in a process; later calls reuse the folder.
    """
    folder = base / f"undisturbed-{command}-{os.getpid()}"
    note = folder / "seconds"
    if not note.exists():
        place = Place.make(folder, base)
        began = time.monotonic()
        done = start(command, place, LONG[command]).wait()
        if done:
            raise RuntimeError(f"{command} alone ends with {done}")
        note.write_text(str(time.monotonic() - began))
    return folder / "out", float(note.read_text())


def start(command: str, place: Place, more: list[str]) -> subprocess.Popen:
    """Start a command in a process, with stdout and stderr in the case's folder."""
    argv = [*right(command, place), *more]
    with (
        open(place.folder / "stdout", "wb") as out,
        open(place.folder / "stderr", "wb") as err,
    ):
        return subprocess.Popen(
            [sys.executable, "-m", _runnable(command), *argv],
            cwd=place.out,
            stdout=out,
            stderr=err,
        )


def _runnable(command: str) -> str:
    return {"convert": "mlx_tokprune.convert"}.get(
        command, MODULES[command].removesuffix(".__main__")
    )
