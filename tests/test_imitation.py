"""Scorers that imitate attention, single-token answers or gradients."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_tokprune.errors import InputError
from mlx_tokprune.models.language import TokenSequence
from mlx_tokprune.pruners.scorers import AdaptiveScorer, load_scorer
from mlx_tokprune.train import scorer as scorer_module
from mlx_tokprune.train.__main__ import main as train
from mlx_tokprune.train.batches import Batches
from mlx_tokprune.train.samples import read_samples
from mlx_tokprune.train.scorer import (
    GRADIENT,
    Lesson,
    ScorerLoss,
    goal_of,
    score,
    scorer_for,
)


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
@pytest.mark.parametrize("sharpen", [1.0, 2.0])
def test_a_scorer_imitates_layers(demo, sharpen, layers):
    """The goal is the attention of the last prompt token in the given layers."""
    model, processor = demo
    batches = Batches(model, processor, read_samples("demo", 2).items)
    plan, scorer = Lesson(1, 2, 2, imitate=layers, sharpen=sharpen), AdaptiveScorer(512)
    loss, count = ScorerLoss(model, batches, plan)(scorer, (0,), 0)
    drawn = batches.draw((0,), 2, 2).samples
    batch = batches.of(drawn, [item.pairs for item in drawn])
    keep = plan.keep(np.random.default_rng((0, 1)), 0, 64)
    logs = np.array(score(model, scorer, batch, keep), np.float64)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
    expected, visual = 0.0, model.project(batch.features.tokens)
    for i in range(2):
        attention = np.zeros(64)
        for j in range(len(batch.samples[i].pairs)):
            ids = batch.questions.ids[i, j][: int(batch.prompt[i, j].sum().item())]
            parts = [mx.array(batch.prefix), ids]
            before, after = (model.decoder.embed(part[None]) for part in parts)
            hidden = mx.concatenate([before, visual[i : i + 1], after], axis=1)
            last, seen = mx.array([[hidden.shape[1] - 1]]), np.zeros(64)
            for number in range(max(layers) + 1):
                if number in layers:
                    all_ = np.array(model.decoder.attention_to(number, hidden, last))
                    seen += all_[0, 0, len(batch.prefix) :][:64]
                hidden = model.layers[number](hidden, "causal", None)
            attention += seen**sharpen / (seen**sharpen).sum() / 8
        expected -= (attention * logs[i]).sum()
    assert count.item() == 2
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-4)


def alone_by_hand(model, batch, row: int, tried: list[int]) -> np.ndarray:
    """Return the probability of the answer with each of these tokens alone."""
    ids, targets = (
        batch.questions.ids[0, row],
        np.array(batch.questions.targets[0, row]),
    )
    start, total = len(batch.prefix), batch.features.total
    before, after = (
        model.decoder.embed(part[None]) for part in (mx.array(batch.prefix), ids)
    )
    visual, found = model.project(batch.features.tokens), []
    for number in tried:
        one = visual[:, number : number + 1]
        places = [*range(start), start + number]
        places += [start + total + place for place in range(len(ids))]
        hidden = mx.concatenate([before, one, after], axis=1)
        sequence = TokenSequence(hidden, mx.array(places), places[-1] + 1)
        read = model.decoder.read(sequence, rows=len(ids))
        logs = nn.log_softmax(model.decoder.logits(read.hidden)[0], axis=-1)
        logs = [logs[i, t].item() for i, t in enumerate(targets) if t >= 0]
        found.append(np.exp(sum(logs)))
    return np.array(found)


@pytest.mark.parametrize("sharpen", [1.0, 2.0])
def test_few_tokens_imitate_what_each_alone_answers(demo, sharpen):
    """Small budgets imitate single-token answers; larger ones imitate attention."""
    model, processor = demo
    batches = Batches(model, processor, read_samples("demo", 1).items)
    how = {"imitate": (1,), "alone": 1, "sharpen": sharpen}
    plan = Lesson(1, 1, 2, 0.016, 0.016, **how)
    batch = batches.draw((0,), 1, 2)
    loss = ScorerLoss(model, batches, plan)
    (item,) = batch.samples
    whole = batches.of([item], [item.pairs])
    attention, expected = np.array(loss._imitated(whole)[0]), np.zeros((8, 64))
    for row, seen in enumerate(attention):
        tried = np.argsort(-seen)[:8].tolist()
        likely = alone_by_hand(model, whole, row, tried) ** sharpen
        expected[row, tried] = likely / likely.sum()
    assert np.abs(expected - attention).max() > 0.1
    rows = [item.pairs.index(pair) for pair in batch.pairs[0]]
    for scorer, goal in (
        (scorer_for(model, "asking"), expected[rows]),
        (AdaptiveScorer(512), expected.mean(0, keepdims=True)),
    ):
        summed, count = loss(scorer, (0,), 0)
        scores = np.array(score(model, scorer, batch, 1), np.float64)
        logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        assert count.item() == len(goal)
        np.testing.assert_allclose(summed.item(), -(goal * logs).sum(), rtol=1e-4)
    more = ScorerLoss(model, batches, Lesson(1, 1, 2, 0.05, 0.05, **how))
    plain = ScorerLoss(
        model, batches, Lesson(1, 1, 2, 0.05, 0.05, **how | {"alone": 0})
    )
    scorer = scorer_for(model, "asking")
    assert more(scorer, (0,), 0)[0].item() == plain(scorer, (0,), 0)[0].item()


def test_training_goes_on_from_a_scorer(tmp_path):
    """After a negligible step the scorer is the initial one, with its options."""
    out = tmp_path / "more"
    asked = ["prune", "--scorer", "demo-asking", "--imitate", "1", "--alone", "1"]
    asked += ["--pictures", "1", "--batch", "1", "--steps", "1", "--questions", "2"]
    train([*asked, "--learning-rate", "1e-9", "--output", str(out)])
    found, given = (
        load_scorer(out).score.weight,
        load_scorer("demo-asking").score.weight,
    )
    np.testing.assert_allclose(found, given, atol=1e-6)
    about = json.loads((out / "scorer.json").read_text())["trained"]
    assert (about["imitate"], about["alone"]) == ([1], 1)


@pytest.mark.parametrize("sharpen", [1.0, 2.0])
def test_a_scorer_imitates_the_gradient_of_the_answers(demo, sharpen, monkeypatch):
    """The goal is the gradient norm of the right answer's logits by token."""
    monkeypatch.setattr(scorer_module, "_AT_ONCE", 3)
    model, processor = demo
    batches = Batches(model, processor, read_samples("demo", 1).items)
    (item,) = batches.samples
    batch = batches.of([item], [item.pairs])
    visual = model.project(batch.features.tokens)
    loss = ScorerLoss(model, batches, Lesson(1, imitate="gradient", sharpen=sharpen))
    for row in (0, len(item.pairs) - 1):
        targets = np.array(batch.questions.targets[0, row])
        ids = batch.questions.ids[0, row]

        def said(visual, ids=ids, targets=targets):
            before = model.decoder.embed(mx.array(batch.prefix)[None])
            after = model.decoder.embed(ids[None])
            hidden = mx.concatenate([before, visual, after], axis=1)
            for layer in model.layers:
                hidden = layer(hidden, "causal", None)
            logits = model.decoder.logits(model.decoder.norm(hidden))[0, -len(ids) :]
            return sum(logits[i, t] for i, t in enumerate(targets) if t >= 0)

        moved = np.linalg.norm(np.array(mx.grad(said)(visual)[0], np.float64), axis=1)
        expected = (moved / moved.sum()) ** sharpen
        found = np.array(loss.goals(item, False)[row])
        np.testing.assert_allclose(found, expected / expected.sum(), rtol=2e-3)


def test_the_goal_is_the_gradient_or_layers(demo):
    assert goal_of(["gradient"]) == GRADIENT
    assert goal_of(["2", "0", "2"]) == (0, 2)
    for words in (["gradient", "1"], ["-1"], ["1", "gradien"]):
        with pytest.raises(
            InputError, match="expected 'gradient' alone, or numbers"
        ) as e:
            goal_of(words)
        assert ("Did you mean 'gradient'" in str(e.value)) == ("gradien" in words)
    with pytest.raises(InputError, match="cannot imitate 'gradien'"):
        Lesson(1, imitate="gradien")
    with pytest.raises(InputError, match="no layer 4 to imitate; expected 0 to 3"):
        ScorerLoss(demo[0], None, Lesson(1, imitate=(0, 4)))
