"""Scorers that learn the number of kept tokens: threshold, training and use."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from test_learned import features, samples

from mlx_tokprune import Features, InputError, Pruner, load
from mlx_tokprune.bench.__main__ import main as bench
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.coreml.export import export_package
from mlx_tokprune.evaluate.__main__ import main as evaluate
from mlx_tokprune.generate.__main__ import main as generate
from mlx_tokprune.generate.stream import stream_generate
from mlx_tokprune.pipeline.planning import plan_for
from mlx_tokprune.pruners.saliency import above
from mlx_tokprune.pruners.scorers import (
    AdaptiveScorer,
    PromptScorer,
    fold_budget,
    load_scorer,
    save_scorer,
)
from mlx_tokprune.report.__main__ import main as report
from mlx_tokprune.train.__main__ import main as train
from mlx_tokprune.train.batches import Batches
from mlx_tokprune.train.gate import above_threshold
from mlx_tokprune.train.loop import Loop, Schedule
from mlx_tokprune.train.packing import answer_logits
from mlx_tokprune.train.samples import Sample, read_samples
from mlx_tokprune.train.scorer import Lesson, ScorerLoss, score, scorer_for


def counting(scorer, given=None):
    """Return the scorer with an own count, and its scores spread around a threshold.

    given: features of which half of all tokens score above the threshold.
    """
    scorer.own_count = True
    scorer.score.weight = scorer.score.weight * 20
    if given is not None:
        scorer.score.bias = scorer.score.bias - mx.median(scorer(given))
    return scorer


class Given(nn.Module):
    """Scorer that returns the first channel of the tokens."""

    at, own_count = "tower", True

    def __call__(self, given):
        return given.tokens[..., 0]


def test_the_gate_is_hard_forward_and_a_sigmoid_backward():
    scores = mx.array([[0.3, 2.0, -1.0, -0.1], [-3.0, -0.5, -2.0, -0.7]])
    weights, tau = mx.array([[1.0, -2.0, 0.5, 3.0], [2.0, 1.0, -1.0, 0.5]]), 0.7
    np.testing.assert_allclose(
        above_threshold(scores, tau), [[1, 1, 0, 0], [0, 1, 0, 0]], atol=1e-6
    )

    def gated(scores):
        return mx.sum(weights * above_threshold(scores, tau))

    def soft(values):
        return np.sum(np.array(weights, np.float64) / (1 + np.exp(-values / tau)))

    found, values, step = mx.grad(gated)(scores), np.array(scores, np.float64), 1e-5
    for i in np.ndindex(2, 4):
        more, less = values.copy(), values.copy()
        more[i] += step
        less[i] -= step
        assert abs(found[i].item() - (soft(more) - soft(less)) / (2 * step)) < 1e-4


def test_a_hard_choice_has_no_gradient_to_scores():
    scores, weights = mx.array([[0.3, 2.0, -1.0, -0.1]]), mx.array([1.0, 2.0, 3.0, 4.0])

    def masked(scores):
        return mx.sum(weights * above(scores))

    def gathered(scores):
        chosen = Pruner("learned", scorer=Given())(Features(scores[..., None], None))
        return mx.sum(weights[chosen.indices])

    assert masked(scores).item() == gathered(scores).item() == 3
    assert mx.all(mx.grad(masked)(scores) == 0).item()
    with pytest.raises(ValueError, match="Cannot calculate VJP with respect to ind"):
        mx.grad(gathered)(scores)


@pytest.mark.parametrize("kind", ["adaptive", "asking"])
def test_the_training_forward_is_that_of_inference(tiny, kind):
    """The masked loss equals that of gathered tokens plus the sparsity penalty."""
    model, processor = tiny
    scorer = counting(scorer_for(model, kind))
    lesson = Lesson(4, 4, 1, noise=0.0, sparsity=2.0)
    batches = Batches(model, processor, samples())
    batch = batches.draw((0, 1), lesson.pictures, 1)
    middle = mx.median(score(model, scorer, batch, None))
    scorer.score.bias = scorer.score.bias - middle
    scores, expected, kept = score(model, scorer, batch, None), 0.0, []
    summed, count = ScorerLoss(model, batches, lesson)(scorer, (0, 1), 1)
    visual, total = model.project(batch.features.tokens), batch.features.total
    for i in range(len(scores)):
        chosen = Pruner("learned", scorer=Given())(
            Features(scores[i : i + 1, :, None], None)
        )
        asked = batches.of([batch.samples[i]], [batch.pairs[i]]).questions
        some = (chosen.apply(visual[i : i + 1]), chosen.indices)
        logits = answer_logits(model, batch.prefix, *some, asked, total)
        losses = nn.losses.cross_entropy(logits, mx.maximum(asked.targets, 0))
        expected += mx.sum(losses * (asked.targets >= 0)).item()
        kept.append(chosen.keep)
    assert len(set(kept)) > 1
    expected += 2.0 * np.mean(kept) / total * count.item()
    np.testing.assert_allclose(summed.item(), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", [AdaptiveScorer, PromptScorer])
def test_a_batch_has_other_counts_under_a_mask(kind):
    given = features(4, text=mx.random.normal((4, 5, 24), key=mx.random.key(1)))
    mx.random.seed(0)
    scorer = counting(kind(24), given)
    pruner = Pruner("learned", at=scorer.at, scorer=scorer)
    assert (pruner.method, pruner.has_own_count) == ("threshold", True)
    chosen, scores = pruner(given), np.array(scorer(given))
    counts = np.array(chosen.mask).sum(axis=1)
    assert len(set(counts.tolist())) > 1
    for i in range(4):
        kept = np.array(chosen.indices[i])[np.array(chosen.mask[i])]
        assert kept.tolist() == np.flatnonzero(scores[i] > 0).tolist()


def test_one_token_stays_at_least():
    scores = mx.array([[-1.0, -3.0, -0.5], [-2.0, -2.0, -2.0]])
    chosen = Pruner("learned", scorer=Given())(Features(scores[..., None], None))
    assert chosen.indices.tolist() == [[2], [0]]


@pytest.mark.parametrize("scorer", [AdaptiveScorer(24), PromptScorer(24)])
def test_a_budget_overrides_and_is_not_told(scorer):
    given = features(text=mx.random.normal((2, 5, 24)))
    scorer = counting(scorer)
    for keep in (1, 5, 11):
        pruner = Pruner("learned", keep_tokens=keep, at=scorer.at, scorer=scorer)
        assert not pruner.has_own_count
        best = np.sort(np.argsort(-np.array(scorer(given)), axis=1)[:, :keep], axis=1)
        assert pruner(given).indices.tolist() == best.tolist()


def kept_by(demo, scorer, picture, question):
    pruner = Pruner("learned", at=scorer.at, scorer=scorer)
    last = [*stream_generate(*demo, [picture], question, pruner=pruner, max_tokens=1)]
    return last[-1].visual.left()[0]


def test_the_picture_and_the_question_say_how_many(demo):
    mx.random.seed(2)
    model, _ = demo
    pictures = [p.path for p in PICTURES]
    at_tower = counting(scorer_for(model, "adaptive"))
    asking = counting(load_scorer("demo-asking"))  # one at random hardly hears
    questions = (
        "What is this?",
        "How many circles are there?",
        "What does the sign say?",
        "Where is the star?",
    )
    whole, *others = questions
    assert len({len(kept_by(demo, at_tower, p, whole)) for p in pictures}) > 1
    for other in others:
        both = (kept_by(demo, at_tower, pictures[0], q) for q in (whole, other))
        assert next(both) == next(both)
    asked = Sample(pictures[1], tuple((question, "2") for question in questions))
    batch = Batches(*demo, [asked]).of([asked], [asked.pairs])
    middle = mx.median(score(model, asking, batch, None))
    asking.score.bias = asking.score.bias - middle
    assert len({len(kept_by(demo, asking, pictures[1], q)) for q in questions}) > 1


def test_a_scorer_on_disk_says_that_it_counts(tmp_path, demo):
    model, _ = demo
    folder = str(tmp_path / "s")
    scorer = counting(scorer_for(model, "asking"))
    save_scorer(scorer, folder)
    pruner = Pruner(folder)
    assert (pruner.method, pruner.at) == ("threshold", "prompt")
    assert pruner.has_own_count
    assert not Pruner(folder, 0.1).has_own_count
    assert Pruner(**pruner.described()).has_own_count
    asked = PICTURES[0].path, PICTURES[0].question
    assert kept_by(demo, pruner.scorer, *asked) == kept_by(demo, scorer, *asked)
    file = tmp_path / "s" / "scorer.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"counts": "mine"}))
    with pytest.raises(InputError, match="says that 'mine' counts; expected budget or"):
        Pruner(folder)
    save_scorer(AdaptiveScorer(512), tmp_path / "t")
    assert Pruner(str(tmp_path / "t"), 0.1).method == "learned"


def trained(tiny, folder, lesson, stop=None):
    model, processor = tiny
    mx.random.seed(0)
    scorer = AdaptiveScorer(model.feature_size, width=16)
    scorer.own_count = True
    order = AdaptiveScorer(model.feature_size, width=16)
    loss = ScorerLoss(model, Batches(model, processor, samples()), lesson, order)
    loop = Loop(scorer, loss, Schedule(lesson.steps, 1e-2, save_every=1), folder)

    def after(step):
        if step == stop:
            raise KeyboardInterrupt

    loop.run(after)
    return scorer


@pytest.mark.parametrize("how", [{"sparsity": 1.0}, {"within": 0.1}])
def test_a_run_that_is_resumed_ends_in_the_same_bytes(tiny, tmp_path, how):
    lesson = Lesson(4, 2, 1, **how)
    whole = trained(tiny, tmp_path / "whole", lesson)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny, tmp_path / "parts", lesson, stop=2)
    parts = trained(tiny, tmp_path / "parts", lesson)
    pairs = zip(*(tree_flatten(s.parameters()) for s in (whole, parts)), strict=True)
    for (name, one), (_, two) in pairs:
        assert mx.array_equal(one, two), name


def test_a_higher_price_keeps_fewer(tiny, tmp_path):
    model, processor = tiny
    batch = Batches(model, processor, samples()).draw((9,), 6, 1)
    low, high = (
        trained(tiny, tmp_path / f"{price}", Lesson(20, 2, 1, sparsity=price))
        for price in (1e-3, 1e3)
    )
    gap = score(model, low, batch, None) - score(model, high, batch, None)
    assert mx.mean(gap).item() > 0.5


def gap_of(model, batch, question, kept):
    """Return the KL in nats of a question's masked answer from the unpruned one."""
    visual, every = model.project(batch.features.tokens), mx.arange(64)[None]
    asked = (batch.prefix, visual, every, batch.questions, 64, "original")
    gate = mx.where(mx.any(every == mx.array(kept)[:, None], axis=0), 0, -1e9)[None]
    whole, some = (
        np.array(answer_logits(model, *asked, g)[0, question], np.float64)
        for g in (mx.zeros((1, 64)), gate)
    )
    whole, some = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (whole, some))
    used = np.array(batch.questions.targets[0, question]) >= 0
    return ((np.exp(whole) * (whole - some)).sum(axis=-1) * used).sum()


def asking_of(demo):
    """Return two images, their batches, a lesson, and its loss with a known order."""
    model, processor = demo
    items = read_samples("demo", 2).items
    batches, order = Batches(model, processor, items), load_scorer("demo-asking")
    bounds = {"least": 0.05, "most": 0.2}
    lesson = Lesson(1, 2, 3, **bounds, within=0.05, sparsity=0.3)
    return items, batches, lesson, ScorerLoss(model, batches, lesson, order)


def test_what_a_question_needs_of_an_order(demo):
    """The goal is the shortest tried prefix of the order with KL within the limit."""
    (items, batches, _, loss), seen = asking_of(demo), set()
    model, _ = demo
    for item in items:
        batch = batches.of([item], [item.pairs])
        goal = np.array(loss._goal(batch, "prompt"))
        # Told 0.1 of 64, between the least and the most.
        scores = np.array(score(model, load_scorer("demo-asking"), batch, 6))
        for question, row in enumerate(goal):
            order = np.argsort(-scores[question], kind="stable")
            count = 12  # at most, and from 3: 0.2 and 0.05 of 64
            for keep in (9, 6, 4, 3):  # half as many more each time
                near = gap_of(model, batch, question, order[:keep]) <= 0.05
                count = keep if near else count
            assert np.flatnonzero(row).tolist() == np.sort(order[:count]).tolist()
            seen.add(count)
        assert loss._goal(batch, "tower").tolist() == [goal.max(axis=0).tolist()]
    assert len(seen) > 1


def test_needs_are_learned_by_cross_entropy(demo):
    (_, batches, _, loss), scorer = asking_of(demo), PromptScorer(192)
    scorer.own_count = True
    found, count = loss(scorer, (0,), 0)
    batch = batches.draw((0,), 2, 3)
    goals = np.array(loss._goal(batch, "prompt"))
    for row, pair in enumerate(pair for asked in batch.pairs for pair in asked):
        item = batch.samples[row // 3]
        every = loss._needed_of(batches.of([item], [item.pairs]))
        assert goals[row].tolist() == every[item.pairs.index(pair)].tolist()
    scores = np.array(score(demo[0], scorer, batch, None), np.float64)
    right = 1 / (1 + np.exp(-np.where(goals > 0, scores, -scores)))
    assert count.item() == 6
    prices = np.where(goals > 0, 1, 0.3)
    expected = -(prices * np.log(right)).mean(axis=1).sum()
    np.testing.assert_allclose(found.item(), expected, rtol=1e-4)


@pytest.mark.parametrize("scorer", [AdaptiveScorer(24), PromptScorer(24)])
def test_it_begins_with_the_scores_of_a_budget(scorer):
    given = features(text=mx.random.normal((2, 5, 24)))
    told = features(**given.extras, budget=mx.full((2,), 0.06))
    before, other = scorer(told), scorer(given)
    fold_budget(scorer, 0.06)
    np.testing.assert_allclose(scorer(given), before, atol=1e-5)
    assert mx.max(mx.abs(other - before)).item() > 1e-3


def test_a_scorer_begins_with_anothers_weights(tiny, demo, tmp_path):
    save_scorer(AdaptiveScorer(512), tmp_path / "s")
    begun = scorer_for(demo[0], str(tmp_path / "s"))
    known = dict(tree_flatten(load_scorer(tmp_path / "s").parameters()))
    for name, array in tree_flatten(begun.parameters()):
        assert mx.array_equal(array, known[name])
    with pytest.raises(InputError, match="trained for another model: its channels are"):
        scorer_for(tiny[0], str(tmp_path / "s"))


def test_a_package_has_fixed_shapes(tmp_path):
    model, _ = load("demo")
    pruner = Pruner("learned", scorer=counting(AdaptiveScorer(512)))
    with pytest.raises(
        InputError, match="'threshold' without a budget decides for each"
    ):
        export_package(model, pruner, tmp_path / "v.mlpackage")
    assert not (tmp_path / "v.mlpackage").exists()
    asking = Pruner("learned", scorer=counting(PromptScorer(192)), at="prompt")
    with pytest.raises(InputError, match="reads the prompt"):
        export_package(model, asking, tmp_path / "v.mlpackage")


def test_every_command_takes_one_without_a_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--pictures", "3", "--batch", "2", "--steps", "2"]
    price, near = ["--sparsity", "1"], ["--within", "0.1", "--questions", "2"]
    train(["prune", "--scorer", "asking", "--output", "s", *common, *price])
    train(["prune", "--scorer", "demo-adaptive", "--output", "t", *common, *near])
    train(["prune", "--scorer", "s", "--output", "u", *common, *near])
    picture = ["--image", str(PICTURES[0].path), "--prompt", "What is this?"]
    for name in "stu":
        generate(["--model", "demo", *picture, "--method", name])
        assert "(threshold, original positions)" in capsys.readouterr().out
    generate(["--model", "demo", *picture, "--method", "s", "--keep-tokens", "5"])
    assert "kept 5 (threshold" in capsys.readouterr().out
    rows = ["--methods", "s", "t", "--keep-ratios", "0.1"]
    evaluate(["--pictures", "1", *rows, "--output", "e.json"])
    result = json.loads((tmp_path / "e.json").read_text())
    found = {row["label"]: row for row in result["rows"]}
    assert list(found) == ["none", "s own count", "s 0.1", "t own count", "t 0.1"]
    for row in found.values():
        assert 1 <= row["least"] <= row["kept"] <= row["most"] <= 64
    capsys.readouterr()
    bench(["--model", "demo", *rows, "--runs", "1", "--output", "b.json"])
    assert "| s own count |" in capsys.readouterr().out
    report(["e.json", "--output", "r.html"])
    assert (tmp_path / "r.html").exists()


def test_its_network_is_part_of_the_cost(tmp_path):
    """A scorer with an own count costs as much as under an equal budget."""
    from mlx_tokprune.measure.subject import Request, subject_of

    subject = subject_of("demo", *load("demo"))
    scorer = counting(AdaptiveScorer(512))
    own = Pruner("learned", scorer=scorer)

    def count(pruner):
        image = Image.open(PICTURES[0].path)
        plan = plan_for(subject.model, pruner)
        return subject.count(Request([image], "What is this?", plan, "original"))

    counted = count(own)
    budget = Pruner("learned", keep_tokens=int(counted.tokens.left), scorer=scorer)
    same = count(budget)
    assert counted.costs["prune"].flops == same.costs["prune"].flops > 0
    assert counted.flops == same.flops


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--within", "0.1"], "folder of a trained scorer, not 'adaptive'"),
        (["--sparsity", "1", "--imitate", "1"], "sparsity and within a count"),
        (["--sparsity", "-1"], "sparsity -1 is outside (0, 1e6]"),
        (["--within", "0"], "within 0 is outside (0, 1000]"),
        (["--sparsity", "1", "--keep-ratios", "0.1", "0.2"], "leave out --curriculum"),
        (["--sparsity", "1", "--curriculum", "0.2"], "leave out --curriculum"),
        (["--scorer", "nowhere"], "or the folder of one"),
    ],
)
def test_bad_options(tmp_path, capsys, arguments, message):
    more = ["--pictures", "1", "--steps", "1", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        train(["prune", *arguments, *more])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
