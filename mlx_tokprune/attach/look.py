"""Pixel scan: from a processor's pictures and videos to the kept visual tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .pixels import Pixels, PixelSelection
from .prompts import Row, floats

_KINDS = {  # by kind of media: config fields of placeholder ids, name of the pixels
    "image": (("image_token_id", "image_token_index"), "pixel_values"),
    "video": (("video_token_id", "video_token_index"), "pixel_values_videos"),
}


@dataclass(frozen=True)
class PixelScan:
    """Scan of the pixels that Qwen's processors return.

    scales: (C,) by kind of media, factors from a processor's values to pixels in
    [0, 1].
    """

    pixels: Pixels
    config: Any
    scales: Mapping[str, np.ndarray]

    def __call__(
        self, inputs: Mapping, full: np.ndarray, rows: Sequence[Row]
    ) -> PixelSelection:
        """Return the visual tokens that the pixel pruners keep.

        full: (B, T) ids. rows: columns of the placeholders of each prompt. Raises
        `InputError` where pixels and placeholders do not match.
        """
        kept = np.ones(full.shape, bool)
        encoded, sources = np.ones(full.shape, bool), []
        for kind, (ids, name) in _KINDS.items():
            if inputs.get(name) is None:
                continue
            where = np.isin(full, [getattr(self.config, i, None) or -1 for i in ids])
            kept_groups, source = self._scan(kind, inputs, name)
            if where.sum() != len(kept_groups):
                raise InputError(
                    f"{kind}s of {len(kept_groups)} tokens do not explain the "
                    f"{where.sum()} placeholders of a prompt; detach the pixel pruners"
                )
            kept[where] = kept_groups
            encoded[where] = source == np.arange(len(source))
            sources.append(source.tolist())
        visual = [(number, row.visual) for number, row in enumerate(rows)]
        return PixelSelection(
            [
                np.flatnonzero(kept[number, columns]).tolist()
                for number, columns in visual
            ],
            [int(encoded[number, columns].sum()) for number, columns in visual],
            sources,
        )

    def _scan(
        self, kind: str, inputs: Mapping, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (N,) the kept groups of one kind of media, and (N,) their sources."""
        scale = self.scales[kind]
        values = floats(inputs[name])
        values = values.reshape(len(values), len(scale), -1) * scale[:, None]
        grids = np.array(inputs[f"{kind}_grid_thw"]).reshape(-1, 3).tolist()
        side = self.config.vision_config.spatial_merge_size
        return self.pixels.look(values.reshape(len(values), -1), grids, side)
