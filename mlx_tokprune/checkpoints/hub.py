"""Model names resolved to folders on disk, for every command."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from ..files import DEMO, note_shadowed

# Files copied with the weights: tokenizer, licence and model card.
COMPANIONS = (
    "tokenizer*",
    "fast_*.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "preprocessor_config.json",
    "dataset_statistics.json",
    "processor_config.json",
    "chat_template.*",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "ACKNOWLEDG*",
    "USE_POLICY*",
    "*.md",
)

# Files downloaded from the hub.
_PATTERNS = (
    "*.json",
    "*.safetensors",
    "*_checkpoint.pt",
    "*.mlpackage/*",
    "lora_adapter/*",
    "tokenizer/*",
    "fast/*.json",
    "assets/*/norm_stats.json",
    *COMPANIONS,
)


# Folders of the embedded demo models, by name.
EMBEDDED = {
    "demo": DEMO / "checkpoint",
    "demo-policy": DEMO / "policy",
    "demo-pi0": DEMO / "pi0",
}

HUB_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?")  # with a revision


def is_local(name: str) -> bool:
    """Return whether `resolve` finds the model without the hub."""
    return name in EMBEDDED or os.path.exists(name)


def resolve(path_or_id: str | Path) -> Path:
    """Return the folder of an embedded model, a local path or a hub id.

    A hub id may name a branch, tag or commit: `org/name@revision`.
    A hub id is downloaded, or taken from the Hugging Face cache. A folder with the name
    of an embedded model is noted, not used, except as a `Path`. Raises `InputError`
    when the name is none of these.
    """
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise InputError(f"a model is a name or a folder, not {path_or_id!r:.40}")
    if isinstance(path_or_id, Path) and path_or_id.exists():
        return path_or_id
    if path_or_id in EMBEDDED:
        note_shadowed(str(path_or_id))
    embedded = EMBEDDED.get(str(path_or_id))
    if embedded is not None and not embedded.is_dir():
        raise InputError(
            f"{path_or_id} is in a clone of the repository, not in the wheel; expected "
            "demo-policy, or an installation from a clone"
        )
    if embedded is not None:
        return embedded
    path = Path(path_or_id)
    if os.path.exists(path):
        return path
    hub_id = HUB_ID.fullmatch(str(path_or_id))
    if not hub_id:
        raise InputError(
            f"{path_or_id} does not exist; expected a checkpoint folder, a hub id such "
            f"as apple/FastVLM-0.5B, or {' or '.join(EMBEDDED)}."
            + nearest(str(path_or_id), EMBEDDED)
        )
    return fetch(hub_id[1], _PATTERNS, hub_id[2])


def fetch(hub_id: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Download the files of a hub id that match patterns; return the snapshot folder.

    revision: branch, tag or commit; `None` for the main one. Raises `InputError` when
    the id does not exist or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    options: Any = {"allow_patterns": list(files), "revision": revision}
    try:
        return Path(snapshot_download(hub_id, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (
            str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        )
        raise InputError(
            f"{hub_id}{f' at revision {revision}' if revision else ''} is no local "
            f"folder and cannot be fetched from the hub ({reason})"
        ) from None
