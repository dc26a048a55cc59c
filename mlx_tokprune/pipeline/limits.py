"""A memory check before pictures are encoded."""

import contextlib
import os
from pathlib import Path

from ..errors import InputError
from ..models.protocol import VisionModel


def check_memory(model: VisionModel, side: int, pictures: int = 1) -> None:
    """Raise `InputError` for pictures whose encoding would not fit into memory."""
    free, needed = _free_memory(), pictures * model.memory_of(side)
    if not free or needed <= free:
        return
    sizes = range(model.stride, side, model.stride)
    fitting = [size for size in sizes if pictures * model.memory_of(size) <= free]
    raise InputError(
        f"{pictures} picture{'s' * (pictures > 1)} of {side} px would take about "
        f"{needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; the largest that "
        f"fit have {max(fitting, default=model.stride)} px"
    )


def _free_memory() -> int:
    """Return the free bytes, 0 if the system does not report them."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0
