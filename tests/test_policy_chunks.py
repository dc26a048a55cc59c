"""Training and evaluation of the small pi0-FAST, without a simulator."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_policy_training import Corridor

from mlx_tokprune import InputError, Policy, Pruner, load
from mlx_tokprune.act.heads import head_of
from mlx_tokprune.features import Selection
from mlx_tokprune.pipeline import Scene, VisualTokens, prune_at_prompt, run
from mlx_tokprune.processing.actions import Bounds
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.train.loop import Schedule
from recipes.policy import __main__ as program
from recipes.policy import (
    chunking,
    collecting,
    demonstrations,
    pi0fast,
    student,
    success,
    table,
    tuning,
)
from recipes.policy.worlds import SIZE, TASKS

BOUNDS = Bounds(-np.ones(4), np.ones(4), np.ones(4, bool))


def draw_chunks(count: int) -> np.ndarray:
    random = np.random.default_rng(1)
    steps = random.normal(0, 0.3, (count, pi0fast.HORIZON, 4)).cumsum(axis=1)
    return np.clip(steps, -1, 1)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Return (folder of the code, policy, processor), with random weights."""
    folder = tmp_path_factory.mktemp("code") / "fast"
    code = pi0fast.learn_code(draw_chunks(200), folder)
    mx.random.seed(0)
    policy = pi0fast.build_policy()
    return folder, policy, pi0fast.build_processor(code, BOUNDS)


def batch_of(processor, keep: int, scored: bool) -> pi0fast.Batch:
    """Return a batch of three tasks with prompts and answers of unequal length."""
    rng, tasks = np.random.default_rng(0), list(TASKS.values())[-3:]
    states = rng.uniform(-1.1, 1.1, (3, 4))
    prompts = [
        pi0fast.prompt_ids(task.instruction, state)
        for task, state in zip(tasks, states, strict=True)
    ]
    lengths, longest = list(map(len, prompts)), max(map(len, prompts))
    assert len(set(lengths)) > 1
    answers = [processor.answer(chunk) for chunk in draw_chunks(3)]
    most = max(map(len, answers)) + 2
    return pi0fast.Batch(
        mx.array(rng.random((3, SIZE, SIZE, 3), dtype=np.float32)),
        mx.array([p + [pi0fast.PAD] * (longest - len(p)) for p in prompts]),
        mx.array(lengths),
        mx.array([a + [-1] * (most - len(a)) for a in answers]),
        keep,
        mx.array(rng.gumbel(size=(3, 64)).astype(np.float32)),
        scored,
    )


def test_answers_of_a_policy_in_training_begin_with_action(learned):
    _, _, processor = learned
    ids = processor.answer(draw_chunks(1)[0])
    assert processor.actions(ids)[1] is None
    with pytest.raises(InputError, match="does not begin with 'Action:'"):
        processor.actions(ids[1:])


@pytest.mark.parametrize(("keep", "scored"), [(64, False), (16, False), (16, True)])
def test_training_sees_what_acting_sees(learned, keep, scored):
    """The loss of a padded batch equals the loss of the package's own forward."""
    _, policy, processor = learned
    batch = batch_of(processor, keep, scored)
    loss, count, _ = pi0fast.losses(policy, batch)
    visual = policy.project(policy.encode(batch.pixels).tokens)
    indices, total = pi0fast._choose(policy, visual, batch), 0.0
    for row, length in enumerate(batch.lengths.tolist()):
        ids = [i for i in batch.answers[row].tolist() if i >= 0]
        kept = indices[row : row + 1]
        some = visual[row : row + 1][:, indices[row]]
        seen = VisualTokens(some, kept, Selection(kept), (8, 8))
        prompt = Prompt(((), tuple(batch.prompts[row, :length].tolist())))
        read, _ = run(
            *(policy, Scene(None, prompt)),
            vision=lambda *_, seen=seen: seen,
            after=mx.array([ids[:-1]]),
        )
        logits = policy.decoder.logits(read.hidden)[0]
        shares = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        total -= sum(shares[n, i].item() for n, i in enumerate(ids))
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert count.item() == (batch.answers >= 0).sum().item()


def test_scored_batches_keep_what_the_pruner_keeps(learned):
    _, policy, processor = learned
    batch = batch_of(processor, 16, True)
    batch = dataclasses.replace(batch, noise=mx.zeros_like(batch.noise))
    visual = policy.project(policy.encode(batch.pixels).tokens)
    kept, every = pi0fast._choose(policy, visual, batch), mx.arange(64)[None]
    for row, length in enumerate(batch.lengths.tolist()):
        told = Prompt(((), batch.prompts[row, :length]))
        seen = VisualTokens(visual[row : row + 1], every, Selection(every), (8, 8))
        pruner = Pruner("trimvla", keep_tokens=16)
        chosen = prune_at_prompt(policy, Scene(None, told), (pruner,), seen)
        assert chosen.indices[0].tolist() == kept[row].tolist()


@pytest.mark.parametrize("scores", [False, True])
def test_learning_lowers_the_losses(learned, scores):
    import mlx.nn as nn
    import mlx.optimizers as optim

    _, _, processor = learned
    mx.random.seed(0)
    policy, batch = pi0fast.build_policy(), batch_of(processor, 24, True)
    optimizer, found = optim.Adam(3e-4 if scores else 1e-3), []

    def total():
        loss, count, off = pi0fast.losses(policy, batch)
        return off if scores else loss / count

    gradient = nn.value_and_grad(policy, total)
    for _ in range(6):
        loss, grads = gradient()
        optimizer.update(policy, grads)
        mx.eval(policy.parameters(), loss)
        found.append(loss.item())
    assert all(loss >= 0 for loss in found)
    assert found[-1] < found[0] * 0.95
    moved = {n for n, g in tree_flatten(grads) if mx.any(g != 0).item()}
    first = "language_model.model.layers.0.self_attn."
    keys = {f"{first}{part}_proj.weight" for part in "qk"}
    assert moved == keys if scores else keys < moved


def test_it_begins_as_the_demo_policy(learned):
    """The warm-started decoder and tower correlate with the demo policy's."""
    teacher = tuning.open_policy("demo-policy")
    policy = pi0fast.build_policy()
    pi0fast.warm_start(policy, teacher)
    words = TASKS["drawer-open"].instruction.split()
    known = pi0fast.vocabulary(), student.vocabulary()
    ids = [mx.array([[table[word] for word in words]]) for table in known]
    first = policy.decoder.embed(ids[0])
    assert mx.allclose(first, teacher.decoder.embed(ids[1]), atol=1e-5)
    random = mx.random.normal((1, 30, 192)) * mx.std(first)
    both = []
    for model in (policy, teacher):
        sequence = pi0fast.TokenSequence(random, None, 30)
        both.append(np.array(model.decoder.read(sequence, rows=30).hidden).ravel())
    assert np.corrcoef(*both)[0, 1] > 0.999
    pixels = mx.random.uniform(shape=(1, SIZE, SIZE, 3))
    tower = teacher.vision_backbone.fused_featurizer
    ours = policy.vision_tower._embed(pixels * 2 - 1)
    assert mx.allclose(ours, tower._embed(pixels * 2 - 1), atol=1e-4)
    for block in policy.vision_tower.blocks:
        ours = block(ours)
    theirs, _ = tower(pixels * 2 - 1)
    assert np.corrcoef(np.array(ours).ravel(), np.array(theirs).ravel())[0, 1] > 0.999
    assert 0.5 < pi0fast.misaligned(policy, teacher, pixels).item() < 5


def test_the_checkpoint_is_what_was_trained(learned, tmp_path):
    """The written checkpoint loads with equal weights, prompts and code."""
    fast, policy, processor = learned
    weights = dict(tree_flatten(policy.parameters()))
    pi0fast.write_checkpoint(weights, fast, BOUNDS, tmp_path / "policy")
    found, loaded = load(tmp_path / "policy", dtype=mx.float32)
    known = dict(tree_flatten(found.parameters()))
    assert known.keys() == weights.keys()
    assert all(mx.allclose(known[n], a, atol=1e-3) for n, a in weights.items())
    random = np.random.default_rng(0)
    for task in TASKS.values():
        state = random.uniform(-1.2, 1.2, 4)
        _, ids = loaded.prompt(task.instruction, state).segments
        assert list(ids) == pi0fast.prompt_ids(task.instruction, state)
        assert ids == processor.prompt(task.instruction, state).segments[-1]
        assert pi0fast.UNK not in ids
    for chunk in draw_chunks(20):
        answer = loaded.answer(chunk)
        assert answer == processor.answer(chunk)
        back, wrong = loaded.actions(answer)
        assert wrong is None
        assert np.abs(back - chunk).max() < 0.05 * pi0fast.HORIZON**0.5 + 1e-9
    state = loaded.bounds("proprio", None)
    assert state.low.tolist() == [-1] * 4
    assert loaded.bounds("action", None).to_units(np.full(4, 0.7)).tolist() == [0.7] * 4
    files = (p for p in (tmp_path / "policy").rglob("*") if p.is_file())
    assert sum(p.stat().st_size for p in files) <= 12e6


# Acting -----------------------------------------------------------------------------


def test_of_a_chunk_the_first_actions_are_given(learned, monkeypatch):
    _, policy, processor = learned
    processor = dataclasses.replace(processor, strict=False)
    images, asked = [np.zeros((SIZE, SIZE, 3), np.uint8)], "open the drawer"
    whole = Policy(policy, processor)(images, asked, [0.0] * 4)
    assert whole.shape == (8, 4)
    some = Policy(policy, processor, first=3)(images, asked, [0.0] * 4)
    assert some.tolist() == whole[:3].tolist()
    for first in (0, 9, True):
        with pytest.raises(InputError, match="expected 1 to 8"):
            Policy(policy, processor, first=first)
    bins = student.build_policy(), student.build_processor()
    with pytest.raises(InputError, match="one action at a time"):
        Policy(*bins, first=1)
    with pytest.raises(InputError, match="not 'sideways'"):
        Policy(policy, processor, draft="sideways")
    with pytest.raises(InputError, match="only the answers of pi0-FAST"):
        Policy(*bins, draft="shifted")


def test_a_shifted_answer_is_what_a_chunk_has_left(learned):
    _, policy, processor = learned
    head = head_of(policy, processor, 4)
    for chunk in draw_chunks(5):
        answer = processor.answer(chunk)
        seen, _ = processor.actions(answer)
        left, wrong = processor.actions(head.shifted(answer, 3))
        assert wrong is None
        expected = np.concatenate([seen[3:], np.repeat(seen[-1:], 3, axis=0)])
        assert np.abs(left - expected).max() < 0.15
        held, _ = processor.actions(head.shifted(answer, 8))
        assert np.ptp(held, axis=0).max() < 0.3


@pytest.mark.parametrize("draft", [True, "shifted"])
def test_drafts_change_no_action(learned, draft):
    _, policy, processor = learned
    processor = dataclasses.replace(processor, strict=False)
    how = {"first": 2, "pruner": Pruner("norm", 0.5)}
    policies = [Policy(policy, processor, draft=d, **how) for d in (False, draft)]
    random = np.random.default_rng(0)
    for _ in range(4):
        frame = random.integers(0, 255, (SIZE, SIZE, 3), np.uint8)
        asked = ([frame], "turn the faucet on", random.uniform(-1, 1, 4).tolist())
        plain, drafted = (p(*asked) for p in policies)
        assert plain.tolist() == drafted.tolist()


# The whole of it --------------------------------------------------------------------


@pytest.fixture
def corridor(monkeypatch):
    for module in (collecting, success):
        monkeypatch.setattr(module, "World", Corridor)
    for module in (demonstrations, success):
        monkeypatch.setattr(module, "HORIZON", 5)
    monkeypatch.setattr(program, "import_simulator", lambda: None)


def test_episodes_of_chunks(corridor, tmp_path):
    collector = collecting.Collector(tmp_path, 8)
    collector.demonstrate(1)
    episodes = collector.load(0)
    some, _ = episodes[0]
    assert some.actions.shape == (len(some), 8, 4)
    assert some.states[0].tolist() == [0, 0, 0, 1]
    random, told = np.random.default_rng(0), np.arange(9) == 3
    frames, tasks, places = collector.pick(random, 60, episodes, told / told.sum())
    assert frames.shape == (60, SIZE, SIZE, 3)
    assert set(tasks) == {3}
    seen = {(f, n) for f, n in places}
    rows = {(f, n) for f, (_, r) in enumerate(episodes) for n in r[3]}
    assert seen == rows  # every frame of the task, and no other


def test_a_robot_looks_again_after_the_first_actions(
    corridor, learned, tmp_path, monkeypatch
):
    looked = []

    class Endless(Corridor):
        def frame(self) -> np.ndarray:
            looked.append(self.steps)
            return super().frame()

        def step(self, action: np.ndarray) -> bool:
            self.steps += 1
            return False

    monkeypatch.setattr(success, "World", Endless)
    _, policy, processor = learned
    processor, row = dataclasses.replace(processor, strict=False), success.rows()[0]
    about = (policy, processor, 2, ["hammer"], [row])
    success.measure(*about, tmp_path / "log.jsonl", 2)
    assert looked == [0, 0, 2, 2, 4, 4]
    (line,) = table.read_log(tmp_path / "log.jsonl")
    assert line["steps"] == 10


def test_the_command_trains_corrects_and_goes_on(corridor, tmp_path, capsys):
    paths = ["--folder", str(tmp_path / "state"), "--output", str(tmp_path / "policy")]
    asked = "chunks --steps 6 --align 2 --batch 2 --demonstrations 2".split()
    asked += "--corrections 1 --rounds 1".split()
    program.main([*asked, *paths])
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "state" / "episodes" / "corrections-000002").is_dir()
    model, processor = load(tmp_path / "policy")
    assert model.args.horizon == 8
    more = ["--folder", str(tmp_path / "more"), "--output", str(tmp_path / "next")]
    program.main([*asked[:-1], "0", *more, "--start", str(tmp_path / "policy")])
    with pytest.raises(SystemExit):
        program.main([*asked, *paths])
    log = tmp_path / "log.jsonl"
    processor = dataclasses.replace(processor, strict=False)
    rows = [success.Row("none", Pruner()), success.Row("norm 0.5", Pruner("norm", 0.5))]
    rows.append(success.Row("vlapruner 0.5", Pruner("vlapruner", 0.5)))
    success.measure(model, processor, 2, ["hammer"], rows, log, 4)
    lines = table.read_log(log)
    assert [line["kept"] for line in lines][:2] == [64, 32]
    assert all(line["first"] == 4 for line in lines)
    success.measure(model, processor, 2, ["hammer"], rows[:1], log, 8)
    assert len(log.read_text().splitlines()) == 4
    assert json.loads(log.read_text().splitlines()[-1])["first"] == 8


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"demonstrations": 0}, "whole numbers from 1"),
        ({"mixed": 2}, "mixed a share"),
        ({"start": "demo-policy"}, "demo-policy has not the shape of a policy of"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, how, message):
    with pytest.raises(InputError, match=message):
        chunking.Chunker(chunking.Chunking(**how), Schedule(1, 1e-3), tmp_path)
