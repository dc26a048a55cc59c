"""`recipes/policy/in_torch.py`, the torch twin of the demo policy, equals MLX."""

import json
import math
import multiprocessing
import threading

import mlx_tokprune  # isort: skip  (loads the BLAS before MLX)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_policy_training import Corridor

from recipes.policy import student, worlds
from recipes.policy.worlds import SIZE, TASKS

torch = pytest.importorskip("torch", reason="torch is in the parity extra")


@pytest.fixture(scope="module")
def twin():
    from recipes.policy import in_torch

    return in_torch


@pytest.fixture(scope="module")
def folder(twin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    twin.main(["prepare", "--folder", str(folder)])
    return folder


@pytest.fixture(autouse=True)
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.mark.parametrize(
    ("keep", "scored"), [(64, False), (24, False), (16, True), (64, True)]
)
def test_losses_and_gradients_are_those_of_mlx(twin, folder, keep, scored):
    rng = np.random.default_rng(keep)
    weights = dict(np.load(folder / "start.npz"))
    for name, array in weights.items():  # nothing is zero or one
        shaken = array * (1 + 0.1 * rng.normal(size=array.shape))
        weights[name] = np.float32(shaken + 0.02 * rng.normal(size=array.shape))
    told = json.loads((folder / "told.json").read_text())
    ids = list(told["prompts"].values())[:3]
    longest = max(map(len, ids)) + 1
    arrays = {
        "pixels": rng.random((3, SIZE, SIZE, 3), dtype=np.float32),
        "prompts": np.array([p + [student.PAD] * (longest - len(p)) for p in ids]),
        "lengths": np.array(list(map(len, ids))),
        "classes": rng.integers(0, 255, (3, 4)),
        "noise": rng.gumbel(size=(3, 64)).astype(np.float32),
    }
    more = {"keep": keep, "scored": scored}

    policy = student.build_policy()
    policy.load_weights([(name, mx.array(a)) for name, a in weights.items()])
    batch = student.Batch(**{n: mx.array(a) for n, a in arrays.items()}, **more)

    def total(model):
        loss, off = student.losses(model, batch)
        return loss + 100 * off, loss, off  # scores learn little else

    (_, *ours), gradients = nn.value_and_grad(policy, total)(policy)
    flat = {n: np.array(g) for n, g in tree_flatten(gradients)}
    norm = math.sqrt(sum(float((g**2).sum()) for g in flat.values()))

    model = twin.Twin(weights, told)
    found = model({n: torch.from_numpy(a) for n, a in arrays.items()} | more)
    (found[0] + 100 * found[1]).backward()
    assert found[0].item() == pytest.approx(ours[0].item(), rel=1e-4)
    assert found[1].item() == pytest.approx(ours[1].item(), rel=1e-3, abs=1e-6)
    square = 0.0
    for safe, weight in model.all.items():
        dotted = safe.replace("/", ".")
        given = np.zeros_like(flat[dotted])
        if weight.grad is not None:
            given = twin.to_mlx(dotted, weight.grad)
        square += float((given**2).sum())
        scale = max(np.abs(flat[dotted]).max(), 1e-3 * norm)
        assert np.abs(given - flat[dotted]).max() < 2e-3 * scale, dotted
    assert math.sqrt(square) == pytest.approx(norm, rel=1e-4)


class Workers:
    """Stand-in of `workers.Workers`, with threads instead of processes."""

    def __init__(self, tasks):
        from recipes.policy import workers

        self.tasks, self.ends = tasks, []
        self.ask = workers.Workers.ask.__get__(self)
        self.hear = workers.Workers.hear.__get__(self)
        for number, task in enumerate(tasks):
            mine, theirs = multiprocessing.Pipe()
            about = theirs, task, 1, 1
            threading.Thread(target=workers.work, args=about, daemon=True).start()
            self.ends.append(mine)
            assert self.hear(number) == task


def test_a_training_ends_with_a_checkpoint(twin, folder, tmp_path, monkeypatch, capsys):
    """A short training corrects, logs, and ends with a checkpoint that loads."""
    monkeypatch.setattr(worlds, "World", Corridor)
    asked = ["train", "--folder", str(folder), "--output", str(tmp_path / "out")]
    asked += ["--scale", "0.0003", "--judged", "1"]
    args = twin.build_parser().parse_args(asked)
    run = twin.Run(args, Workers(list(TASKS)))
    run.plan |= {"batch": 4, "first_round": 1, "round_every": 9, "demonstrations": 2}
    run.train()
    printed = capsys.readouterr().out
    assert printed.count("won of 1") == 2  # a round and the look at the end
    assert run.frames.all()
    assert run.shares.std() > 0
    assert "step 4:" in printed
    asked = ["finish", "--weights", str(tmp_path / "out" / "weights.npz")]
    twin.main([*asked, "--output", str(tmp_path / "checkpoint")])
    policy, _ = mlx_tokprune.load(tmp_path / "checkpoint")
    pixels = np.random.default_rng(0).random((1, SIZE, SIZE, 3), dtype=np.float32)
    expected = twin.Twin(dict(np.load(tmp_path / "out" / "weights.npz")), run.told)
    with torch.no_grad():
        seen = expected.encode(torch.from_numpy(pixels))
    tokens = policy.encode(mx.array(pixels)).tokens
    np.testing.assert_allclose(tokens, seen, rtol=2e-2, atol=2e-2)


def test_labels_and_actions_are_those_of_the_recipe(twin, folder, tmp_path):
    """Labels are the bins of `action_classes`; actions are their centres."""
    asked = ["train", "--folder", str(folder), "--output", str(tmp_path)]
    run = twin.Run(twin.build_parser().parse_args(asked), Idle())
    actions = np.float32(np.random.default_rng(0).uniform(-1.1, 1.1, (50, 4)))
    frames = np.zeros((50, SIZE, SIZE, 3), np.uint8)
    run.add(2, frames, actions, None)
    classes = student.action_classes(actions)
    np.testing.assert_array_equal(run.data[2]["classes"], classes)
    run.twin.act = lambda batch: torch.from_numpy(classes)
    found, damaged = run.answer(frames, None, np.zeros(50, np.int64), True)
    assert (found.shape, damaged) == ((50, 1, 4), 0)
    near = np.abs(found[:, 0] - np.clip(actions, -1, 1)).max()
    assert near <= 1 / 255 + 1e-6


class Idle:
    ends = ()
