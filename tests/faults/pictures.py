"""Group 2: damaged, odd and special image files."""

import io
import os
import struct
import zlib
from pathlib import Path
from random import Random

from PIL import Image

from . import damage
from .asks import CHECKS, right
from .case import Outcome, Place, perform

KINDS = ("PPM", "PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "TGA", "ICO")
MODES = ("RGB", "L", "RGBA", "P", "1", "I", "F", "LA", "CMYK", "I;16")
HEADERS = (
    *(b"P6 100000 100000 255\n", b"P6 0 0 255\n", b"P5 1 1 99999999999\n\0", b"P6"),
    *(b"P3 2 2 255 1 2", b"P6 -1 4 255\n", b"Pf 8 8 -1.0\n" + b"\xff" * 256, b"P9"),
    *(b"GIF89a\xff\xff\xff\xff\xf7\0\0", b"BM" + b"\xff" * 60, b"II*\0" + b"\xff" * 99),
    *(b"\xff\xd8\xff\xdb", b"RIFF\xff\xff\xff\xffWEBPVP8 ", b"", b"\0" * 1000),
    *(b"<svg/>", b"%!PS-Adobe-3.0 EPSF\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1", b"#!"),
    *(
        b"P6 4 4 255\n" + b"#" * 10**6,
        b"/* XPM */\n" + b"x" * 999,
        b"qoif" + b"\xff" * 9,
    ),
)
WAYS = ([], [], ["--each"], ["--temporal"], ["--padding", "skip"])
NAMES = ("a\nb.png", "\x1b[2J.png", "x" * 240 + ".png", "é\u202e.png", "-.png")
SPECIAL = ("/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/", "", "nowhere")
SPECIAL += ("a\nb", "\x1b[31m" * 300, "x" * 5000, "\udcff.png", "~")


def run(rng: Random, place: Place) -> Outcome:
    """Pass the image, or the folder that contains it, to a command."""
    path = _special(rng, place) if rng.random() < 0.15 else _damaged(rng, place)
    command = rng.choices(("generate", "act", "evaluate", "bench"), (6, 4, 3, 0.5))[0]
    argv = right(command, place)
    if command == "evaluate":
        argv += ["--data", os.path.dirname(path) or path]
    else:
        argv[argv.index("--image") + 1] = path
    if command == "generate":
        argv += rng.choice(WAYS)
    if command in ("generate", "act") and rng.random() < 0.3:
        argv += ["--overlay", "o.png", "--keep-ratio", "0.5"]
    outcome = perform(command, argv, place, CHECKS.get(command))
    whole = path.startswith(str(place.folder)) and os.path.isfile(path)
    head = Path(path).read_bytes()[:60] if whole else b""
    return Outcome(outcome.kind, f"{outcome.told}\n  picture {head!r}")


def _special(rng: Random, place: Place) -> str:
    how = rng.randrange(10)
    path = place.folder / "special.png"
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.symlink_to(path)
    elif how == 2:
        path.mkdir()
    else:
        return rng.choice(SPECIAL)
    return str(path)


def _damaged(rng: Random, place: Place) -> str:
    folder = place.folder / "pictures"
    folder.mkdir()
    path = folder / (rng.choice(NAMES) if rng.random() < 0.2 else "p.png")
    make = rng.choices(
        (_header, _bomb, _sizes, _alone, _bytes, _exif), (2, 1, 2, 1, 7, 1)
    )[0]
    path.write_bytes(make(rng))
    return str(path)


def _picture(rng: Random, size: tuple[int, int] | None = None, **options) -> bytes:
    size = size or rng.choice(((1, 1), (8, 5), (40, 30), (1, 300), (64, 64)))
    noise = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    kind, mode = rng.choice(KINDS), rng.choice(MODES)
    if options:
        kind, mode = options.pop("kind"), "RGB"
    data = io.BytesIO()
    try:
        shown = noise if mode == "I;16" else noise.convert(mode)
        shown.save(data, kind, **options)
    except (OSError, ValueError):  # not every format has every mode
        noise.save(data, "PNG")
    return data.getvalue()


def _bytes(rng: Random) -> bytes:
    data = _picture(rng)
    return damage.damaged(rng, data, rng.choice((16, 64, len(data))))


def _header(rng: Random) -> bytes:
    return rng.choice(HEADERS) + rng.choice((b"", b"\0" * 100))


def _alone(rng: Random) -> bytes:
    """Return an undamaged image of an odd shape or mode."""
    return _picture(rng, rng.choice(((1, 1), (3000, 1), (1, 3000), (2, 2))))


def _exif(rng: Random) -> bytes:
    data = b"Exif\0\0" + damage.damaged(rng, b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01")
    return _picture(rng, kind="JPEG", exif=data[: rng.randrange(6, 60)])


def _sizes(rng: Random) -> bytes:
    """Return a PNG whose header gives an incorrect size, with a correct checksum."""
    data = bytearray(_picture(rng, (8, 8), kind="PNG"))
    many = (0, 1, 7, 9, 60_000, 178_956, 2**31 - 1, 2**32 - 1)
    data[16:24] = struct.pack(">II", rng.choice(many), rng.choice(many))
    data[24:29] = bytes([*rng.choice(((8, 2), (16, 6), (1, 0), (9, 9))), 0, 0, 0])
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def _bomb(rng: Random) -> bytes:
    """Return a PNG with a chunk that unpacks to 50 MB."""
    data = _picture(rng, (8, 8), kind="PNG")
    packed = zlib.compress(b"\0" * (50 << 20))
    kind, start = rng.choice(((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")))
    kind, start = rng.choice(((kind, start), (b"iCCP", b"a\0\0")))
    body = kind + start + packed
    chunk = struct.pack(">I", len(body) - 4) + body
    return data[:33] + chunk + struct.pack(">I", zlib.crc32(body)) + data[33:]
