"""Prepare two pictures with TensorFlow, as OpenVLA's evaluation in LIBERO does.

Run once, with tensorflow-cpu 2.21.0, to write `tests/data/pictures.npz`:

    python tests/goldens/pictures.py
"""

from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

SIZE, CROP = 56, 0.9
DATA = Path(__file__).parents[1] / "data"


def round_trip(picture: np.ndarray) -> tf.Tensor:
    """Encode as JPEG with the default quality of 95, and decode."""
    code = tf.io.encode_jpeg(picture)
    return tf.io.decode_image(code, expand_animations=False, dtype=tf.uint8)


def resize(picture: tf.Tensor | np.ndarray) -> tf.Tensor:
    resized = tf.image.resize(picture, (SIZE, SIZE), method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)


def crop(picture: tf.Tensor) -> tf.Tensor:
    margin = (1 - tf.sqrt(tf.constant(CROP))) / 2
    box = [[margin, margin, 1 - margin, 1 - margin]]
    pixels = tf.image.convert_image_dtype(picture, tf.float32)[None]
    cropped = tf.image.crop_and_resize(pixels, box, [0], (SIZE, SIZE))[0]
    cropped = tf.clip_by_value(cropped, 0, 1)
    return tf.image.convert_image_dtype(cropped, tf.uint8, saturate=True)


def main() -> None:
    photo = Image.open(DATA / "openvla-tiny" / "image_0.png").convert("RGB")
    noise = np.random.default_rng(0).integers(0, 256, (45, 38, 3), np.uint8)
    arrays = {}
    pictures = {"photo": np.asarray(photo)[20:123, 30:127], "noise": noise}
    for name, picture in pictures.items():
        arrays[name] = picture
        arrays[f"{name}_jpeg"] = round_trip(picture).numpy()
        arrays[f"{name}_resized"] = resize(picture).numpy()
        arrays[f"{name}_prepared"] = crop(resize(round_trip(picture))).numpy()
    np.savez_compressed(DATA / "pictures.npz", **arrays)


if __name__ == "__main__":
    main()
