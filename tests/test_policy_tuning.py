"""Tuning of a policy under a choice that it learns, without a simulator."""

import dataclasses
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_tokprune import InputError, Policy, Pruner, load
from mlx_tokprune.features import Selection
from mlx_tokprune.pipeline import Scene, VisualTokens, assemble, prune_at_prompt
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.train.loop import Schedule
from recipes.policy import __main__ as program
from recipes.policy import choosing, collecting, demonstrations, student, tuning
from recipes.policy.choosing import lightvla_gate, trimvla_gate
from recipes.policy.worlds import SIZE, TASKS


class Corridor:
    """World of three steps that shows a bright half and is always won."""

    def __init__(self, name: str):
        self.task = TASKS[name]

    def reset(self, seed: int) -> None:
        self.steps, self.success = 0, False
        self.side = float(np.random.default_rng(seed).choice([-1, 1]))

    def frame(self) -> np.ndarray:
        frame = np.zeros((SIZE, SIZE, 3), np.uint8)
        frame[:, :: int(self.side)][:, : SIZE // 2] = 255
        return frame

    def expert(self) -> np.ndarray:
        return np.array([self.side, 0, 0, 1], np.float32)

    def hand(self) -> np.ndarray:
        return np.zeros(4, np.float32)

    def step(self, action: np.ndarray) -> bool:
        self.steps += 1
        self.success = self.steps >= 3
        return self.success


@pytest.fixture
def corridor(monkeypatch):
    monkeypatch.setattr(collecting, "World", Corridor)
    monkeypatch.setattr(demonstrations, "HORIZON", 4)


SMALL = {"batch": 2, "demonstrations": 1, "corrections": 1}


def tuner(folder, steps=2, **how):
    settings = tuning.Tuning(**{**SMALL, **how})
    plan = Schedule(steps, 1e-3, save_every=1)
    return tuning.Tuner("demo-policy", settings, plan, folder)


def batch_of(size: int) -> student.Labelled:
    """Return a batch of noise frames with instructions of unequal length."""
    rng = np.random.default_rng(0)
    prompts = [student.prompt_ids(t.instruction) for t in TASKS.values()][-size:]
    lengths = [len(p) for p in prompts]
    padded = [p + [student.PAD] * (max(lengths) - len(p)) for p in prompts]
    return student.Labelled(
        mx.array(rng.random((size, SIZE, SIZE, 3), dtype=np.float32)),
        mx.array(padded),
        mx.array(lengths),
        mx.array(rng.integers(0, 255, (size, 4))),
    )


def pruned_losses(policy, pruner: Pruner, batch: student.Labelled, row: int):
    """Return (A,) losses and the count of one row: gathered tokens, no padding."""
    features = policy.encode(batch.pixels[row : row + 1]).tokens
    every = mx.arange(64)[None]
    ids = batch.prompts[row, : batch.lengths[row].item()].tolist()
    seen = VisualTokens(policy.project(features), every, Selection(every), (8, 8))
    asked = Scene(None, Prompt(((student.START,), ids)))
    visual = prune_at_prompt(policy, asked, (pruner,), seen)
    acted = student.action_ids(np.array(batch.classes[row]))[:-1].tolist()
    told = Scene(None, Prompt(((student.START,), (*ids, *acted))))
    read = policy.decoder.read(assemble(policy, told, visual), rows=4)
    return losses_of(policy, read.hidden, mx.arange(4)[None], batch, row), visual.keep


def losses_of(policy, hidden, rows, batch, row: int) -> mx.array:
    log_shares = student.action_log_shares(policy, hidden, rows)[0]
    return -mx.sum(student.blurred(batch.classes[row]) * log_shares, axis=-1)


@pytest.mark.parametrize("method", ["trimvla", "lightvla"])
def test_training_chooses_and_sees_what_acting_does(method, monkeypatch, tmp_path):
    """Losses under padding and a gate equal the losses of gathered tokens."""
    made = tuner(tmp_path, method=method, noise=0.0, whole=0.0, distill=0.0)
    batch = batch_of(5)
    assert len(set(batch.lengths.tolist())) > 1
    monkeypatch.setattr(tuning.Tuning, "keep", lambda *_: 6)
    ours = made.losses(batch, np.random.default_rng(0), 0)
    pruner = Pruner(method, keep_tokens=6 if method == "trimvla" else None)
    for row in range(5):
        expected, kept = pruned_losses(made.policy, pruner, batch, row)
        assert kept < 64
        np.testing.assert_allclose(ours[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("whole", "distill", "learns"),
    [(1.0, 1.0, False), (1.0, 0.0, True), (0.0, 1.0, True)],
)
def test_the_policy_itself_is_its_target(tmp_path, whole, distill, learns):
    """Distillation alone gives a gradient with pruned tokens, and none with all."""
    made = tuner(tmp_path, method="lightvla", whole=whole, distill=distill)
    found = gradients(made, batch_of(3), 1.0).values()
    assert (max(mx.max(mx.abs(g)).item() for g in found) > 1e-2) == learns


def test_half_of_the_target_is_the_expert_s(tmp_path):
    made, batch = tuner(tmp_path), batch_of(2)

    def target(share: float) -> mx.array:
        made.tuning = dataclasses.replace(made.tuning, distill=share)
        return made._target(batch)

    np.testing.assert_allclose(target(0.0), student.blurred(batch.classes))
    both = (target(0.0) + target(1.0)) / 2
    np.testing.assert_allclose(target(0.5), both, atol=1e-6)


def gradients(made, batch, choice: float) -> dict[str, mx.array]:
    made.tuning = dataclasses.replace(made.tuning, choice=choice)

    def loss():
        mx.random.seed(0)
        return mx.sum(made.losses(batch, np.random.default_rng(0), 0))

    _, found = nn.value_and_grad(made.policy, loss)()
    return dict(tree_flatten(found))


@pytest.mark.parametrize(
    ("method", "reached"), [("trimvla", "projector"), ("lightvla", "embed_tokens")]
)
def test_the_choice_reaches_what_makes_the_scores(tmp_path, method, reached):
    """The gate gives gradients to the weights that make the scores."""
    made, batch = tuner(tmp_path, method=method, whole=0.0, rank=0), batch_of(3)
    without, through = (gradients(made, batch, choice) for choice in (0.0, 1.0))
    moved = {n for n in through if not mx.allclose(through[n], without[n], atol=1e-6)}
    assert {f"projector.fc{n}.weight" for n in (1, 2, 3)} <= moved
    assert any(reached in name for name in moved)
    assert not any("layers" in name for name in moved)


def test_scorers_and_towers_stay_as_they_are(tmp_path):
    for rank in (0, 2):
        made = tuner(tmp_path / str(rank), rank=rank)
        names = {n for n, _ in tree_flatten(made.policy.trainable_parameters())}
        first = "language_model.model.layers.0.self_attn."
        assert not any(n.startswith((f"{first}q", f"{first}k")) for n in names)
        assert not any(n.startswith("vision") for n in names)
        assert any(n.startswith(f"{first}v_proj") for n in names)
        assert any("layers.1.self_attn.q_proj" in n for n in names)


def test_noise_spreads_the_choice_and_none_is_the_pruner_s():
    mx.random.seed(0)
    policy, batch = student.build_policy(), batch_of(3)
    visual = policy.project(policy.encode(batch.pixels).tokens)

    def counts(choose, times=8):
        gates = []
        for _ in range(times):
            gate, here = choose()
            whole = mx.zeros(visual.shape[:2])
            gates.append(mx.put_along_axis(whole, here, gate, axis=1))
        return mx.sum(gates[0]).item(), mx.sum(sum(gates) > 0).item()

    kept, ever = counts(lambda: trimvla_gate(policy, visual, batch, 6, 0.0, 1.0))
    assert kept == ever == 18
    kept, ever = counts(lambda: trimvla_gate(policy, visual, batch, 6, 9.0, 1.0))
    assert kept == 18 < ever
    kept, ever = counts(lambda: lightvla_gate(policy, visual, batch, 0.0, 1.0))
    more, _ = counts(lambda: lightvla_gate(policy, visual, batch, 99.0, 1.0))
    assert kept == ever < more


def test_scores_are_not_pushed_up_together(monkeypatch):
    """The gradient of TrimVLA's choice changes the order, not the mean."""
    scores = mx.random.normal((2, 18), key=mx.random.key(0))
    pull = mx.random.normal((2, 18), key=mx.random.key(1)) - 3

    def chosen(more):
        monkeypatch.setattr(choosing, "trimvla_scores", lambda *_: scores + more)
        gate, here = trimvla_gate(None, None, None, 6, 0.0, 1.0)
        return mx.sum(gate * mx.take_along_axis(pull, here, axis=1))

    found = mx.grad(chosen)(mx.zeros(scores.shape))
    assert mx.max(mx.abs(found)).item() > 0.1
    np.testing.assert_allclose(mx.sum(found, axis=1), mx.zeros(2), atol=1e-5)


def test_noise_and_temperature_from_end_to_end(tmp_path, monkeypatch):
    made, seen = tuner(tmp_path, steps=10, whole=0.0), []

    def spy(policy, visual, batch, keep, noise, temperature):
        seen.append((noise, temperature))
        here = mx.broadcast_to(mx.arange(64), visual.shape[:2])
        return mx.ones(here.shape), here

    monkeypatch.setattr(tuning, "trimvla_gate", spy)
    for step in (0, 10):
        made.losses(batch_of(1), np.random.default_rng(0), step)
    assert seen == [(0.5, 1.0), (0.0, pytest.approx(0.3))]


def test_how_many_stay():
    rng, settings = np.random.default_rng(0), tuning.Tuning(keep_ratio=0.1)
    kept = [settings.keep(rng, 64) for _ in range(300)]
    assert (min(kept), max(kept)) == (3, 15)
    wide = tuning.Tuning(keep_ratio=0.9)
    assert max(wide.keep(rng, 64) for _ in range(99)) == 63


def test_rounds_are_spread_from_the_first_step_on():
    assert collecting.rounds_of(2, 800) == (0, 400)
    assert collecting.rounds_of(3, 10) == (0, 3, 6)


def test_tasks_that_take_long_are_drawn_more_often(tmp_path, corridor):
    collector = collecting.Collector(tmp_path)
    for step, slow in ((0, 3), (7, 8)):
        tasks = np.repeat(np.arange(9), [30 if n == slow else 10 for n in range(9)])
        frames = np.zeros((len(tasks), SIZE, SIZE, 3), np.uint8)
        zeros = np.zeros((len(tasks), 4))
        episodes = demonstrations.Episodes(frames, zeros, tasks, zeros, zeros)
        episodes.save(collector.data / f"corrections-{step:06d}")
    assert np.argmax(collector.shares(6)) == 3
    shares = collector.shares(7)
    np.testing.assert_allclose(shares[8], (9 / 17 + 1 / 9) / 2)
    np.testing.assert_allclose(shares[:8], (1 / 17 + 1 / 9) / 2)


def run(folder, output, *more):
    command = "tune --method lightvla --steps 2 --batch 2 --rank 2 --corrections 1"
    paths = ["--folder", str(folder), "--output", str(output)]
    options = "--demonstrations 1 --snapshots 1".split()
    program.main([*command.split(), *options, *paths, *more])


def test_tune_writes_a_policy_that_acts(tmp_path, corridor, monkeypatch):
    monkeypatch.setattr(program, "import_simulator", lambda: None)
    run(tmp_path / "state", tmp_path / "tuned")
    episodes = {p.name for p in (tmp_path / "state" / "episodes").iterdir()}
    assert {"corrections-000000", "corrections-000001"} <= episodes
    # The rate of the first step is 0, so the snapshot is what was tuned.
    before, snapshot, tuned = (
        dict(tree_flatten(load(name)[0].parameters()))
        for name in ("demo-policy", tmp_path / "state" / "step-1", tmp_path / "tuned")
    )
    assert before.keys() == tuned.keys()
    assert all(mx.array_equal(before[name], snapshot[name]) for name in before)
    moved = {n for n in tuned if not mx.allclose(tuned[n], before[n], atol=1e-6)}
    assert any(n.startswith("projector") for n in moved)
    assert any(n.startswith("language_model") for n in moved)
    assert not any(n.startswith("vision") for n in moved)
    pruner = Pruner("lightvla")
    act = Policy(*load(tmp_path / "tuned"), pruner=pruner, compile=False)
    frame = np.zeros((SIZE, SIZE, 3), np.uint8)
    assert act([frame], "open the drawer").shape == (4,)
    assert 1 <= act.kept_each[0] == act.kept < 64
    with pytest.raises(SystemExit):
        run(tmp_path / "state", tmp_path / "tuned")


def test_adapters_are_in_the_weights(tmp_path):
    made = tuner(tmp_path, rank=2)
    layer = made.policy.layers[1].self_attn.q_proj
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(0))
    plain = student.build_policy()
    plain.load_weights(list(made.weights().items()))
    ids = mx.array([[1, 5, 6, 7]])
    np.testing.assert_allclose(plain(ids), made.policy(ids), rtol=1e-3, atol=1e-4)


def test_a_stopped_tuning_goes_on_where_it_was(tmp_path, corridor):
    """A stopped and resumed tuning has the losses and weights of a whole one."""
    whole = tuner(tmp_path / "whole", steps=4)
    whole.run(tmp_path / "a")
    stopped = tuner(tmp_path / "parts", steps=4)
    draw = stopped.collector.draw

    def fail_late(*arguments):
        if stopped._loop.losses[2:]:
            raise KeyboardInterrupt
        return draw(*arguments)

    stopped.collector.draw = fail_late
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tmp_path / "b")
    again = tuner(tmp_path / "parts", steps=4)
    assert again._loop.begin == 3
    again.run(tmp_path / "b")
    assert json.dumps(again._loop.losses) == json.dumps(whole._loop.losses)
    one, other = whole.weights(), again.weights()
    assert all(mx.array_equal(one[name], other[name]) for name in one)


def test_other_settings_in_a_folder_are_refused(tmp_path):
    tuner(tmp_path)
    tuner(tmp_path, noise=0.5)  # nothing was learned yet
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match="other settings"):
        tuner(tmp_path, noise=0.75)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "norm"], "expected trimvla or lightvla"),
        (["--keep-ratio", "1.5"], "outside (0, 1)"),
        (["--batch", "0"], "whole numbers from 1"),
        (["--model", "demo"], "shape of demo-policy"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(program, "import_simulator", lambda: None)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "state", tmp_path / "tuned", *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
