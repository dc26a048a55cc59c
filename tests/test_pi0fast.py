"""pi0-FAST equals the float32 values of lerobot's own module."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY_CHUNKS

from mlx_tokprune import Policy, Pruner, load, pipeline
from mlx_tokprune.act.__main__ import main
from mlx_tokprune.act.heads import head_of
from mlx_tokprune.act.inputs import check_images, observe, tell
from mlx_tokprune.act.predict import predict_action
from mlx_tokprune.bench.__main__ import main as bench
from mlx_tokprune.errors import InputError
from mlx_tokprune.evaluate.__main__ import main as evaluate
from mlx_tokprune.models.positions import LayerCache
from mlx_tokprune.pipeline import planning
from mlx_tokprune.processing.image import center_crop, load_image
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.pruners import get_method, list_pruners

INSTRUCTION = "Pick up_the cup"
CAMERAS = ("base", "left", "right")
CONFIG = json.loads((TINY_CHUNKS / "config.json").read_text())
STATE = CONFIG["state"]
CASES = ("0", "012", "02")  # which cameras are there
EACH = 16  # visual tokens of a picture


@pytest.fixture(scope="module")
def expected():
    return mx.load(str(TINY_CHUNKS / "expected.safetensors"))


def pictures(case: str) -> dict:
    return {CAMERAS[int(i)]: TINY_CHUNKS / f"image_{i}.png" for i in case}


def scene_of(tiny_chunks, case: str) -> pipeline.Scene:
    model, processor = tiny_chunks
    told = tell(head_of(model, processor, 3), model, INSTRUCTION, [STATE], None)
    return observe(processor, [check_images(model, pictures(case))], *told)


def relative(a, b) -> float:
    a, b = np.array(a), np.array(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def read(model, scene, plan=(), rows=1, **how):
    plan = planning.plan_for(model, plan)
    return pipeline.run(model, scene, plan, rows=rows, **how)


def length_of(scene) -> int:
    return len(scene.pixels) // scene.batch * EACH + len(scene.prompt.segments[1])


@pytest.mark.parametrize("case", CASES)
def test_prefix_equals_the_reference(tiny_chunks, expected, case):
    """States and logits equal the reference; absent cameras take no position."""
    model, _ = tiny_chunks
    scene = scene_of(tiny_chunks, case)
    ids = list(scene.prompt.segments[1])
    assert ids[:-1] == expected[f"{case}_input_ids"].tolist()
    assert ids[-1] == ids[0]  # lerobot's second <bos>
    found, _ = read(model, scene, rows=length_of(scene))
    assert relative(found.hidden[0], expected[f"{case}_hidden"]) < 1e-4
    logits = model.decoder.logits(found.hidden[:, -1])
    assert relative(logits[0], expected[f"{case}_logits"]) < 1e-4


def test_pictures_and_tower_equal_the_reference(tiny_chunks, expected):
    """Pixels, features and projections equal the reference, with resized images."""
    model, _ = tiny_chunks
    scene = scene_of(tiny_chunks, "012")
    seen = (scene.pixels * 2 - 1).transpose(0, 3, 1, 2)[:, :, ::8, ::8]
    assert relative(seen, expected["012_pixels"]) < 1e-5
    features = model.encode(scene.pixels)
    assert relative(features.tokens, expected["012_features"]) < 1e-4
    assert relative(model.project(features.tokens), expected["012_projected"]) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_answers_and_actions_equal_the_reference(tiny_chunks, expected, case):
    action = predict_action(
        *tiny_chunks, pictures(case), INSTRUCTION, proprio=STATE, stages=True
    )
    assert list(action.token_ids) == expected[f"{case}_greedy_ids"].tolist()
    np.testing.assert_allclose(
        action.normalized, expected[f"{case}_normalized"], atol=1e-5
    )
    np.testing.assert_allclose(action.values, expected[f"{case}_action"], atol=1e-5)
    assert action.values.shape == (4, 3)
    assert "coefficients instead of 12" in action.wrong
    assert action.visual.total == EACH * len(case)


def with_dialect(tiny_chunks, dialect: str):
    """Return the tiny policy with another reference's dialect."""
    _, processor = tiny_chunks
    model, _ = load(TINY_CHUNKS)
    model.args = dataclasses.replace(model.args, dialect=dialect)
    return model, dataclasses.replace(processor, dialect=dialect)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_openpi_answers_a_position_later(tiny_chunks, expected, positions):
    model, processor = with_dialect(tiny_chunks, "openpi")
    scene = scene_of(tiny_chunks, "01")
    ids = processor.tokenizer.encode(CONFIG["openpi_prompt"])
    scene = dataclasses.replace(scene, prompt=Prompt(((), tuple(ids))))
    head = head_of(model, processor, 3)
    said = head.joined(head.decode(model, scene, (), positions=positions)[0])
    assert said[0].tolist() == expected["openpi_ids"].tolist()
    # With lerobot's positions the same weights answer otherwise.
    lerobot = head_of(*tiny_chunks, 3)
    other = lerobot.joined(lerobot.decode(tiny_chunks[0], scene, ())[0])
    assert other[0].tolist() != said[0].tolist()[: other.shape[1]]


def test_openpi_s_prompt_is_lower_case_and_has_one_bos(tiny_chunks):
    _, processor = with_dialect(tiny_chunks, "openpi")
    state = np.array([-1.5, -1.0, 0.0, 1.0, 2.0], np.float32)
    _, ids = processor.prompt(INSTRUCTION, state).segments
    text = "Task: pick up the cup, State: -1 0 128 255 255;\n"
    assert processor.tokenizer.decode(ids[1:]) == text
    assert ids.count(ids[0]) == 1
    _, ids = tiny_chunks[1].prompt(INSTRUCTION, state).segments
    assert "Task: Pick up the cup," in processor.tokenizer.decode(ids)


def test_openpi_gives_zeros_for_damaged_answers(tiny_chunks):
    _, processor = with_dialect(tiny_chunks, "openpi")
    head = processor.tokenizer.encode("Action: ", add_special_tokens=False)
    codes = [processor.tokenizer.vocab_size - 129 - t for t in (20, 30, 40)]
    for said, wrong in (
        (codes, "without 'Action: '"),
        ([*head, *codes, processor.stop], "instead of 12"),
    ):
        chunk, found = processor.actions(said)
        assert not chunk.any()
        assert wrong in found
    lerobot, _ = tiny_chunks[1].actions([*head, *codes, processor.stop])
    assert lerobot.any()


def test_an_answer_that_is_none_is_refused_where_the_checkpoint_says_so(tiny_chunks):
    strict = dataclasses.replace(tiny_chunks[1], strict=True)
    with pytest.raises(InputError, match="does not begin with 'Action:'"):
        predict_action(
            tiny_chunks[0], strict, pictures("0"), INSTRUCTION, proprio=STATE
        )


# Pruning ------------------------------------------------------------------------------


def two_robots(tiny_chunks) -> pipeline.Scene:
    """Return a scene of two robots with two cameras each and one prompt."""
    scene = scene_of(tiny_chunks, "01")
    pixels = mx.concatenate([scene.pixels, scene.pixels[::-1] * 0.7])
    return dataclasses.replace(scene, pixels=pixels, batch=2)


def masked(model, scene, choices: dict[int, np.ndarray]) -> mx.array:
    """Return (B, T, D) states of the full sequence, masked from each layer k on.

    choices: by k, (B, n) indices of the visual tokens that stay visible.
    """
    visual = pipeline.look(model, scene, ())
    sequence = pipeline.assemble(model, scene, visual)
    hidden = sequence.embeddings
    batch, length = hidden.shape[:2]
    seen = np.ones((batch, length), bool)
    for number, layer in enumerate(model.layers):
        if number in choices:
            seen[:, : visual.total] = False
            np.put_along_axis(seen, choices[number], True, axis=1)
        mask = mx.broadcast_to(mx.array(seen)[:, None], (batch, length, length))
        part = LayerCache(None, 0, mx.arange(length))
        hidden = layer(hidden, mask[:, None], part)
    return model.decoder.norm(hidden)


PLANS = [
    Pruner("norm", 0.5),
    Pruner("trimvla", 0.25),
    Pruner("attention", 0.5, at=1),
    [Pruner("norm", 0.5), Pruner("attention", 0.5, at=2)],
    [Pruner("attention", 0.5, at=1), Pruner("dart", 0.5, at=2)],
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_pruned_equals_masked_at_original_positions(tiny_chunks, plan):
    model, _ = tiny_chunks
    scene, text = two_robots(tiny_chunks), length_of(scene_of(tiny_chunks, "01"))
    text -= 2 * EACH
    found, visual = read(model, scene, plan, rows=text)
    kept = np.array(visual.indices)
    choices = {0: kept}
    for place, chosen in visual.choices:
        if isinstance(place, int):
            kept = np.take_along_axis(kept, np.array(chosen), axis=1)
            choices[place] = kept
    assert kept.shape[1] < 2 * EACH
    assert (kept[0] != kept[1]).any()
    assert relative(found.hidden, masked(model, scene, choices)[:, -text:]) < 1e-4


@pytest.mark.parametrize("plan", [(), *PLANS], ids=str)
@pytest.mark.parametrize("dialect", ["lerobot", "openpi"])
def test_decoding_equals_reading_prompt_and_answer_at_once(tiny_chunks, plan, dialect):
    model, processor = with_dialect(tiny_chunks, dialect)
    scene, head = scene_of(tiny_chunks, "02"), head_of(model, processor, 3)
    plan = planning.plan_for(model, plan)
    said = head.joined(head.decode(model, scene, plan)[0])
    assert said.shape[1] > 3
    whole, _ = pipeline.run(model, scene, plan, after=said[:, :-1])
    again = mx.argmax(model.decoder.logits(whole.hidden), axis=-1)
    assert again.tolist() == said.tolist()


def test_two_robots_answer_as_each_does_alone(tiny_chunks):
    """Robots of a batch answer as alone; zeros follow the shorter answer."""
    model, processor = tiny_chunks
    scene, head = two_robots(tiny_chunks), head_of(model, processor, 3)
    plan = planning.plan_for(model, Pruner("norm", 0.5))
    together = np.array(head.joined(head.decode(model, scene, plan)[0]))
    lengths = []
    for row, said in enumerate(together):
        pixels = scene.pixels[2 * row : 2 * row + 2]
        alone = dataclasses.replace(scene, pixels=pixels, batch=1)
        answer = np.array(head.joined(head.decode(model, alone, plan)[0]))[0]
        assert said[: len(answer)].tolist() == answer.tolist()
        assert not said[len(answer) :].any()
        assert head.normalized(together)[row].tolist() == (
            head.normalized(answer).tolist()
        )
        lengths.append(len(answer))
    assert lengths[0] != lengths[1]


def fits(model, name: str) -> bool:
    method = get_method(name)
    return set(method.needs) <= set(model.provides.get(method.place, ()))


@pytest.mark.parametrize("name", [n for n in list_pruners() if n != "none"])
def test_every_method_prunes_cameras_that_are_there(tiny_chunks, name):
    model, _ = tiny_chunks
    if not fits(model, name):
        pytest.skip("needs what a place does not have")
    ratio = None if get_method(name).counts == "own" else 0.5
    asked = {"proprio": STATE, "pruner": Pruner(name, ratio)}
    action = predict_action(*tiny_chunks, pictures("02"), INSTRUCTION, **asked)
    assert action.visual.total == 2 * EACH
    (kept,) = action.visual.left()
    assert len(kept) <= 2 * EACH
    if get_method(name).place == "tower":  # each camera keeps its share
        cameras = action.visual.per_picture([kept])
        assert [len(tokens) for tokens in cameras] == [EACH // 2, EACH // 2]
    policy = Policy(*tiny_chunks, pruner=asked["pruner"])
    if name == "vlapruner":  # sees everything at first
        return
    np.testing.assert_allclose(
        policy(pictures("02"), INSTRUCTION, STATE), action.values, atol=1e-6
    )
    assert policy.wrong == action.wrong


def test_a_method_that_looks_back_prunes_after_the_first_steps(tiny_chunks):
    policy = Policy(*tiny_chunks, pruner=Pruner("vlapruner", 0.5))
    kept = []
    for _ in range(5):
        assert np.isfinite(policy(pictures("012"), INSTRUCTION, STATE)).all()
        kept.append(policy.kept)
    assert kept == [48, 48, 48, 24, 24]


def test_absent_cameras_cost_nothing(tiny_chunks):
    policy = Policy(*tiny_chunks, pruner=Pruner("norm", 0.5))
    for case in ("0", "012", "02", "0"):
        policy(pictures(case), INSTRUCTION, STATE)
        assert policy.kept == EACH / 2 * len(case)


def test_robots_of_a_batch_act_as_they_do_alone(tiny_chunks):
    policy = Policy(*tiny_chunks, pruner=Pruner("norm", 0.5))
    states = [STATE, [0.0] * 5]
    batch = [pictures("0"), pictures("12")]
    together = policy.act_on_batch(batch, INSTRUCTION, states)
    assert together.shape == (2, 4, 3)
    for images, state, action in zip(batch, states, together, strict=True):
        np.testing.assert_array_equal(policy(images, INSTRUCTION, state), action)


# What can be given --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"top": 0}, "camera 'top' is none of base_0_rgb, left_wrist"),
        ({"wrist": 0}, "fits several of"),
        ({"base": 0, "base_0_rgb": 1}, "base_0_rgb has two pictures"),
        ({}, "takes 1 to 3 pictures"),
        ([0] * 4, "takes 1 to 3 pictures"),
    ],
)
def test_pictures_that_fit_no_camera_are_refused(tiny_chunks, images, message):
    names = [TINY_CHUNKS / f"image_{i}.png" for i in range(3)]
    if isinstance(images, dict):
        images = {name: names[i] for name, i in images.items()}
    else:
        images = [names[i] for i in images]
    with pytest.raises(InputError, match=message):
        predict_action(*tiny_chunks, images, INSTRUCTION, proprio=STATE)


def test_names_are_for_policies_that_have_them(tiny_policy):
    images = {"base": TINY_CHUNKS / "image_0.png"}
    with pytest.raises(InputError, match="have no names"):
        predict_action(*tiny_policy, images, "pick")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"proprio": None}, "give proprio, 5 numbers"),
        ({"proprio": [0.0] * 4}, "5 numbers for this policy; got 4"),
        ({"proprio": [0.0] * 4 + [float("nan")]}, "not finite"),
        ({"instruction": " "}, "the instruction is empty"),
        ({"instruction": "go " * 40}, "the model reads 80"),
        ({"instruction": "go " * 40000}, "is too long"),
    ],
)
def test_what_cannot_be_told_is_refused(tiny_chunks, asked, message):
    asked = {"instruction": INSTRUCTION, "proprio": STATE} | asked
    instruction = asked.pop("instruction")
    with pytest.raises(InputError, match=message):
        predict_action(*tiny_chunks, pictures("0"), instruction, **asked)


def test_command_line(tiny_chunks, expected, capsys, tmp_path):
    names = [f"{c}={TINY_CHUNKS}/image_{i}.png" for i, c in enumerate(CAMERAS)]
    images = [word for name in names[::-1] for word in ("--image", name)]
    asked = ["--model", str(TINY_CHUNKS), "--instruction", INSTRUCTION, *images]
    asked += ["--state", *map(str, STATE), "--overlay", str(tmp_path / "kept.png")]
    main([*asked, "--json"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["token_ids"] == expected["012_greedy_ids"].tolist()
    np.testing.assert_allclose(record["action"], expected["012_action"], atol=1e-5)
    assert "coefficients" in record["wrong"]
    main([*asked, "--keep-ratio", "0.5", "--method", "norm"])
    assert "48, kept 24" in capsys.readouterr().out
    main([*asked, "--json", "--first", "3", "--runs", "1"])
    some = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert some["action"] == record["action"][:3]
    with pytest.raises(SystemExit):
        main([*asked, "--first", "5"])
    assert "expected 1 to 4" in capsys.readouterr().err
    for wrong in (["--image", str(TINY_CHUNKS / "image_0.png")], images[:2]):
        with pytest.raises(SystemExit):
            main([*asked, *wrong])
        assert "each camera once" in capsys.readouterr().err


def test_overlay_shows_pictures_on_their_square(tiny_chunks):
    _, processor = tiny_chunks
    image = load_image(TINY_CHUNKS / "image_1.png")  # 80 x 60
    pixels = processor.pixels([image])[0]
    assert processor.pads
    assert np.array_equal(center_crop(image, processor.crop), image)
    assert not pixels[:7].any()
    assert not pixels[-7:].any()
    assert pixels[7:-7].min(axis=(1, 2)).max() > 0


def test_bench_and_evaluate_take_such_a_policy(tiny_chunks, tmp_path, capsys):
    """`bench` and `evaluate` give each camera the image, and read whole chunks."""
    picture = str(TINY_CHUNKS / "image_0.png")
    record = {"image": picture, "question": "go", "answer": " ".join(["0.0"] * 12)}
    (tmp_path / "asked.jsonl").write_text(json.dumps(record))
    asked = ["--model", str(TINY_CHUNKS), "--methods", "norm", "--keep-ratio", "0.5"]
    output = ["--output", str(tmp_path / "result.json")]
    evaluate([*asked, *output, "--data", str(tmp_path / "asked.jsonl")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert "48" in capsys.readouterr().out
    assert len(result["answers"][0]["given"]["none"].split()) == 12
    output = ["--output", str(tmp_path / "bench.json")]
    bench([*asked, *output, "--image", picture, "--prompt", "go", "--runs", "1"])
    assert "24/48" in capsys.readouterr().out
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    whole, half = (row["cache_bytes"] for row in rows)
    each = 3 * 2 * 16 * 4  # layers, keys and values, numbers of the one head, bytes
    assert whole - half == 24 * each
    assert half > 24 * each
