"""Training and evaluation of the demo policy, without a simulator."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_tokprune import InputError, load
from mlx_tokprune.features import Selection
from mlx_tokprune.measure.intervals import wilson
from mlx_tokprune.pipeline import Scene, VisualTokens, assemble, prune_at_prompt
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.pruners import Pruner
from mlx_tokprune.pruners.text import prompt_scores
from recipes.policy import __main__ as program
from recipes.policy import (
    cloning,
    collecting,
    demonstrations,
    student,
    success,
    table,
    worlds,
)
from recipes.policy.demonstrations import Episodes, demonstrate, join
from recipes.policy.worlds import SIZE, TASKS

PLAN = cloning.Cloning(
    demonstrations=2,
    steps=6,
    batch=4,
    round_every=2,
    first_round=3,
    corrections=1,
    learning_rate=1e-3,
)


class Corridor:
    """World of three steps that is won by moving to the bright half."""

    def __init__(self, name: str):
        self.task = TASKS[name]

    def reset(self, seed: int) -> None:
        self.seed, self.steps, self.success = seed, 0, False
        self.side = float(np.random.default_rng(seed).choice([-1, 1]))

    def frame(self) -> np.ndarray:
        frame = np.zeros((SIZE, SIZE, 3), np.uint8)
        half = slice(SIZE // 2, None) if self.side > 0 else slice(SIZE // 2)
        frame[:, half] = 255
        return frame

    def expert(self) -> np.ndarray:
        return np.array([self.side, 0, 0, 1], np.float32)

    def hand(self) -> np.ndarray:
        return np.array([0, 0, 0.1 * self.steps, 1], np.float32)

    def ahead(self, count: int) -> np.ndarray:
        return np.stack([self.expert()] * count)

    def step(self, action: np.ndarray) -> bool:
        self.steps += 1
        self.success = self.success or (self.steps >= 3 and action[0] * self.side > 0)
        return self.success


@pytest.fixture
def corridor(monkeypatch):
    for module in (collecting, success):
        monkeypatch.setattr(module, "World", Corridor)
    for module in (demonstrations, success):
        monkeypatch.setattr(module, "HORIZON", 5)


def state(trainer) -> list[mx.array]:
    return [array for _, array in sorted(trainer.averaged().items())]


def test_a_stopped_run_goes_on_where_it_was(tmp_path, corridor, monkeypatch):
    monkeypatch.setattr(cloning, "_SAVE_EVERY", 2)
    whole = cloning.Trainer(tmp_path / "whole", PLAN)
    whole.run()

    stopped = cloning.Trainer(tmp_path / "parts", PLAN)
    draw = stopped._draw

    def fail_late(step):
        if step == 5:
            raise KeyboardInterrupt
        return draw(step)

    stopped._draw = fail_late
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = cloning.Trainer(tmp_path / "parts", PLAN)
    assert again.loop.begin == 4
    again.run()
    for one, other in zip(state(whole), state(again), strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-6)
    folders = sorted(p.name for p in (tmp_path / "parts" / "episodes").iterdir())
    assert "corrections-000003" in folders
    assert "corrections-000005" in folders


def test_frames_are_drawn_by_what_took_long_in_the_last_round(
    tmp_path, corridor, monkeypatch
):
    """Frames are drawn evenly at first, and by the last round's shares later."""
    drawn = []

    def draw(self, rng, size, episodes, shares=None):
        drawn.append(shares)
        return collect(self, rng, size, episodes, shares)

    collect = collecting.Collector.draw
    monkeypatch.setattr(collecting.Collector, "draw", draw)
    trainer = cloning.Trainer(tmp_path, PLAN)
    trainer.run()
    assert drawn[:3] == [None] * 3
    for step, shares in enumerate(drawn[3:], 3):
        expected = trainer.collector.shares(step)
        np.testing.assert_array_equal(shares, expected)
        assert expected.std() > 0


def batch_of(keep: int, scored: bool, size: int = 8) -> student.Batch:
    rng = np.random.default_rng(0)
    prompts = [student.prompt_ids(t.instruction) for t in TASKS.values()][:size]
    lengths = [len(p) for p in prompts]
    padded = [p + [student.PAD] * (max(lengths) - len(p)) for p in prompts]
    return student.Batch(
        mx.array(rng.random((size, SIZE, SIZE, 3), dtype=np.float32)),
        mx.array(padded),
        mx.array(lengths),
        mx.array(rng.integers(0, 255, (size, 4))),
        keep,
        mx.array(rng.gumbel(size=(size, 64)).astype(np.float32)),
        scored,
    )


@pytest.mark.parametrize(("keep", "scored"), [(64, False), (16, False), (16, True)])
def test_training_sees_what_acting_sees(keep, scored):
    """Logits of a padded batch equal the logits of the package's decoding."""
    mx.random.seed(0)
    policy, batch = student.build_policy(), batch_of(keep, scored)
    processor = student.build_processor()
    seen, logits = {}, policy.decoder.logits
    policy.decoder.logits = lambda x: seen.setdefault("logits", logits(x))
    student.losses(policy, batch)
    features = policy.encode(batch.pixels).tokens
    indices = student._choose(policy, features, batch)
    ids = student.action_ids(np.array(batch.classes))
    for row, task in enumerate(list(TASKS.values())[:3]):
        start, asked = processor.prompt(task.instruction).segments
        told = Prompt((start, (*asked, *ids[row, :-1].tolist())))
        kept = indices[row : row + 1]
        visual = VisualTokens(
            policy.project(features[row : row + 1])[:, indices[row]],
            kept,
            Selection(kept),
            (8, 8),
        )
        sequence = assemble(policy, Scene(None, told), visual)
        ours = logits(policy.decoder.read(sequence, rows=4).hidden)[0]
        assert mx.allclose(ours, seen["logits"][row], rtol=1e-3, atol=1e-4)


def test_training_scores_what_the_pruner_scores():
    """Training scores equal the pruner's scores of unpadded prompts."""
    pruner = Pruner("trimvla", keep_tokens=16)
    policy, batch = student.build_policy(), batch_of(64, False)
    visual = policy.project(policy.encode(batch.pixels).tokens)
    ours = student.trimvla_scores(policy, visual, batch)
    lengths = batch.lengths.tolist()
    assert min(lengths) < max(lengths)
    for row, length in enumerate(lengths):
        text = policy.decoder.embed(batch.prompts[row : row + 1, :length])
        prepared = pruner.prepare(visual[row : row + 1]), pruner.prepare(text)
        queries, keys = policy.decoder.queries_and_keys(*prepared)
        expected = prompt_scores(queries, keys, 1.0)[0]
        assert mx.allclose(ours[row], expected, rtol=1e-4, atol=1e-5)
        every = mx.arange(64)[None]
        told = Prompt(((student.START,), batch.prompts[row, :length]))
        seen = VisualTokens(visual[row : row + 1], every, Selection(every), (8, 8))
        chosen = prune_at_prompt(policy, Scene(None, told), (pruner,), seen)
        best = mx.sort(mx.argsort(-ours[row])[:16])
        assert mx.array_equal(chosen.indices[0], best)


def test_the_second_loss_is_a_divergence():
    """The second loss is never negative, and training lowers it."""
    import mlx.nn as nn
    import mlx.optimizers as optim

    mx.random.seed(1)
    policy, batch = student.build_policy(), batch_of(16, False)
    gradient = nn.value_and_grad(policy, lambda: student.losses(policy, batch)[1])
    optimizer, found = optim.Adam(3e-4), []
    for _ in range(6):
        off, grads = gradient()
        optimizer.update(policy, grads)
        mx.eval(policy.parameters(), off)
        found.append(off.item())
    assert all(off >= 0 for off in found)
    assert found[-1] < found[0]


def test_learning_lowers_the_loss():
    import mlx.nn as nn
    import mlx.optimizers as optim

    mx.random.seed(0)
    policy, batch = student.build_policy(), batch_of(24, True)
    optimizer = optim.AdamW(1e-3)
    gradient = nn.value_and_grad(policy, lambda: sum(student.losses(policy, batch)))
    found = []
    for _ in range(8):
        loss, grads = gradient()
        optimizer.update(policy, grads)
        mx.eval(policy.parameters(), loss)
        found.append(loss.item())
    assert found[-1] < found[0] - 0.5


def test_the_second_loss_teaches_queries_and_keys_of_the_first_layer_only():
    import mlx.nn as nn

    policy, batch = student.build_policy(), batch_of(16, False)
    gradient = nn.value_and_grad(policy, lambda: student.losses(policy, batch)[1])
    _, grads = gradient()
    moved = {n for n, g in tree_flatten(grads) if mx.any(g != 0).item()}
    first = "language_model.model.layers.0."
    wanted = {f"{first}self_attn.{p}_proj.weight" for p in "qk"}
    assert wanted <= moved <= wanted | {f"{first}input_layernorm.weight"}


def test_the_tokenizer_gives_the_ids_of_training(tmp_path):
    target = tmp_path / "policy"
    student.write_checkpoint(
        dict(tree_flatten(student.build_policy().parameters())), target
    )
    _, processor = load(target)
    for task in TASKS.values():
        start, ids = processor.prompt(task.instruction).segments
        assert (start, list(ids)) == ((1,), student.prompt_ids(task.instruction))
    assert processor.bounds("action", None).low.tolist() == [-1.0] * 4
    assert sum(p.stat().st_size for p in target.iterdir()) <= 12e6


def test_labels_survive_the_bins():
    actions = np.linspace(-1, 1, 101)
    ids = student.action_ids(student.action_classes(actions))
    back = student.build_processor().values(ids)
    assert np.abs(back - actions).max() <= 1 / 255


def test_demonstrations_are_labelled_with_clean_actions(tmp_path):
    world = Corridor("hammer")
    some = demonstrate(world, 3)
    assert (np.abs(some.actions[:, 0]) == 1).all()
    again = demonstrate(world, 3)
    assert np.array_equal(some.frames, again.frames)
    both = join([some, again])
    both.save(tmp_path / "episodes")
    stored = Episodes.open(tmp_path / "episodes")
    assert len(stored) == 2 * len(some)
    assert np.array_equal(stored.actions, both.actions)
    assert [p.name for p in tmp_path.iterdir()] == ["episodes"]


# Judging ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    mx.random.seed(0)
    return student.build_policy(), student.build_processor()


def test_success_is_logged_and_not_measured_again(tmp_path, corridor, policy):
    log = tmp_path / "log.jsonl"
    rows = [
        success.Row("none", Pruner()),
        success.Row("trimvla own count", Pruner("trimvla")),
        success.Row("random actions", Pruner()),
        success.Row("grey picture", Pruner()),
    ]
    success.measure(*policy, 3, ["drawer-open", "hammer"], rows, log)
    lines = table.read_log(log)
    assert [(x["row"], x["task"]) for x in lines] == [
        (row.label, task) for task in ("drawer-open", "hammer") for row in rows
    ]
    assert all(len(x["success"]) == 3 for x in lines)
    assert lines[0]["kept"] == 64
    assert 1 <= lines[1]["least"] <= lines[1]["kept"] <= lines[1]["most"] < 64
    before = log.read_text()
    success.measure(*policy, 3, ["drawer-open", "hammer"], rows, log)
    assert log.read_text() == before
    # Other weights, or another number of episodes, are another measurement.
    mx.random.seed(9)
    success.measure(student.build_policy(), policy[1], 3, ["hammer"], rows[:1], log)
    success.measure(*policy, 2, ["hammer"], rows[:1], log)
    assert len(table.read_log(log)) == len(lines) + 2


def test_a_policy_that_looks_wins_and_one_that_does_not_loses(
    tmp_path, corridor, monkeypatch
):
    """A policy that reads its frames wins, and loses on grey frames."""

    class Looker:
        kept_each, robots = (64,), None

        def __init__(self, *arguments, **options):
            pass

        def act_on_batch(self, batch, instruction):
            right = [frames[0][:, -1].mean() for frames in batch]
            left = [frames[0][:, 0].mean() for frames in batch]
            side = np.sign(np.subtract(right, left))
            assert self.robots in (None, len(batch))  # those that were said to go on
            self.robots = len(batch)
            return np.stack([side, side, side, side], axis=1)

        def keep_robots(self, rows):
            assert sorted(set(rows)) == list(rows)
            assert rows[-1] < self.robots
            self.robots = len(rows)

    monkeypatch.setattr(success, "Policy", Looker)
    rows = [success.Row(label, Pruner()) for label in ("none", "grey picture")]
    success.measure(
        student.build_policy(), None, 4, ["drawer-open"], rows, tmp_path / "log"
    )
    full, grey = table.read_log(tmp_path / "log")
    assert full["success"] == [True] * 4
    assert grey["success"] == [False] * 4


def test_the_opposite_instruction_is_the_opposite(corridor, monkeypatch):
    heard = []

    class Listener:
        kept_each = (64,)

        def __init__(self, *arguments, **options):
            pass

        def act_on_batch(self, batch, instruction):
            heard.append(instruction)
            return np.zeros((len(batch), 4))

        def keep_robots(self, rows):
            pass

    monkeypatch.setattr(success, "Policy", Listener)
    row = success.Row("opposite instruction", Pruner())
    for name in TASKS:
        world = Corridor(name)
        world.reset(0)
        see, _ = success._actor(None, None, row, name, 1, None)
        see([world])
        assert heard[-1] != TASKS[name].instruction
    assert heard[0] == "close the drawer"


def test_every_method_and_control_has_its_rows():
    labels = [row.label for row in success.rows()]
    assert len(labels) == len(set(labels))
    for label in ("none", "norm 0.75", "trimvla 0.1", "lightvla own count"):
        assert label in labels
    assert set(success.CONTROLS) <= set(labels)
    chosen = ["lightvla own count", "trimvla 0.07", "none"]
    found = success.rows(budgets=[0.07], labels=chosen)
    assert [row.label for row in found] == chosen


def test_seeds_of_judging_are_never_those_of_training():
    most = cloning.Cloning()
    tasks = len(TASKS)
    shown = demonstrations.DEMONSTRATION_SEEDS
    last = shown + 10_000 * (tasks - 1) + most.demonstrations
    assert most.demonstrations <= 10_000
    assert last < demonstrations.CORRECTION_SEEDS
    last = demonstrations.CORRECTION_SEEDS + 1_000_000 * (tasks - 1) + 16 * most.steps
    assert last + most.corrections < success.TEST_SEEDS


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 225, 0.0, 0.0168), (225, 225, 0.9832, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_intervals_are_wilson_s(right, total, low, high):
    """Intervals equal Wilson's, as in the example of Newcombe (1998), method 3."""
    found = wilson(right, total)
    assert found == pytest.approx((low, high), abs=2e-4)


def test_the_table_and_the_picture_for_people(tmp_path, monkeypatch):
    lines = [
        {"row": "none", "task": "hammer", "success": [True] * 3 + [False], "kept": 64},
        {"row": "norm 0.5", "task": "hammer", "success": [False] * 4, "kept": 32},
    ]
    shown = table.markdown(lines, {"norm 0.5": 0.25}).splitlines()
    assert shown[2].startswith("| none | 64 | 75.0 (30.1-95.4) |  | 75 |")
    assert shown[3].startswith("| norm 0.5 | 32 | 0.0 (0.0-49.0) | 25 % | 0 |")
    assert "TTFT" not in table.markdown(lines, {})
    spread = [{**lines[0], "least": 3, "most": 9, "kept": 5.6, "row": "lightvla"}]
    assert "| lightvla | 6 (3-9) |" in table.markdown(spread, {})
    learned = {**lines[1], "row": "./a-scorer 0.1", "kept": 6}
    drawn = []
    monkeypatch.setattr(table, "_line", lambda axes, *about: drawn.append(about))
    table.draw([learned], tmp_path / "success.png")  # without the unpruned row
    assert drawn == [([(6.0, 0, 4)], "./a-scorer")]
    monkeypatch.undo()
    table.draw(lines, tmp_path / "success.png")
    with Image.open(tmp_path / "success.png") as picture:
        assert picture.width > picture.height > 300


def test_success_by_the_steps_of_a_tuning(tmp_path, capsys):
    for step, won in ((0, [True, False]), (200, [True, True])):
        line = {"row": "lightvla own count", "task": "hammer", "success": won}
        line |= {"kept": 4.5, "least": 2, "most": 9}
        (tmp_path / f"{step}.jsonl").write_text(json.dumps(line) + "\n")
    logs = [str(tmp_path / f"{step}.jsonl") for step in (0, 200)]
    plot = tmp_path / "plot.png"
    program.main(["table", *logs, "--steps", "0", "200", "--plot", str(plot)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "| | step 0 | step 200 |"
    assert shown[2].startswith("| lightvla own count | 50.0 (9.5-90.5), 4.5 (2-9) |")
    assert plot.stat().st_size > 1000
    with pytest.raises(SystemExit):
        program.main(["table", *logs, "--steps", "0"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["success", "--log", "x", "--tasks", "drawer-opn"], "'drawer-open'?"),
        (["success", "--log", "x", "--episodes", "0"], "cannot run 0 episodes"),
        (["success", "--log", "x", "--methods", "nrm"], "'norm'?"),
        (["success", "--log", "x", "--rows", "trimvla .1"], "'trimvla 0.1'?"),
        (["success", "--log", "x", "--budgets", "2"], "outside (0, 1]"),
        (["run", "--folder", "f", "--output", "o", "--scale", "0"], "out of range"),
        (["run", "--folder", "f", "--output", "."], "already exists"),
        (["table", "nowhere.jsonl"], "does not exist"),
        (["table", __file__], "line 1 of"),
        (["table", __file__, "--plot", "no/such/place.png"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence(monkeypatch, capsys, options, message):
    monkeypatch.setattr(program, "import_simulator", lambda: None)
    with pytest.raises(SystemExit) as stop:
        program.main(options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_metaworld_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "metaworld", None)
    with pytest.raises(InputError, match=r"mlx-tokprune\[sim\]"):
        worlds.import_simulator()


def test_a_log_is_lines_of_json(tmp_path):
    file = tmp_path / "log"
    line = {"row": "none", "task": "hammer", "success": [True], "kept": 64}
    file.write_text(json.dumps(line) + "\n")
    assert table.read_log(file) == [line]
    assert table.read_log(tmp_path / "nothing") == []
    assert math.isclose(sum(wilson(1, 2)), 1)


def test_a_folder_of_another_plan_is_refused(tmp_path, corridor):
    cloning.Trainer(tmp_path, PLAN).run()
    with pytest.raises(InputError, match="other settings"):
        cloning.Trainer(tmp_path, cloning.Cloning())
    assert cloning.Trainer(tmp_path, PLAN).loop.begin == PLAN.steps


def test_a_table_s_times_are_of_policies_with_a_state_too():
    assert program._time_saved("demo-pi0", 1).keys() >= {"norm 0.5", "trimvla 0.1"}
