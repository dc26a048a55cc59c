"""The test bed: its model family, its images, and training on them."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import DATA
from mlx.utils import tree_flatten
from PIL import Image

from mlx_tokprune import InputError, Pruner, generate, load
from mlx_tokprune.checkpoints.family import identify
from mlx_tokprune.evaluate import items as data
from mlx_tokprune.evaluate.__main__ import main as evaluate
from mlx_tokprune.evaluate.accuracy_table import most_common
from mlx_tokprune.evaluate.evaluator import describe_run
from mlx_tokprune.pipeline import Scene, prune_at_tower
from mlx_tokprune.pipeline.planning import plan_for
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.train.__main__ import main as train
from mlx_tokprune.train.packing import Questions, answer_logits, answer_losses
from recipes.testbed import (
    assemble,
    family,  # noqa: F401  (registers the family)
    prepare,
    resnet,
    resnet_vlm,
    scenes,
    things,
)
from recipes.testbed import questions as testbed_questions

TEXT = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    **{"rope_theta": 1e5, "tie_word_embeddings": True},
}


@pytest.fixture(autouse=True, scope="module")
def _narrow():
    """Reduce ResNet-50 to a few blocks."""
    before = resnet.STAGES, resnet_vlm.STAGES
    resnet.STAGES = resnet_vlm.STAGES = (1, 1, 2, 1)
    yield
    resnet.STAGES, resnet_vlm.STAGES = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a tiny random checkpoint with the tiny FastVLM's tokenizer."""
    made = tmp_path_factory.mktemp("testbed") / "checkpoint"
    made.mkdir()
    tokenizer = DATA / "fastvlm-tiny"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made / name).write_bytes((tokenizer / name).read_bytes())
    size = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    config = {
        "model_type": "resnet_vlm",
        "text_config": {**TEXT, "vocab_size": size},
        "vision_config": {"image_size": 128},
    }
    (made / "config.json").write_text(json.dumps(config))
    mx.random.seed(3)
    model = resnet_vlm.ResNetVLM(resnet_vlm.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    for name, array in weights.items():
        if ".stages." in name and array.ndim == 4:
            fan_in = array.shape[1] * array.shape[2] * array.shape[3]
            weights[name] = mx.random.normal(array.shape) * fan_in**-0.5
    mx.save_safetensors(str(made / "model.safetensors"), weights)
    return made


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    return Image.fromarray(pixels)


# The family -------------------------------------------------------------------------


def _convolve(x, kernel, bias, stride, padding):
    """Convolve (H, W, C) in NumPy, tap by tap."""
    x = np.pad(x, ((padding,) * 2, (padding,) * 2, (0, 0)))
    size = kernel.shape[1]
    rows = (x.shape[0] - size) // stride + 1
    columns = (x.shape[1] - size) // stride + 1
    found = np.zeros((rows, columns, kernel.shape[0])) + bias
    for down in range(size):
        for right in range(size):
            part = x[down::stride, right::stride][:rows, :columns]
            found += part @ kernel[:, down, right].T
    return found


def test_the_tower_is_resnet_by_numpy(loaded):
    tower = loaded[0].vision_tower
    w = {n: np.array(a, np.float64) for n, a in tree_flatten(tower.parameters())}
    pixels = np.random.default_rng(1).random((64, 64, 3))

    def convolve(x, name, stride=1, padding=0):
        return _convolve(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding)

    x = pixels[..., ::-1] * 255 - np.array([103.939, 116.779, 123.68])
    x = np.pad(np.maximum(convolve(x, "stem", 2, 3), 0), ((1, 1), (1, 1), (0, 0)))
    side = (x.shape[0] - 3) // 2 + 1
    taps = [
        x[i : i + 2 * side : 2, j : j + 2 * side : 2]
        for i in range(3)
        for j in range(3)
    ]
    x = np.max([tap[:side, :side] for tap in taps], axis=0)
    for stage, depth in enumerate(resnet.STAGES):
        for place in range(depth):
            name, stride = f"stages.{stage}.{place}", 1 + (stage > 0 and place == 0)
            inner = np.maximum(convolve(x, f"{name}.reduce", stride), 0)
            inner = np.maximum(convolve(inner, f"{name}.spatial", padding=1), 0)
            beside = x if place else convolve(x, f"{name}.shortcut", stride)
            x = np.maximum(convolve(inner, f"{name}.expand") + beside, 0)
    found = np.array(tower(mx.array(pixels[None], mx.float32)))[0]
    np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-3 * np.abs(x).max())


def test_tokens_know_their_places_and_keep_their_order_of_norms(loaded, picture):
    model, processor = loaded
    features = model.encode(mx.array(processor.pixels([picture])))
    assert features.grid == (4, 4)
    assert features.tokens.shape == (1, 16, model.feature_size)
    where = features.tokens[0, :, resnet.CHANNELS :]
    lengths = mx.linalg.norm(where, axis=-1)
    assert mx.allclose(lengths, lengths[0], rtol=1e-5)
    assert len({tuple(row) for row in np.array(where).round(4).tolist()}) == 16


def test_pruned_is_masked(loaded, picture):
    """Logits of pruned tokens at original positions equal masking the others."""
    model, processor = loaded
    features = model.encode(mx.array(processor.pixels([picture])))
    ids = mx.random.randint(0, 60, (1, 1, 7))
    questions = Questions(ids, mx.zeros_like(ids))
    scene = Scene(None, Prompt(((), ())))

    def logits(pruner, gate=None):
        visual = prune_at_tower(model, scene, plan_for(model, pruner), features)
        seen = (visual.embeddings, visual.indices, questions, 16, "original", gate)
        return answer_logits(model, [1, 2], *seen), visual

    found, visual = logits(Pruner("norm", 0.25))
    kept = mx.put_along_axis(mx.zeros((1, 16)), visual.indices, mx.array(1.0), axis=1)
    expected, _ = logits(Pruner("none"), mx.where(kept > 0, 0.0, -1e9))
    other, _ = logits(Pruner("none"))
    assert mx.allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert not mx.allclose(found, other, rtol=1e-3, atol=1e-4)


def test_methods_that_need_attention_are_refused_at_a_convolution(loaded, picture):
    with pytest.raises(InputError, match="attention"):
        generate(*loaded, [picture], "What?", pruner=Pruner("attention", 0.5))


def test_it_is_told_from_other_families_and_converts(folder, tmp_path):
    from mlx_tokprune.checkpoints.shards import Checkpoint
    from mlx_tokprune.convert import convert

    assert identify(Checkpoint.open(folder))[0].name == "ResNet-VLM"
    quantized = {"quantize": True, "q_bits": 8, "q_group_size": 32}
    model, _ = load(convert(folder, tmp_path / "q8", **quantized))
    assert hasattr(model.language_model.model.layers[0].mlp.up_proj, "scales")


def test_an_impossible_picture_size_is_refused():
    config = {"text_config": {**TEXT, "vocab_size": 64}}
    config["vision_config"] = {"image_size": 100}
    with pytest.raises(InputError, match="a multiple of 32"):
        resnet_vlm.ModelArgs.from_dict(config)


def test_rotated_numbers_of_gguf_come_apart():
    """Reordered GGUF rows under the plain rotation give the same products."""
    matrix, x = mx.random.normal((16, 6)), mx.random.normal((1, 5, 6))

    def turned(weights, traditional):
        heads = (x @ weights.T).reshape(1, 5, 2, 8).swapaxes(1, 2)
        how = {"traditional": traditional, "base": 1e4, "scale": 1.0, "offset": 3}
        return mx.fast.rope(heads, 8, **how)

    pairs, halves = (
        turned(matrix, True),
        turned(assemble._halves_apart(matrix, 2), False),
    )
    assert mx.allclose(pairs @ pairs.swapaxes(-1, -2), halves @ halves.swapaxes(-1, -2))


# Pictures ---------------------------------------------------------------------------


def _square(colour, size=40) -> Image.Image:
    return Image.new("RGBA", (size, size), (*colour, 255))


@pytest.fixture
def stocked(tmp_path, monkeypatch):
    """Write two plain things of every kind, and one background, for each split."""
    colours = {"red": (220, 10, 10), "blue": (10, 20, 230)}
    for split in things.SPLITS:
        for kind in things.KINDS:
            target = tmp_path / "testbed" / things.FOLDER / split / kind
            target.mkdir(parents=True)
            for name, colour in colours.items():
                _square(colour).save(target / f"{name}.png")
        Image.new("RGB", (300, 200), (90, 90, 90)).save(target.parent / "grey.jpg")
    monkeypatch.setenv("MLX_TOKPRUNE_CACHE", str(tmp_path))
    things.stock.cache_clear()
    yield
    things.stock.cache_clear()


def questions_of(split, pictures, folder) -> str:
    """Write questions of a split with the recipe; return the file of their lines."""
    output = str(folder / f"{split}-{pictures}")
    asked = ["--split", split, "--pictures", str(pictures), "--output", output]
    testbed_questions.main(asked)
    return f"{output}/questions.jsonl"


def test_written_questions_are_those_of_the_scenes(stocked, tmp_path):
    """Pictures and fields come back as drawn; splits have their own seeds."""
    file = questions_of("test", 2, tmp_path)
    items = data.read_questions(file, 1, None).items
    rng = np.random.default_rng((12, 0))
    scene = scenes.sample_scene(rng, "test")
    drawn = scenes.ask(rng, scene)
    first = [item for item in items if item.picture == items[0].picture]
    assert [item.question for item in first] == [q.prompt for q in drawn]
    assert [item.answers for item in first] == [(q.answer,) for q in drawn]
    assert [item.needed for item in first] == [scenes.covered(q.needed) for q in drawn]
    assert np.array_equal(items[0].load(), scene.draw())
    train_file = questions_of("train", 2, tmp_path)
    other = data.read_questions(train_file, 1, None).items
    assert not np.array_equal(other[0].load(), items[0].load())


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        *(((230, 20, 20), "red"), ((250, 220, 30), "yellow"), ((20, 180, 40), "green")),
        *(((30, 40, 220), "blue"), ((250, 140, 20), "orange"), ((10, 10, 12), "black")),
        *(
            ((250, 250, 250), "white"),
            ((120, 122, 121), "grey"),
            ((110, 70, 40), "brown"),
        ),
    ],
)
def test_colours_have_the_names_that_people_give_them(colour, name):
    assert things.colour_of(_square(colour)) == name
    assert name in things.COLOURS


def test_a_thing_of_two_colours_has_none():
    picture = _square((230, 20, 20))
    picture.paste((30, 40, 220, 255), (0, 0, 40, 20))
    assert things.colour_of(picture) is None


def test_scenes_and_questions_come_from_the_seed(stocked):
    def made(seed):
        rng = np.random.default_rng(seed)
        scene = scenes.sample_scene(rng, "test")
        asked = [(q.prompt, q.answer) for q in scenes.ask(rng, scene)]
        return np.asarray(scene.draw()), asked

    one, other, again = made(1), made(2), made(1)
    assert np.array_equal(one[0], again[0])
    assert one[1] == again[1]
    assert not np.array_equal(one[0], other[0])


def test_answers_are_what_is_drawn(stocked):
    """Answers of 60 scenes agree with the placed things."""
    kinds, names = set(), set(things.KINDS)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scene = scenes.sample_scene(rng, "test")
        there = {one.thing.kind: divmod(one.cell, 3) for one in scene.placed}
        for asked in scenes.ask(rng, scene):
            kinds.add(asked.kind)
            assert asked.prompt in scenes.QUESTIONS
            assert asked.answer in scenes.ANSWERS
            words = asked.prompt.strip("?").split()
            if asked.kind == "count":
                numbers = ("one", "two", "three", "four", "five", "six")
                assert asked.answer == numbers[len(there) - 1]
            elif asked.kind == "exists":
                assert (words[-1] in there) == (asked.answer == "yes")
                assert words[-1] in names
            elif asked.kind == "colour":
                (one,) = (p for p in scene.placed if p.thing.kind == words[-1])
                assert asked.answer == one.thing.name
            elif asked.kind == "beside":
                row, column = there[words[-1]]
                down = {"above": -1, "below": 1}.get(words[2], 0)
                right = {"left": -1, "right": 1}.get(words[2], 0)
                assert there[asked.answer] == (row + down, column + right)
            else:
                row, column = there[asked.answer]
                if "centre" in words:
                    assert (row, column) == (1, 1)
                assert ("top" in words, "bottom" in words) == (row == 0, row == 2)
                assert ("left" in words, "right" in words) == (column == 0, column == 2)
    assert kinds == {"what", "count", "beside", "exists", "colour"}


def test_needed_tokens_are_those_that_a_thing_covers(stocked):
    """The needed tokens are those whose pixels the thing changes."""
    rng = np.random.default_rng(4)
    scene = scenes.sample_scene(rng, "test")
    empty = np.asarray(scenes.Scene(scene.background, ()).draw(), int)
    for one in scene.placed:
        alone = np.asarray(scenes.Scene(scene.background, (one,)).draw(), int)
        changed = (np.abs(alone - empty).max(-1) > 20).reshape(16, 32, 16, 32)
        share = changed.mean((1, 3)).reshape(-1)
        found = scenes.covered((one,))
        assert set(np.flatnonzero(share > 0.3)) <= set(found)
        assert set(found) <= set(np.flatnonzero(share > 0.1))


def test_things_of_the_test_are_no_others_than_named():
    kinds = [kind.name for kind in prepare.KINDS]
    assert tuple(kinds) == things.KINDS
    assert len(set(kinds)) == len(kinds) == 16
    stamp = prepare.PurePosixPath
    (ball,) = (kind for kind in prepare.KINDS if kind.name == "ball")
    assert ball.has(stamp("sports/soccerball.png"))
    assert not ball.has(stamp("sports/cartoon/volleyball.png"))
    assert not ball.has(stamp("sports/tennisracket.png"))


# Evaluating -------------------------------------------------------------------------


def test_evaluate_says_what_is_kept_of_what_is_needed(
    stocked, folder, tmp_path, monkeypatch, capsys
):
    """The reported share of needed tokens equals that of the pruner's choice."""
    monkeypatch.setattr(scenes, "covered", lambda placed: (0, 5, 15))
    file = tmp_path / "result.json"
    asked = ["--model", str(folder), "--data", questions_of("test", 2, tmp_path)]
    how = ["--methods", "uniform", "--keep-ratios", "0.5", "--max-tokens", "2"]
    evaluate([*asked, *how, "--output", str(file)])
    rows = {row["label"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["none"]["needed"]["all"]["value"] == 1
    model, _ = load(folder)
    features = model.encode(mx.zeros((1, 128, 128, 3)))
    kept = set(np.array(Pruner("uniform", 0.5)(features).indices)[0].tolist())
    expected = len(kept & {0, 5, 15}) / 3
    assert rows["uniform 0.5"]["needed"]["all"]["value"] == pytest.approx(expected)
    assert "needed tokens kept, %" in capsys.readouterr().out


def test_lines_of_json_can_say_what_is_needed(tmp_path, picture):
    picture.save(tmp_path / "p.png")
    lines = [
        {"image": "p.png", "question": "What?", "answer": "x", "needed": [3, 1]},
        {"image": "p.png", "question": "Who?", "answer": "x", "needed": ["a"]},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    found = data.read_questions(str(file), 1, None)
    assert [item.needed for item in found.items] == [(3, 1)]
    assert "needed is ['a']" in found.skipped[0][1]


def test_blind_questions_have_black_pictures_and_the_same_answers(tmp_path, picture):
    picture.save(tmp_path / "p.png")
    item = data.Item(str(tmp_path / "p.png"), "What?", ("x",), "kind")
    (blind,) = data.blinded(data.Questions((item,))).items
    assert blind.load().size == picture.size
    assert not np.asarray(blind.load()).any()
    assert (blind.question, blind.answers) == (item.question, item.answers)


def test_a_blind_run_does_not_go_on_from_one_that_sees(loaded):
    items = data.read_questions("demo", 1, None).items
    blind = data.blinded(data.Questions(items)).items
    seen, unseen = (describe_run(loaded[0], some, ()) for some in (items, blind))
    assert seen["questions"] != unseen["questions"]


def test_the_most_common_answer_of_each_kind():
    given = [("a", "x"), ("a", "x"), ("a", "y"), ("b", "z"), ("b", "w")]
    items = [data.Item("p", "?", (answer,), kind) for kind, answer in given]
    assert most_common(items) == pytest.approx(3 / 5)
    assert most_common([data.Item("p", "?")]) is None


# Learning ---------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["adaptive", "asking"])
def test_a_scorer_learns_from_pictures_of_the_training(
    stocked, folder, tmp_path, scorer
):
    """The command trains a scorer on the recipe's questions."""
    data = questions_of("train", 2, tmp_path)
    asked = ["prune", "--model", str(folder), "--data", data]
    asked += ["--scorer", scorer, "--imitate", "1", "--steps", "1", "--batch", "2"]
    train([*asked, "--questions", "2", "--output", str(tmp_path / "scorer")])
    assert Pruner(str(tmp_path / "scorer"), 0.25).scorer is not None


def test_a_projector_is_trained_beside_the_adapter(stocked, folder, tmp_path):
    adapter, fused = tmp_path / "adapter", tmp_path / "fused"
    data = questions_of("train", 4, tmp_path)
    asked = ["lora", "--model", str(folder), "--data", data]
    asked += ["--method", "none", "--keep-ratio", "1", "--projector", "--rank", "2"]
    asked += ["--steps", "3", "--batch", "2", "--questions", "2"]
    train([*asked, "--learning-rate", "0.01", "--output", str(adapter)])
    before, after = load(folder)[0], load(folder, adapter_path=adapter)[0]
    moved = mx.abs(after.mm_projector[0].weight - before.mm_projector[0].weight)
    assert mx.max(moved).item() > 1e-3
    asked = ["fuse", "--model", str(folder), "--adapter-path", str(adapter)]
    train([*asked, "--output", str(fused)])
    merged, x = load(fused)[0], mx.random.normal((1, 3, after.feature_size))
    assert mx.allclose(merged.project(x), after.project(x), rtol=1e-5)
    ids = mx.array([[3, 5, 7]])
    assert mx.allclose(merged(ids), after(ids), rtol=1e-4, atol=1e-5)
    assert not mx.allclose(merged(ids), before(ids), rtol=1e-4, atol=1e-5)


def test_a_projector_that_does_not_fit_is_refused(stocked, folder, tmp_path):
    adapter = tmp_path / "adapter"
    data = questions_of("train", 2, tmp_path)
    asked = ["lora", "--model", str(folder), "--data", data]
    asked += ["--method", "none", "--keep-ratio", "1", "--projector", "--steps", "1"]
    train([*asked, "--batch", "1", "--questions", "1", "--output", str(adapter)])
    mx.save_safetensors(
        str(adapter / "projector.safetensors"),
        {"mm_projector.0.weight": mx.zeros((2, 2))},
    )
    with pytest.raises(InputError, match="the projector of the adapter"):
        load(folder, adapter_path=adapter)
    (adapter / "projector.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="is truncated"):
        load(folder, adapter_path=adapter)


def test_torch_learns_from_the_same_loss(stocked, folder, tmp_path, monkeypatch):
    """The loss of `recipes/testbed/in_torch.py` with an adapter equals MLX's."""
    torch = pytest.importorskip("torch", reason="torch is in the parity extra")
    from safetensors.torch import load_file

    from recipes.testbed import in_torch as learn

    words = learn.Words.of(load(folder)[1])
    config = json.loads((folder / "config.json").read_text())
    weights = {n: w.float() for n, w in load_file(folder / "model.safetensors").items()}
    torch.manual_seed(0)
    trainee = learn.Trainee(weights, config, 2, 1.5)
    for parameter in trainee.adapter.values():
        torch.nn.init.normal_(parameter, std=0.1)
    trainee.save(tmp_path / "adapter")
    model, _ = load(folder, adapter_path=tmp_path / "adapter")
    features = model.encode(mx.random.uniform(shape=(2, 128, 128, 3)))
    pairs = [(scenes.QUESTIONS[n], scenes.ANSWERS[n]) for n in (0, 9, 30)]
    rows = [words.rows(pairs), words.rows(pairs[::-1])]
    ids, targets = (np.stack([row[part] for row in rows]) for part in (0, 1))
    with torch.no_grad():
        given = torch.tensor(np.array(features.tokens))
        asked = (torch.tensor(ids), torch.tensor(targets))
        found = trainee(given, torch.tensor(words.prefix), *asked).item()
    questions = Questions(mx.array(ids, mx.int32), mx.array(targets, mx.int32))
    scene = Scene(None, Prompt(((),) * 3))
    visual = prune_at_tower(model, scene, plan_for(model, Pruner("none")), features)
    seen = (visual.embeddings, visual.indices, questions, features.total)
    losses, used = answer_losses(answer_logits(model, words.prefix, *seen), questions)
    expected = (mx.sum(losses * used) / mx.sum(used)).item()
    assert found == pytest.approx(expected, rel=2e-3)
