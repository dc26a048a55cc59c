"""Every place of a plan has its indices in the record and its row in the sheet."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY_POLICY

from mlx_tokprune import Selection, load, predict_action, stream_generate
from mlx_tokprune.act.__main__ import main as act
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.cli import draw_choices
from mlx_tokprune.generate.__main__ import main as generate
from mlx_tokprune.processing.image import center_crop, load_image
from mlx_tokprune.processing.overlay import draw_overlay
from mlx_tokprune.pruners import read_plan
from mlx_tokprune.pruners.registry import temporary

FILES = [str(picture.path) for picture in PICTURES]


@pytest.fixture
def known():
    """Register `second`, which keeps every second token, and `first`."""
    with temporary("second") as register:

        @register
        def second(features, *, keep):
            kept = 2 * mx.arange(keep, dtype=mx.int32)
            return Selection(mx.broadcast_to(kept, (len(features.tokens), keep)))

        with temporary("first") as register:

            @register
            def first(features, *, keep):
                kept = mx.arange(keep, dtype=mx.int32)
                return Selection(mx.broadcast_to(kept, (len(features.tokens), keep)))

            yield


STEPS = ["second:0.5@tower", "second:0.5@prompt", "first:20@2"]
IN_WORDS = "second at the tower, second at the prompt, first after 2 layers"


def flags(*places: str) -> list[str]:
    return [part for place in places for part in ("--prune", place)]


def record_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def check_sheet(file, images, visual, padded: bool) -> None:
    """Check that the sheet has a titled row for each place, drawn as alone."""
    places, sheet = visual.by_place(), load_image(file)
    drawn = [
        draw_overlay(images, visual.per_picture(kept), visual.grid, padded)
        for _, kept in places
    ]
    height = drawn[0].height + 20
    assert sheet.height == len(places) * height + 8 * (len(places) - 1)
    for number, row in enumerate(drawn):
        top = number * (height + 8) + 20
        below = sheet.crop((0, top, row.width, top + row.height))
        np.testing.assert_array_equal(np.array(below), np.array(row))
        title = sheet.crop((0, top - 20, row.width, top))
        assert np.array(title).min() < 128  # something is written there
    assert len({row.tobytes() for row in drawn}) == len(drawn)


def test_places_of_two_pictures(known, demo, tmp_path, capsys):
    """Each image is pruned alone before the language model, which prunes both."""
    sheet = tmp_path / "sheet.png"
    files = [part for file in FILES for part in ("--image", file)]
    more = ["--max-tokens", "1", "--json", "--overlay", str(sheet)]
    generate([*files, "--prompt", "What?", *flags(*STEPS), *more])
    record = record_of(capsys)
    left = [[*range(0, 64, 4)], [0, 4, 8, 12]]  # 20 of the 32
    assert record["places"] == [
        {"at": "tower", "kept_indices": [[*range(0, 64, 2)]] * 2},
        {"at": "prompt", "kept_indices": [[*range(0, 64, 4)]] * 2},
        {"at": 2, "kept_indices": left},
    ]
    assert record["kept_indices"] == left
    assert (record["keep"], record["method"]) == (16, IN_WORDS)
    images, plan = [load_image(file) for file in FILES], read_plan("+".join(STEPS))
    asked = (*demo, images, "What?")
    *_, last = stream_generate(*asked, pruner=plan, max_tokens=1)
    found = [{"at": at, "kept_indices": kept} for at, kept in last.visual.by_place()]
    assert found == record["places"]
    assert last.visual.left() == left
    assert [len(kept) for kept in last.visual.per_picture(left)] == [16, 4]
    check_sheet(sheet, images, last.visual, padded=True)


def test_places_of_a_policy_of_two_pictures(known, oft_folder, tmp_path, capsys):
    """The tokens of a policy's two images are numbered in one sequence."""
    image, sheet = load_image(TINY_POLICY / "image_0.png"), tmp_path / "sheet.png"
    turned = tmp_path / "turned.png"
    image.rotate(90).save(turned)
    asked = ["--model", str(oft_folder), "--image", str(TINY_POLICY / "image_0.png")]
    asked += ["--image", str(turned), "--instruction", "lift the block"]
    more = ["--json", "--overlay", str(sheet), "--proprio", *["0.1"] * 5]
    act([*asked, *flags(*STEPS), *more])
    record = record_of(capsys)
    assert record["visual_tokens"] == 128
    assert record["places"] == [
        {"at": "tower", "kept_indices": [[*range(0, 128, 2)]]},
        {"at": "prompt", "kept_indices": [[*range(0, 128, 4)]]},
        {"at": 2, "kept_indices": [[*range(0, 80, 4)]]},
    ]
    assert record["kept_indices"] == [[*range(0, 80, 4)]]
    assert (record["keep"], record["method"]) == (20, IN_WORDS)
    action = predict_action(
        *load_of(oft_folder, [image, image.rotate(90)]),
        proprio=[0.1] * 5,
        pruner=read_plan("+".join(STEPS)),
    )
    pictures = action.visual.per_picture(action.visual.left())
    expected = [[*range(0, 64, 4)], [0, 4, 8, 12]]
    assert [kept.tolist() for kept in pictures] == expected
    crop = load(oft_folder)[1].crop
    seen = [center_crop(one, crop) for one in (image, image.rotate(90))]
    check_sheet(sheet, seen, action.visual, padded=False)


def load_of(folder, images) -> tuple:
    return (*load(folder), images, "lift the block")


@pytest.mark.parametrize("steps", [[], STEPS[:1], STEPS[2:], STEPS[:2]])
def test_other_plans_say_their_places_too(known, demo, capsys, steps):
    generate([*flags(*steps), "--max-tokens", "1", "--json"])
    record = record_of(capsys)
    kept = {
        "tower": [[*range(0, 64, 2)]],
        "prompt": [[*range(0, 64, 4)]],
        2: [[*range(20)]],
    }
    ats = [2 if step.endswith("2") else step.rpartition("@")[2] for step in steps]
    assert record["places"] == [{"at": at, "kept_indices": kept[at]} for at in ats]
    last = record["places"][-1]["kept_indices"] if steps else [[*range(64)]]
    assert record["kept_indices"] == last


def test_one_place_at_the_tower_is_one_picture_without_title(known, demo):
    """A plan of one place has one untitled row, and merged tokens keep colours."""
    images = [load_image(FILES[0])]
    for text, rows in (("second:0.5", 1), ("similarity:8", 1), ("first:9@2", 1)):
        *_, last = stream_generate(
            *(*demo, images, "What?"), pruner=read_plan(text), max_tokens=1
        )
        drawn = draw_choices(images, last.visual, padded=True)
        assert (
            drawn.height == draw_overlay(images, last.visual.selection, (8, 8)).height
        )
        kept = np.array(last.visual.left()[0])
        gone = draw_overlay(images, [kept], (8, 8))
        assert (drawn.tobytes() == gone.tobytes()) == (text != "similarity:8")
        assert len(last.visual.by_place()) == rows
