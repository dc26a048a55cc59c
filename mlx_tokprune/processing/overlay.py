"""Overlays of kept tokens: dropped patches dimmed, merged patches coloured."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..features import Selection

_SIDE = 768  # pixels of a drawn square
_DIM = 0.25  # brightness of dropped patches
_TINT = 0.45  # strength of the colour of a merged patch
_GAP = 8


def draw_overlay(
    images: Sequence[Image.Image],
    selection: Selection | Sequence[np.ndarray],
    grid: tuple[int, int],
    padded: bool = True,
) -> Image.Image:
    """Draw the pictures side by side, without padding, with shaded patches.

    selection: of all pictures, or the kept tokens of each. padded: whether the model
    encoded the pictures padded (to a square if `grid` is one), else stretched.

    Dropped patches are dimmed. For merging methods, patches of one kept token share a
    colour, and a ring marks the position of that token.
    """
    if isinstance(selection, Selection):
        kept, assignment = list(np.array(selection.indices)), selection.assignment()
    else:
        kept, assignment = selection, None
    groups = None if assignment is None else np.array(assignment)
    panels = [
        _panel(image, kept[i], None if groups is None else groups[i], grid, padded)
        for i, image in enumerate(images)
    ]
    width = sum(p.width for p in panels) + _GAP * (len(panels) - 1)
    sheet = Image.new("RGB", (width, max(p.height for p in panels)), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + _GAP
    return sheet


def stack(rows: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Stack pictures vertically, each below its title."""
    line = 20 if any(titles) else 0
    height = sum(row.height + line for row in rows) + _GAP * (len(rows) - 1)
    sheet = Image.new("RGB", (max(row.width for row in rows), height), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for row, title in zip(rows, titles, strict=True):
        draw.text((4, top + 4), title, fill="black")
        sheet.paste(row, (0, top + line))
        top += row.height + line + _GAP
    return sheet


def _panel(
    image: Image.Image,
    kept: np.ndarray,
    groups: np.ndarray | None,
    grid: tuple[int, int],
    padded: bool,
) -> Image.Image:
    """Shade one picture. groups: (N,) the kept token of each patch, -1 for none."""
    scale = _SIDE / max(image.size)
    size = [max(1, round(scale * side)) for side in image.size]
    frame = [round(_SIDE * cells / max(grid)) for cells in (grid[1], grid[0])]
    left, top = ((f - s) // 2 for f, s in zip(frame, size, strict=True))
    canvas = Image.new("RGB", frame)
    resized = image.resize(size if padded else frame, Image.Resampling.BICUBIC)
    canvas.paste(resized, (left, top) if padded else (0, 0))
    pixels = np.asarray(canvas, dtype=np.float32)
    if groups is None:
        mask = np.full(grid[0] * grid[1], _DIM, np.float32)
        mask[kept] = 1
        shaded = pixels * _stretch(mask.reshape(grid), pixels)[..., None]
    else:
        colors = _colors(len(kept))[groups].reshape(*grid, 3)
        shaded = (1 - _TINT) * pixels + _TINT * _stretch(colors, pixels)
        gone = _stretch(groups.reshape(grid) < 0, pixels)[..., None]
        shaded = np.where(gone, _DIM * pixels, shaded)
    panel = Image.fromarray(shaded.round().astype(np.uint8))
    if groups is not None:
        _mark(panel, kept, grid)
    if padded:
        return panel.crop((left, top, left + size[0], top + size[1]))
    return panel.resize(size)


def _stretch(cells: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Repeat patch values (H, W, ...) for each pixel of (h, w, 3): (h, w, ...)."""
    height, width = pixels.shape[:2]
    rows = np.arange(height) * cells.shape[0] // height
    columns = np.arange(width) * cells.shape[1] // width
    return cells[rows[:, None], columns[None]]


def _colors(count: int) -> np.ndarray:
    """Return colours (count, 3); the golden ratio separates neighbours in hue."""
    hues = (np.arange(count) * 0.618034) % 1
    return 255 * np.array([colorsys.hsv_to_rgb(h, 0.85, 1.0) for h in hues])


def _mark(panel: Image.Image, kept: np.ndarray, grid: tuple[int, int]) -> None:
    """Draw a ring at each kept token."""
    draw = ImageDraw.Draw(panel)
    height, width = panel.height / grid[0], panel.width / grid[1]
    radius = min(height, width) / 5
    for index in kept:
        x, y = (index % grid[1] + 0.5) * width, (index // grid[1] + 0.5) * height
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, outline="white", width=3)
