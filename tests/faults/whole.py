"""Check that the files a command left behind are whole."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

_JOURNAL = re.compile(r".+\.\d+-of-\d+\.jsonl")  # kept, so that a run can go on


@dataclass(frozen=True)
class Listing:
    """Names in a folder, each with a tuple that changes when the file is written."""

    files: dict[str, tuple]

    @classmethod
    def of(cls, folder: Path) -> "Listing":
        found = {}
        for path in folder.iterdir():
            seen = path.lstat()
            found[path.name] = (seen.st_ino, seen.st_mtime_ns, seen.st_size)
        return cls(found)


def leftovers(folder: Path, before: Listing) -> list[str]:
    """Return errors of new and changed files that are not whole, and of lost files."""
    now, wrong = Listing.of(folder).files, []
    for name, seen in now.items():
        if before.files.get(name) == seen or _JOURNAL.fullmatch(name):
            continue
        if why := not_whole(folder / name):
            wrong.append(f"{name[:80]!r} {why}")
    gone = [name for name in before.files if name not in now]
    wrong += [f"{n[:80]!r} is gone" for n in gone if not _JOURNAL.fullmatch(n)]
    return wrong


def not_whole(path: Path) -> str | None:
    """Return the reason, or `None` for a whole image, result, page or package."""
    try:
        return _folder(path) if path.is_dir() else _file(path)
    except Exception as error:
        return f"cannot be read ({type(error).__name__}: {str(error)[:200]})"


def _file(path: Path) -> str | None:
    data = path.read_bytes()
    if data.startswith(b"\x89PNG"):
        with Image.open(path) as picture:
            picture.load()
        return None
    if data.startswith(b"{"):
        return None if "schema" in json.loads(data) else "is no result"
    if data.startswith(b"<!doctype html>") and data.endswith(b"</html>\n"):
        return None
    return f"is a file of {len(data)} bytes that is no result"


def _folder(path: Path) -> str | None:
    if (path / "Manifest.json").exists():
        entries = json.loads((path / "Manifest.json").read_text())["itemInfoEntries"]
        missing = [e["path"] for e in entries.values() if not _there(path, e["path"])]
        return f"lacks {missing}" if missing else None
    if path.name.endswith(".training"):  # kept, so that a training can go on
        return None
    if (path / "scorer.json").exists():
        from mlx_tokprune.pruners.scorers import load_scorer

        load_scorer(path)
        return None
    if (path / "adapter_config.json").exists():
        json.loads((path / "adapter_config.json").read_text())
        return None if (path / "adapters.safetensors").exists() else "lacks weights"
    if (path / "config.json").exists():
        from mlx_tokprune.checkpoints.opening import open_checkpoint

        open_checkpoint(path)
        return None
    files = list(path.iterdir())
    if not files or any(f.is_file() and f.suffix != ".png" for f in files):
        return f"is a folder of {[file.name for file in files][:5]}"
    return next(filter(None, map(not_whole, files)), None)


def _there(package: Path, name: str) -> bool:
    return (package / "Data" / name).exists()
