"""Contents of a golden folder: settings, random weights, images (NumPy, Pillow)."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

DATA = Path(__file__).resolve().parents[1] / "data"
SHAPES = 9  # drawn on a picture
GAIN = 1.4  # keeps activations of tiny models far from zero


def copy_settings(source: Path, folder: Path) -> None:
    """Copy config, preprocessor and tokenizer files to another golden folder."""
    names = ("config.json", "preprocessor_config.json")
    for name in (*names, "tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def draw_weights(seed: int, shapes: Mapping[str, tuple]) -> dict[str, np.ndarray]:
    """Return float32 tensors by name; the order of names does not matter."""
    random = np.random.default_rng(seed)
    return {name: _draw(random, name, shapes[name]) for name in sorted(shapes)}


def _draw(random: np.random.Generator, name: str, shape: tuple) -> np.ndarray:
    if name.endswith(".num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith(".running_var"):
        values = random.uniform(0.5, 1.5, shape)
    elif name.endswith(".running_mean"):
        values = random.normal(0, 0.2, shape)
    elif name.endswith(".bias"):
        values = random.normal(0, 0.1, shape)
    elif len(shape) == 1 or "layer_scale" in name:
        values = random.uniform(0.7, 1.3, shape)
    else:
        values = random.normal(0, GAIN / math.sqrt(math.prod(shape[1:])), shape)
    return values.astype(np.float32)


def write_weights(seed: int, shapes: Mapping[str, tuple], folder: Path) -> None:
    weights = draw_weights(seed, shapes)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def draw_picture(seed: int, number: int, width: int, height: int) -> Image.Image:
    """Draw squares and circles on a noisy gradient."""
    random = np.random.default_rng([seed, number])
    picture = Image.fromarray(_background(random, width, height))
    pen = ImageDraw.Draw(picture)
    for _ in range(SHAPES):
        side = round(min(width, height) * random.uniform(0.13, 0.33))
        left, top = (int(random.integers(0, n - side // 2)) for n in (width, height))
        draw = pen.ellipse if random.random() < 0.4 else pen.rectangle
        color = tuple(map(int, random.integers(0, 256, 3)))
        draw((left, top, left + side, top + side), fill=color)
    return picture


def _background(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    x = np.broadcast_to(np.linspace(0, 1, width), (height, width))
    y = np.broadcast_to(np.linspace(0, 1, height)[:, None], (height, width))
    colors = np.stack([160 * x, 160 * y, 80 * (x + y)], axis=-1)
    noise = random.integers(0, 40, colors.shape)
    return (colors + noise).astype(np.uint8)
