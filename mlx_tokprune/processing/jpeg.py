"""A round trip through JPEG in NumPy, bit for bit as TensorFlow's.

Robot data sets store JPEG files, and TensorFlow decodes them with the fast inverse
transform. Pillow offers only the accurate one, which gives other levels. The integer
arithmetic is that of the libjpeg library, whose lossless coding is left out.
https://github.com/libjpeg-turbo/libjpeg-turbo
"""

import numpy as np

# Quantization steps of JPEG's Annex K, for quality 50.
_LUMA = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56
14 17 22 29 51 87 80 62 18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92
49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMA = (
    """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99
47 66 99 99 99 99 99 99"""
    + " 99" * 32
)
# The left half of libjpeg's cosine transform of 8 numbers, times 8192 * sqrt(8).
_HALF = """8192 8192 8192 8192 11363 9633 6437 2260 10703 4433 -4433 -10703
9633 -2259 -11362 -6436 8192 -8192 -8192 8192 6437 -11362 2261 9633
4433 -10704 10704 -4433 2260 -6436 9633 -11363"""
_LEFT = np.array(_HALF.split(), np.float64).reshape(8, 4)
_COSINES = np.hstack([_LEFT, _LEFT[:, ::-1] * np.array([[1], [-1]] * 4)])
# Scales of the fast inverse transform by frequency.
_SCALES = np.cos(np.arange(8) * np.pi / 16) * np.array([1] + [2**0.5] * 7)


def jpeg_round_trip(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Return (H, W, 3) uint8 pixels after JPEG with chroma of half the sides (4:2:0).

    quality: 1 to 100; `tf.io.encode_jpeg` has 95.
    """
    height, width = pixels.shape[:2]
    padding, half = ((0, height % 2), (0, -width % 16), (0, 0)), 1 << 15
    red, green, blue = (
        np.pad(pixels, padding, "edge").astype(np.int32).transpose(2, 0, 1)
    )
    luma = (19595 * red + 38470 * green + 7471 * blue + half) >> 16
    luma = _quantized(luma, _steps(_LUMA, quality))[:height, :width]
    planes = (
        -11059 * red - 21709 * green + 32768 * blue,
        32768 * red - 27439 * green - 5329 * blue,
    )
    chroma = []
    for plane in planes:
        halves = _halved((plane + (128 << 16) + half - 1) >> 16)
        halves = _quantized(halves, _steps(_CHROMA, quality))
        whole = _doubled(halves[:, : (width + 1) // 2])
        chroma.append(whole[:height, :width] - 128)
    blues, reds = chroma
    parts = (91881 * reds, -22554 * blues - 46802 * reds, 116130 * blues)
    colors = [luma + ((part + half) >> 16) for part in parts]
    return np.clip(np.stack(colors, axis=-1), 0, 255).astype(np.uint8)


def _steps(text: str, quality: int) -> np.ndarray:
    """Return the (8, 8) quantization steps of a quality."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = (np.array(text.split(), np.int32) * scale + 50) // 100
    return np.clip(steps, 1, 255).reshape(8, 8)


def _halved(plane: np.ndarray) -> np.ndarray:
    """Average squares of 2 x 2; the rounding alternates between columns."""
    height, width = plane.shape
    sums = plane.reshape(height // 2, 2, width // 2, 2).sum((1, 3), dtype=np.int32)
    return (sums + 1 + np.arange(width // 2) % 2) >> 2


def _doubled(plane: np.ndarray) -> np.ndarray:
    """Double both sides by a triangle filter; narrow planes repeat their levels."""
    if plane.shape[1] <= 2:
        return plane.repeat(2, axis=0).repeat(2, axis=1)
    near = np.pad(plane, ((1, 1), (0, 0)), "edge")
    rows = np.stack([near[:-2], near[2:]], axis=1) + 3 * plane[:, None]
    rows = rows.reshape(-1, plane.shape[1])
    near = np.pad(rows, ((0, 0), (1, 1)), "edge")
    pairs = (near[:, :-2] + 3 * rows + 8, near[:, 2:] + 3 * rows + 7)
    return (np.stack(pairs, axis=2) >> 4).reshape(len(rows), -1)


def _quantized(plane: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Round the cosine transform of (H, W) levels to steps, and transform back."""
    height, width = plane.shape
    padded = np.pad(plane, ((0, -height % 8), (0, 0)), "edge") - 128
    blocks = padded.reshape(-1, 8, width // 8, 8).transpose(1, 3, 0, 2)
    waves = _cosines(_cosines(blocks, 11), 15)  # 8 times the transform
    steps = steps[..., None, None]
    counts = np.sign(waves) * ((np.abs(waves) + 4 * steps) // (8 * steps))
    scales = np.rint((1 << 14) * np.outer(_SCALES, _SCALES)).astype(np.int32)
    waves = counts * ((steps * scales[..., None, None] + (1 << 11)) >> 12)
    levels = _inverse(_inverse(waves).swapaxes(0, 1)).swapaxes(0, 1) >> 5
    levels = np.clip(levels + 128, 0, 255).transpose(2, 0, 3, 1)
    return levels.reshape(padded.shape)[:height]


def _cosines(blocks: np.ndarray, shift: int) -> np.ndarray:
    """Transform the second axis of (8, 8, ...) blocks, and make it the first one."""
    columns = blocks.swapaxes(0, 1)
    sums = _COSINES @ columns.reshape(8, -1).astype(np.float64)  # exact below 2**53
    return (sums.astype(np.int32) + (1 << shift - 1) >> shift).reshape(columns.shape)


def _inverse(waves: np.ndarray) -> np.ndarray:
    """Return the scaled inverse transform of the first axis, in fast arithmetic."""
    a, b, c, d, e, f, g, h = waves
    first, second, both = a + e, a - e, c + g
    half = ((c - g) * 362 >> 8) - both
    even = (first + both, second + half, second - half, first - both)
    high, low, sums, rest = f + d, f - d, b + h, b - h
    turn = (low + rest) * 473 >> 8
    odd = [sums + high]
    odd.append((low * -669 >> 8) + turn - odd[0])
    odd.append(((sums - high) * 362 >> 8) - odd[1])
    odd.append(turn - (rest * 277 >> 8) - odd[2])
    outputs = [x + y for x, y in zip(even, odd, strict=True)]
    outputs += [x - y for x, y in zip(even[::-1], odd[::-1], strict=True)]
    return np.stack(outputs)
