"""The black border of a padded image is encoded or left out."""

import dataclasses

import numpy as np
import pytest
from asking import IMAGE, QUESTIONS, answer, scene_of
from conftest import TINY
from PIL import Image

from mlx_tokprune import Pruner, generate
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.generate import image_size as sizes
from mlx_tokprune.generate.__main__ import main as command
from mlx_tokprune.pipeline import assemble, look
from mlx_tokprune.processing.image import preprocess, preprocess_content
from mlx_tokprune.processing.overlay import draw_overlay
from mlx_tokprune.pruners import as_plan


def wide(width: int, height: int) -> Image.Image:
    """Return an image without symmetry."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((512, 288), (320, 512)),
        ((288, 512), (512, 320)),
        ((512, 512), (512, 512)),
        ((1920, 1080), (320, 512)),
        ((2000, 3), (64, 512)),
        ((512, 321), (384, 512)),
    ],
)
def test_padding_that_is_skipped_leaves_the_picture(size, shape):
    image = wide(*size)
    (found,) = preprocess_content([image], 512, 64)
    assert found.shape == (*shape, 3)
    width, height = (max(1, round(side * 512 / max(size))) for side in size)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    content = found[top : top + height, left : left + width]
    np.testing.assert_array_equal(content, np.asarray(scaled, np.float32) / 255)
    assert found.sum() == pytest.approx(content.sum())


def test_pixels_of_a_picture_without_resizing_are_those_of_the_square():
    image = wide(512, 256)
    (square,) = preprocess([image], 512)
    (content,) = preprocess_content([image], 512, 64)
    np.testing.assert_array_equal(content, square[128:384])


def test_pictures_of_different_shapes_share_a_rectangle(demo):
    model, processor = demo
    processor = processor.at(512, "skip")
    images = [wide(512, 200), wide(400, 300)]
    pixels = processor.pixels(images)
    assert pixels.shape == (2, 384, 512, 3)
    for image, shared in zip(images, (pixels[0, 64:-64], pixels[1]), strict=True):
        np.testing.assert_array_equal(preprocess_content([image], 512, 64)[0], shared)
    assert not pixels[0, :64].any()
    # As if both had come with borders that make them alike.
    alike = [Image.fromarray((255 * p).round().astype(np.uint8)) for p in pixels]
    found, expected = (
        answer(model, processor, some, QUESTIONS[0], max_tokens=4)[0]
        for some in (images, alike)
    )
    assert found == expected
    assert found != answer(model, processor, alike[::-1], "Who?", max_tokens=4)[0]


def test_places_are_those_in_the_padded_square(demo):
    model, processor = demo
    processor = processor.at(512, "skip")
    for size, places in (((512, 256), range(16, 48)), ((256, 512), None)):
        scene = scene_of(processor, [wide(*size)], "Hi")
        visual = look(model, scene, ())
        assert visual.total == 32
        found, total = visual.on_squares()
        assert total == 64
        columns = [8 * row + column for row in range(8) for column in range(2, 6)]
        assert found.tolist() == [list(places or columns)]
        before, after = map(len, scene.prompt.segments)
        sequence = assemble(model, scene, visual, (), "original")
        expected = [*range(before), *(before + p for p in found.tolist()[0])]
        expected += [before + 64 + i for i in range(after)]
        assert sequence.positions.tolist() == expected
        assert sequence.end - sequence.embeddings.shape[1] == 32
        assert assemble(model, scene, visual, (), "contiguous").positions is None


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.path.name)
def test_the_demo_answers_without_padding(demo, picture):
    model, processor = demo
    asked = (model, processor.at(512, "skip"), [picture.path], picture.question)
    assert generate(*asked, pruner=Pruner("norm", keep_ratio=0.5)) == picture.answer


def test_an_overlay_without_padding_shows_the_same_places(demo):
    model, processor = demo
    image = wide(512, 256)
    scene = scene_of(processor.at(512, "skip"), [image], "Hi")
    visual = look(model, scene, as_plan(Pruner("norm", keep_ratio=0.5)))
    drawn = draw_overlay([image], visual.selection, visual.grid)
    places, _ = visual.on_squares()
    square = dataclasses.replace(visual.selection, indices=places)
    expected = draw_overlay([image], square, (8, 8))
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size", "100"], "expected a multiple of 64, such as 128"),
        (["--image-size", "-64"], "such as 64"),
        (["--padding", "crop"], "invalid choice"),
        (["--vision-budget", "0.001"], "the smallest, 64 px, takes about 7 ms"),
        (["--image-size", "64", "--vision-budget", "9"], "not allowed with"),
        (["--image-size", "0"], "such as 64"),
        (["--image-size", "640000"], "the most is 4096"),
        (["--vision-budget", "nan"], "a TTFT of nan ms"),
        (["--vision-budget", "1e9", "--keep-tokens", "65"], "at 512 px there are 64"),
    ],
)
def test_bad_sizes_are_one_sentence(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(sizes, "_measure", lambda *_: 7.0)
    asked = ["--model", str(TINY), "--image", str(IMAGE), "--prompt=a"]
    with pytest.raises(SystemExit) as stopped:
        command([*arguments, *asked])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
