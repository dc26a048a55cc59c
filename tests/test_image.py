"""Images of every kind are read, or refused with a reason."""

import logging
import sys

import numpy as np
import pytest
from PIL import Image

from mlx_tokprune.errors import InputError, note
from mlx_tokprune.features import Selection
from mlx_tokprune.processing.image import (
    list_pictures,
    load_image,
    load_pictures,
    pad_to_square,
    preprocess,
)
from mlx_tokprune.processing.overlay import draw_overlay

import mlx.core as mx  # isort: skip

RED, BLUE = (200, 30, 40), (10, 60, 220)


def two_halves() -> Image.Image:
    """Return a 40x20 image, red on the left and blue on the right."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    return image


def assert_close(pixel, color, by: int = 12) -> None:
    assert np.abs(np.array(pixel[:3], int) - color).max() <= by


def test_plain_picture_and_array(tmp_path):
    two_halves().save(tmp_path / "a.png")
    from_file = load_image(tmp_path / "a.png")
    from_array = load_image(np.asarray(two_halves()))
    assert from_file.tobytes() == from_array.tobytes() == two_halves().tobytes()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    two_halves().save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = load_image(tmp_path / "a.jpg")
    assert image.size == (20, 40)
    assert_close(image.getpixel((10, 2)), RED)
    assert_close(image.getpixel((10, 38)), BLUE)


def test_cmyk_and_palette_and_grey(tmp_path):
    two_halves().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert_close(load_image(tmp_path / "a.jpg").getpixel((5, 5)), RED, 40)
    two_halves().quantize().save(tmp_path / "b.png")
    assert_close(load_image(tmp_path / "b.png").getpixel((5, 5)), RED)
    Image.new("L", (4, 4), 77).save(tmp_path / "c.png")
    assert load_image(tmp_path / "c.png").getpixel((1, 1)) == (77, 77, 77)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.getpixel((1, 1)) == (0, 0, 0)
    assert loaded.getpixel((7, 7)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled(tmp_path):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    grey = np.asarray(load_image(tmp_path / "a.png"))[..., 0]
    assert grey.tolist() == [[0, 100], [200, 255]]


def test_dark_sixteen_bit_grey_stays_dark(tmp_path):
    Image.fromarray(np.full((2, 2), 200, np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(load_image(tmp_path / "a.png")).max() <= 1


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert_close(load_image(tmp_path / "a.gif").getpixel((3, 3)), RED)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (1, 20000)])
def test_extreme_shapes(size):
    pixels = preprocess([Image.new("RGB", size, RED)], 64)
    assert pixels.shape == (1, 64, 64, 3)
    assert pixels.dtype == np.float32
    assert 0 <= pixels.min() <= pixels.max() <= 1


def test_padding_is_black_and_centred():
    square = pad_to_square(two_halves())
    assert square.size == (40, 40)
    assert square.getpixel((20, 5)) == (0, 0, 0) == square.getpixel((20, 35))
    assert square.getpixel((5, 20)) == RED
    assert pad_to_square(Image.new("RGB", (4, 7))).size == (7, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist or is not a file"),
        (b"", "is not a picture that Pillow can read; expected a PNG, JPEG"),
        (b"hello", "is not a picture that Pillow can read; expected a PNG, JPEG"),
        ("truncated", "is damaged"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path, content, message):
    path = tmp_path / "a.png"
    if content == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_image(path)


def test_a_damaged_exif_is_ignored(tmp_path):
    two_halves().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff", quality=95)
    assert load_image(tmp_path / "a.jpg").size == (40, 20)


def test_float_pictures_are_scaled(tmp_path):
    Image.fromarray(np.array([[0, 0.5], [1, 1]], np.float32)).save(tmp_path / "a.tif")
    assert np.asarray(load_image(tmp_path / "a.tif"))[..., 0].max() == 255


@pytest.fixture
def notes(caplog):
    """Return the notes on stderr, which the process has not printed before."""
    note.cache_clear()
    caplog.set_level(logging.WARNING, "mlx_tokprune")
    return caplog


def save_grey(path, values, kind=np.float32):
    Image.fromarray(np.array([values], kind)).save(path)
    return path


@pytest.mark.parametrize(
    ("values", "kind", "grey", "note"),
    [
        ([0, 0.5, 1], "f4", [0, 127, 255], None),
        ([-0.04, 0.5, 1.06], "f4", [0, 127, 255], "from -0.04 to 1.06, read as 0 to 1"),
        ([0, 100, 200], "f4", [0, 100, 200], "read as 0 to 255"),
        ([0, 25700, 65535], "f4", [0, 100, 255], "read as 0 to 65535"),
        ([0, 100, 255], "i4", [0, 100, 255], "read as 0 to 255"),
        ([0, 257, 25700], "i4", [0, 1, 100], "read as 0 to 65535"),
    ],
)
def test_ranges_of_grey(tmp_path, notes, values, kind, grey, note):
    path = save_grey(tmp_path / "a.tif", values, kind)
    for _ in range(2):
        assert np.asarray(load_image(path))[0, :, 0].tolist() == grey
    assert len(notes.messages) == (note is not None)
    assert all(note in text and "a.tif" in text for text in notes.messages)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 8.5], "f4"),  # radiance
        ([0, 4000], "f4"),  # millimetres
        ([-1, 1], "f4"),
        ([0, 1e6], "f4"),
        ([0, float("nan")], "f4"),
        ([0, float("inf")], "f4"),
        ([-5, 200], "i4"),
        ([0, 1 << 24], "i4"),
    ],
)
def test_pixels_in_another_unit_are_refused(tmp_path, values, kind):
    path = save_grey(tmp_path / "a.tif", values, kind)
    with pytest.raises(
        InputError, match=r"a\.tif has pixels (from|that are not finite)"
    ):
        load_image(path)


APPLE_DOUBLE = b"\0\5\26\7\0\2\0\0Mac OS X        "
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.fixture
def album(tmp_path):
    """Return a folder with four pictures, as a Mac leaves it."""
    for name in ("a.png", "b.jfif", "c.AVIF", "e.ppm"):
        kind = "JPEG" if name == "b.jfif" else None
        two_halves().save(tmp_path / name.lower(), format=kind)
        (tmp_path / name.lower()).rename(tmp_path / name)
    (tmp_path / "._a.png").write_bytes(APPLE_DOUBLE)
    (tmp_path / "d.png").mkdir()
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


def test_a_folder_of_a_mac(album, notes):
    names = [file.name for file in list_pictures(album)]
    assert names == ["a.png", "b.jfif", "c.AVIF", "e.ppm"]
    assert [file.name for file, _ in load_pictures(album)] == names
    assert len(notes.messages) == 1
    assert notes.messages[0].endswith("they are no pictures: ._a.png; d.png; notes.txt")


def test_a_damaged_picture_of_a_folder_is_skipped(album, notes):
    (album / "a.png").write_bytes(b"hello")
    (album / "z.gif").write_bytes(b"")
    assert len(load_pictures(album)) == 3
    assert "a.png is not a picture" in notes.messages[1]
    assert "z.gif is not a picture" in notes.messages[1]
    with pytest.raises(InputError, match="is not a picture"):
        load_pictures(album / "a.png")


def test_a_folder_of_damaged_pictures_is_refused(tmp_path):
    (tmp_path / "a.webp").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"no picture that can be read: .*a\.webp"):
        load_pictures(tmp_path)
    (tmp_path / "a.webp").unlink()
    (tmp_path / "._b.jpg").write_bytes(APPLE_DOUBLE)
    with pytest.raises(InputError, match="has no pictures"):
        load_pictures(tmp_path)


@pytest.mark.parametrize("name", ["a.heic", "b.HIF", "c.jpg"])
def test_heic_names_what_reads_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / name).write_bytes(HEIC)
    for read in (load_image, load_pictures):
        with pytest.raises(
            InputError, match=r"is HEIC.*pip install 'mlx-tokprune\[heic"
        ):
            read(tmp_path / name)
    with pytest.raises(InputError, match=r"no picture that can be read: .*is HEIC"):
        load_pictures(tmp_path)


@pytest.mark.parametrize("name", ["a.heic", "b.jpg"])
def test_heic_is_read(tmp_path, name):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(two_halves().resize((80, 40))).save(tmp_path / "x.heic")
    (tmp_path / "x.heic").rename(tmp_path / name)
    [(_, image)] = load_pictures(tmp_path)
    assert image.size == (80, 40)
    assert_close(image.getpixel((10, 20)), RED)
    assert_close(image.getpixel((70, 20)), BLUE)


@pytest.mark.parametrize("source", [None, 5, [1]])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(InputError, match="a file, an array or a PIL image"):
        load_image(source)


def test_an_array_of_another_type_is_refused():
    with pytest.raises(InputError, match=r"\(H, W, 3\) uint8"):
        load_image(np.zeros((4, 4, 3), np.float32))


def test_overlay_dims_dropped_patches_and_has_the_picture_s_shape():
    selection = Selection(mx.array([[5, 6]]))
    sheet = draw_overlay(
        [Image.new("RGB", (40, 20), (200, 200, 200))], selection, (4, 4)
    )
    assert sheet.width == 2 * sheet.height  # padding is cut off
    cell = sheet.width // 4
    kept = sheet.getpixel((cell + cell // 2, cell // 2))
    dropped = sheet.getpixel((cell // 2, cell // 2))
    assert kept == (200, 200, 200)
    assert dropped == (50, 50, 50)


def test_overlay_colours_groups_alike():
    weights = mx.array([[[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]])
    selection = Selection(mx.array([[0, 3]]), weights)
    sheet = draw_overlay([Image.new("RGB", (64, 64))], selection, (2, 2))
    corners = [
        sheet.getpixel((x, y)) for y in (20, sheet.height - 20) for x in (20, 700)
    ]
    assert corners[0] == corners[1] != corners[2]
    assert corners[2] == corners[3]


def test_overlay_of_two_pictures_is_side_by_side():
    selection = Selection(mx.array([[0], [3]]))
    images = [Image.new("RGB", (10, 10), c) for c in (RED, BLUE)]
    sheet = draw_overlay(images, selection, (2, 2))
    assert_close(sheet.getpixel((10, 10)), RED)
    assert_close(sheet.getpixel((sheet.width - 10, sheet.height - 10)), BLUE)
