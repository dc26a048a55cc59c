"""Scorers, their training gate, the training loop, and adapters."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_tokprune import Features, InputError, Pruner, generate, load
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.pipeline.planning import plan_for
from mlx_tokprune.pruners.scorers import (
    AdaptiveScorer,
    ConstantScorer,
    PromptScorer,
    TowerScorer,
    load_scorer,
    save_scorer,
)
from mlx_tokprune.train.__main__ import main as train
from mlx_tokprune.train.batches import Batches
from mlx_tokprune.train.gate import annealed, log_gate, straight_through, tamed
from mlx_tokprune.train.loop import Loop, Schedule
from mlx_tokprune.train.packing import answer_logits
from mlx_tokprune.train.samples import Sample, read_samples
from mlx_tokprune.train.scorer import Lesson, ScorerLoss, score, scorer_for


def features(batch=2, side=4, channels=24, seed=0, **extras):
    tokens = mx.random.normal((batch, side * side, channels), key=mx.random.key(seed))
    return Features(tokens, (side, side), extras=extras)


def samples(count=6):
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        image = Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8))
        pairs = (("What is it?", f"number {number}"), ("How many?", str(number)))
        made.append(Sample(number, pairs, image.copy))
    return made


def test_the_gate_is_hard_forward_and_a_sigmoid_backward():
    scores = mx.array([[0.3, 2.0, -1.0, 0.9, 0.5]])
    weights = mx.array([[1.0, -2.0, 0.5, 3.0, 1.5]])
    tau = 0.7
    gate = straight_through(scores, 2, tau)
    np.testing.assert_allclose(gate, [[0, 1, 0, 1, 0]], atol=1e-6)
    found = mx.grad(lambda s: mx.sum(weights * straight_through(s, 2, tau)))(scores)
    threshold = (0.9 + 0.5) / 2

    def soft(values):
        return float(
            np.sum(np.array(weights) / (1 + np.exp(-(values - threshold) / tau)))
        )

    values, step = np.array(scores, np.float64), 1e-5
    for i in range(5):
        more, less = values.copy(), values.copy()
        more[0, i] += step
        less[0, i] -= step
        expected = (soft(more) - soft(less)) / (2 * step)
        assert abs(found[0, i].item() - expected) < 1e-4


def test_a_hard_gather_has_no_gradient_to_scores():
    tokens = mx.random.normal((1, 5, 3))

    def gathered(scores):
        order = mx.argsort(-scores, axis=1)[:, :2]
        order = mx.stop_gradient(order)  # MLX has no gradient here, and says so
        return mx.sum(mx.take_along_axis(tokens, order[..., None], axis=1))

    assert mx.all(mx.grad(gathered)(mx.array([[0.3, 2, -1, 0.9, 0.5]])) == 0).item()


def test_large_gradients_come_down_to_those_of_their_sample():
    large = mx.array([[1e6, -2.0, 1.0, 0.5, 0.1, 0.0, -1.0, 2.0, 1.0, -3.0]])
    found = np.array(
        mx.grad(lambda gate: mx.sum(large * tamed(gate)))(mx.ones((1, 10)))
    )
    assert (np.sign(found) == np.sign(np.array(large))).all()
    assert np.abs(found).max() <= 1
    assert found[0, 0] == np.abs(found).max()
    np.testing.assert_allclose(tamed(large), large)


def test_schedules_at_their_ends():
    assert annealed(1.0, 0.3, 0, 10) == 1.0
    assert (
        annealed(1.0, 0.3, 10, 10) == annealed(1.0, 0.3, 99, 10) == pytest.approx(0.3)
    )
    assert annealed(0.5, 0.0, 5, 10) == 0.25


@pytest.mark.parametrize("kind", ["adaptive", "inside", "asking"])
def test_the_training_forward_is_that_of_inference(tiny, kind):
    """The loss of a training step equals the loss of the kept tokens alone."""
    model, processor = tiny
    scorer, plan = scorer_for(model, kind), Lesson(4, 3, 1, noise=0.0)
    needs = ("blocks",) if kind == "inside" else ()
    batches = Batches(model, processor, samples(), needs)
    summed, count = ScorerLoss(model, batches, plan)(scorer, (0, 1), 1)
    batch = batches.draw((0, 1), 3, 1)
    rng = np.random.default_rng((0, 1, 1))
    keep = plan.keep(rng, 1, batch.features.total)
    scores = score(model, scorer, batch, keep)
    kept = mx.sort(mx.argsort(-scores, axis=1)[:, :keep], axis=1)
    visual = model.project(batch.features.tokens)
    some = mx.take_along_axis(visual, kept[..., None], axis=1)
    asked = (batch.questions, batch.features.total)
    logits = answer_logits(model, batch.prefix, some, kept, *asked)
    targets = batch.questions.targets
    losses = nn.losses.cross_entropy(logits, mx.maximum(targets, 0))
    expected = mx.sum(losses * (targets >= 0))
    assert count.item() == mx.sum(targets >= 0).item()
    np.testing.assert_allclose(summed.item(), expected.item(), rtol=1e-4)


def test_an_open_gate_changes_nothing(tiny):
    model, processor = tiny
    batch = Batches(model, processor, samples()).draw((0,), 2, 2)
    visual = model.project(batch.features.tokens)
    every = mx.broadcast_to(mx.arange(visual.shape[1]), visual.shape[:2])
    asked = (model, batch.prefix, visual, every, batch.questions, visual.shape[1])
    plain = answer_logits(*asked)
    gated = answer_logits(*asked, "original", log_gate(mx.ones(visual.shape[:2])))
    np.testing.assert_allclose(plain, gated, atol=1e-5)


@pytest.mark.parametrize(
    "scorer", [AdaptiveScorer(24), TowerScorer(24, (8, 2)), PromptScorer(24)]
)
def test_budgets_and_batches(scorer):
    """Exactly K tokens stay; scores depend on the budget, not on other samples."""
    text, blocks = (mx.random.normal(shape) for shape in ((2, 5, 24), (2, 16, 10)))
    given = features(text=text, blocks=blocks)
    for keep in (1, 7, 15):
        chosen = Pruner("learned", keep_tokens=keep, at=scorer.at, scorer=scorer)(given)
        assert chosen.indices.shape == (2, keep)
    few, many = (
        scorer(features(text=text, blocks=blocks, budget=mx.full((2,), share)))
        for share in (0.1, 0.9)
    )
    assert mx.max(mx.abs(few - many)).item() > 1e-6
    alone = {name: array[:1] for name, array in given.extras.items()}
    one = scorer(Features(given.tokens[:1], given.grid, extras=alone))
    np.testing.assert_allclose(scorer(given)[:1], one, atol=1e-5)


def test_what_is_not_told_its_budget_does_not_see_it():
    scorer = ConstantScorer(24)
    few, many = (scorer(features(budget=mx.full((2,), s))) for s in (0.1, 0.9))
    assert mx.array_equal(few, many)


def test_the_budget_is_a_token_inside():
    """The budget is one more token, constant at first and then mixed with others."""
    scorer, seen = TowerScorer(24, (8, 2)), []

    def watch(x, block):
        seen.append(x)
        return block(x)

    scorer.blocks = [functools.partial(watch, block=b) for b in scorer.blocks]
    given = features(blocks=mx.random.normal((2, 16, 10)))
    scorer(given)
    scorer(features(blocks=given.extras["blocks"].at[:, 0, 0].add(1)))
    (first, second, _), (again, other, _) = seen[:3], seen[3:]
    assert first.shape == second.shape == (2, 17, 48)
    assert mx.array_equal(first[:, -1], again[:, -1])
    assert mx.array_equal(first[0, -1], first[1, -1])
    assert mx.max(mx.abs(second[:, -1] - other[:, -1])).item() > 1e-6


def test_a_scorer_inside_leaves_the_tower_as_it_is(tiny):
    """Extra outputs do not change the features; every weight has a gradient."""
    model, processor = tiny
    pixels = mx.random.uniform(shape=(2, 64 * 2, 64 * 3, 3))
    plain, read = model.encode(pixels), model.encode(pixels, ("blocks",))
    assert mx.array_equal(plain.tokens, read.tokens)
    scorer = scorer_for(model, "inside")
    batches = Batches(model, processor, samples(), ("blocks",))
    loss = ScorerLoss(model, batches, Lesson(4, 3, 1))
    (_, _), gradients = nn.value_and_grad(scorer, loss)(scorer, (0, 1), 1)
    for name, gradient in tree_flatten(gradients):
        assert mx.max(mx.abs(gradient)).item() > 0, name


def test_blocks_are_per_token():
    with pytest.raises(ValueError, match="blocks has shape"):
        features(blocks=mx.zeros((2, 15, 10)))


def test_models_without_blocks_are_refused(tiny_policy):
    model, _ = tiny_policy
    message = "reads blocks, which this model does not have at 'tower'"
    with pytest.raises(InputError, match=message):
        scorer_for(model, "inside")
    pruner = Pruner("learned", 0.5, scorer=TowerScorer(24, (8, 2)))
    with pytest.raises(InputError, match="needs blocks, which this model does not"):
        plan_for(model, pruner)


def test_padding_of_questions_is_not_seen():
    scorer, text = PromptScorer(24), mx.random.normal((2, 5, 24))
    mask = mx.arange(5) < mx.array([[3], [5]])
    padded = scorer(features(text=text, text_mask=mask))
    alone = scorer(
        Features(features().tokens[:1], (4, 4), extras={"text": text[:1, :3]})
    )
    np.testing.assert_allclose(padded[:1], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["demo-adaptive", "demo-inside", "demo-asking"])
def test_embedded_scorers_answer(demo, name):
    model, processor = demo
    for picture in PICTURES:
        asked = (model, processor, [picture.path], picture.question)
        assert generate(*asked, pruner=Pruner(name, 0.11)) == picture.answer


def test_a_scorer_on_disk(tmp_path, demo):
    model, processor = demo
    inside = scorer_for(model, "inside")
    for name, scorer in (
        ("a", AdaptiveScorer(512)),
        ("b", PromptScorer(192)),
        ("c", inside),
    ):
        save_scorer(scorer, tmp_path / name)
        again = load_scorer(tmp_path / name)
        for (key, one), (_, two) in zip(
            tree_flatten(scorer.parameters()),
            tree_flatten(again.parameters()),
            strict=True,
        ):
            assert mx.array_equal(one, two), key
        pruner = Pruner(str(tmp_path / name), 0.25)
        assert (pruner.method, pruner.at) == ("learned", scorer.at)
        assert Pruner(**pruner.described()).at == scorer.at
        same = Pruner("learned", 0.25, at=scorer.at, scorer=scorer)
        asked = (model, processor, [PICTURES[0].path], PICTURES[0].question)
        assert generate(*asked, pruner=pruner) == generate(*asked, pruner=same)
    with pytest.raises(InputError, match="was trained for 'prompt', not 'tower'"):
        Pruner(str(tmp_path / "b"), 0.25, at="tower")


def test_a_scorer_of_another_class_is_not_written(tmp_path):
    class Odd(nn.Module):
        at, needs, own_count = "tower", (), False

    pruner = Pruner("learned", 0.5, scorer=Odd())
    with pytest.raises(InputError, match="scorer of class Odd; expected AdaptiveSc"):
        save_scorer(pruner.scorer, tmp_path / "odd")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scorer": "adaptiv"}, "Did you mean 'adaptive'"),
        ({"settings": {"channels": 512, "width": -1}}, "sizes are no whole numbers"),
        ({"settings": {"channels": 512, "depth": 2}}, "no scorer that can be read"),
        ({"settings": {"channels": 8}}, "no scorer that can be read"),
        ({"settings": {"channels": 8, "sizes": [8, 0]}}, "sizes are no whole numbers"),
    ],
)
def test_damaged_scorers_are_refused(tmp_path, change, message):
    save_scorer(AdaptiveScorer(512), tmp_path / "s")
    file = tmp_path / "s" / "scorer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        Pruner(str(tmp_path / "s"), 0.5)


def trained(tiny, folder, steps, stop=None):
    model, processor = tiny
    batches, plan = Batches(model, processor, samples()), Lesson(steps, 2, 1)
    mx.random.seed(0)
    scorer = AdaptiveScorer(model.feature_size, width=16)
    how = Schedule(steps, 1e-3, save_every=1)
    loop = Loop(scorer, ScorerLoss(model, batches, plan), how, folder)

    def after(step):
        if step == stop:
            raise KeyboardInterrupt

    loop.run(after)
    return scorer


def test_a_run_that_is_resumed_ends_in_the_same_bytes(tiny, tmp_path):
    whole = trained(tiny, tmp_path / "whole", 4)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny, tmp_path / "parts", 4, stop=2)
    parts = trained(tiny, tmp_path / "parts", 4)
    for (name, one), (_, two) in zip(
        tree_flatten(whole.parameters()), tree_flatten(parts.parameters()), strict=True
    ):
        assert mx.array_equal(one, two), name
    with pytest.raises(InputError, match="training with other settings"):
        trained(tiny, tmp_path / "parts", 5)


def test_samples_from_files(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    lines = [
        json.dumps({"image": "a.png", "question": "What?", "answer": "black"}),
        "no json",
        json.dumps({"image": "missing.png", "question": "What?", "answer": "x"}),
        json.dumps({"image": "a.png", "question": "What?"}),
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    found = read_samples(str(tmp_path / "lines.jsonl"), 1)
    assert [item.pairs for item in found.items] == [(("What?", "black"),)]
    assert [number for number, _ in found.skipped] == [2, 3, 4]
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "black"},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "yes"},
    ]
    entries = [{"image": "a.png", "conversations": turns}, {"image": 3}]
    (tmp_path / "llava.json").write_text(json.dumps(entries))
    found = read_samples(str(tmp_path / "llava.json"), 1)
    assert found.items[0].pairs == (("What?", "black"), ("Sure?", "yes"))
    assert found.skipped == ((2, "has no image"),)
    (tmp_path / "empty.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="nothing to learn from"):
        read_samples(str(tmp_path / "empty.jsonl"), 1)


@pytest.mark.parametrize("dora", [[], ["--dora"]])
def test_an_adapter_is_trained_used_and_fused(tmp_path, packages, dora):
    """A fused adapter from the command line answers like the adapter."""
    out, fused = str(tmp_path / "adapter"), str(tmp_path / "fused")
    common = ["--pictures", "3", "--batch", "2", "--questions", "1", "--steps", "2"]
    train(["lora", "--rank", "2", "--output", out, *common, *dora])
    weights = mx.load(f"{out}/adapters.safetensors")
    assert any(mx.any(a != 0).item() for n, a in weights.items() if n.endswith("_b"))
    train(["fuse", "--adapter-path", out, "--output", fused])
    adapted, _ = load("demo", adapter_path=out)
    merged, _ = load(fused)
    ids = mx.array([[1, 5, 9, 30]])
    logits, same = adapted(ids), merged(ids)
    effect = mx.max(mx.abs(logits - load("demo")[0](ids))).item()
    assert effect > 1e-3
    assert mx.max(mx.abs(logits - same)).item() < 0.05 * effect


def test_a_scorer_is_trained_on_the_command_line(tmp_path):
    for kind in ("adaptive", "inside", "constant", "asking"):
        out = str(tmp_path / kind)
        common = ["--pictures", "3", "--batch", "2", "--steps", "2"]
        more = [] if kind == "asking" else ["--questions", "2"]
        train(["prune", "--scorer", kind, "--output", out, *common, *more])
        assert Pruner(out, 0.25).scorer is not None
        assert (tmp_path / f"{kind}.training" / "loss.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--scorer", "adaptve"], "Did you mean 'adaptive'"),
        (["prune", "--keep-ratios", "0.5", "0.1"], "out of order"),
        (["prune", "--data", "nothing.jsonl"], "does not exist"),
        (["prune", "--steps", "0"], "whole numbers from 1"),
        (["prune", "--imitate", "4", "--pictures", "1"], "expected 0 to 3"),
        (["prune", "--alone", "1", "--pictures", "1"], "where more are kept"),
        (
            ["prune", "--sharpen", "0", "--pictures", "1", "--steps", "1"],
            "sharpen 0 is outside (0, 16]",
        ),
        (
            ["lora", "--method", "lightvla", "--pictures", "1"],
            "decides itself how many",
        ),
        (["lora", "--rank", "0"], "rank and layers"),
        (["fuse", "--adapter-path", "nowhere"], "no adapter_config.json"),
    ],
)
def test_bad_training_options(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        train([*arguments, "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())  # no training is begun, either


TWICE = """
import sys, mlx_tokprune
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_tokprune import load
from mlx_tokprune.pruners.scorers import AdaptiveScorer
from mlx_tokprune.train.batches import Batches
from mlx_tokprune.train.samples import read_samples
from mlx_tokprune.train.loop import Loop, Schedule
from mlx_tokprune.train.scorer import Lesson, ScorerLoss

model, processor = load("demo")
batches = Batches(model, processor, read_samples("demo", 3).items)
mx.random.seed(0)
scorer, folder = AdaptiveScorer(512, 16), Path(sys.argv[2])
loss = ScorerLoss(model, batches, Lesson(2, 1, 1))
loop = Loop(scorer, loss, Schedule(2, 1e-3, accumulate=int(sys.argv[1])), folder)
loop.run()
if loop.is_first:
    mx.savez(str(folder / "w.npz"), **dict(tree_flatten(scorer.parameters())))
"""


def test_two_processes_equal_one(tmp_path):
    """Two processes give the weights of one process that accumulates two batches."""
    script = tmp_path / "twice.py"
    script.write_text(TWICE)
    launcher = Path(sys.executable).with_name("mlx.launch")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    subprocess.run([sys.executable, script, "2", one], check=True)
    start = [launcher, "-n", "2", "--backend", "ring", "--", sys.executable]
    limits = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([*start, script, "1", two], check=True, env=os.environ | limits)
    alone, both = (np.load(f"{folder}/w.npz") for folder in (one, two))
    for name in alone.files:
        np.testing.assert_allclose(alone[name], both[name], atol=1e-6, err_msg=name)
