"""Files of `train`: its question lines, as in `evaluate`, and adapters."""

import json
import shutil

import numpy as np
import pytest
from conftest import TINY

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip

from mlx_tokprune import InputError, Pruner, load
from mlx_tokprune.evaluate.items import read_questions
from mlx_tokprune.pipeline.planning import plan_for
from mlx_tokprune.train.__main__ import main as train
from mlx_tokprune.train.loop import Loop, Schedule
from mlx_tokprune.train.samples import read_samples

PICTURE = str(TINY / "image_0.png")


def write(folder, *entries) -> str:
    lines = [json.dumps({"image": PICTURE, "question": "Q", **e}) for e in entries]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return str(folder / "lines.jsonl")


@pytest.mark.parametrize(
    ("entry", "answer"),
    [
        ({"answer": "a cat"}, "a cat"),
        ({"answer": ["dog", "cat", "cat"]}, "cat"),
        ({"answers": ["x", "y"]}, "x"),
        ({"answer": 7}, "7"),
    ],
)
def test_of_several_answers_the_commonest_is_learned(tmp_path, entry, answer):
    (sample,) = read_samples(write(tmp_path, entry), 1).items
    assert sample.pairs == (("Q", answer),)


@pytest.mark.parametrize("answer", [True, [], [None], {"a": 1}, "", ["a", True], 1.5])
def test_what_is_no_answer_is_skipped(tmp_path, answer):
    with pytest.raises(InputError, match="line 1: has no question with an answer"):
        read_samples(write(tmp_path, {"answer": answer}), 1)


@pytest.mark.parametrize("scale", ["x", None, True, float("nan"), [1]])
def test_an_adapter_has_a_scale(tmp_path, scale):
    config = {"lora_parameters": {"scale": scale}, "num_layers": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="has the scale"):
        load(TINY, adapter_path=tmp_path)


@pytest.mark.parametrize("kind", ["nobody", ["adaptive"], None, {}])
def test_a_scorer_has_a_known_kind(tmp_path, kind):
    (tmp_path / "scorer.json").write_text(json.dumps({"scorer": kind}))
    with pytest.raises(InputError, match="expected one of adaptive"):
        Pruner(str(tmp_path), 0.5)


@pytest.mark.parametrize("what", ["prune", "lora"])
def test_layers_computed_again_change_nothing(tmp_path, tiny, what):
    kind = type(tiny[0].decoder.layers[0])
    before, found = kind.__call__, []
    file = {"prune": "scorer.safetensors", "lora": "adapters.safetensors"}[what]
    entries = [{"question": q, "answer": "x y"} for q in "abc"]
    for more in ([], ["--grad-checkpoint"]):
        output = tmp_path / f"out{len(more)}"
        asked = [what, "--model", str(TINY), "--data", write(tmp_path, *entries)]
        asked += ["--steps", "2", "--batch", "1", "--output", str(output)]
        train([*asked, *more])
        assert kind.__call__ is before
        found.append(mx.load(str(output / file)))
    for name, array in found[0].items():
        np.testing.assert_allclose(array, found[1][name], atol=1e-6)


@pytest.mark.parametrize("what", ["prune", "lora"])
def test_a_folder_goes_on_with_the_same_training_only(tmp_path, capsys, what):
    first = write(tmp_path, {"answer": "x"})
    asked = [what, "--steps", "1", "--batch", "1", "--folder", str(tmp_path / "state")]

    def go(model=TINY, data=first, *more):
        output = str(tmp_path / f"out{len(list(tmp_path.iterdir()))}")
        train(
            [*asked, "--model", str(model), "--data", data, "--output", output, *more]
        )

    go()
    go()
    (tmp_path / "more").mkdir()
    other = write(tmp_path / "more", {"answer": "y"})
    flags = ["--keep-ratios", "0.1", "0.2"] if what == "prune" else ["--rank", "4"]
    for changed in (("demo", first), (TINY, other), (TINY, first, *flags)):
        with pytest.raises(SystemExit):
            go(*changed)
        assert "holds a training with other settings" in capsys.readouterr().err


def test_a_training_that_was_refused_leaves_nothing_in_the_way(tmp_path, capsys):
    asked = ["lora", "--data", write(tmp_path, {"answer": "x"}), "--steps", "1"]
    asked += ["--batch", "1", "--model", str(TINY), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        train([*asked, "--dequantize"])
    assert "no quantized weights" in capsys.readouterr().err
    train(asked)


def test_another_scorer_is_another_training(tmp_path, capsys):
    asked = ["lora", "--data", write(tmp_path, {"answer": "x"}), "--steps", "1"]
    asked += ["--batch", "1", "--folder", str(tmp_path / "state")]
    asked += ["--keep-ratio", "0.2"]
    train([*asked, "--method", "demo-adaptive", "--output", str(tmp_path / "a")])
    with pytest.raises(SystemExit):
        train([*asked, "--method", "demo-inside", "--output", str(tmp_path / "b")])
    assert "with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "flags"),
    [
        ("prune", ["--distill", "nan"]),
        ("prune", ["--distill", "-1"]),
        ("prune", ["--curriculum", "7"]),
        ("lora", ["--distill", "nan"]),
        ("lora", ["--scale", "nan"]),
        ("lora", ["--method", "trimvla"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, capsys, what, flags):
    asked = [what, "--data", write(tmp_path, {"answer": "x"}), "--steps", "1"]
    asked += ["--model", str(TINY), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        train([*asked, *flags])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_ends_a_training(tmp_path):
    module = nn.Linear(2, 2)

    def loss(module, seed, step):
        return mx.sum(module(mx.full((1, 2), mx.inf))), mx.array(1.0)

    with pytest.raises(InputError, match="the loss of step 0 is not finite"):
        Loop(module, loss, Schedule(2, 1e-3), tmp_path).run()
    assert not (tmp_path / "state.json").exists()


def test_a_scorer_of_another_model_is_refused(tiny):
    for name, size in (("demo-adaptive", 512), ("demo-asking", 192)):
        with pytest.raises(InputError, match=f"its channels are {size}, not"):
            plan_for(tiny[0], Pruner(name, 0.5))


def test_another_picture_under_the_same_name_is_other_data(tmp_path):
    picture = tmp_path / "own.png"
    shutil.copy(TINY / "image_0.png", picture)
    lines = write(tmp_path, {"image": str(picture), "answer": "a cat"})
    first, again = (read_samples(lines, 1).digest for _ in range(2))
    shutil.copy(TINY / "image_1.png", picture)
    assert first == again != read_samples(lines, 1).digest


@pytest.mark.parametrize("reader", ["train", "evaluate"])
def test_only_a_line_feed_ends_a_line(tmp_path, reader):
    """U+2028 and U+0085 do not end a line, and a byte order mark is skipped."""
    line = {"image": PICTURE, "question": "x\u2028y\x85z", "answer": "a"}
    texts = ["", json.dumps(line, ensure_ascii=False), "{"]
    (tmp_path / "l.jsonl").write_text("\n".join(texts), encoding="utf-8-sig")
    read = {"train": read_samples, "evaluate": lambda f, n: read_questions(f, n, None)}
    found = read[reader](str(tmp_path / "l.jsonl"), 1)
    (item,) = found.items
    asked = item.pairs[0][0] if reader == "train" else item.question
    assert asked == line["question"]
    assert [number for number, _ in found.skipped] == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["prune", "--sharpen", "2"], "nothing to imitate"),
        (["prune", "--distill", "1", "--imitate", "1"], "expected one of them"),
        (["prune", "--scorer", "asking", "--questions", "4"], "leave out --questions"),
        (["lora", "--layers", "0"], "whole numbers from 1"),
    ],
)
def test_options_are_not_ignored(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        train([*options, "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_adapter_can_be_trained_without_pruning(tmp_path):
    told = ["--method", "none", "--steps", "1", "--batch", "2", "--pictures", "2"]
    train(["lora", *told, "--output", str(tmp_path / "adapter")])
    assert (tmp_path / "adapter" / "adapters.safetensors").exists()
