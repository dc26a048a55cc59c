"""Inputs refused early: too large, not finite, or not a regular file."""

import json
import os
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, TINY_POLICY, copy_policy

from mlx_tokprune import InputError, Policy, generate, load, predict_action
from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME
from mlx_tokprune.convert import convert
from mlx_tokprune.errors import printable
from mlx_tokprune.evaluate.__main__ import main as evaluate
from mlx_tokprune.files import PICTURE, check_output, new_folder, write_text
from mlx_tokprune.generate.__main__ import main as command
from mlx_tokprune.pipeline import limits
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.report.__main__ import main as report

QUESTION = PICTURES[0].question


def error_of(run, arguments, capsys) -> str:
    """Return the single error line of a refused command."""
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("side", [512, 1024])
def test_memory_is_predicted_from_above(demo, side):
    model, _ = demo
    pixels = mx.zeros((1, side, side, 3))
    mx.eval(pixels)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(model.encode(pixels).tokens)
    used = mx.get_peak_memory() - before
    assert used < model.memory_of(side) < 3 * used


def test_pictures_beyond_memory_are_refused(monkeypatch, capsys, demo):
    free = demo[0].memory_of(1024)
    monkeypatch.setattr(limits, "_free_memory", lambda: free)
    said = error_of(command, ["--image-size", 2048], capsys)
    assert "the largest that fit have 1024 px" in said
    picture = load_image(PICTURES[0].path)
    generate(*demo, [picture] * 3, QUESTION, max_tokens=1)
    monkeypatch.setattr(limits, "_free_memory", lambda: demo[0].memory_of(512) * 2)
    with pytest.raises(InputError, match="3 pictures of 512 px"):
        generate(*demo, [picture] * 3, QUESTION)


def test_a_long_prompt_is_refused_without_its_tokens(monkeypatch, demo, capsys):
    def never(*_, **__):
        raise AssertionError("tokenized")

    monkeypatch.setattr(type(demo[1]), "_encode", never)
    start = time.perf_counter()
    said = error_of(command, ["--prompt", "word " * 200_000], capsys)
    assert "too long" in said
    assert len(said) < 700
    assert time.perf_counter() - start < 20


def test_a_prompt_of_more_tokens_than_the_model_reads(demo):
    prompt = "12345 " * 1000
    with pytest.raises(InputError, match=r"tokens, and the model reads 2048"):
        generate(*demo, [PICTURES[0].path], prompt)


def test_more_layers_than_tensors_are_not_built(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] = 1_000_000
    (checkpoint / "config.json").write_text(json.dumps(config))
    start = time.perf_counter()
    with pytest.raises(InputError, match="layers, but the checkpoint has only"):
        load(checkpoint)
    assert time.perf_counter() - start < 5


# Not a number -----------------------------------------------------------------------


def damaged(folder, name: str, value: float) -> None:
    file = str(folder / "model.safetensors")
    weights = mx.load(file)
    array = np.array(weights[name])
    array.reshape(-1)[3] = value
    weights[name] = mx.array(array)
    mx.eval(weights)
    mx.save_safetensors(file, weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(checkpoint, tmp_path, value, capsys):
    damaged(checkpoint, "model.layers.0.mlp.up_proj.weight", value)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    asked = ["--model", checkpoint, "--image", PICTURES[0].path, "--prompt", "hi"]
    assert name in error_of(command, asked, capsys)
    data = ["--model", checkpoint, "--data", PICTURES[0].path.parent]
    output = ["--output", tmp_path / "e.json"]
    assert name in error_of(evaluate, [*data, *output], capsys)
    with pytest.raises(InputError, match=r"up_proj\.weight has numbers that are not"):
        convert(str(checkpoint), str(tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))


def test_first_logits_and_actions_that_are_no_numbers():
    """Logits and actions that become NaN after loading are refused."""
    model, processor = load(TINY)
    norm = model.language_model.model.norm
    norm.weight = norm.weight * float("nan")
    with pytest.raises(InputError, match="logits are not finite"):
        generate(model, processor, [TINY / "image_0.png"], "hi")
    policy, processor = load(TINY_POLICY)
    norm = policy.language_model.model.norm
    norm.weight = norm.weight * float("nan")
    asked = ([load_image(POLICY_FRAME.path)], "lift the block")
    with pytest.raises(InputError, match="action is not finite"):
        predict_action(policy, processor, *asked)
    for draft in (False, True):
        with pytest.raises(InputError, match="action is not finite"):
            Policy(policy, processor, draft=draft)(*asked)


# Files ------------------------------------------------------------------------------


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    folder = copy_policy(tmp_path / "policy")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        load(folder)
    for target in ("/dev/full", tmp_path):
        with pytest.raises(InputError, match="no regular file"):
            check_output(target, PICTURE)
    with pytest.raises(InputError, match="no regular file"):
        write_text(folder / "config.json", "text")


def test_what_killed_runs_left_is_taken_away(tmp_path):
    """Only partial folders of dead processes and of this target are removed."""
    with new_folder(tmp_path / "out") as partial:
        mine = partial.name
        (tmp_path / mine.replace(f"-{os.getpid()}-", "-999999999-")).mkdir()
        (tmp_path / mine.replace("out", "other", 1)).mkdir()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 3  # it was made after the folder had swept
    (tmp_path / "out").rmdir()
    with new_folder(tmp_path / "out"):
        pass
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [mine.replace("out", "other", 1), "out"]


def test_links_do_not_leave_the_source(checkpoint, tmp_path):
    (tmp_path / "secret.md").write_text("secret")
    (checkpoint / "README.md").symlink_to(tmp_path / "secret.md")
    with pytest.raises(InputError, match=r"README\.md is a link that leaves"):
        convert(str(checkpoint), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_messages_are_one_line_of_a_terminal():
    shown = printable("a\x1b[31m\nb\u202e" + "x" * 5000 + "end")
    assert shown.startswith(r"a\x1b[31m\nb\u202e")
    assert shown.endswith("end")
    assert len(shown) < 620


@pytest.mark.parametrize("run", [report, evaluate])
def test_plots_without_matplotlib(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = {report: ["x.json"], evaluate: ["--plot", tmp_path / "p.png"]}[run]
    assert "pip install 'mlx-tokprune[bench]'" in error_of(run, arguments, capsys)
