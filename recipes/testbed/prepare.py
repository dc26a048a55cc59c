"""Extraction of the test bed's cut-outs and backgrounds from their packages."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from mlx_tokprune.files import new_folder

from .parts import BACKGROUNDS, THINGS, fetch, members
from .things import SPLITS

_STAMPS = "./usr/share/tuxpaint/stamps/"
_DRAWN = {"cartoon", "toys", "plastic", "symbols"}  # folders of drawings
_SIZE = 224  # longer side of a thing, px
_BACKGROUND = 1024  # longer side of a background, px


@dataclass(frozen=True)
class Kind:
    """Kind of thing: its name, and a filter for its stamps.

    folders: folders of its stamps. only: name parts, one of which a stamp's file has.
    but: name parts, none of which the file has.
    """

    name: str
    folders: tuple[str, ...]
    only: tuple[str, ...] = ("",)
    but: tuple[str, ...] = ()

    def has(self, stamp: PurePosixPath) -> bool:
        inside = any(stamp.is_relative_to(folder) for folder in self.folders)
        drawn = _DRAWN.intersection(stamp.parts)
        named = any(part in stamp.stem for part in self.only)
        other = any(part in stamp.stem for part in self.but)
        return inside and named and not drawn and not other


_CLOTHES = ("button", "clothespin", "cap")
_GRAVES = ("grave", "tomb", "headstone", "cemetery", "monument")
KINDS = (
    Kind("ball", ("sports",), only=("ball",)),
    Kind("bird", ("animals/birds",)),
    Kind("fish", ("animals/fish",), but=("lobster", "shrimp", "seahorse")),
    Kind("flower", ("plants/flowers",)),
    Kind("fruit", ("food/fruit",)),
    Kind("garment", ("clothes",), but=(*_CLOTHES, "hat", "fedora", "sombrero")),
    Kind("gravestone", ("seasonal/halloween",), only=_GRAVES),
    Kind("hat", ("clothes/hats",)),
    Kind("insect", ("animals/insects",), but=("slug", "woodlouse")),
    Kind("instrument", ("hobbies/music",)),
    Kind("mammal", ("animals/mammals", "animals/marsupials")),
    Kind("planet", ("space/planets", "space/moon")),
    Kind("sign", ("town/roadsigns",), but=("light", "cone")),
    Kind("tool", ("household/tools",)),
    Kind("vegetable", ("food/vegetables",)),
    Kind("vehicle", ("vehicles",), but=("wheel", "emblem", "locomotive")),
)
_PLACES = {  # file names of the backgrounds, by split
    "test": ("Blinds", "Dune", "RainDrops", "Wood", "scenetext04"),
    "train": (
        *("Aqua", "Elephants", "GreenMeadow", "Storm", "aero1", "board", "building"),
        *("home", "leuvenA", "scenetext05", "starry_night"),
    ),
}


def prepare(output: Path, packages: Path) -> None:
    """Write things and backgrounds of both splits to the new folder `output`."""
    with new_folder(output) as folder:
        for kind, found in _stamps(packages).items():
            for number, (name, picture) in enumerate(sorted(found.items())):
                split = SPLITS[number % 3 == 2]
                target = folder / split / kind / f"{name}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                picture.save(target)
        for name, picture in _photographs(packages):
            split = "test" if name in _PLACES["test"] else "train"
            target = folder / split / f"{name}.jpg"
            picture.save(target, quality=92)


def _stamps(packages: Path) -> dict[str, dict[str, Image.Image]]:
    found: dict[str, dict[str, Image.Image]] = {kind.name: {} for kind in KINDS}
    for name, data in members(fetch(THINGS, packages)):
        stamp = PurePosixPath(name.removeprefix(_STAMPS))
        if stamp.suffix != ".png" or stamp.stem.endswith(("_mirror", "_flip")):
            continue
        for kind in KINDS:
            if kind.has(stamp):
                picture = Image.open(io.BytesIO(data)).convert("RGBA")
                picture = picture.crop(picture.getchannel("A").getbbox())
                picture.thumbnail((_SIZE, _SIZE), Image.Resampling.LANCZOS)
                found[kind.name][stamp.stem] = picture
    return found


def _photographs(packages: Path) -> Iterable[tuple[str, Image.Image]]:
    wanted = {name for names in _PLACES.values() for name in names}
    for package in BACKGROUNDS:
        for name, data in members(fetch(package, packages)):
            path = PurePosixPath(name)
            if path.suffix == ".jpg" and path.stem in wanted and "html" not in name:
                wanted.remove(path.stem)
                picture = Image.open(io.BytesIO(data)).convert("RGB")
                picture.thumbnail((_BACKGROUND,) * 2, Image.Resampling.LANCZOS)
                yield path.stem, picture
