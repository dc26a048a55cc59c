"""A scorer warns under a model that it was not trained for."""

import json
import logging
from pathlib import Path

import pytest
from conftest import TINY

import mlx.core as mx  # isort: skip
from mlx.utils import tree_map

from mlx_tokprune import InputError, Pruner, load
from mlx_tokprune.convert import convert
from mlx_tokprune.pipeline.planning import plan_for
from mlx_tokprune.pruners.scorers import (
    SCORERS,
    load_scorer,
    same_model,
    save_scorer,
    signs_of,
)
from mlx_tokprune.pruners.scorers.fitting import _warn_of
from mlx_tokprune.train.__main__ import main as train

DEMO_SCORERS = ("demo-adaptive", "demo-inside", "demo-asking")


def warned(caplog, model, pruner) -> int:
    """Return the number of warnings of three calls."""
    caplog.clear()
    _warn_of.cache_clear()
    with caplog.at_level(logging.WARNING, "mlx_tokprune"):
        for _ in range(3):
            plan_for(model, pruner)
    return sum("model with other weights" in text for text in caplog.messages)


@pytest.mark.parametrize("name", DEMO_SCORERS)
def test_embedded_scorers_are_those_of_the_demo(demo, caplog, name):
    assert load_scorer(name).model_signs == demo[0].signs
    assert warned(caplog, demo[0], Pruner(name, 0.5)) == 0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_makes_no_other_model(demo, caplog, dtype):
    """A scorer does not warn under its own model in half precision."""
    model, _ = load("demo", dtype)
    assert (int(model.signs, 16) ^ int(demo[0].signs, 16)).bit_count() < 32
    for name in DEMO_SCORERS:
        assert warned(caplog, model, Pruner(name, 0.5)) == 0


@pytest.fixture
def trained(tmp_path, demo):
    scorer = SCORERS["adaptive"](demo[0].feature_size)
    scorer.model_signs = demo[0].signs
    save_scorer(scorer, tmp_path / "scorer")
    return Pruner(str(tmp_path / "scorer"), 0.5)


def test_under_a_model_with_other_weights_it_says_so_once(caplog, trained):
    other, _ = load("demo")
    mx.random.seed(0)
    drawn = tree_map(lambda w: mx.random.normal(w.shape), other.parameters())
    other.update(drawn)
    other.signs = signs_of(other)
    assert warned(caplog, other, trained) == 1


@pytest.mark.parametrize("how", [{"dtype": "bfloat16"}, {"quantize": True}])
def test_rounding_or_quantizing_makes_no_other_model(tmp_path, caplog, trained, how):
    convert("demo", str(tmp_path / "rounded"), **how)
    model, _ = load(tmp_path / "rounded")
    assert model.signs is not None
    assert warned(caplog, model, trained) == 0


def test_an_adapter_on_the_projector_makes_no_other_model(tmp_path, demo):
    told = ["--projector", "--steps", "1", "--batch", "2", "--pictures", "2"]
    folder = tmp_path / "adapter"
    train(["lora", "--model", "demo", *told, "--output", str(folder)])
    model, _ = load("demo", adapter_path=folder)
    assert same_model(signs_of(model), demo[0].signs)  # as a fused one will have them


def test_what_is_not_known_is_not_said(caplog, demo):
    scorer = SCORERS["adaptive"](demo[0].feature_size)
    assert warned(caplog, demo[0], Pruner("learned", 0.5, scorer=scorer)) == 0


def test_training_notes_the_model(tmp_path, demo):
    told = ["--steps", "1", "--batch", "2", "--pictures", "2"]
    folder = tmp_path / "scorer"
    train(["prune", "--scorer", "adaptive", *told, "--output", str(folder)])
    assert json.loads((folder / "scorer.json").read_text())["model"] == demo[0].signs


@pytest.mark.parametrize("signs", ["", "x" * 64, 5, "0" * 63, ["0"]])
def test_damaged_signs_are_refused(trained, signs):
    file = Path(trained.folder) / "scorer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": signs}))
    with pytest.raises(InputError, match="no scorer that can be read"):
        load_scorer(trained.folder)


def test_models_that_were_trained_apart_differ(demo):
    other = load(TINY)[0].signs
    assert not same_model(demo[0].signs, other)
    assert same_model(demo[0].signs, None)
