"""OpenVLA-OFT: one bidirectional forward, slots counted from the kept tokens."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import OFT, TINY_POLICY, copy_policy, side_tensors
from PIL import Image

from mlx_tokprune import Policy, Pruner, load, pipeline
from mlx_tokprune.act.__main__ import main
from mlx_tokprune.act.heads import head_of
from mlx_tokprune.act.inputs import observe
from mlx_tokprune.act.predict import predict_action
from mlx_tokprune.checkpoints.opening import open_checkpoint
from mlx_tokprune.checkpoints.shards import Checkpoint
from mlx_tokprune.convert import convert, sidefiles
from mlx_tokprune.errors import InputError
from mlx_tokprune.processing.actions import read_bounds
from mlx_tokprune.processing.image import load_image, preprocess_naive
from mlx_tokprune.pruners import as_plan

PICTURE = load_image(TINY_POLICY / "image_0.png")
PICTURES = [PICTURE, PICTURE.rotate(90)]
STATE = [0.5, -1.0, 2.0, 0.0, 1.0]
INSTRUCTION = "pick up the cup"


def scene_of(processor, instruction=INSTRUCTION) -> pipeline.Scene:
    state = mx.array([[0.1, -0.4, 0.9, 0.0, 0.3]])
    return observe(processor, [PICTURES], processor.prompt(instruction), state)


def see(policy, pruner: Pruner, positions="original"):
    """Return the kept visual tokens, and the sequence."""
    scene, plan = scene_of(policy[1]), as_plan(pruner)
    visual = pipeline.look(policy[0], scene, plan)
    visual = pipeline.prune_at_prompt(policy[0], scene, plan, visual)
    return visual, pipeline.assemble(policy[0], scene, visual, plan, positions)


def states(model, sequence) -> mx.array:
    """Return (1, T, D) states of all tokens."""
    rows = sequence.embeddings.shape[1]
    return model.decoder.read(sequence, rows=rows).hidden


def actions_of(model, sequence) -> np.ndarray:
    """Return (chunk, A) actions from the states before the 21 slots."""
    return np.array(model.action_head(states(model, sequence)[:, -23:-2])[0])


def act(policy, pruner: Pruner, positions="original") -> np.ndarray:
    """Return (chunk, A) normalised actions."""
    model, processor = policy
    head, scene = head_of(model, processor, 7), scene_of(processor)
    parts, _ = head.decode(model, scene, as_plan(pruner), positions=positions)
    return np.array(head.joined(parts)[0])


def linear(weights, name, x):
    return x @ np.array(weights[f"{name}.weight"]).T + np.array(weights[f"{name}.bias"])


def layer_norm(weights, name, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * np.array(weights[f"{name}.weight"]) + np.array(
        weights[f"{name}.bias"]
    )


def plain_head(states: np.ndarray) -> np.ndarray:
    """Return (chunk, A) actions of the head in NumPy for (slots, D) states."""
    prefix = "action_head.model"
    weights = {
        k.removeprefix(f"{prefix}."): v
        for k, v in side_tensors().items()
        if k.startswith(prefix)
    }
    x = layer_norm(weights, "layer_norm1", states.reshape(OFT["chunk"], -1))
    x = np.maximum(linear(weights, "fc1", x), 0)
    for i in range(2):
        name = f"mlp_resnet_blocks.{i}.ffn"
        normed = layer_norm(weights, f"{name}.0", x)
        x = x + np.maximum(linear(weights, f"{name}.1", normed), 0)
    return linear(weights, "fc2", layer_norm(weights, "layer_norm2", x))


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize(
    "pruner",
    [
        Pruner(),
        Pruner("norm", 0.5),
        Pruner("norm", 0.1),
        Pruner("trimvla"),
        Pruner("lightvla"),
    ],
    ids=str,
)
def test_actions_come_from_the_slots(oft_policy, pruner, positions):
    """Actions come from the states before the slots, which have zero embeddings."""
    model, _ = oft_policy
    _, sequence = see(oft_policy, pruner, positions)
    zero = np.abs(np.array(sequence.embeddings[0])).sum(-1) == 0
    slots = np.nonzero(zero)[0]
    assert len(slots) == 21
    # Each action is read from the state before its slot.
    expected = plain_head(np.array(states(model, sequence)[0])[slots - 1])
    ours = act(oft_policy, pruner, positions)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "pruner", [Pruner("norm", 0.25), Pruner("trimvla", 0.25)], ids=str
)
def test_pruned_forward_equals_a_mask_over_the_whole_one(oft_policy, pruner):
    model, _ = oft_policy
    visual, _ = see(oft_policy, pruner)
    whole, full = see(oft_policy, Pruner())
    keep = np.ones(full.embeddings.shape[1], bool)
    keep[1 : 1 + whole.total] = False
    keep[1 + np.array(visual.indices[0])] = True
    mask = mx.array(np.broadcast_to(keep, (1, len(keep), len(keep))))
    expected = actions_of(model, dataclasses.replace(full, mask=mask))
    ours = act(oft_policy, pruner)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


def test_a_prompt_stage_pruner_chooses_among_both_pictures(oft_policy):
    visual, _ = see(oft_policy, Pruner("trimvla", 0.25))
    assert visual.total == 128
    assert visual.indices.shape == (1, 32)
    each, _ = see(oft_policy, Pruner("norm", 0.25))
    indices = np.array(each.indices[0])
    assert (indices < 64).sum() == (indices >= 64).sum() == 16
    assert (np.diff(indices) > 0).all()


def test_attention_is_bidirectional(oft_policy):
    """A change of the stop token, which comes last, changes the actions."""
    model, _ = oft_policy
    _, sequence = see(oft_policy, Pruner())
    changed = np.array(sequence.embeddings)
    changed[0, -1] += 1  # the stop token comes after every slot
    changed = dataclasses.replace(sequence, embeddings=mx.array(changed))
    moved = actions_of(model, changed) - actions_of(model, sequence)
    assert np.abs(moved).max() > 1e-4


@pytest.mark.parametrize("method", ["norm", "trimvla", "lightvla"])
def test_policy_and_predict_action_agree(oft_policy, method):
    pruner = Pruner(method, 0.5 if method == "norm" else None)
    asked = {"proprio": STATE, "pruner": pruner}
    action = predict_action(*oft_policy, PICTURES, INSTRUCTION, **asked)
    assert action.values.shape == (3, 7)
    assert action.token_ids is None
    policy = Policy(*oft_policy, pruner=pruner, compile=False)
    again = policy(PICTURES, INSTRUCTION, STATE)
    np.testing.assert_allclose(again, action.values, rtol=1e-4, atol=1e-5)
    batch = policy.act_on_batch([PICTURES, PICTURES[::-1]], INSTRUCTION, [STATE, STATE])
    np.testing.assert_allclose(batch[0], action.values, rtol=1e-4, atol=1e-5)
    other = predict_action(*oft_policy, PICTURES[::-1], INSTRUCTION, **asked)
    np.testing.assert_allclose(batch[1], other.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pruner", [Pruner(), Pruner("norm", 0.5)], ids=str)
def test_the_sequence_is_the_reference_s(oft_policy, pruner):
    """The sequence is <s>, patches, robot state, prompt, empty slots, </s>."""
    model, processor = oft_policy
    visual, sequence = see(oft_policy, pruner, "contiguous")
    scene = scene_of(processor)

    def embed(*ids):
        return np.array(model.decoder.embed(mx.array([ids])))[0]

    parts = [
        embed(257),
        np.array(visual.embeddings[0]),
        np.array(model.proprio_projector(scene.state)),
        embed(*scene.prompt.segments[1]),
        np.zeros((21, 96)),
        embed(258),
    ]
    expected = np.concatenate(parts)
    np.testing.assert_allclose(np.array(sequence.embeddings[0]), expected, rtol=1e-6)


def test_pixels_are_cropped_as_the_policy_was_trained(oft_policy):
    _, processor = oft_policy
    expected = preprocess_naive(PICTURES, 112, 0.9, Image.Resampling.LANCZOS)
    assert np.array_equal(processor.pixels(PICTURES), expected)


@pytest.mark.parametrize(
    ("folder", "data_set", "habits"),
    [
        ("openvla-7b-oft-finetuned-libero-spatial", "x", (8, 2, "bounds_q99")),
        ("policy", "aloha1_put_X_into_pot", (25, 3, "bounds")),
        ("policy", "bridge_orig", (5, 1, "bounds_q99")),
    ],
)
def test_robots_that_are_known_by_name(tmp_path, folder, data_set, habits):
    source = copy_policy(tmp_path / folder)
    weights = mx.load(str(source / "model.safetensors")) | side_tensors(proprio=8)
    mx.eval(weights)
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    numbers = {k: [0.0] * 7 for k in ("q01", "q99", "min", "max")}
    stats = {data_set: {"action": numbers}}
    (source / "dataset_statistics.json").write_text(json.dumps(stats))
    oft = open_checkpoint(source).config["oft"]
    assert (oft["chunk"], oft["pictures"], oft["rule"]) == habits
    assert (oft["action_dim"], oft["proprio_dim"]) == (7, 8)


def test_extremes_bound_robots_that_use_them():
    entry = {"min": [-2.0, 0.0], "max": [2.0, 1.0], "q01": [0, 0], "q99": [1, 1]}
    entry["mask"] = [True, False]
    bounds = read_bounds({"action": entry}, "action", "bounds")
    assert bounds.to_units(np.array([0.5, 0.5])).tolist() == [1.0, 0.5]
    assert bounds.from_units(np.array([1.0, 0.7])).tolist() == pytest.approx([0.5, 0.7])


def test_robot_state_is_scaled_by_its_statistics(oft_policy):
    bounds = oft_policy[1].bounds("proprio", None)
    scaled = bounds.from_units(np.array([-1.0, 2.0, 0.5, 9.0, -9.0]))
    np.testing.assert_allclose(scaled, [-1, 1, 0, 1, -1], atol=1e-6)


def test_converts_with_side_files(oft_folder, tmp_path, monkeypatch):
    """Converted side files act like the single file, and no pickle remains."""
    source = copy_policy(tmp_path / "libero-oft")
    stats = (oft_folder / "dataset_statistics.json").read_text()
    (source / "dataset_statistics.json").write_text(stats)
    tensors = side_tensors()
    for part in ("action_head", "proprio_projector"):
        (source / f"{part}--150000_checkpoint.pt").write_bytes(b"")

    def read(path):
        part = path.name.split("--")[0]
        names = {k: v for k, v in tensors.items() if k.startswith(f"{part}.")}
        return {k.removeprefix(f"{part}."): v for k, v in names.items()}

    monkeypatch.setattr(sidefiles, "_read", read)
    options = {"actions_per_chunk": 3, "jpeg": 0}
    target = convert(str(source), str(tmp_path / "mlx"), **options)
    monkeypatch.undo()
    assert not list(target.glob("*.pt"))
    config = json.loads((target / "config.json").read_text())
    sizes = {"action_dim": 7, "proprio_dim": 5, "film": False}
    oft = {"chunk": 3, "pictures": 2, "rule": "bounds_q99"}
    assert config["oft"] == oft | sizes
    pictures = {"crop": 0.9, "resize": "lanczos", "jpeg": 0}
    assert config["image_processing"] == pictures
    policy = load(target)
    ours = predict_action(*policy, PICTURES, INSTRUCTION, proprio=STATE)
    reference = predict_action(*load(oft_folder), PICTURES, INSTRUCTION, proprio=STATE)
    np.testing.assert_allclose(ours.values, reference.values, rtol=1e-5, atol=1e-6)


def test_film_conditions_the_towers_on_the_prompt(oft_folder, tmp_path):
    folder = tmp_path / "film"
    folder.mkdir()
    for path in oft_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = dict(mx.load(str(folder / "model.safetensors")))
    for tower, dim in (("featurizer", 48), ("fused_featurizer", 64)):
        for i in range(4):
            name = f"vision_backbone.{tower}.blocks.{i}"
            for part in ("scale", "shift"):
                key = mx.random.key(i)
                weights[f"{name}.{part}.weight"] = mx.random.normal((dim, 96), key=key)
                weights[f"{name}.{part}.bias"] = mx.zeros((dim,))
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    model, processor = load(folder)
    assert model.args.oft.film
    asked = {"proprio": STATE}
    cup = scene_of(processor)
    ours = pipeline.encode(model, cup, ()).tokens
    lid = pipeline.encode(model, scene_of(processor, "close the lid"), ()).tokens
    assert not mx.allclose(ours, lid)
    # The words are <s>, the prompt and </s>.
    words = model.decoder.embed(mx.array([[257, *cup.prompt.segments[1], 258]]))
    mean = mx.broadcast_to(mx.mean(words, axis=1), (2, 96))
    expected = model.vision_backbone(cup.pixels, (), mean).tokens
    assert mx.allclose(ours, expected, rtol=1e-5)
    # x <- x (1 + scale) + shift between attention and MLP, from the mean embedding.
    block = model.vision_backbone.featurizer.blocks[0]
    x = mx.random.normal((1, 6, 48), key=mx.random.key(1))
    language = mx.random.normal((1, 96), key=mx.random.key(2))
    y = x + block.ls1(block.attn(block.norm1(x)))
    y = y * (1 + block.scale(language)) + block.shift(language)
    y = y + block.ls2(block.mlp(block.norm2(y)))
    assert mx.allclose(block(x, language), y, rtol=1e-4, atol=1e-4)
    plain = predict_action(model, processor, PICTURES, INSTRUCTION, **asked)
    policy = Policy(model, processor)
    compiled = policy(PICTURES, INSTRUCTION, STATE)
    np.testing.assert_allclose(plain.values, compiled, rtol=1e-3, atol=1e-3)


def test_film_backbones_come_unwrapped_and_merged(tmp_path, monkeypatch):
    source = copy_policy(tmp_path / "film")
    for part in ("action_head", "vision_backbone"):
        (source / f"{part}--1_checkpoint.pt").write_bytes(b"")
    name = "featurizer.blocks.0.block.attn.qkv"
    rank = 32  # OpenVLA-OFT's, whose alpha is 16
    weight = mx.random.normal((144, 48), key=mx.random.key(0))
    down = mx.random.normal((rank, 48), key=mx.random.key(1))
    up = mx.random.normal((144, rank), key=mx.random.key(2))
    backbone = {
        f"vision_backbone.{name}.base_layer.weight": weight,
        f"vision_backbone.{name}.base_layer.bias": mx.zeros((144,)),
        f"vision_backbone.{name}.lora_A.default.weight": down,
        f"vision_backbone.{name}.lora_B.default.weight": up,
        "vision_backbone.featurizer.blocks.0.scale.weight": mx.zeros((48, 96)),
    }
    monkeypatch.setattr(
        sidefiles,
        "_read",
        lambda path: backbone if "vision" in path.name else {"model.fc2.bias": down},
    )
    found = sidefiles.add_side_files(Checkpoint.open(source))
    merged = found.extra["vision_backbone.featurizer.blocks.0.attn.qkv.weight"]
    assert mx.allclose(merged, weight + 0.5 * up @ down, rtol=1e-5, atol=1e-5)
    assert "vision_backbone.featurizer.blocks.0.scale.weight" in found.tensors
    assert not any("lora" in n or ".block." in n for n in found.tensors)
    # Nothing of the shards' backbone stays beside the one that replaces it.
    assert "vision_backbone.featurizer.cls_token" not in found.tensors


def touch(*names):
    def make(folder):
        for name in names:
            (folder / name).write_bytes(b"not a pickle")

    return make


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ("action_head--1_checkpoint.pt", "action_head--2_checkpoint.pt"),
            "both action_head--1_checkpoint.pt and action_head--2_checkpoint.pt",
        ),
        (("proprio_projector--1_checkpoint.pt",), "but no action_head--"),
        (
            ("action_head--1_checkpoint.pt", "noisy_action_projector--1_checkpoint.pt"),
            "a diffusion policy",
        ),
        (("action_head--1_checkpoint.pt",), "torch is not installed|is refused"),
    ],
)
def test_wrong_side_files_are_named(policy_checkpoint, files, message):
    touch(*files)(policy_checkpoint)
    with pytest.raises(InputError, match=message):
        load(policy_checkpoint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": PICTURES[:1]}, "takes 2 pictures; 1 given"),
        ({"proprio": None}, "give proprio, 5 numbers"),
        ({"proprio": STATE[:3]}, "proprio is 5 numbers .* got 3"),
        ({"proprio": [float("nan")] * 5}, "not finite"),
        ({"proprio": ["a"] * 5}, "no list of 5 numbers"),
    ],
)
def test_observations_that_do_not_fit_are_refused(oft_policy, arguments, message):
    given = {"images": PICTURES, "instruction": INSTRUCTION, "proprio": STATE}
    with pytest.raises(InputError, match=message):
        predict_action(*oft_policy, **(given | arguments))


def test_command_prints_the_chunk(oft_folder, tmp_path, capsys):
    file, overlay = tmp_path / "a.png", tmp_path / "kept.png"
    PICTURE.save(file)
    main(
        [
            *("--model", str(oft_folder), "--image", str(file), "--image", str(file)),
            *("--instruction", INSTRUCTION, "--proprio", *map(str, STATE)),
            *("--method", "trimvla", "--overlay", str(overlay), "--json"),
        ]
    )
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert np.array(record["action"]).shape == (3, 7)
    assert record["token_ids"] is None
    assert record["visual_tokens"] == 128
    assert overlay.exists()


def test_center_crop_is_bilinear_from_corner_to_corner():
    """The crop equals TensorFlow's crop_and_resize and convert_image_dtype."""
    size, side = 9, 0.9  # of the picture's side: 0.81 of its area
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    ours = preprocess_naive([load_image(picture)], size, 0.81)[0]
    for row in range(size):
        for column in range(size):
            y, x = (
                (size - 1) * ((1 - side) / 2 + side * i / (size - 1))
                for i in (row, column)
            )
            top, left = min(int(y), size - 2), min(int(x), size - 2)
            value = 0
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = abs(1 - i - (y - top)) * abs(1 - j - (x - left))
                value = value + weight * (picture[top + i, left + j] / 255.0)
            expected = np.floor(value * 255.5 + 1e-4) / 255
            assert np.abs(ours[row, column] - expected).max() <= 1.01 / 255
            assert np.mean(np.abs(ours[row, column] - expected) > 1e-6) <= 1 / 3


def test_bytes_survive_a_crop_of_nearly_everything():
    picture = np.full((8, 8, 3), 200, np.uint8)
    pixels = preprocess_naive([load_image(picture)], 8, 0.9)
    assert (pixels == np.float32(200) / np.float32(255)).all()
