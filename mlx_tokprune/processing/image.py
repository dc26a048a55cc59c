"""Pictures: from a file or an array to pixels (B, S, S, 3). Pillow and NumPy only.

HEIC photographs need pillow-heif (the extra `heic`).
"""

import functools
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError, note
from .jpeg import jpeg_round_trip

_LONGEST = 8192  # pixels; longer pictures shrink before they are padded
_HEIC = (".heic", ".heif", ".hif")
_HEIC_BRANDS = (b"hei", b"hev", b"mif1", b"msf1")  # ISO/IEC 23008-12
_NAMED = 5  # skipped files that a note names
RESIZES = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


@dataclass(frozen=True)
class Preparation:
    """Preparation of a policy's pictures, as `preprocess_naive` does it.

    crop: encoded share of the area, around the middle. resize: filter of `RESIZES`.
    jpeg: quality of a round trip through JPEG before resizing, 0 for none.
    """

    crop: float = 1.0
    resize: str = "bicubic"
    jpeg: int = 0

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Preparation":
        """Check settings, which may be incomplete.

        Raises `InputError` for unknown names and impossible values.
        """
        checks = {
            "crop": (
                lambda v: type(v) in (int, float) and 0 < v <= 1,
                "above 0, up to 1",
            ),
            "resize": (lambda v: v in list(RESIZES), " or ".join(RESIZES)),
            "jpeg": (lambda v: type(v) is int and 0 <= v <= 100, "0 (none) to 100"),
        }
        for name, value in settings.items():
            fits, expected = checks.get(
                name, (lambda v: False, "crop, resize, jpeg only")
            )
            if not fits(value):
                raise InputError(
                    f"the {name} of pictures is {value!r}; expected {expected}"
                )
        return cls(**settings)


def list_pictures(path: str | Path) -> list[str | Path]:
    """Return the files of a folder that may be pictures, by name, or the one file.

    These are the files with a suffix that Pillow reads, or of HEIC. Other entries are
    skipped and named in a note on stderr, except for hidden files. Raises `InputError`
    for a folder without pictures.
    """
    if not os.path.isdir(path):
        return [path]
    pictures: list[str | Path] = []
    others = []
    for entry in sorted(Path(path).iterdir()):
        picture = entry.suffix.lower() in _suffixes() and entry.is_file()
        if picture and not entry.name.startswith("._"):  # macOS: attributes of a file
            pictures.append(entry)
        elif picture or entry.is_dir() or not entry.name.startswith("."):
            others.append(entry.name)
    if not pictures:
        raise InputError(f"folder {path} has no pictures; expected PNG, JPEG or WebP")
    _note_skipped(path, others)
    return pictures


def load_pictures(path: str | Path) -> list[tuple[str | Path, Image.Image]]:
    """Return the pictures of a folder with their files, by name, or of the one file.

    Files of a folder that cannot be read are skipped and named on stderr, once. Raises
    `InputError` for a file that is no picture, and for a folder without any.
    """
    loaded, reasons = [], []
    for file in list_pictures(path):
        try:
            loaded.append((file, load_image(file)))
        except InputError as error:
            if not os.path.isdir(path):
                raise
            reasons.append(str(error))
    if not loaded:
        raise InputError(f"folder {path} has no picture that can be read: {reasons[0]}")
    _note_skipped(path, reasons)
    return loaded


@functools.cache
def _suffixes() -> frozenset[str]:
    """Return the suffixes of pictures: all that Pillow opens, and HEIC's."""
    formats = Image.registered_extensions().items()
    return frozenset({*_HEIC, *(s for s, kind in formats if kind in Image.OPEN)})


def _note_skipped(folder: str | Path, entries: Sequence[str]) -> None:
    if entries:
        shown = "; ".join(entries[:_NAMED])
        more = f" and {len(entries) - _NAMED} more" if len(entries) > _NAMED else ""
        note(f"skipped in {folder}, as they are no pictures: {shown}{more}")


def load_image(source: str | os.PathLike | np.ndarray | Image.Image) -> Image.Image:
    """Decode a file, an (H, W, 3) uint8 array or a PIL image to an RGB picture.

    EXIF rotation is applied, the first frame of an animation is used, grey of 16 or 32
    bits is scaled to 8 bits (`_to_bytes`), and transparency becomes white. Raises
    `InputError` for a missing file or one that is no picture.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise InputError(
                f"an array picture is (H, W, 3) uint8; got {source.shape} "
                f"{source.dtype}"
            )
        if not source.size:
            raise InputError(f"a picture of shape {source.shape} has no pixels")
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        plain = source.mode == "RGB" and type(source) is Image.Image
        return source if plain and not source.info else _decode(source, "the picture")
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"a picture is a file, an array or a PIL image, not {type(source).__name__}"
        )
    path = Path(source)
    if re.match(r"https?://", str(source), re.I):
        raise InputError(
            f"picture {str(source)[:200]!r} is a URL, which is not fetched from here; "
            "expected a file, or the URL in --image of generate or chat"
        )
    if not os.path.isfile(path):
        raise InputError(
            f"picture {str(source)!r} does not exist or is not a file; expected a PNG, "
            "JPEG, WebP or similar file"
        )
    return open_image(path, str(path))


def open_image(file: Path | BinaryIO, name: str) -> Image.Image:
    """Decode an existing file as `load_image` does. name: its name in errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # a bad picture raises, so warnings add nothing
            with _open(file, name) as image:
                return _decode(image, f"picture {name}")
    except (InputError, PermissionError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large a picture ({error})") from None
    except Exception:  # Pillow may raise anything for a damaged header
        raise InputError(
            f"{name} is not a picture that Pillow can read; expected a PNG, JPEG, WebP "
            "or similar file"
        ) from None


def _open(file: Path | BinaryIO, name: str) -> Image.Image:
    """Open a picture file; `InputError` for HEIC without pillow-heif."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as stream:
            stream.seek(0)
            head = stream.read(12)
        if head[4:8] != b"ftyp" or not head[8:].startswith(_HEIC_BRANDS):
            raise
    try:
        import pillow_heif
    except ImportError:
        raise InputError(
            f"{name} is HEIC, which needs pillow-heif; pip install 'mlx-tokprune[heic]'"
        ) from None
    pillow_heif.register_heif_opener()
    return Image.open(file)


def _decode(image: Image.Image, name: str) -> Image.Image:
    if not image.width * image.height:
        raise InputError(f"{name} of {image.width} x {image.height} has no pixels")
    try:
        image.load()
        return _to_rgb(_upright(image), name)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow may raise anything for damaged data
        raise InputError(f"{name} is damaged ({error})") from None


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation, if the EXIF data can be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow may raise anything for damaged tags
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_bytes(image, name))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _to_bytes(image: Image.Image, name: str) -> np.ndarray:
    """Return grey pixels of more than 8 bits as bytes.

    16-bit integers go from 0 to 65535. The range of other types is a guess, with a
    note: the first of 0 to 1 (floats only), 0 to 255 and 0 to 65535 that holds them,
    floats up to a tenth beyond it, as resizing leaves them. Raises `InputError` where
    there is none, or floats use less than a sixteenth of it: they have another unit.
    """
    values, floats = np.asarray(image, dtype=np.float32), image.mode == "F"
    if not np.isfinite(values).all():
        raise InputError(f"{name} has pixels that are not finite; expected numbers")
    if image.mode.startswith("I;16"):
        return (values / 257).astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    tops, slack = ((1, 255, 65535), 0.1) if floats else ((255, 65535), 0)
    top = next((top for top in tops if high <= (1 + slack) * top), 0)
    dark = floats and top > max(1, 16 * high)
    if not top or dark or low < -slack * top:
        raise InputError(
            f"{name} has pixels from {low:g} to {high:g}; scale them to "
            f"{' or '.join(f'0 to {top}' for top in tops)}"
        )
    if top > 1 or low < 0 or high > 1:
        note(f"{name} has pixels from {low:g} to {high:g}, read as 0 to {top}")
    return np.clip(values * 255 / top, 0, 255).astype(np.uint8)


def pad_to_square(image: Image.Image) -> Image.Image:
    """Centre a picture on a black square as wide as its longer side.

    A picture with a side of more than 8192 pixels first shrinks to that.
    """
    if max(image.size) > _LONGEST:
        image = image.copy()
        image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.BICUBIC)
    side = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (side, side))
    square.paste(image, square_offset(image.size))
    return square


def square_offset(size: tuple[int, int]) -> tuple[int, int]:
    """Return (left, top) of a (width, height) picture centred on its square."""
    width, height = size
    side = max(size)
    return (side - width) // 2, (side - height) // 2


def preprocess(images: Sequence[Image.Image], size: int) -> np.ndarray:
    """Return pictures as (B, size, size, 3) float32 in [0, 1], padded and resized."""
    return np.stack([_pixels(image, size) for image in images])


def _pixels(image: Image.Image, size: int) -> np.ndarray:
    square = pad_to_square(image)
    if square.width != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.float32) / 255


def preprocess_cropped(images: Sequence[Image.Image], size: int) -> np.ndarray:
    """Return pictures as (B, size, size, 3) float32 in [0, 1], cropped to the middle.

    As transformers' CLIPImageProcessor: the shorter side is resized to `size`.
    """
    return np.stack([_cropped(image, size) for image in images])


def _cropped(image: Image.Image, size: int) -> np.ndarray:
    if size * max(image.size) > _LONGEST * min(image.size):
        image = middle_square(image)  # resized whole, a long picture would not fit
    width, height = (size * side // min(image.size) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    square = image.crop((left, top, left + size, top + size))
    return np.asarray(square, dtype=np.float32) / 255


def middle_square(image: Image.Image) -> Image.Image:
    """Return the square in the middle of a picture, as wide as its shorter side."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def preprocess_content(
    images: Sequence[Image.Image], size: int, stride: int
) -> np.ndarray:
    """Return pictures as (B, h, w, 3) float32 in [0, 1], not padded to a square.

    Longer sides get `size` pixels, as with padding. Every picture is centred on the
    smallest black rectangle, in multiples of `stride`, that holds all of them.
    """
    contents = [_content_size(image.size, size) for image in images]
    width, height = (
        -(-max(sides) // stride) * stride for sides in zip(*contents, strict=True)
    )
    frames = np.zeros((len(images), height, width, 3), np.float32)
    for frame, image, (w, h) in zip(frames, images, contents, strict=True):
        if image.size != (w, h):
            image = image.resize((w, h), Image.Resampling.BICUBIC)
        left, top = (width - w) // 2, (height - h) // 2
        frame[top : top + h, left : left + w] = np.asarray(image, np.float32) / 255
    return frames


def _content_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Scale (width, height) so that the longer side is `longest`."""
    width, height = (max(1, round(side * longest / max(size))) for side in size)
    return width, height


def preprocess_fitted(images: Sequence[Image.Image], size: int) -> np.ndarray:
    """Return pictures as (B, size, size, 3) float32 in [0, 1], centred on black.

    Resized bilinearly without antialiasing, as openpi and lerobot train policies.
    """
    frames = np.zeros((len(images), size, size, 3), np.float32)
    for frame, image in zip(frames, images, strict=True):
        pixels = np.asarray(image, np.float32) / 255
        rows, columns = pixels.shape[:2]
        ratio = max(rows, columns) / size
        height, width = (max(1, int(n / ratio)) for n in (rows, columns))
        if (height, width) != (rows, columns):
            pixels = _interpolated(pixels, height).swapaxes(0, 1)
            pixels = _interpolated(pixels, width).swapaxes(0, 1)
        top, left = (size - height) // 2, (size - width) // 2
        frame[top : top + height, left : left + width] = np.clip(pixels, 0, 1)
    return frames


def _interpolated(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize (R, C, 3) to (size, C, 3), linearly along the first axis."""
    rows = len(pixels)
    at = (np.arange(size) + 0.5) * (rows / size) - 0.5
    at = np.clip(at, 0, rows - 1)
    low = np.minimum(at.astype(int), rows - 1)
    high = np.minimum(low + 1, rows - 1)
    share = (at - low).astype(np.float32)[:, None, None]
    return pixels[low] * (1 - share) + pixels[high] * share


def center_crop(image: Image.Image, share: float) -> Image.Image:
    """Zoom to the middle of a picture: `share` of its area, with subpixel edges."""
    margin = (1 - share**0.5) / 2
    width, height = image.size
    box = (margin * width, margin * height, (1 - margin) * width, (1 - margin) * height)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=box)


def preprocess_naive(
    images: Sequence[Image.Image],
    size: int,
    crop: float = 1.0,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    jpeg: int = 0,
) -> np.ndarray:
    """Return pictures as (B, size, size, 3) float32 in [0, 1], stretched to a square.

    crop: kept share of the area, around the middle; cropped after resizing and resized
    again, bilinearly. resample: filter of the first resizing. jpeg: quality of a round
    trip through JPEG before it, 0 for none. As in OpenVLA-OFT's evaluation, a picture
    that has the size already is taken as prepared: it is only cropped.
    """
    return np.stack([_stretched(image, size, crop, resample, jpeg) for image in images])


def _stretched(
    image: Image.Image, size: int, crop: float, resample: Image.Resampling, jpeg: int
) -> np.ndarray:
    levels = np.asarray(image)
    if image.size != (size, size):
        levels = jpeg_round_trip(levels, jpeg) if jpeg else levels
        levels = _resized(levels, size, resample)
    pixels = levels.astype(np.float32) / 255
    if crop == 1:
        return pixels
    # The corners of the crop map to the corners of the result, as in TensorFlow's
    # crop_and_resize, which OFT uses.
    side = np.sqrt(crop)
    at = (size - 1) * np.linspace((1 - side) / 2, (1 + side) / 2, size)
    low = np.minimum(at.astype(int), size - 2)
    share = (at - low).astype(np.float32)
    rows = pixels[low] + share[:, None, None] * (pixels[low + 1] - pixels[low])
    across = share[None, :, None]
    cropped = rows[:, low] + across * (rows[:, low + 1] - rows[:, low])
    # TensorFlow's conversion of [0, 1] to bytes.
    return np.floor(np.clip(cropped * 255.5, 0, 255)) / np.float32(255)


def _resized(levels: np.ndarray, size: int, resample: Image.Resampling) -> np.ndarray:
    """Resize (H, W, 3) uint8 to a square.

    Lanczos rounds once, at the end, as TensorFlow does. Pillow's rounds and clips
    between both axes, too.
    """
    if resample != Image.Resampling.LANCZOS:
        return np.asarray(Image.fromarray(levels).resize((size, size), resample))
    channels = []
    for i in range(3):
        channel = Image.fromarray(levels[..., i].astype(np.float32))
        channels.append(np.asarray(channel.resize((size, size), resample)))
    return np.clip(np.rint(np.stack(channels, axis=-1)), 0, 255).astype(np.uint8)
