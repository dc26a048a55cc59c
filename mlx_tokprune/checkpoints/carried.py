"""Pruners that a checkpoint carries, as the section `pruner` of its config.json.

A list with an object for each place: the fields of `Pruner`, or in the place of
`method` the name of a scorer's folder beside the weights. Code is never carried.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from ..pruners import Plan, Pruner, Pruners, as_plan, is_registered
from ..pruners.scorers import is_scorer, save_scorer

SECTION = "pruner"
_NAME = re.compile(r"[\w-]{1,64}")  # of a folder
_FIELDS = {"method", "scorer", "keep_ratio", "keep_tokens", "at", "seed", "options"}


def read_carried(config: Mapping, folder: str | Path) -> Plan:
    """The pruners that the checkpoint in `folder` carries, mostly none.

    Raises `InputError` for a section that says no pruners, or that leaves the folder.
    """
    section = config.get(SECTION, [])
    if not isinstance(section, list) or not all(isinstance(e, dict) for e in section):
        raise InputError(
            f"config.json of {folder} has a section {SECTION!r} that is no list of "
            "objects; expected one for each place"
        )
    return as_plan(_read(entry, Path(folder)) for entry in section)


def carry(pruners: Pruners, config: Mapping, folder: str | Path) -> dict:
    """The config with a section for these pruners; scorers are written to `folder`."""
    section: list[dict] = []
    for number, pruner in enumerate(as_plan(pruners)):
        if not _is_known(pruner.method):
            raise InputError(
                f"a checkpoint cannot carry the code of {pruner.method!r}; expected a "
                "method of mlx_tokprune, or the folder of a scorer"
            )
        entry = pruner.described()
        if pruner.scorer is not None:
            del entry["method"]
            entry["scorer"] = f"scorer-{number}"
            save_scorer(pruner.scorer, Path(folder) / entry["scorer"])
        section.append({name: value for name, value in entry.items() if value})
    others = {name: value for name, value in config.items() if name != SECTION}
    return others | ({SECTION: section} if section else {})


def _is_known(method: str) -> bool:
    """Whether it has a name, and not the path of a function to import."""
    return is_registered(method) and ":" not in method


def _read(entry: dict, folder: Path) -> Pruner:
    unknown = sorted(entry.keys() - _FIELDS)
    scorer, method = entry.get("scorer"), entry.get("method")
    if unknown or (scorer is None) == (method is None):
        wrong = f"has {unknown[0]!r}" if unknown else "names no method, or two"
        raise InputError(
            f"a pruner in config.json of {folder} {wrong}; expected one of method and "
            f"scorer, and of {', '.join(sorted(_FIELDS - {'method', 'scorer'}))}"
        )
    how = {name: value for name, value in entry.items() if name != "scorer"}
    if scorer is not None:
        inside = isinstance(scorer, str) and _NAME.fullmatch(scorer)
        path = (folder / scorer).resolve() if inside else folder
        if path.parent != folder.resolve() or not is_scorer(path):
            raise InputError(
                f"config.json of {folder} names the scorer {scorer!r}; expected a "
                "folder of a scorer in that of the checkpoint"
            )
        how["method"] = str(path)
    elif not isinstance(method, str) or not _is_known(method):
        raise InputError(
            f"config.json of {folder} names the method {method!r}, which is none of "
            "mlx_tokprune; its code would have to be run"
        )
    return Pruner(**how)
