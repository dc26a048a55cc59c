"""Settings of a policy that a caller can give in place of its checkpoint's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest

PICTURES = ("crop", "resize", "jpeg")  # fields of `processing.image.Preparation`
CHUNKS = ("actions_per_chunk", "pictures")
# Policies that have a setting, by its name. `unnorm_key` is the data set that counts.
SETTINGS = {
    **dict.fromkeys(PICTURES, "OpenVLA and OpenVLA-OFT"),
    **dict.fromkeys(CHUNKS, "OpenVLA-OFT"),
    **{"norm": "OpenVLA-OFT and pi0-FAST", "unnorm_key": "robot"},
}


def check_settings(
    settings: Mapping[str, Any], supported: tuple[str, ...], folder: Path
) -> None:
    """Raise `InputError` for settings that a checkpoint's policy does not have."""
    for name in settings.keys() - {*supported, "unnorm_key"}:
        if name not in SETTINGS:
            raise InputError(
                f"unknown setting {name!r} of a policy; expected one of "
                f"{', '.join(SETTINGS)}." + nearest(str(name), SETTINGS)
            )
        raise InputError(
            f"--{name.replace('_', '-')} is one of the options for {SETTINGS[name]} "
            f"policies, and {folder} is none; leave it out"
        )
