"""From what a processor gave of pictures and videos to the visual tokens that stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .pixels import Pixels, Seen
from .prompts import Row, floats

_KINDS = {  # of media: the names of the ids of placeholders, and of pixels
    "image": (("image_token_id", "image_token_index"), "pixel_values"),
    "video": (("video_token_id", "video_token_index"), "pixel_values_videos"),
}


@dataclass(frozen=True)
class PixelLook:
    """Looks at the pixels of Qwen's processors.

    scales: (C,) by kind, what makes their values differ as pixels in [0, 1] do.
    """

    pixels: Pixels
    config: Any
    scales: Mapping[str, np.ndarray]

    def __call__(self, inputs: Mapping, full: np.ndarray, rows: Sequence[Row]) -> Seen:
        """full: (B, T) ids. rows: where they have placeholders."""
        stays, made, sources = np.ones(full.shape, bool), np.ones(full.shape, bool), []
        for kind, (ids, name) in _KINDS.items():
            if inputs.get(name) is None:
                continue
            where = np.isin(full, [getattr(self.config, i, None) or -1 for i in ids])
            some, source = self._of(kind, inputs, name)
            if where.sum() != len(some):
                raise InputError(
                    f"{kind}s of {len(some)} tokens do not explain the {where.sum()} "
                    "placeholders of a prompt; detach what looks at pixels"
                )
            stays[where], made[where] = some, source == np.arange(len(source))
            sources.append(source.tolist())
        visual = [(number, row.visual) for number, row in enumerate(rows)]
        return Seen(
            [np.flatnonzero(stays[number, some]).tolist() for number, some in visual],
            [int(made[number, some].sum()) for number, some in visual],
            sources,
        )

    def _of(self, kind: str, inputs: Mapping, name: str):
        scale = self.scales[kind]
        values = floats(inputs[name])
        values = values.reshape(len(values), len(scale), -1) * scale[:, None]
        grids = np.array(inputs[f"{kind}_grid_thw"]).reshape(-1, 3).tolist()
        side = self.config.vision_config.spatial_merge_size
        return self.pixels.look(values.reshape(len(values), -1), grids, side)
