"""Images of every kind are read, or refused with a reason."""

import numpy as np
import pytest
from PIL import Image

from mlx_tokprune.errors import InputError
from mlx_tokprune.features import Selection
from mlx_tokprune.processing.image import load_image, pad_to_square, preprocess
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
