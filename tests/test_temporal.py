"""In a video, changed tokens are encoded and the others are reused."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from mlx_tokprune import InputError, Pruner, generate, load
from mlx_tokprune.generate.__main__ import main as command
from mlx_tokprune.generate.temporal import Temporal
from mlx_tokprune.pipeline import Scene
from mlx_tokprune.pipeline import look as see
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.pruners import as_plan


@pytest.fixture
def model(tiny):
    return tiny[0]


def frame_of(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.repeat(np.repeat(rng.random((8, 8, 3)), 64, 0), 64, 1).astype(np.float32)


def scene_of(*frames: np.ndarray) -> Scene:
    return Scene(mx.array(np.stack(frames)), Prompt(((), ())))


def look(video: Temporal, model, frame: np.ndarray):
    return video(model, scene_of(frame), video.plan)


def full(model, frame: np.ndarray, pruner: Pruner | None = None):
    return see(model, scene_of(frame), as_plan(pruner))


def difference(a, b) -> float:
    return mx.max(mx.abs(a.embeddings - b.embeddings)).item()


def test_a_first_frame_is_seen_whole(model):
    video, frame = Temporal(Pruner("norm", 0.5)), frame_of()
    seen, expected = look(video, model, frame), full(model, frame, Pruner("norm", 0.5))
    assert difference(seen, expected) == 0
    assert seen.selection.indices.tolist() == expected.selection.indices.tolist()
    assert video.encoded == 1


def test_a_frame_without_changes_is_not_encoded(model, monkeypatch):
    video, frame = Temporal(), frame_of()
    first = look(video, model, frame)
    monkeypatch.setattr(type(model), "encode", None)
    again = look(video, model, frame + 0.04)  # below the threshold
    assert difference(first, again) == 0
    assert video.encoded == 0


def test_only_what_changed_is_encoded(model, monkeypatch):
    video, frame = Temporal(), frame_of()
    before = look(video, model, frame)
    sizes, encode = [], type(model).encode

    def watched(self, pixels, *rest):
        sizes.append(pixels.shape[1:3])
        return encode(self, pixels, *rest)

    monkeypatch.setattr(type(model), "encode", watched)
    changed = frame.copy()
    changed[2 * 64 : 4 * 64, 3 * 64 : 4 * 64] = 0.5
    after = look(video, model, changed)
    assert sizes == [(4 * 64, 3 * 64)]
    assert video.encoded == 12 / 64
    same = mx.all(before.embeddings == after.embeddings, axis=-1)[0].tolist()
    cells = [8 * row + column for row in (2, 3) for column in (3,)]
    assert [number for number, equal in enumerate(same) if not equal] == cells
    window = full(model, changed[64 : 5 * 64, 2 * 64 : 5 * 64])
    inner = [window.embeddings[0, 3 * row + 1] for row in (1, 2)]
    found = [after.embeddings[0, cell] for cell in cells]
    assert mx.max(mx.abs(mx.stack(inner) - mx.stack(found))).item() < 1e-5


def test_a_change_that_creeps_is_seen(model):
    """Small changes add up: pixels are compared with those of the reused token."""
    video, frame = Temporal(threshold=0.1, max_age=100), frame_of() * 0.5
    look(video, model, frame)
    encoded = []
    for step in range(1, 5):
        crept = frame.copy()
        crept[:64, :64] += 0.04 * step
        look(video, model, crept)
        encoded.append(video.encoded)
    assert encoded == [0, 0, 4 / 64, 0]


def test_a_change_that_creeps_beside_another_is_seen(model):
    """Small changes add up while another part of the frame is encoded."""
    video, frame = Temporal(threshold=0.1, max_age=100), frame_of() * 0.5
    look(video, model, frame)
    encoded = []
    for step in range(1, 5):
        moved = frame.copy()
        moved[:64, :64] += 0.04 * step
        moved[-64:, -64:] = 0.2 * step
        look(video, model, moved)
        encoded.append(video.encoded)
    assert encoded == [4 / 64, 4 / 64, 1, 4 / 64]  # both corners: the whole frame


def test_no_token_gets_older_than_asked(model):
    video, frame = Temporal(max_age=2), frame_of()
    shares = []
    for _ in range(7):
        look(video, model, frame)
        shares.append(video.encoded)
    assert shares == [1, 0, 0, 1, 0, 0, 1]


def test_a_part_that_was_renewed_ages_from_then_on(model):
    video, frame = Temporal(max_age=3), frame_of()
    look(video, model, frame)
    changed = frame.copy()
    changed[-64:, -64:] = 0
    shares = []
    for number in range(4):
        look(video, model, changed)
        shares.append(video.encoded)
        ages = video._last.ages
        assert number == 3 or (ages[-1, -1], ages[0, 0]) == (number, number + 1)
    assert shares[:3] == [4 / 64, 0, 0]
    assert shares[3] == 1  # all cells but one are too old


def test_much_change_encodes_the_whole_frame(model):
    video = Temporal()
    look(video, model, frame_of())
    corners = frame_of()
    corners[:64, :64] = corners[-64:, -64:] = 0.5
    seen = look(video, model, corners)
    assert video.encoded == 1
    assert difference(seen, full(model, corners)) == 0


def test_reset_and_other_sizes_begin_again(model):
    video, frame = Temporal(), frame_of()
    look(video, model, frame)
    video.reset()
    look(video, model, frame)
    assert video.encoded == 1
    look(video, model, frame[:256])
    assert video.encoded == 1


def test_another_model_begins_again(model):
    video, frame, other = Temporal(), frame_of(), load(TINY)[0]
    other.mm_projector[0].weight *= 0
    look(video, model, frame)
    assert difference(look(video, other, frame), full(other, frame)) == 0
    assert video.encoded == 1


@pytest.mark.parametrize("method", ["norm", "trimvla"])
def test_in_a_stream(tiny, method):
    model, processor = tiny
    pruner = Pruner(method, keep_ratio=0.5)
    video = Temporal(pruner)
    asked = (model, processor, [TINY / "image_0.png"], "What?")
    plain = generate(*asked, pruner=pruner, max_tokens=4)
    assert generate(*asked, vision=video, max_tokens=4) == plain
    assert generate(*asked, vision=video, max_tokens=4) == plain
    assert video.encoded == 0


def test_the_command_asks_about_each_frame(capsys, tmp_path):
    frames = []
    for number in range(3):
        pixels = (frame_of() * 255).astype(np.uint8)
        pixels[:64, :64] = 80 * number
        frames += ["--image", str(tmp_path / f"{number}.png")]
        Image.fromarray(pixels).save(frames[-1])
    command(["--temporal", *frames, "--prompt", "Hi", "--max-tokens", "2"])
    out = capsys.readouterr().out
    assert out.count("encoded") == 3
    assert "100 % of the frame encoded" in out
    assert out.count("6 % of the frame encoded") == 2
    asked = ["--prompt", "Hi", "--prompt", "Ho", "--vision-budget", "1e6"]
    command(["--temporal", *frames, *asked, "--max-tokens", "1", "--json"])
    lines = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert [record["prompt"] for record in records] == ["Hi", "Ho"] * 3
    assert [record["reused_tokens"] > 0 for record in records] == [False, True] * 3
    shares = [round(record["encoded"], 2) for record in records]
    assert shares == [1, 1, 0.06, 0.06, 0.06, 0.06]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruner": Pruner("attention", 0.5)}, "needs more of a frame than its tokens"),
        (
            {"pruner": Pruner("trimvla", 0.5, at="tower")},
            "choose another, such as 'norm'",
        ),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"max_age": -1}, "max age -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        Temporal(**options)


def test_what_cannot_be_seen_in_parts_is_refused(model, policy_model):
    with pytest.raises(InputError, match="cannot encode a part of an image alone"):
        Temporal().check(policy_model)
    with pytest.raises(InputError, match="frames come one by one; 2 given"):
        Temporal()(model, scene_of(frame_of(), frame_of()), ())


@pytest.fixture
def policy_model(tiny_policy):
    return tiny_policy[0]
