"""Group 5: outputs that cannot be written."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random

from .asks import PICTURES, TINY, WEIGHTS, pick, right
from .case import Outcome, Place, perform

FLAGS = {
    "evaluate": ("--output", "--plot"),
    "bench": ("--output", "--plots"),
    "convert": ("--mlx-path",),
    "coreml": ("--output",),
    "report": ("--output",),
    "generate": ("--overlay",),
    "act": ("--overlay",),
    "attach": ("--mlx-path",),
    **dict.fromkeys(("prune", "lora", "fuse"), ("--output",)),
}
NAMES = ("", ".", "..", "/", "/dev/full", "/dev/null", "nowhere/x", "/proc/x", "/dev/x")
NAMES += ("x" * 300, "a\nb", "\udcff", "\x1b[2J", "/dev/null/x", "-")
FULL = 2 << 20  # bytes of the small disk


def run(rng: Random, place: Place) -> Outcome:
    kinds = (_name, _there, _read_only, _full, _input)
    return rng.choices(kinds, (4, 4, 2, 5, 1))[0](rng, place)


def _asked(rng: Random, place: Place, target: str) -> tuple[str, list[str]]:
    command = pick(rng, WEIGHTS)
    return command, [*right(command, place), f"{rng.choice(FLAGS[command])}={target}"]


def _name(rng: Random, place: Place) -> Outcome:
    return perform(*_asked(rng, place, rng.choice(NAMES)), place)


def _there(rng: Random, place: Place) -> Outcome:
    """Write to a name that a folder, a pipe, a link or a file already has."""
    path = place.out / "there.json"
    how = rng.randrange(6)
    if how == 0:
        path.mkdir()
        (path / "x").write_text("mine")
    elif how == 1:
        os.mkfifo(path)
    elif how in (2, 3):
        path.symlink_to(("nothing", "there.json")[how - 2])
    else:
        path.write_text("mine")
    command, argv = _asked(rng, place, path.name)
    outcome = perform(command, argv, place)
    if how == 0 and not (path / "x").exists():
        return Outcome("wrong", f"emptied a folder of the user's: {outcome.told}")
    return outcome


def _input(rng: Random, place: Place) -> Outcome:
    """Check that an input is kept where the output has the same name."""
    command = rng.choice(("evaluate", "report", "generate"))
    name = {"evaluate": "questions.jsonl", "report": "e.json", "generate": "p.png"}
    path = place.out / name[command]
    source = PICTURES[TINY] if command == "generate" else place.base / path.name
    shutil.copy(source, path)
    argv = right(command, place)
    if command == "report":
        argv[0] = path.name
    else:
        argv += ["--data" if command == "evaluate" else "--image", path.name]
    outcome = perform(command, [*argv, f"{FLAGS[command][0]}={path.name}"], place)
    if path.read_bytes() != source.read_bytes():
        return Outcome("wrong", f"the input was overwritten: {outcome.told}")
    return outcome


def _mounted(place: Place, options: str) -> Place | None:
    folder = place.folder / "disk"
    folder.mkdir()
    how = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(how, capture_output=True)
    except OSError:
        return None
    return replace(place, out=folder) if done.returncode == 0 else None


def _on_disk(place: Place, command: str, argv: list[str]) -> Outcome:
    try:
        return perform(command, argv, place)
    finally:
        subprocess.run(["umount", str(place.out)], capture_output=True)


def _full(rng: Random, place: Place) -> Outcome:
    """Run a command on a disk of 2 MB with little or no room left."""
    disk = _mounted(place, f"size={FULL}")
    if disk is None:
        return Outcome("skipped", "no small disk can be mounted here")
    left = rng.choice((0, 4096, 8192, 100_000, 10**6, FULL))
    _fill(disk.out / "filler", FULL - left)
    command = pick(rng, WEIGHTS)
    argv = right(command, disk)
    if command in ("generate", "act"):
        argv += ["--overlay", "o.png"]
    return _on_disk(disk, command, argv)


def _fill(path: Path, size: int) -> None:
    try:
        path.write_bytes(b"x" * size)
    except OSError:  # the folder itself takes room
        pass


def _read_only(rng: Random, place: Place) -> Outcome:
    """Run a command on a read-only disk, because folder modes do not stop root."""
    disk = _mounted(place, "ro")
    if disk is None:
        return Outcome("skipped", "no read-only disk can be mounted here")
    command = pick(rng, WEIGHTS)
    argv = right(command, disk)
    if command in ("generate", "act"):
        argv += ["--overlay", "o.png"]
    return _on_disk(disk, command, argv)
