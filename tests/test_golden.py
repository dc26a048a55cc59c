"""The pipeline equals the float32 values of the reference implementation."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY

from mlx_tokprune.convert import convert
from mlx_tokprune.features import Features
from mlx_tokprune.generate.__main__ import main
from mlx_tokprune.pipeline import Scene, run
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import Pruner, as_plan

PROMPTS = ("Describe the image.", "What is on the left?")
PICTURES = (0, 1)  # the second is 640x400
BUDGETS = {"50": 0.5, "25": 0.25}
CASES = [("none", "")] + [(m, b) for m in ("norm", "attention") for b in BUDGETS]


def relative(a, b) -> float:
    a, b = np.array(a), np.array(b)
    return float(np.abs(a - b).max() / np.abs(b).max())


def pixels_of(processor, picture: int) -> mx.array:
    return mx.array(processor.pixels([load_image(TINY / f"image_{picture}.png")]))


@pytest.mark.parametrize("picture", PICTURES)
def test_pixels_equal_the_reference(tiny, expected, picture):
    ours = pixels_of(tiny[1], picture)[:, ::8, ::8].transpose(0, 3, 1, 2)
    assert mx.array_equal(ours, expected[f"{picture}.pixel_values"])


@pytest.mark.parametrize("picture", PICTURES)
def test_prompt_tokens_equal_the_reference(tiny, expected, picture):
    segments = tiny[1].prompt(PROMPTS[picture], 1).segments
    assert [*segments[0], -200, *segments[1]] == expected[
        f"{picture}.input_ids"
    ].tolist()


@pytest.mark.parametrize("picture", PICTURES)
def test_tower_and_projector_equal_the_reference(tiny, expected, picture):
    model, processor = tiny
    features: Features = model.encode(pixels_of(processor, picture), ("attention",))
    assert relative(features.tokens, expected[f"{picture}.vision_features"]) < 1e-4
    received = expected[f"{picture}.attention_received"]
    assert relative(features.extras["attention"][0], received) < 1e-4
    projected = model.project(features.tokens)
    assert relative(projected, expected[f"{picture}.projected"]) < 1e-4


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(("method", "budget"), CASES)
def test_logits_equal_the_reference(tiny, expected, picture, method, budget):
    model, processor = tiny
    name = f"{picture}." if method == "none" else f"{picture}.{method}_{budget}."
    pruner = Pruner(method, None if method == "none" else BUDGETS[budget])
    prompt = processor.prompt(PROMPTS[picture], 1)
    scene = Scene(pixels_of(processor, picture), prompt)
    for rows in (1, 8):  # the product's one, and all that the reference stored
        read, visual = run(
            model, scene, as_plan(pruner), positions="contiguous", rows=rows
        )
        logits = model.decoder.logits(read.hidden)[0]
        assert relative(logits, expected[f"{name}last8_logits"][-rows:]) < 1e-4
    if method != "none":
        assert (
            visual.selection.indices[0].tolist() == expected[f"{name}indices"].tolist()
        )


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert(str(TINY), str(tmp_path_factory.mktemp("mlx") / "tiny"))


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(("method", "budget"), CASES)
def test_command_line_equals_the_reference(
    converted, expected, capsys, picture, method, budget
):
    keep = [] if method == "none" else ["--keep-ratio", str(BUDGETS[budget])]
    main(
        [
            *("--model", str(converted), "--prompt", PROMPTS[picture]),
            *("--image", str(TINY / f"image_{picture}.png"), "--max-tokens", "12"),
            *("--method", method, "--positions", "contiguous", *keep, "--json"),
        ]
    )
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    name = f"{picture}." if method == "none" else f"{picture}.{method}_{budget}."
    assert record["token_ids"] == expected[f"{name}greedy_ids"].tolist()
    if method != "none":
        assert record["kept_indices"][0] == expected[f"{name}indices"].tolist()
