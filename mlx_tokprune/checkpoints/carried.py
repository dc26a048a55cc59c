"""Pruners stored in a checkpoint: the section `pruner` of its config.json.

The section is a list with one object per pruning place. An object has the fields of
`Pruner`; a learned scorer replaces `method` by `scorer`, the name of its folder beside
the weights. Code is never stored.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from ..pruners import Plan, Pruner, Pruners, as_plan, is_registered
from ..pruners.scorers import is_scorer, save_scorer

SECTION = "pruner"
_FOLDER_NAME = re.compile(r"[\w-]{1,64}")
_FIELDS = {"method", "scorer", "keep_ratio", "keep_tokens", "at", "seed", "options"}


def read_carried(config: Mapping, folder: str | Path) -> Plan:
    """Return the pruners stored in the checkpoint at `folder`, usually none.

    Raises `InputError` for a section that does not describe pruners, or that names a
    path outside the folder.
    """
    section = config.get(SECTION, [])
    if not isinstance(section, list) or not all(isinstance(e, dict) for e in section):
        raise InputError(
            f"config.json of {folder} has a section {SECTION!r} that is no list of "
            "objects; expected one object for each place"
        )
    return as_plan(_read(entry, Path(folder)) for entry in section)


def carry(pruners: Pruners, config: Mapping, folder: str | Path) -> dict:
    """Return `config` with a section for `pruners`; write scorers into `folder`.

    Raises `InputError` for a method that exists only as code.
    """
    section: list[dict] = []
    for number, pruner in enumerate(as_plan(pruners)):
        if not _is_built_in(pruner.method):
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
    rest = {name: value for name, value in config.items() if name != SECTION}
    return rest | ({SECTION: section} if section else {})


def _is_built_in(method: str) -> bool:
    """Return whether `method` is a registered name, not an import path."""
    return is_registered(method) and ":" not in method


def _read(entry: dict, folder: Path) -> Pruner:
    unknown = sorted(entry.keys() - _FIELDS)
    scorer, method = entry.get("scorer"), entry.get("method")
    if unknown or (scorer is None) == (method is None):
        problem = f"has {unknown[0]!r}" if unknown else "names no method, or two"
        raise InputError(
            f"a pruner in config.json of {folder} {problem}; expected either method or "
            f"scorer, and of {', '.join(sorted(_FIELDS - {'method', 'scorer'}))}"
        )
    fields = {name: value for name, value in entry.items() if name != "scorer"}
    if scorer is not None:
        inside = isinstance(scorer, str) and _FOLDER_NAME.fullmatch(scorer)
        # A link must not lead out of the checkpoint, so compare resolved paths.
        path = (folder / scorer).resolve() if inside else folder
        if path.parent != folder.resolve() or not is_scorer(path):
            raise InputError(
                f"config.json of {folder} names the scorer {scorer!r}; expected a "
                "folder of a scorer in that of the checkpoint"
            )
        fields["method"] = str(path)
    elif not isinstance(method, str) or not _is_built_in(method):
        raise InputError(
            f"config.json of {folder} names the method {method!r}, which is not in "
            "mlx_tokprune; its code would have to be run"
        )
    return Pruner(**fields)
