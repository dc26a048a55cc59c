"""Scorers that read the last action: episodes, folders, and training."""

import dataclasses
import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY_POLICY
from mlx.utils import tree_flatten, tree_map
from test_policy_tuning import Corridor, batch_of, corridor  # noqa: F401

from mlx_tokprune import InputError, Policy, Pruner, generate, load, predict_action
from mlx_tokprune.act.__main__ import main as act
from mlx_tokprune.act.episode import first_inputs
from mlx_tokprune.act.heads import head_of
from mlx_tokprune.act.inputs import observe
from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME
from mlx_tokprune.features import EPISODE_EXTRAS, Selection
from mlx_tokprune.pipeline import Scene, VisualTokens, assemble, look, prune_at_prompt
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.pruners import read_plan
from mlx_tokprune.pruners.saliency import keep_highest
from mlx_tokprune.pruners.scorers import ActionScorer, load_scorer, save_scorer
from mlx_tokprune.train.__main__ import main as train
from mlx_tokprune.train.gate import log_gate
from mlx_tokprune.train.loop import Schedule
from recipes.policy import __main__ as program
from recipes.policy import demonstrations, scoring, student, success
from recipes.policy.choosing import gate_of
from recipes.policy.tuning import Tuner, Tuning
from recipes.policy.worlds import SIZE

TOLD = POLICY_FRAME.question


def acting(channels=192, actions=4) -> ActionScorer:
    """Return a scorer whose scores depend strongly on the last action."""
    mx.random.seed(3)
    scorer = ActionScorer(channels, actions, width=16, depth=1, heads=2)
    scorer.action.weight = 40 * scorer.action.weight
    for block in scorer.blocks:
        block.qkv.weight = 4 * block.qkv.weight
    return scorer


def pruner_of(scorer, keep=6) -> Pruner:
    return Pruner("learned", keep_tokens=keep, at="prompt", scorer=scorer)


@pytest.fixture(scope="module")
def frames():
    """Return images of one episode, each rotated 40 degrees further."""
    image = load_image(POLICY_FRAME.path)
    return [image.rotate(40 * number) for number in range(5)]


def before(action) -> dict[str, mx.array]:
    """Return the run-time inputs after this action (B, A)."""
    return {"action_previous": mx.array(np.asarray(action, np.float32))}


def test_policies_supply_the_extras_that_they_provide():
    assert tuple(first_inputs(1, 4)) == EPISODE_EXTRAS


def chosen(loaded, pruner, robots, acted=None, state=None) -> list[list[int]]:
    """Return the kept indices of each robot, given the last actions (B, A)."""
    model, processor = loaded
    told = processor.prompt(TOLD)
    extras = {} if acted is None else before(acted)
    scene = observe(processor, robots, told, state, extras)
    return prune_at_prompt(
        model, scene, (pruner,), look(model, scene, ())
    ).indices.tolist()


# Episodes ---------------------------------------------------------------------------


def watched(policy) -> list[np.ndarray]:
    """Return a list that collects the last actions that scorers receive."""
    seen, act_ = [], policy._act

    def spy(scene, arrays):
        seen.append(np.array(scene.extras["action_previous"]))
        return act_(scene, arrays)

    policy._act = spy
    return seen


def test_a_scorer_is_told_the_last_action(demo_policy, frames):
    """A scorer receives the last action, and zeros first and after a reset."""
    pruner = pruner_of(acting())
    policy = Policy(*demo_policy, pruner=pruner)
    seen, said = watched(policy), []
    for frame in frames[:3]:
        said.append(policy([frame], TOLD))
    policy.reset()
    said.append(policy([frames[0]], TOLD))
    np.testing.assert_array_equal(seen[0], np.zeros((1, 4)))
    for before, action in zip(seen[1:3], said, strict=False):
        np.testing.assert_allclose(policy.bounds.to_units(before[0]), action, atol=1e-6)
    np.testing.assert_array_equal(seen[3], np.zeros((1, 4)))
    np.testing.assert_array_equal(said[3], said[0])


def test_the_last_action_changes_what_is_kept(demo_policy, frames):
    """The last action changes the kept tokens, also in a compiled call."""
    pruner, (model, processor) = pruner_of(acting()), demo_policy
    policy, head = Policy(*demo_policy, pruner=pruner), head_of(*demo_policy, 4)
    first = policy([frames[0]], TOLD)
    alone = predict_action(model, processor, [frames[0]], TOLD, pruner=pruner)
    np.testing.assert_array_equal(first, alone.values)
    for number, same in ((0.0, True), (-1.0, False)):
        here = chosen(demo_policy, pruner, [[frames[0]]], [[number] * 4])
        assert (alone.visual.left() == here) == same
    kept = [chosen(demo_policy, pruner, [[frames[1]]], [[0.0] * 4])]
    for sign in (1, -1):
        previous = mx.full((1, 4), sign * 0.9)
        policy._inputs.previous, extras = previous, before(previous)
        kept.append(chosen(demo_policy, pruner, [[frames[1]]], previous))
        scene = observe(processor, [[frames[1]]], processor.prompt(TOLD), None, extras)
        parts, _ = head.decode(model, scene, (pruner,))
        values = head.normalized(np.array(head.joined(parts))[0])
        said = policy([frames[1]], TOLD)
        np.testing.assert_array_equal(said, policy.bounds.to_units(values))
    assert kept[1] not in kept[::2]
    assert kept[0] != kept[2]


@pytest.mark.parametrize("text", ["norm:1@tower", "norm:0.5@tower"])
def test_robots_of_a_batch_are_told_their_own(demo_policy, frames, text):
    """Robots of a batch receive their own actions, also after one has left."""
    plan = [*read_plan(text), pruner_of(acting())]
    together = Policy(*demo_policy, pruner=plan)
    alone = [Policy(*demo_policy, pruner=plan, compile=False) for _ in range(3)]
    robots = [0, 1, 2]
    for step in range(4):
        if step == 2:
            together.keep_robots([0, 2])
            robots = [0, 2]
        seen = [frames[(step + 2 * robot) % 5] for robot in robots]
        values = together.act_on_batch([[frame] for frame in seen], TOLD)
        for robot, frame, action in zip(robots, seen, values, strict=True):
            np.testing.assert_array_equal(alone[robot]([frame], TOLD), action)
    acted = np.array(together._inputs.previous)
    assert acted.shape == (2, 4)
    assert not np.allclose(acted[0], acted[1])
    with pytest.raises(InputError, match="the episode has 2 robots, not 3"):
        together.act_on_batch([[frame] for frame in frames[:3]], TOLD)
    together.reset()
    together.act_on_batch([[frame] for frame in frames[:3]], TOLD)


def test_of_a_chunk_the_last_that_was_done(oft_policy):
    """The scorer receives the last executed action of a chunk."""
    image, how = load_image(TINY_POLICY / "image_0.png"), {"proprio": [0.1] * 5}
    pruner = pruner_of(acting(96, 7))
    for compiled in (True, False):
        policy = Policy(*oft_policy, pruner=pruner, first=2, compile=compiled)
        seen = watched(policy)
        said = [policy([image, image.rotate(a)], TOLD, **how) for a in (0, 90)]
        assert said[0].shape == (2, 7)
        np.testing.assert_array_equal(seen[0], np.zeros((1, 7)))
        last = policy.bounds.to_units(seen[1][0])
        np.testing.assert_allclose(last, said[0][1], rtol=1e-5, atol=1e-6)
    head, bounds = head_of(*oft_policy, 7), oft_policy[1].bounds("proprio", None)
    state = head.state(np.full((1, 5), 0.1), bounds)
    robots = [[image, image.rotate(90)]]
    scene = observe(oft_policy[1], robots, oft_policy[1].prompt(TOLD), state)
    scene = dataclasses.replace(scene, extras=before(seen[1]))
    parts, _ = head_of(*oft_policy, 7).decode(oft_policy[0], scene, (pruner,))
    expected = policy.bounds.to_units(np.array(parts[0])[0, :2])
    np.testing.assert_allclose(said[1], expected, rtol=1e-4, atol=1e-5)


def test_robots_that_act_one_after_the_other_need_policies_of_their_own(tiny_chunks):
    model, processor = tiny_chunks
    hidden = model.args.text["hidden_size"]
    size = len(processor.bounds("action", None).low)
    policy = Policy(*tiny_chunks, pruner=pruner_of(acting(hidden, size), 1))
    with pytest.raises(InputError, match="give each robot a Policy of its own"):
        policy.act_on_batch([[None], [None]], TOLD)


def test_drafts_do_not_change_actions(demo_policy, frames):
    how = {"pruner": pruner_of(acting())}
    plain, drafted = (Policy(*demo_policy, draft=d, **how) for d in (False, True))
    for frame in frames[:3]:
        np.testing.assert_array_equal(drafted([frame], TOLD), plain([frame], TOLD))


# Folders and other models -----------------------------------------------------------


def test_a_folder_chooses_as_the_scorer_did(tmp_path, demo_policy, frames, capsys):
    scorer, folder = acting(), str(tmp_path / "scorer")
    save_scorer(scorer, folder)
    again = load_scorer(folder)
    assert type(again) is ActionScorer
    for (name, one), (_, two) in zip(
        *(tree_flatten(s.parameters()) for s in (scorer, again)), strict=True
    ):
        assert mx.array_equal(one, two), name
    asked = (demo_policy, [[frames[0]], [frames[1]]], [[0.5] * 4, [-0.5] * 4])
    kept = [
        chosen(asked[0], pruner, *asked[1:])
        for pruner in (pruner_of(scorer), Pruner(folder, keep_tokens=6))
    ]
    assert kept[0] == kept[1]
    act(["--method", folder, "--keep-tokens", "6", "--json"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    whole = pruner_of(scorer)
    action = predict_action(*demo_policy, [POLICY_FRAME.path], TOLD, pruner=whole)
    assert said["action"] == pytest.approx(action.values.tolist(), abs=1e-6)


def test_others_refuse_it_in_a_sentence(tmp_path, demo, tiny_policy, capsys):
    folder = str(tmp_path / "scorer")
    save_scorer(acting(), folder)
    pruner = Pruner(folder, 0.25)
    asked = (*demo, [PICTURES[0].path], PICTURES[0].question)
    with pytest.raises(InputError, match="needs action_previous, which this model"):
        generate(*asked, pruner=pruner)
    save_scorer(ActionScorer(96, 4), f"{folder}-narrow")
    narrow = Pruner(f"{folder}-narrow", 0.25)
    words = "reads actions of 4 numbers, and those of this policy have 7"
    for use in (
        lambda: Policy(*tiny_policy, pruner=narrow),
        lambda: predict_action(
            *tiny_policy, [TINY_POLICY / "image_0.png"], TOLD, pruner=narrow
        ),
    ):
        with pytest.raises(InputError, match=words):
            use()
    with pytest.raises(SystemExit) as stop:
        train(["prune", "--scorer", "acting", "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "reads action_previous" in error
    assert error.count("\n") == 1


# Learning ---------------------------------------------------------------------------

SMALL = {"batch": 2, "demonstrations": 1, "held_out": 1, "corrections": 1}


def trainer(folder, steps=2, **how):
    settings = scoring.Scoring(**{**SMALL, "layers": (1, 2), **how})
    plan = Schedule(steps, 1e-3, save_every=1)
    return scoring.ScorerTrainer("demo-policy", settings, plan, folder)


def test_a_folder_of_another_training_is_refused(tmp_path):
    trainer(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match="other settings"):
        Tuner("demo-policy", Tuning(), Schedule(2, 1e-3, save_every=1), tmp_path)


def with_actions(size: int) -> student.Labelled:
    before = np.random.default_rng(1).uniform(-1, 1, (size, 4)).astype(np.float32)
    return dataclasses.replace(batch_of(size), before=mx.array(before))


@pytest.mark.parametrize("kind", ["acting", "asking"])
def test_training_chooses_and_sees_what_acting_does(tmp_path, kind):
    """Training under padding and a gate equals acting on gathered tokens."""
    made, batch = trainer(tmp_path, scorer=kind), with_actions(5)
    if kind == "acting":
        made.scorer = acting()
    assert len(set(batch.lengths.tolist())) > 1
    visual = made._visual(batch)
    known = made._known(batch, visual)
    gate, here = gate_of(made.scores(batch, visual, 6), 6, 0.0, 1.0)
    gated = made._divergence(batch, visual, known, here, log_gate(gate))
    for row in range(5):
        ids = batch.prompts[row, : batch.lengths[row].item()].tolist()
        every = mx.arange(64)[None]
        seen = VisualTokens(visual[row : row + 1], every, Selection(every), (8, 8))
        prompt = Prompt(((student.START,), ids))
        scene = Scene(None, prompt, extras=before(batch.before[row : row + 1]))
        kept = prune_at_prompt(made.policy, scene, (pruner_of(made.scorer),), seen)
        opened = mx.argsort(-gate[row])[:6]
        assert sorted(here[row][opened].tolist()) == kept.indices[0].tolist()
        said = student.action_ids(np.array(batch.classes[row]))[:-1].tolist()
        told = Scene(None, Prompt(((student.START,), (*ids, *said))))
        read = made.policy.decoder.read(assemble(made.policy, told, kept), rows=4)
        rows = mx.arange(4)[None]
        logs = student.action_log_shares(made.policy, read.hidden, rows)[0]
        expected = mx.sum(mx.exp(known[row]) * (known[row] - logs))
        np.testing.assert_allclose(gated[row], expected, rtol=1e-3, atol=1e-4)


def test_the_goal_is_what_the_action_tokens_attend_to(tmp_path):
    """The goal is the attention of action tokens, mean over layers and heads."""
    made, batch = trainer(tmp_path), with_actions(3)
    policy, visual = made.policy, made._visual(batch)
    goal = np.array(made._goal(batch, visual, (1, 2)))
    for row in range(3):
        ids = batch.prompts[row, : batch.lengths[row].item()].tolist()
        said = student.action_ids(np.array(batch.classes[row]))[:-1].tolist()
        before, after = (
            policy.decoder.embed(mx.array([part]))
            for part in ((student.START,), (*ids, *said))
        )
        hidden = mx.concatenate([before, visual[row : row + 1], after], axis=1)
        last, found = mx.arange(hidden.shape[1] - 4, hidden.shape[1])[None], 0
        for number, layer in enumerate(policy.layers[:3]):
            if number:
                found += policy.decoder.attention_to(number, hidden, last)
            hidden = layer(hidden, "causal", None)
        found = np.array(mx.sum(found, axis=1)[0, 1:65])
        np.testing.assert_allclose(goal[row], found / found.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("actions", [0.0, 0.5, 1.0])
def test_the_scorer_alone_learns(tmp_path, actions, monkeypatch):
    made, batch = trainer(tmp_path, actions=actions, noise=0.0), with_actions(4)
    monkeypatch.setattr(made.collector, "draw", lambda *_: batch)
    made.scoring = dataclasses.replace(made.scoring, batch=4)

    def loss() -> float:
        mx.random.seed(0)
        return made._loss(made.scorer, (0,), 0)[0]

    before, visual = loss().item(), made._visual(batch)
    keep = made.scoring.keep(np.random.default_rng((0,)), 64)
    scores = made.scores(batch, visual, keep)
    logs = scores - mx.logsumexp(scores, axis=1, keepdims=True)
    imitated = -mx.sum(made._goal(batch, visual, (1, 2)) * logs)
    here = keep_highest(scores, keep).indices
    off = mx.sum(made._divergence(batch, visual, made._known(batch, visual), here))
    expected = (1 - actions) * imitated + actions * off
    np.testing.assert_allclose(before, expected.item(), rtol=1e-3)
    _, found = nn.value_and_grad(made.scorer, loss)()
    sizes = {n: mx.max(mx.abs(g)).item() for n, g in tree_flatten(found)}
    assert all(sizes[n] > 0 for n in ("action.weight", "place.weight", "text.weight"))
    assert not tree_flatten(made.policy.trainable_parameters())
    step = tree_map(lambda w, g: w - 0.02 * g, made.scorer.parameters(), found)
    made.scorer.update(step)
    assert actions or loss().item() < before


def test_frames_know_what_was_done_before(corridor, tmp_path):  # noqa: F811
    """A frame stores the executed previous action, not the expert's label."""
    world, done = Corridor("hammer"), []

    def act_(frame, expert):
        done.append(expert * 0.5 + len(done))
        return done[-1]

    some = demonstrations.record(world, 3, act_)
    expected = np.clip([np.zeros(4), *done[:-1]], -1, 1)
    np.testing.assert_allclose(some.before, expected)
    assert len(some) == 3
    assert not np.allclose(some.before[1], some.actions[0])
    both = demonstrations.join([some, some])
    np.testing.assert_array_equal(both.before[3], np.zeros(4))
    both.save(tmp_path / "episodes")
    again = demonstrations.Episodes.open(tmp_path / "episodes")
    np.testing.assert_array_equal(again.before, both.before)
    (tmp_path / "episodes" / "before.npy").unlink()
    with pytest.raises(InputError, match="collected by an earlier version"):
        demonstrations.Episodes.open(tmp_path / "episodes")


def test_batches_bring_it_along(corridor, tmp_path):  # noqa: F811
    made = trainer(tmp_path)
    made.collector.demonstrate(2)
    episodes = made.collector.load(-1)
    rng = np.random.default_rng(0)
    batch = made.collector.draw(rng, 40, episodes)
    _, _, places = made.collector.pick(np.random.default_rng(0), 40, episodes)
    expected = [episodes[i][0].before[n] for i, n in places]
    np.testing.assert_array_equal(batch.before, expected)
    assert 0 < np.any(np.array(batch.before) != 0, axis=1).sum() < 40


def test_held_out_episodes_are_others(corridor, tmp_path, monkeypatch):  # noqa: F811
    made, seeds = trainer(tmp_path), []
    monkeypatch.setattr(Corridor, "reset", _noting(Corridor.reset, seeds))
    made.collector.demonstrate(2)
    learned = set(seeds)
    seeds.clear()
    made.held_out.demonstrate(2, skip=2)
    assert len(learned) == len(seeds) == 18
    assert not learned & set(seeds)


def _noting(reset, seeds):
    def noted(world, seed):
        seeds.append(seed)
        reset(world, seed)

    return noted


def run(folder, output, *more):
    command = "score --steps 2 --batch 2 --corrections 1 --demonstrations 1"
    paths = ["--folder", str(folder), "--output", str(output)]
    program.main([*command.split(), "--held-out", "1", *paths, *more])


def test_score_writes_a_scorer(tmp_path, corridor, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(program, "import_simulator", lambda: None)
    monkeypatch.setattr(scoring, "_BATCHES", 1)
    run(tmp_path / "state", tmp_path / "scorer")
    printed = capsys.readouterr().out
    assert "| acting | " in printed
    assert "| trimvla | " in printed
    about = json.loads((tmp_path / "scorer" / "scorer.json").read_text())
    assert about["settings"]["actions"] == 4
    assert about["trained"]["layers"] in ([0], [1], [2], [3], [1, 2, 3])
    made = load_scorer(tmp_path / "scorer")
    assert type(made) is ActionScorer
    frame = np.zeros((SIZE, SIZE, 3), np.uint8)
    pruner = Pruner(str(tmp_path / "scorer"), 0.1)
    policy = Policy(*load("demo-policy"), pruner=pruner)
    assert about["model"] == policy.model.signs
    assert policy([frame], "open the drawer").shape == (4,)
    assert policy.kept == 6
    with pytest.raises(SystemExit):
        run(tmp_path / "state", tmp_path / "scorer")


def test_a_stopped_training_goes_on_where_it_was(tmp_path, corridor):  # noqa: F811
    whole = trainer(tmp_path / "whole", steps=4)
    whole.run(tmp_path / "a")
    stopped = trainer(tmp_path / "parts", steps=4)
    draw = stopped.collector.draw

    def fail_late(*arguments):
        if stopped._loop.losses[2:]:
            raise KeyboardInterrupt
        return draw(*arguments)

    stopped.collector.draw = fail_late
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tmp_path / "b")
    again = trainer(tmp_path / "parts", steps=4)
    assert again._loop.begin == 3
    again.run(tmp_path / "b")
    for name in ("scorer.json", "scorer.safetensors"):
        one, other = ((tmp_path / f / name).read_bytes() for f in "ab")
        assert one == other
    with pytest.raises(InputError, match="other settings"):
        trainer(tmp_path / "parts", steps=4, actions=0.5)


def test_another_scorer_in_its_folder_is_measured_again(
    tmp_path,
    demo_policy,
    corridor,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setattr(success, "World", Corridor)
    monkeypatch.setattr(success, "HORIZON", 2)
    folder, log = str(tmp_path / "scorer"), tmp_path / "log.jsonl"
    for number, lines in ((0, 1), (0, 1), (1, 2)):
        if number or not log.exists():
            shutil.rmtree(folder, ignore_errors=True)
            mx.random.seed(number)
            save_scorer(ActionScorer(192, 4, 16), folder)
        rows = success.rows([folder], [0.1], [f"{folder} 0.1"])
        success.measure(*demo_policy, 1, ["hammer"], rows, log)
        said = [json.loads(line) for line in log.read_text().splitlines()]
        assert len(said) == lines
        assert {line["kept"] for line in said} == {6.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scorer", "actin"], "Did you mean 'acting'"),
        (["--layers", "1", "4"], "no layer 4 to imitate; expected 0 to 3"),
        (["--keep-ratios", "0.5", "0.1"], "out of order"),
        (["--actions", "2"], "outside [0, 1]"),
        (["--held-out", "0"], "whole numbers from 1"),
        (["--model", "demo"], "shape of demo-policy"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(program, "import_simulator", lambda: None)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "state", tmp_path / "scorer", *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "scorer").exists()
