"""Adapters trained under plans that prune at any place."""

import copy
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_tokprune import InputError, load
from mlx_tokprune.convert import convert
from mlx_tokprune.pipeline import Scene, run, tower_needs
from mlx_tokprune.pipeline.planning import plan_for
from mlx_tokprune.pruners import read_plan
from mlx_tokprune.train import lora
from mlx_tokprune.train.__main__ import main as train
from mlx_tokprune.train.answers import answer_loss, answers, is_shared
from mlx_tokprune.train.batches import Batches
from mlx_tokprune.train.loop import Loop, Schedule
from mlx_tokprune.train.lora import Adapter, replace_quantized, train_adapter
from mlx_tokprune.train.packing import divergence, unpruned_logits
from mlx_tokprune.train.samples import read_samples

# A plan, and whether questions about a picture share a sequence under it.
PLANS = {
    "norm:0.25": True,
    "divprune:0.25@prompt": True,
    "visionzip:0.25+dart:0.5": True,
    "cdpruner:0.25": False,
    "trimvla:0.25": False,
    "demo-asking:0.11": False,
    "fastv:0.25": False,
    "attention:0.25@3": False,
    "pyramiddrop:0.5": False,
    "sparsevlm:0.5": False,
    "visionzip:0.25@2": False,
    "norm:0.5+demo-asking:0.5+fastv:0.5": False,
}
SOME = ("norm:0.25", "demo-asking:0.11", "fastv:0.25")


@pytest.fixture(scope="module")
def samples():
    return read_samples("demo", 3)


def drawn(model, processor, samples, plan, pictures=2, questions=3):
    batches = Batches(model, processor, samples.items, tower_needs(plan))
    return batches.draw((0,), pictures, questions)


def expected(model, processor, batch, i: int, j: int, plan, positions: str):
    """Return (A, V) logits of one question, decoded with a cache, and its targets."""
    ids = np.array(batch.questions.ids[i, j])
    targets = np.array(batch.questions.targets[i, j])
    answer = targets[targets >= 0].tolist()
    begin = int(batch.prompt[i, j].sum().item())
    text = processor.tokenizer.decode(ids[:begin].tolist())
    question = next(q for q, _ in batch.samples[i].pairs if q in text)
    pixels = mx.array(processor.pixels([batch.samples[i].load()]))
    scene = Scene(pixels, processor.prompt(question, 1))
    assert scene.prompt.segments[1] == tuple(ids[:begin])
    cache = model.decoder.make_cache()
    read, _ = run(model, scene, plan, positions=positions, cache=cache)
    found = [model.decoder.logits(read.hidden)[0]]
    for token in answer[:-1]:
        hidden = model.decoder.follow(mx.array([[token]]), read.cache)
        found.append(model.decoder.logits(hidden)[0])
    return np.array(mx.concatenate(found)), targets >= 0


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("text", PLANS)
def test_the_training_forward_is_that_of_inference(demo, samples, text, positions):
    model, processor = demo
    plan = plan_for(model, read_plan(text))
    assert is_shared(plan) == PLANS[text]
    batch = drawn(model, processor, samples, plan)
    logits = np.full((*batch.questions.ids.shape, 512), np.nan)
    for part, at in answers(model, batch, plan, positions):
        where = tuple(np.array(a) if isinstance(a, mx.array) else a for a in at)
        if len(where) == 3:  # rows, columns and a range of tokens
            for n, (i, j) in enumerate(zip(*where[:2], strict=True)):
                logits[i, j, where[2]] = np.array(part)[n]
        else:
            logits[where] = np.array(part)
    for i in range(2):
        for j in range(3):
            right, used = expected(model, processor, batch, i, j, plan, positions)
            error = np.abs(logits[i, j, used] - right).max()
            assert error < 1e-4 * np.abs(right).max()


# Few tokens: a loss that is almost 0 has no slope to speak of.
STRONG = ("norm:0.05", "demo-asking:0.02", "attention:0.05@1", "visionzip:0.05@2")


@pytest.mark.parametrize("text", [*STRONG, "cdpruner:0.05"])
def test_gradients_are_those_of_a_choice_that_stays(demo, samples, text):
    """The gradient equals the slope of the loss along its own direction."""
    model, processor = demo
    model = copy.deepcopy(model)
    plan = plan_for(model, read_plan(text))
    mx.random.seed(0)
    Adapter(rank=2, projector=True).add_to(model)
    batches = Batches(model, processor, samples.items, tower_needs(plan))
    loss = answer_loss(model, batches, plan, "contiguous", (2, 2))
    sums = nn.value_and_grad(model, lambda m: loss(m, (0,), 0)[0])
    _, gradients = sums(model)
    found = dict(tree_flatten(gradients))
    assert any("mm_projector" in name for name in found)
    before = dict(tree_flatten(model.trainable_parameters()))
    norm = np.sqrt(sum(mx.sum(g * g).item() for g in found.values()))
    values, step = [], 5e-4 / norm
    for sign in (1, -1):
        moved = {n: before[n] + sign * step * found[n] for n in before}
        model.load_weights(list(moved.items()), strict=False)
        values.append(loss(model, (0,), 0)[0].item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(norm**2, rel=0.05)


@pytest.mark.parametrize("text", ["cdpruner:0.25", "demo-asking:0.05", "random:0.05@1"])
@pytest.mark.parametrize("distill", [0, 1])
def test_some_steps_lower_the_loss(demo, samples, tmp_path, text, distill):
    model, processor = demo
    teacher, model = model, copy.deepcopy(model)
    plan = plan_for(model, read_plan(text))
    mx.random.seed(0)
    Adapter(rank=4).add_to(model)
    batches = Batches(model, processor, samples.items, tower_needs(plan))
    loss = answer_loss(model, batches, plan, "contiguous", (2, 4), distill, teacher)
    before = loss(model, (0, 1), 0)[0].item()
    Loop(model.language_model, loss, Schedule(10, 1e-3), tmp_path).run()
    assert loss(model, (0, 1), 0)[0].item() < 0.7 * before


def test_the_teacher_s_part_of_the_loss(demo, samples):
    """The teacher's loss equals the weighted divergence from the unpruned logits."""
    model, processor = demo
    plan = plan_for(model, read_plan("random:0.05@1"))
    batches = Batches(model, processor, samples.items)
    losses = [
        answer_loss(model, batches, plan, "contiguous", (2, 2), weight, model)
        for weight in (0.0, 3.0)
    ]
    plain, more = (loss(model, (0,), 0)[0].item() for loss in losses)
    batch = batches.draw((0,), 2, 2)
    whole = unpruned_logits(model, batch.prefix, batch.features.tokens, batch.questions)
    total = 0.0
    for logits, at in answers(model, batch, plan, "contiguous"):
        used = batch.questions.targets[at] >= 0
        total += mx.sum(divergence(whole[at], logits) * used).item()
    assert total > 0.1
    assert more - plain == pytest.approx(3 * total, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "how", "projector"),
    [
        ("fastv:0.25", {"distill": 0.5}, True),
        ("norm:0.5+demo-asking:0.5", {"checkpoint": True}, False),
    ],
)
def test_a_run_that_is_resumed_ends_in_the_same_bytes(
    samples, tmp_path, monkeypatch, text, how, projector
):
    def run(name, folder):
        adapter = Adapter(2, projector=projector)
        asked = (load("demo"), samples, read_plan(text), "contiguous", adapter, (2, 2))
        schedule = Schedule(4, 1e-3, save_every=1)
        train_adapter(*asked, schedule, tmp_path / folder, tmp_path / name, **how)

    def stopped(self, step):
        saved(self, step)
        if step == 2:
            raise KeyboardInterrupt

    saved = Loop._save
    run("whole", "a")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_save", stopped)
        with pytest.raises(KeyboardInterrupt):
            run("parts", "b")
    assert json.loads((tmp_path / "b" / "state.json").read_text())["step"] == 2
    run("parts", "b")
    names = ["adapters.safetensors", *(["projector.safetensors"] if projector else [])]
    for name in names:
        files = [(tmp_path / run / name).read_bytes() for run in ("whole", "parts")]
        assert files[0] == files[1]


def test_the_teacher_stays_what_the_model_was(samples, tmp_path, monkeypatch):
    def kept(*how):
        made.append(how[-1])
        return answer_loss(*how)

    made, model = [], load("demo")
    ids = mx.array([[1, 5, 9, 30]])
    before = model[0](ids)
    monkeypatch.setattr(lora, "answer_loss", kept)
    asked = (model, samples, read_plan("norm:0.05"), "contiguous", Adapter(2), (2, 2))
    folders = (tmp_path / "state", tmp_path / "out")
    train_adapter(*asked, Schedule(2, 1e-2), *folders, distill=1.0)
    assert mx.array_equal(made[0](ids), before)
    assert mx.max(mx.abs(model[0](ids) - before)).item() > 0.01


@pytest.mark.parametrize("bits", [2, 4])
def test_an_adapter_trained_on_the_values_of_quantized_weights(tmp_path, bits):
    """The adapter gives equal logits on the quantized weights and their values."""
    low, out = tmp_path / "low", tmp_path / "adapter"
    convert("demo", str(low), quantize=True, q_bits=bits, q_group_size=64)
    small = ["--pictures", "2", "--batch", "2", "--questions", "2", "--steps", "3"]
    more = ["--dequantize", "--learning-rate", "0.01", "--output", str(out)]
    train(["lora", "--model", str(low), *small, *more])
    model = load(low, adapter_path=out)[0]
    assert any(isinstance(m, nn.QuantizedLinear) for m in model.modules())
    values = copy.deepcopy(model)
    replace_quantized(values)
    assert not any(hasattr(module, "bits") for module in values.modules())
    ids = mx.array([[1, 5, 9, 30, 7]])
    logits, same, before = (np.array(m(ids)) for m in (model, values, load(low)[0]))
    np.testing.assert_allclose(logits, same, atol=1e-5 * np.abs(same).max())
    assert np.abs(logits - before).max() > 0.01 * np.abs(same).max()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (["--method", "lightvla"], "method 'lightvla' decides itself how many"),
        (["--prune", "trimvla"], "method 'trimvla' decides itself how many"),
        (["--prune", "prumerge"], "method 'prumerge' decides itself how many"),
        (["--method", "attention", "--at", "9"], "cannot prune after layer 9 of 4"),
        (["--method", "norm", "--distill", "-1"], "distill -1 is outside"),
        (["--dequantize"], "no quantized weights"),
    ],
)
def test_what_is_refused(tmp_path, capsys, how, message):
    with pytest.raises(SystemExit) as stopped:
        train(["lora", "--pictures", "1", *how, "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize(
    "how", [["lora", "--projector"], ["prune", "--scorer", "acting"], ["prune"]]
)
def test_a_policy_is_not_trained(tmp_path, capsys, how):
    small = ["--model", "demo-policy", "--pictures", "1"]
    with pytest.raises(SystemExit) as stopped:
        train([*how, *small, "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "expected a FastVLM checkpoint" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_distill_needs_a_teacher(samples):
    model, processor = load("demo")
    batches = Batches(model, processor, samples.items)
    with pytest.raises(InputError, match="distill needs a teacher"):
        answer_loss(model, batches, (), "contiguous", (1, 1), 0.5)
