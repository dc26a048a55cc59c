"""The contract of pruners: extras, masks, options, scorers, plans, custom methods."""

import json
import logging

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from PIL import Image

from mlx_tokprune import (
    Features,
    InputError,
    Memory,
    Pruner,
    Selection,
    generate,
    stream_generate,
)
from mlx_tokprune.act.__main__ import main as act
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.generate.__main__ import main as command
from mlx_tokprune.pipeline import Scene, look, prune_at_prompt, run
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import as_plan, get_method, list_pruners, registry
from mlx_tokprune.pruners.registry import temporary
from mlx_tokprune.pruners.saliency import keep_highest

TOKENS = mx.random.normal((2, 12, 8), key=mx.random.key(0))
FEATURES = Features(TOKENS, (3, 4), extras={"attention": mx.sum(TOKENS, axis=-1)})


def test_a_tower_method_keeps_its_mask():
    with temporary("masked") as register:

        @register
        def masked(features, *, keep):
            kept = keep_highest(features.tokens[..., 0], keep).indices
            return Selection(kept, mask=mx.arange(keep)[None] < mx.array([[2], [3]]))

        found = Pruner("masked", keep_tokens=4)(FEATURES)
        assert found.mask.tolist() == [[True] * 2 + [False] * 2, [True] * 3 + [False]]


def test_a_mask_of_the_tower_reaches_the_language_model(demo):
    """Masked tokens change nothing: the states equal those of the unmasked alone."""
    model, processor = demo
    pixels = mx.array(processor.pixels([load_image(PICTURES[0].path)]))
    scene = Scene(pixels, processor.prompt(PICTURES[0].question, 1))
    with temporary("padded") as register:

        @register
        def padded(features, *, keep):
            kept = mx.arange(keep, dtype=mx.int32)[None]
            return Selection(kept, mask=mx.arange(keep)[None] < 9)

        hidden = {
            positions: run(
                model,
                scene,
                as_plan(Pruner("padded", keep_tokens=16)),
                positions=positions,
            )[0].hidden
            for positions in ("original", "contiguous")
        }
    with temporary("first") as register:

        @register
        def first(features, *, keep):
            return Selection(mx.arange(keep, dtype=mx.int32)[None])

        plan = as_plan(Pruner("first", keep_tokens=9))
        for positions, padded_hidden in hidden.items():
            alone, _ = run(model, scene, plan, positions=positions)
            np.testing.assert_allclose(alone.hidden, padded_hidden, atol=1e-4)


def test_a_method_reads_any_extra_that_its_model_has(demo):
    """A method at the prompt receives the text extra that it declares."""
    model, processor = demo
    pixels = mx.array(processor.pixels([load_image(PICTURES[0].path)]))
    scene = Scene(pixels, processor.prompt(PICTURES[0].question, 1))
    with temporary("reads", needs=("text",), at="prompt") as register:

        @register
        def reads(features, *, keep):
            mean = mx.mean(features.extras["text"], axis=1, keepdims=True)
            return keep_highest(mx.sum(features.tokens * mean, axis=-1), keep)

        plan = as_plan(Pruner("reads", 0.25))
        visual = prune_at_prompt(model, scene, plan, look(model, scene, plan))
    tokens = look(model, scene, ()).embeddings
    text = model.text(scene.prompt)[-1]
    scores = mx.sum(tokens * mx.mean(text, axis=1, keepdims=True), axis=-1)
    assert mx.array_equal(visual.indices, keep_highest(scores, 16).indices)


def test_tokens_that_there_are_not_are_refused():
    """Indices out of range raise an error, and are clipped in compiled code."""
    with temporary("beyond") as register:

        @register
        def beyond(features, *, keep):
            order = mx.argsort(features.tokens[..., 0], axis=1)
            return Selection(order[:, :keep].astype(mx.int32) + 9999)

        with pytest.raises(InputError, match="numbers from 0 to 11"):
            Pruner("beyond", keep_tokens=2)(FEATURES)

        @mx.compile
        def inside(tokens):
            return Pruner("beyond", keep_tokens=2)(Features(tokens, None)).indices

        assert inside(TOKENS).tolist() == [[11, 11], [11, 11]]


def test_seeded_methods_take_their_options():
    with temporary("drawn", seeded=True) as register:

        @register
        def drawn(features, *, keep, seed=0, first=0.0):
            return Selection(mx.full((2, keep), int(first) + seed, mx.int32))

        found = Pruner("drawn", keep_tokens=2, seed=3, options={"first": 4})(FEATURES)
        assert found.indices.tolist() == [[7, 7], [7, 7]]


class Scorer(nn.Module):
    needs = ("attention",)

    def __init__(self, sign=1.0):
        super().__init__()
        self.sign = mx.array(sign)

    def __call__(self, features):
        return self.sign * features.extras["attention"]


def test_a_scorer_chooses_by_its_weights_of_today():
    scorer = Scorer()
    pruner = Pruner("learned", keep_tokens=3, scorer=scorer)
    assert pruner.needs == ("attention",)
    highest = pruner(FEATURES).indices
    scores = FEATURES.extras["attention"]
    assert mx.array_equal(highest, keep_highest(scores, 3).indices)
    scorer.update({"sign": mx.array(-1.0)})
    assert mx.array_equal(pruner(FEATURES).indices, keep_highest(-scores, 3).indices)
    scorer.sign = mx.array(1.0)
    assert mx.array_equal(pruner(FEATURES).indices, highest)


def test_a_method_that_closes_over_weights_chooses_by_those_of_today():
    weights = mx.ones((8,))
    with temporary("closed") as register:

        @register
        def closed(features, *, keep):
            return keep_highest(features.tokens @ weights, keep)

        pruner = Pruner("closed", keep_tokens=3)
        before = pruner(FEATURES).indices
        weights = -weights
        after = pruner(FEATURES).indices
    assert not mx.array_equal(before, after)
    assert mx.array_equal(after, keep_highest(TOKENS @ weights, 3).indices)


def test_scorers_belong_to_methods_that_read_scores():
    with pytest.raises(InputError, match="chooses by a scorer"):
        Pruner("learned", 0.5)
    with pytest.raises(InputError, match="reads no scores"):
        Pruner("norm", 0.5, scorer=Scorer())
    assert "learned" not in list_pruners()


def test_a_scorer_prunes_a_model(demo):
    model, processor = demo
    asked = (model, processor, [PICTURES[0].path], PICTURES[0].question)
    learned = Pruner("learned", 0.5, scorer=Scorer())
    attention = Pruner("attention", 0.5)
    assert generate(*asked, pruner=learned) == generate(*asked, pruner=attention)


def test_a_memory_knows_that_a_scorer_learned_more(demo):
    model, processor = demo
    memory, scorer = Memory(), Scorer()
    pruner = Pruner("learned", 0.25, scorer=scorer)
    asked = (model, processor, [PICTURES[0].path], PICTURES[0].question)

    def kept(**how):
        *_, last = stream_generate(*asked, pruner=pruner, max_tokens=1, **how)
        return last.visual.left()

    before = kept(memory=memory)
    scorer.update({"sign": mx.array(-1.0)})
    assert kept(memory=memory) == kept() != before


SIGN, COLOR = "What does the sign say?", "Which color is the thing on the left?"


@pytest.mark.parametrize(
    "pruner",
    [
        Pruner("trimvla", 0.25),
        Pruner("cdpruner", 0.25),
        Pruner("fastv", 0.25),
        [Pruner("norm", 0.5), Pruner("cdpruner", 0.5), Pruner("fastv", 0.5)],
    ],
    ids=["trimvla", "cdpruner", "fastv", "all places"],
)
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_memory_chooses_tokens_for_each_question(demo, pruner, positions):
    """Questions share the tower's tokens, but each question prunes them anew."""
    model, processor = demo
    memory = Memory()

    def asked(text: str, **how):
        pieces = stream_generate(
            *(model, processor, [PICTURES[0].path], text),
            **{"pruner": pruner, "max_tokens": 4, "positions": positions, **how},
        )
        *_, last = found = list(pieces)
        return [piece.token for piece in found], last.visual.by_place(), last.reused

    before = asked(SIGN, memory=memory)
    ids, kept, reused = asked(COLOR, memory=memory)
    assert len(memory) == 1
    assert (ids, kept, reused) == asked(COLOR)
    assert reused == 0  # the cache holds what the first question kept
    assert kept != before[1]
    assert asked(SIGN, memory=memory) == before


def test_padding_of_the_tower_is_not_pruned_further(demo):
    with temporary("uneven") as register:

        @register
        def uneven(features, *, keep):
            kept = mx.arange(keep, dtype=mx.int32)[None]
            return Selection(kept, mask=mx.arange(keep)[None] < 3)

        plan = [Pruner("uneven", 0.5), Pruner("attention", 0.5, at=2)]
        with pytest.raises(InputError, match="followed by a pruner at a later place"):
            generate(*demo, [PICTURES[0].path], "What is it?", pruner=plan)


def test_a_place_needs_something_to_drop(capsys):
    with pytest.raises(SystemExit):
        command(["--at", "2"])
    assert "give --keep-ratio, too" in capsys.readouterr().err


@pytest.mark.parametrize("name", list_pruners())
def test_places_are_values(name, demo):
    """A method runs at each place that has its extras, and is refused elsewhere."""
    model, processor = demo
    known = get_method(name)
    for place in ("tower", "prompt", 2):
        budget = {} if known.counts == "own" else {"keep_tokens": 16}
        pruner = Pruner(name, at=place, **({} if name == "none" else budget))
        kind = "layer" if place == 2 else place
        fits = set(known.needs) <= set(model.provides[kind])
        fits &= not (place == 2 and pruner.has_own_count)
        asked = (model, processor, [PICTURES[0].path], "What is it?")
        if fits:
            generate(*asked, pruner=pruner, max_tokens=1)
        else:
            with pytest.raises(InputError, match=f"method '{name}'"):
                generate(*asked, pruner=pruner)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Features(mx.zeros((2, 12)), (3, 4)),
        lambda: Features(TOKENS, (3, 5)),
        lambda: Features(TOKENS, (3, 4), pictures=2),
        lambda: Features(TOKENS, (3, 4), extras={"attention": mx.zeros((2, 11))}),
        lambda: Features(TOKENS, (3, 4), extras={"text": mx.zeros((1, 5, 8))}),
        lambda: Selection(mx.zeros((4,), mx.int32)),
        lambda: Selection(mx.zeros((2, 4))),
        lambda: Selection(mx.zeros((2, 4), mx.int32), mx.zeros((2, 3, 12))),
        lambda: Selection(mx.zeros((2, 4), mx.int32), mask=mx.zeros((2, 3))),
    ],
)
def test_shapes_are_checked(make):
    with pytest.raises(ValueError, match=r"not|fit|other than"):
        make()


# Somebody's own methods -------------------------------------------------------------


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "corner_tokens.py").write_text(
        "import mlx.core as mx\n"
        "from mlx_tokprune import Selection\n"
        "def corner(features, *, keep, start: float = 0.0):\n"
        "    indices = mx.arange(keep, dtype=mx.int32) + int(start)\n"
        "    shape = (features.tokens.shape[0], keep)\n"
        "    return Selection(mx.broadcast_to(indices, shape))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("_METHODS", "_NAMES"):  # what this test registers goes with it
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    return "corner_tokens:corner"


def test_an_own_method_reaches_the_commands(own_module, capsys):
    budget = ["--method", own_module, "--keep-tokens", "4", "--json"]
    for run_command, more in ((command, ["--max-tokens", "1"]), (act, [])):
        run_command([*budget, *more, "--option", "start=2"])
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["kept_indices"] == [[2, 3, 4, 5]]
        assert record["method"] == own_module


@pytest.mark.parametrize("name", ["nowhere:f", "json:nothing", "json:decoder", ":"])
def test_own_methods_that_are_not_there(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command(["--method", name, "--keep-ratio", "0.5"])
    assert ended.value.code == 2
    assert "package.module:function" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["start", "start=x", "=3", "middle=2"])
def test_options_that_are_not_known(option, capsys):
    with pytest.raises(SystemExit) as ended:
        command(["--method", "norm", "--keep-ratio", "0.5", "--option", option])
    assert ended.value.code == 2
    assert "option" in capsys.readouterr().err


def test_the_logger_tells_places_counts_and_times(demo, caplog):
    with caplog.at_level(logging.DEBUG, "mlx_tokprune"):
        plan = [Pruner("norm", 0.5), Pruner("attention", 0.5, at=2)]
        picture = Image.new("RGB", (64, 64), "red")
        generate(*demo, [picture], "What is it?", pruner=plan, max_tokens=1)
    told = " | ".join(caplog.messages)
    assert "norm at tower: 64 -> 32 tokens" in told
    assert "attention at 2: 32 -> 16 tokens" in told
    assert "first token after" in told
