"""Evaluation: answers, accuracies and divergences equal those computed by hand."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, TINY_POLICY
from PIL import Image

from mlx_tokprune import generate, predict_action, stream_generate
from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME
from mlx_tokprune.errors import InputError
from mlx_tokprune.evaluate import items as data
from mlx_tokprune.evaluate import read_result
from mlx_tokprune.evaluate.__main__ import main
from mlx_tokprune.evaluate.evaluator import Answer, Evaluator
from mlx_tokprune.evaluate.judge_actions import accuracy as action_accuracy
from mlx_tokprune.evaluate.judge_words import accuracy
from mlx_tokprune.evaluate.own_runtime import OwnRuntime
from mlx_tokprune.generate.settings import Settings
from mlx_tokprune.measure.results import Row, make_rows
from mlx_tokprune.measure.subject import Request, StageCosts, subject_of
from mlx_tokprune.pipeline import run
from mlx_tokprune.pruners import Counts, Pruner, as_plan
from recipes.policy import __main__ as policy_recipe
from recipes.policy import worlds

QUESTION = "What does the sign say?"


# Questions --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for picture in PICTURES:
        shutil.copy(picture.path, tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def write_lines(folder, *lines) -> str:
    file = folder / "questions.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts) + "\n")
    return str(file)


def ask(image="scene_0.png", question=QUESTION, **more) -> dict:
    return {"image": image, "question": question, **more}


def test_bad_lines_are_skipped_with_their_numbers(folder):
    source = write_lines(
        folder,
        ask(answer="EAST"),
        "{",
        ask(image="nowhere.png"),
        "",
        ask(answer="EAST"),
        ask(image="broken.png"),
        [1],
        ask(question=""),
        ask(question=5),
        ask(question="How many?", answer={"a": 1}),
        ask(question="How many?", answer=[True]),
        ask(question="Which?", kind=3),
        ask(question="How many?", answer=["2", 2], kind="count"),
    )
    found = data.read_questions(source, 1, None)
    assert [item.question for item in found.items] == [QUESTION, "How many?"]
    assert found.items[1].answers == ("2", "2")
    reasons = dict(found.skipped)
    assert list(reasons) == [2, 3, 5, 6, 7, 8, 9, 10, 11, 12]
    assert "repeats the question of line 1" in reasons[5]
    assert "does not exist" in reasons[3]
    assert "expected a text" in reasons[12]


def test_questions_about_a_picture_come_together(folder):
    source = write_lines(
        folder,
        ask("scene_1.png"),
        ask("scene_0.png"),
        ask("scene_1.png", "Why?"),
    )
    items = data.read_questions(source, 1, None).items
    names = [item.picture[-11:] for item in items]
    assert names == ["scene_1.png", "scene_1.png", "scene_0.png"]


def test_a_folder_of_pictures(folder):
    found = data.read_questions(str(folder), 1, "Who?")
    assert [item.question for item in found.items] == ["Who?"] * 2
    assert len(found.skipped) == 1
    assert not found.items[0].answers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: "nowhere", "does not exist"),
        (lambda f: write_lines(f, "{"), "no question that can be asked .line 1"),
        (lambda f: str(f / "empty"), "has no pictures"),
    ],
)
def test_nothing_to_ask_is_refused(folder, make, message):
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        data.read_questions(make(folder), 1, None)


# Measuring --------------------------------------------------------------------------


ROWS = make_rows(["norm", "similarity", "uniform"], [0.5, 0.11])


def evaluator_of(loaded, rows=ROWS, positions="original", most=8, **cache) -> Evaluator:
    settings = Settings(positions, most, **cache)
    return Evaluator(OwnRuntime(subject_of("it", *loaded), rows, settings), rows)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_answers_are_those_of_generate(demo, positions):
    evaluator = evaluator_of(demo, positions=positions)
    for picture in PICTURES:
        item = data.Item(str(picture.path), picture.question, (picture.answer,))
        records = evaluator.ask(item)
        for row in ROWS:
            asked = ([picture.path], picture.question)
            how = {"pruner": row.pruners, "positions": positions, "max_tokens": 8}
            alone = generate(*demo, *asked, **how)
            record = records[row.label]
            assert record["answer"] == alone
            assert record["accuracy"] == accuracy(alone, [picture.answer])
            same = alone == records["none"]["answer"]
            assert record["agrees"] == same


def test_answers_of_a_quantized_cache_are_those_of_generate(demo, monkeypatch):
    cache = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}
    evaluator, read = evaluator_of(demo, **cache), []
    follow = type(evaluator.runtime.model.decoder).follow

    def watched(decoder, ids, layers):
        read.extend(type(layer.inner).__name__ for layer in layers)
        return follow(decoder, ids, layers)

    monkeypatch.setattr(type(evaluator.runtime.model.decoder), "follow", watched)
    item = data.Item(str(PICTURES[0].path), PICTURES[0].question)
    records = evaluator.ask(item)
    assert set(read) == {"QuantizedKVCache"}
    for row in ROWS:
        how = {"pruner": row.pruners, "max_tokens": 8}
        alone = generate(*demo, [item.picture], item.question, **how, **cache)
        assert records[row.label]["answer"] == alone


def decoded(evaluator, item, plan, ids) -> mx.array:
    """Return the logits of each of `ids`, decoded one by one with a cache."""
    model = evaluator.runtime.model
    scene = evaluator.runtime.subject.scene([item.load()], item.question)
    read, _ = run(model, scene, plan, cache=model.decoder.make_cache())
    found = [model.decoder.logits(read.hidden)[0, -1]]
    for token in ids[:-1]:
        logits = model(mx.array([[token]]), cache=read.cache)
        found.append(logits[0, -1])
    return mx.stack(found)


def test_divergence_is_that_of_the_distributions(demo):
    """The divergence equals the KL of step-by-step distributions in NumPy."""
    evaluator = evaluator_of(demo)
    item = data.Item(str(PICTURES[0].path), PICTURES[0].question)
    records = evaluator.ask(item)
    assert records["none"]["divergence"] == 0
    asked = (*demo, [PICTURES[0].path], item.question)
    ids = [piece.token for piece in stream_generate(*asked, max_tokens=8)]

    def distributions(plan):
        rows = np.array(decoded(evaluator, item, plan, ids), np.float64)
        shares = np.exp(rows - rows.max(-1, keepdims=True))
        return shares / shares.sum(-1, keepdims=True)

    wanted = distributions(())
    for row in ROWS[1:]:
        other = distributions(as_plan(row.pruners))
        expected = (wanted * np.log(wanted / other)).sum(-1).mean()
        found = records[row.label]["divergence"]
        assert found == pytest.approx(expected, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("same", [0, 2, 3])
def test_told_answers_are_those_of_decoding(tiny, same):
    """Log-probabilities of a forced answer equal decoding; own ids are greedy."""
    pruner, picture = Pruner("norm", 0.25), str(TINY / "image_0.png")
    evaluator = evaluator_of(tiny, make_rows(["norm"], [0.25]), most=4)
    item = data.Item(picture, "Hi")
    how = {"pruner": pruner, "max_tokens": 4}
    own = [p.token for p in stream_generate(*tiny, [picture], "Hi", **how)]
    assert len(own) == 4
    told = [*own[:same], *[(token + 1) % 64 for token in own[same:]]]
    evaluator.runtime.begin(item)
    unpruned = Answer(told, mx.zeros((4, 64)))
    found = evaluator.runtime.answer(evaluator.rows[1], item, unpruned)
    assert found.ids == own
    expected = decoded(evaluator, item, as_plan(pruner), told)
    expected = expected - mx.logsumexp(expected, axis=-1, keepdims=True)
    assert mx.allclose(found.logs, expected, rtol=1e-3, atol=1e-4)


def test_a_picture_is_encoded_once(demo, monkeypatch):
    model, _ = demo
    evaluator = evaluator_of(demo, most=4)
    encoded = []
    encode = type(model).encode
    monkeypatch.setattr(
        type(model), "encode", lambda *args: encoded.append(1) or encode(*args)
    )
    # Counting FLOPs traces the tower, which computes nothing.
    none = StageCosts({}, 0, Counts(64, 64, 64, 64, 64))
    monkeypatch.setattr(
        type(evaluator.runtime.subject), "count_shapes", lambda *_: none
    )
    for question in ("What?", "Where?"):
        evaluator.ask(data.Item(str(PICTURES[0].path), question))
    assert len(encoded) == 1


def test_accuracies_are_those_of_generated_answers(demo):
    """Accuracies with shared features equal those of separate `generate` calls."""
    questions = data.read_questions("demo", 6, None).items
    pruners = [Pruner("none"), Pruner("norm", 0.11), Pruner("random", 0.25)]
    evaluator = evaluator_of(demo, [Row(p.method, (p,)) for p in pruners])
    right = dict.fromkeys((p.method for p in pruners), 0)
    for item in questions:
        records = evaluator.ask(item)
        for pruner in pruners:
            answer = generate(*demo, [item.load()], item.question, pruner=pruner)
            score = accuracy(answer, item.answers)
            assert records[pruner.method]["accuracy"] == score
            right[pruner.method] += score
    assert right["none"] > right["random"]


def test_budgets_in_tokens():
    rows = make_rows(["norm"], [], [8, 16])
    assert [row.label for row in rows] == ["none", "norm 8 tokens", "norm 16 tokens"]


# Policies ---------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_actions_are_those_of_predict_action(tiny_policy, positions):
    rows = make_rows(["norm", "trimvla", "attention"], [0.5, 0.1])
    evaluator = evaluator_of(tiny_policy, rows, positions)
    picture, told = str(TINY_POLICY / "image_0.png"), "pick up the cup"
    plain = predict_action(*tiny_policy, [picture], told)
    right = " ".join(f"{value:.6f}" for value in plain.normalized)
    records = evaluator.ask(data.Item(picture, told, (right,)))
    assert records["none"]["accuracy"] == 1
    for row in rows:
        how = {"pruner": row.pruners, "positions": positions}
        action = predict_action(*tiny_policy, [picture], told, **how)
        shown = " ".join(f"{value:+.3f}" for value in action.normalized)
        record = records[row.label]
        assert record["answer"] == shown
        assert record["agrees"] == (action.token_ids == plain.token_ids)
        near = np.abs(action.normalized - plain.normalized) <= 0.1
        assert record["accuracy"] == pytest.approx(near.mean(), abs=1e-6)
        assert (record["divergence"] > 0) == (row.label != "none")


@pytest.fixture
def still_worlds(monkeypatch):
    """Replace the worlds by worlds that need no simulator."""

    class Still:
        def __init__(self, name):
            self.name = name

        def reset(self, seed):
            self.seed = seed

        def frame(self):
            return np.full((112, 112, 3), self.seed % 250, np.uint8)

        def expert(self):
            return np.array([0.1, 0.2, 0.3, 1.0])

        def step(self, action):
            return False

    monkeypatch.setattr(worlds, "World", Still)
    monkeypatch.setattr(policy_recipe, "import_simulator", lambda: None)


def test_policies_are_asked_about_meta_world(tmp_path, still_worlds, capsys):
    output, frames = tmp_path / "e.json", tmp_path / "frames"
    policy_recipe.main(["frames", "--pictures", "10", "--output", str(frames)])
    options = ["--model", "demo-policy", "--data", str(frames / "questions.jsonl")]
    options += ["--keep-ratios", "0.5", "--methods", "trimvla"]
    main([*options, "--output", str(output)])
    assert "| trimvla 0.5 | 32 |" in capsys.readouterr().out
    result = read_result(output)
    assert not result["skipped"]
    kinds = set(result["rows"][0]["accuracy"])
    assert kinds == {"all", *worlds.TASKS}
    assert result["answers"][9]["picture"] != result["answers"][0]["picture"]


def test_methods_that_count_for_themselves(tmp_path, capsys, demo_policy):
    """Methods with an own count keep as many tokens as in `predict_action`."""
    source = write_lines(tmp_path, ask(str(POLICY_FRAME.path), POLICY_FRAME.question))
    output = tmp_path / "e.json"
    options = ["--model", "demo-policy", "--data", source, "--output", str(output)]
    options += ["--methods", "lightvla", "trimvla", "--option", "coverage=0.3"]
    main([*options, "--option", "min_keep_ratio=0.02"])
    asked = (*demo_policy, [POLICY_FRAME.path], POLICY_FRAME.question)
    own = {"coverage": 0.3, "min_keep_ratio": 0.02}
    shown, result = capsys.readouterr().out, read_result(output)
    assert len(result["rows"]) == 3
    for pruner in (Pruner("lightvla"), Pruner("trimvla", options=own)):
        label, row = f"{pruner.method} own count", result["run"]["rows"]
        action = predict_action(*asked, pruner=pruner)
        assert 0 < action.visual.keep < 64
        assert f"| {label} | {action.visual.keep} |" in shown
        given = " ".join(f"{value:+.3f}" for value in action.normalized)
        assert result["answers"][0]["given"][label] == given
        (described,) = [r["pruner"] for r in row if r["label"] == label]
        assert described["options"] == dict(pruner.options)


@pytest.mark.parametrize(("answer", "message"), [("x", "no action"), ("0 1", "has 2")])
def test_answers_that_are_no_actions_are_refused(answer, message):
    with pytest.raises(InputError, match=message):
        action_accuracy(np.zeros(4), [answer])


# The command ------------------------------------------------------------------------


def test_the_command_writes_rows_and_answers(folder, capsys):
    source = write_lines(folder, ask(answer="EAST"), "{", ask("scene_1.png", "Why?"))
    output, plot = folder / "e.json", folder / "e.png"
    options = ["--data", source, "--methods", "norm", "--keep-ratios", "1", "0.5"]
    main([*options, "--output", str(output), "--plot", str(plot)])
    out = capsys.readouterr().out
    assert "skipped line 2: no JSON" in out
    assert "| norm 0.5 | 32 |" in out
    result = read_result(output)
    none, norm = result["rows"]
    assert none["accuracy"]["all"] == pytest.approx(
        {"value": 1, "low": 0.2065, "high": 1, "n": 1}, abs=1e-3
    )
    assert norm["flops"] < none["flops"]
    assert result["answers"][0]["given"]["none"] == "EAST"
    with Image.open(plot) as picture:
        assert picture.width > 400


def test_pictures_without_answers_are_compared_with_the_unpruned(folder, capsys):
    options = ["--data", str(folder), "--methods", "norm", "--eval-budgets", "8"]
    main([*options, "--output", str(folder / "e.json")])
    shown = capsys.readouterr().out
    head = next(line for line in shown.splitlines() if line.startswith("| method"))
    assert "agreement" in head
    assert "accuracy" not in head
    assert "| norm 8 tokens | 8 |" in shown


def test_more_tokens_than_there_are_mean_all(folder, capsys):
    """Budgets above the token count keep all tokens, with one warning."""
    (folder / "broken.png").unlink()
    output = folder / "e.json"
    options = ["--data", str(folder), "--methods", "norm", "uniform"]
    options += ["--eval-budgets", "8", "65", "500", "--max-tokens", "2"]
    main([*options, "--output", str(output)])
    shown = capsys.readouterr().out
    assert (
        shown.count("65, 500 visual tokens are more than the 64, so all are kept") == 1
    )
    assert shown.count("so all are kept") == 1
    result = read_result(output)
    assert [(row["label"], row["kept"]) for row in result["rows"]] == [
        ("none", 64),
        ("norm 8 tokens", 8),
        ("norm 64 tokens", 64),
        ("uniform 8 tokens", 8),
        ("uniform 64 tokens", 64),
    ]
    assert result["rows"][2]["agreement"]["all"]["value"] == 1


def test_the_least_picture_says_how_many_tokens_there_are(tmp_path, capsys):
    """The image with the fewest tokens limits the budget without padding."""
    for height in (512, 256):
        picture = Image.new("RGB", (512, height), "green")
        picture.save(tmp_path / f"{height}.png")
    options = ["--data", str(tmp_path), "--padding", "skip", "--methods", "norm"]
    options += ["--eval-budgets", "40", "--max-tokens", "2"]
    main([*options, "--output", str(tmp_path / "e.json")])
    shown = capsys.readouterr().out
    assert "40 visual tokens are more than the 32, so all are kept" in shown
    assert "| norm 32 tokens | 32 |" in shown


def test_flops_are_those_of_each_question(demo, folder):
    picture, questions = str(PICTURES[0].path), ("Why?", "Why, of all there is? " * 9)
    evaluator = evaluator_of(demo, ROWS[:2], most=1)
    flops = []
    for question in questions:
        record = evaluator.ask(data.Item(picture, question))["norm 0.5"]
        asked = ([data.Item(picture, question).load()], question)
        plan = as_plan(ROWS[1].pruners)
        counted = evaluator.runtime.subject.count(Request(*asked, plan, "original"))
        assert record["flops"] == counted.flops
        flops.append(record["flops"])
    assert flops[1] > 1.1 * flops[0]
    source = write_lines(folder, *(ask(picture, question) for question in questions))
    options = ["--data", source, "--methods", "norm", "--keep-ratios", "0.5"]
    options += ["--max-tokens", "1", "--output", str(folder / "e.json")]
    main(options)
    row = read_result(folder / "e.json")["rows"][1]
    assert row["flops"] == sum(flops) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-ratios", "0"], "keep ratio 0 is outside"),
        (["--methods", "nrm"], "Did you mean 'norm'?"),
        (["--methods", "learned"], "chooses by a scorer"),
        (["--option", "coverage=0.3"], "has an option 'coverage'"),
        (["--data", "nowhere"], "does not exist"),
        (["--pictures", "0"], "whole numbers from 1"),
        (["--output", "nowhere/e.json"], "which does not exist"),
        (["--model", str(TINY_POLICY), "--pictures", "1"], "is no action"),
        (["--model", "nowhere", "--pictures", "1"], "does not exist"),
        (["--model", "nowhere", "--workers", "2", "--pictures", "1"], "does not exist"),
        (["--eval-budgets", "0"], "from 1"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_tiny_model_can_be_asked(tiny):
    evaluator = evaluator_of(tiny, ROWS[:2], most=3)
    records = evaluator.ask(data.Item(str(TINY / "image_0.png"), "Hi", ("x",)))
    assert records["norm 0.5"]["kept"] == 32


def test_the_demos_pictures_come_without_their_padding():
    from mlx_tokprune.processing.image import preprocess
    from mlx_tokprune.scenes.held_out import HELD_OUT
    from recipes.demo.stages import draw_scenes

    pixels = draw_scenes((HELD_OUT, 0), 8, 512, 5).pixels
    items = {item.picture: item for item in data.read_questions("demo", 8, None).items}
    shapes = set()
    for number, item in enumerate(items.values()):
        image = item.load()
        shapes.add(image.width == image.height)
        (again,) = preprocess([image], 512)
        np.testing.assert_allclose(again, pixels[number], atol=1e-6)
    assert shapes == {True, False}
