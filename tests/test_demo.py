"""The shipped models answer correctly, also when pruned, and their commands run."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_tokprune
from mlx_tokprune import InputError, Pruner, generate, predict_action
from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME, POLICY_STATE
from mlx_tokprune.checkpoints.hub import EMBEDDED, resolve
from mlx_tokprune.demo.__main__ import main
from mlx_tokprune.evaluate import read_result
from mlx_tokprune.evaluate.__main__ import main as evaluate_main
from mlx_tokprune.pipeline import Scene, look, run
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.pruners import as_plan
from mlx_tokprune.scenes.held_out import held_out
from mlx_tokprune.scenes.questions import KINDS
from mlx_tokprune.train.packing import IGNORE, answer_logits
from recipes.demo.packing import pack


def test_the_demo_answers_and_draws(tmp_path, capsys):
    main(["--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    for number, picture in enumerate(PICTURES):
        answers = [f"{n} of 64 tokens: {picture.answer}\n" for n in ("64", "32")]
        assert all(answer in out for answer in answers)
        with Image.open(tmp_path / "out" / f"overlay_{number}.png") as overlay:
            with Image.open(picture.path) as source:
                assert overlay.width / overlay.height == pytest.approx(
                    source.width / source.height, rel=0.01
                )
    action = out[out.index(POLICY_FRAME.path.name) :]
    assert "64 of 64 tokens" in action
    assert "32 of 64 tokens" in action
    assert (tmp_path / "out" / "overlay_policy.png").exists()


@pytest.mark.parametrize(
    "pruner",
    [Pruner("none"), Pruner("trimvla", 0.5), Pruner("trimvla", 0.25)],
    ids=["all", "half", "quarter"],
)
def test_the_policy_does_what_the_expert_does(demo_policy, pruner):
    expert = np.array([float(value) for value in POLICY_FRAME.answer.split()])
    asked = ([POLICY_FRAME.path], POLICY_FRAME.question)
    action = predict_action(*demo_policy, *asked, pruner=pruner)
    assert np.abs(action.values - expert).max() < 0.15


def test_the_instruction_decides_the_action(demo_policy):
    """Opposite instructions on one frame give different actions."""
    frame = [POLICY_FRAME.path]
    opened, closed = (
        predict_action(*demo_policy, frame, f"{verb} the drawer").values
        for verb in ("open", "close")
    )
    assert np.abs(opened - closed).max() > 0.3


@pytest.fixture(scope="module")
def demo_pi0():
    return mlx_tokprune.load("demo-pi0")


@pytest.mark.parametrize("ratio", [None, 0.5, 0.25])
def test_the_small_pi0_begins_as_the_expert_does(demo_pi0, ratio):
    """The first action is the expert's; the opposite instruction changes the chunk."""
    expert = np.array([float(value) for value in POLICY_FRAME.answer.split()])
    chunks = [
        predict_action(
            *(*demo_pi0, [POLICY_FRAME.path], f"{verb} the drawer"),
            proprio=POLICY_STATE,
            pruner=Pruner("trimvla", ratio) if ratio else None,
        ).values
        for verb in ("open", "close")
    ]
    assert chunks[0].shape == (8, 4)
    assert np.abs(chunks[0][0] - expert).max() < 0.15
    assert np.abs(chunks[0] - chunks[1]).max() > 0.5


def test_the_small_pi0_is_small():
    files = [p for p in EMBEDDED["demo-pi0"].rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12e6


def test_the_picture_decides_the_answer(demo):
    question = PICTURES[0].question
    answers = [generate(*demo, [p.path], question) for p in PICTURES]
    assert answers[0] == PICTURES[0].answer
    assert answers[1] == "95"


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("method", ["norm", "attention", "similarity"])
def test_half_precision_answers_alike(dtype, method):
    """Pruned answers in half precision are correct."""
    half = mlx_tokprune.load("demo", dtype=dtype)
    for picture in PICTURES:
        asked = ([picture.path], picture.question)
        assert generate(*half, *asked, pruner=Pruner(method, 0.5)) == picture.answer


def test_accuracy_on_held_out_pictures(tmp_path):
    """`none` and `norm` are mostly right; `random` and black images score low."""
    how = ["--methods", "norm", "random", "--keep-ratios", "0.25", "--pictures", "16"]
    evaluate_main([*how, "--output", str(tmp_path / "seen.json")])
    blind = ["--methods", "norm", "--keep-ratios", "1", "--pictures", "16", "--blind"]
    evaluate_main([*blind, "--output", str(tmp_path / "blind.json")])
    seen, blind = (read_result(tmp_path / f"{n}.json") for n in ("seen", "blind"))
    none, norm, random = (row["accuracy"] for row in seen["rows"])
    dark = blind["rows"][0]["accuracy"]
    assert none["all"]["value"] > 0.9
    assert norm["all"]["value"] > 0.85
    assert random["all"]["value"] < 0.6
    assert dark["all"]["value"] < 0.35
    assert seen["most_common"] < 0.4
    for kind in KINDS:
        assert none[kind]["value"] > 0.9
        assert dark[kind]["value"] < 0.6


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_packed_logits_equal_the_pipeline_s(demo, positions):
    model, processor = demo
    image, asked = next(held_out(1))
    pixels = mx.array(processor.pixels([image]))
    plan = as_plan(Pruner("norm", 0.11))
    visual = look(model, Scene(pixels, Prompt(((), ()))), plan)
    questions = [q for q in asked if q is not None]

    def encode(text):
        return processor.tokenizer.encode(text, add_special_tokens=False)

    packed = pack([questions], encode, model.prompt_suffix, 0)
    prefix, seen = encode(model.prompt_prefix), (visual.embeddings, visual.indices)
    logits = answer_logits(model, prefix, *seen, packed, visual.total, positions)
    for number, question in enumerate(questions):
        scene = Scene(pixels, processor.prompt(question.prompt, 1))
        read, _ = run(model, scene, plan, positions=positions)
        alone = model.decoder.logits(read.hidden)[:, -1]
        first = int(np.argmax(np.array(packed.targets[0, number]) != IGNORE))
        np.testing.assert_allclose(
            np.array(logits[0, number, first]), np.array(alone[0]), atol=1e-3
        )


def run_module(*command: str, cwd) -> str:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    return result.stdout


def test_generate_without_a_model_runs_the_demo(tmp_path):
    out = run_module("mlx_tokprune.generate", "--keep-ratio", "0.5", cwd=tmp_path)
    assert out.splitlines()[0] == PICTURES[0].answer


COMMANDS = "act bench convert coreml demo evaluate generate report train".split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_from_the_root_folder(command):
    out = run_module(f"mlx_tokprune.{command}", "--help", cwd="/")
    assert out.startswith(f"usage: mlx_tokprune {command} ")


@pytest.mark.skipif(sys.platform != "linux", reason="loads a BLAS on Linux only")
def test_a_fast_blas_is_loaded_before_mlx():
    code = (
        "import mlx_tokprune, mlx.core as mx; a = mx.ones((64, 64)); mx.eval(a @ a);"
        "maps = open('/proc/self/maps');"
        "print([l.split()[-1] for l in maps if '/libopenblas' in l][0])"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "libopenblas" in out
    off = os.environ | {"MLX_TOKPRUNE_BLAS": "0"}
    result = subprocess.run(command, env=off, capture_output=True, text=True)
    assert "IndexError" in result.stderr  # nothing was loaded


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="needs Metal")
def test_the_demo_runs_on_the_gpu(demo):
    assert mx.default_device().type == mx.DeviceType.gpu
    for picture in PICTURES:
        asked = ([picture.path], picture.question)
        assert generate(*demo, *asked, pruner=Pruner("norm", 0.5)) == picture.answer


def test_a_model_of_clones_alone_is_named_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(EMBEDDED, "demo-pi0", tmp_path / "absent")
    with pytest.raises(InputError, match="in a clone of the repository, not in the"):
        resolve("demo-pi0")
