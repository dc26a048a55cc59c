"""`recipes/demo/in_torch.py`, the torch twin of the demo recipe, equals MLX."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import mlx_tokprune  # isort: skip  (loads the BLAS before MLX)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_train import SMALL

from mlx_tokprune.checkpoints.hub import EMBEDDED
from recipes.demo import stages as recipe
from recipes.demo.batches import as_batch
from recipes.demo.export import torch_name
from recipes.demo.recipe import STAGES, Trainer, optimizer_of
from recipes.demo.student import DEMO_CONFIG, Student

torch = pytest.importorskip("torch", reason="torch is in the parity extra")
SEED = 5


@pytest.fixture(scope="module")
def twin_of():
    """Return the modules `in_torch` and `torch_vlm`."""
    from recipes import torch_vlm
    from recipes.demo import in_torch

    return in_torch, torch_vlm


@pytest.fixture(autouse=True)
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Return a `Trainer` of a small student, and the folder that `train` reads."""
    tokenizer = (EMBEDDED["demo"] / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    mx.random.seed(SEED)
    trainer = Trainer(tmp_path, STAGES, Student(SMALL))
    # Nothing that is zero or one at the start may stand for something else.
    names = dict(tree_flatten(trainer.student.parameters()))
    shaken = {n: a * (1 + 0.1 * mx.random.normal(a.shape)) for n, a in names.items()}
    shaken = {n: a + (0.05 if n.endswith("bias") else 0) for n, a in shaken.items()}
    trainer.student.load_weights(list(shaken.items()))
    np.savez(tmp_path / "start.npz", **{n: np.array(a) for n, a in shaken.items()})
    told = {"config": SMALL, "prefix": trainer.prefix, "end": trainer.end}
    told["suffix"] = trainer.student.vlm.prompt_suffix
    (tmp_path / "told.json").write_text(json.dumps(told))
    return trainer, tmp_path


def twin(modules, folder):
    weights = dict(np.load(folder / "start.npz"))
    told = json.loads((folder / "told.json").read_text())
    return modules[1].Student(weights, told["config"], told["prefix"])


def numbers() -> dict[str, int]:
    """Return the number of each stage by name."""
    return {stage.name: n for n, stage in enumerate(STAGES)}


@pytest.mark.parametrize(
    "name", ["tower", "full pictures", "language", "projector", "together"]
)
def test_losses_and_gradients_are_those_of_mlx(twin_of, prepared, name):
    (trainer, folder), number = prepared, numbers()[name]
    stage = dataclasses.replace(STAGES[number], batch=2)
    stages = [*STAGES[:number], stage]
    _, _, drawn = twin_of[0].Steps(folder, stages)[number, 3]
    batch = twin_of[0].on("cpu", drawn)

    mx.random.seed(SEED)
    if stage.loss == "language":
        shape = batch["cells"]["shape"].shape
        sizes = {"uniform": shape, "normal": (2, batch["keep"], SMALL["hidden_size"])}
        for what, size in sizes.items():
            array = getattr(mx.random, what)(shape=size)
            batch[what] = torch.from_numpy(np.array(array))
    trainer._freeze(stage)
    mx.random.seed(SEED)
    trainer._rng = recipe.choices_of(number, 3)
    loss_of = trainer.losses[stage.loss]
    gradient = nn.value_and_grad(trainer.student, lambda model, b: loss_of(b, stage))
    loss, gradients = gradient(
        trainer.student, as_batch(recipe.draw_step(stage, number, 3))
    )
    flat = {n: np.array(g) for n, g in tree_flatten(gradients)}
    norm = math.sqrt(sum(float((g**2).sum()) for g in flat.values()))

    student = twin(twin_of, folder)
    student.train(stage.loss != "align")
    found = student(stage.loss, batch)
    found.backward()
    theirs = {}
    for safe, weight in student.all.items():
        dotted = safe.replace("/", ".")
        if weight.grad is not None:
            theirs[dotted] = twin_of[1].to_mlx(dotted, weight.grad)
            assert dotted in flat, f"{dotted} does not learn there"
    assert found.item() == pytest.approx(loss.item(), rel=1e-4)
    total = math.sqrt(sum(float((g**2).sum()) for g in theirs.values()))
    assert total == pytest.approx(norm, rel=1e-4)
    for dotted, ours in flat.items():  # one by one: a norm hides what is small
        other = theirs.get(dotted, np.zeros_like(ours))
        scale = max(np.abs(ours).max(), 1e-3 * norm)
        assert np.abs(other - ours).max() < 2e-3 * scale, dotted
    with torch.autocast("cpu", torch.bfloat16):
        rough = student.eval()(stage.loss, batch)
    student.zero_grad()
    rough.backward()
    smooth = student(stage.loss, batch)
    assert rough.item() == pytest.approx(smooth.item(), rel=0.03)
    assert all(
        w.grad.isfinite().all() for w in student.all.values() if w.grad is not None
    )
    if stage.loss == "tower":  # running statistics moved alike
        arrays = student.arrays()
        for dotted, ours in tree_flatten(trainer.student.parameters()):
            if "running" in dotted:
                np.testing.assert_allclose(arrays[dotted], ours, rtol=1e-4, atol=1e-5)


def test_the_shipped_model_answers_in_torch(twin_of, tmp_path):
    """The shipped model in torch is mostly right, and fails on black images."""
    model, processor = mlx_tokprune.load("demo")
    ids = processor.tokenizer.encode
    told = {"suffix": model.prompt_suffix, "prefix": ids(model.prompt_prefix)}
    (told["end"],) = ids("<|im_end|>")
    (tmp_path / "told.json").write_text(json.dumps(told | {"config": DEMO_CONFIG}))
    tokenizer = (EMBEDDED["demo"] / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    batch, rows = twin_of[0].Steps(tmp_path, list(STAGES)).judged(6, 512, 5)
    stored, weights = mx.load(str(EMBEDDED["demo"] / "model.safetensors")), {}
    for name, _ in tree_flatten(Student().vlm.parameters()):
        array = torch.from_numpy(np.array(stored[torch_name(name)]))
        weights[f"vlm.{name}"] = twin_of[1].to_mlx(name, array)
    student = twin_of[1].Student(weights, DEMO_CONFIG, told["prefix"]).eval()
    batch, shares = twin_of[0].on("cpu", batch), []
    for pixels in (batch["pixels"], 0 * batch["pixels"]):
        with torch.no_grad():
            visual = student.project(student.see(pixels)[0])
            about = twin_of[1].every(visual), visual.shape[1], batch["ids"]
            logits = student.answer_logits(visual, *about)
        shares.append(twin_of[0].answers_right(logits, batch, rows)["all"])
    assert shares[0] > 0.85
    assert shares[1] < 0.6


def test_steps_of_the_optimizer_are_those_of_mlx(twin_of):
    rng = np.random.default_rng(0)
    start = [rng.normal(size=(3, 2)).astype(np.float32), np.ones(4, np.float32)]
    weights = [torch.nn.Parameter(torch.from_numpy(a.copy())) for a in start]
    ours = {str(n): mx.array(a) for n, a in enumerate(start)}
    stage = dataclasses.replace(STAGES[0], steps=80, learning_rate=0.1)
    optimizer, other = twin_of[0].AdamW(weights), optimizer_of(stage)
    for step in range(6):
        scale = 3.0 if step % 2 else 0.1  # clipped, and not
        grads = [scale * rng.normal(size=a.shape).astype(np.float32) for a in start]
        grads[1][:] = 0  # the loss does not depend on it
        given, _ = optim.clip_grad_norm({"0": mx.array(grads[0])}, 1.0)
        ours = other.apply_gradients(given | {"1": mx.zeros(4)}, ours)
        weights[0].grad = torch.from_numpy(grads[0].copy())
        optimizer.step(twin_of[0].rate_of(stage, step / stage.steps))
        for n, weight in enumerate(weights):
            np.testing.assert_allclose(weight.detach(), ours[str(n)], 1e-5, 1e-6)


def test_rates_are_those_of_mlx(twin_of):
    stage = dataclasses.replace(STAGES[0], steps=200)
    optimizer = optimizer_of(stage)
    for step in range(stage.steps):
        optimizer.update({}, {})
        ours = optimizer.learning_rate.item()
        found = twin_of[0].rate_of(stage, step / stage.steps)
        assert found == pytest.approx(ours, rel=1e-4, abs=1e-9), step


def test_a_training_ends_with_a_checkpoint(twin_of, prepared, capsys, monkeypatch):
    """After one step per stage, `finish` writes a checkpoint that `load` reads."""
    _, folder = prepared
    short = tuple(dataclasses.replace(s, steps=1, batch=2) for s in STAGES)
    monkeypatch.setattr(twin_of[0], "STAGES", short)
    out, checkpoint = folder / "out", folder / "checkpoint"
    about = ["--folder", str(folder), "--output"]
    more = ["--workers", "0", "--judged", "2", "--minutes", "5"]
    twin_of[0].main(["train", *about, str(out), *more])
    printed = capsys.readouterr().out
    assert all(f"{stage.name}: 1 steps, loss" in printed for stage in STAGES)
    weights = str(out / "weights.npz")
    twin_of[0].main(["finish", *about, str(checkpoint), "--weights", weights])
    model, _ = mlx_tokprune.load(checkpoint)
    pixels = np.random.default_rng(0).random((1, 128, 128, 3), dtype=np.float32)
    student = twin_of[1].Student(dict(np.load(weights)), SMALL, [1]).eval()
    with torch.no_grad():
        seen = student.see(torch.from_numpy(pixels))[0]
        tokens = model.encode(mx.array(pixels)).tokens
        np.testing.assert_allclose(tokens, seen, atol=2e-2, rtol=2e-2)


def test_a_stage_whose_time_is_over_makes_room(twin_of, prepared, monkeypatch):
    """A stage out of time does one step and skips the steps drawn ahead."""
    _, folder = prepared
    asked = ["train", "--folder", str(folder), "--output", str(folder / "out")]
    args = twin_of[0].build_parser().parse_args(asked)
    args.workers, args.scale = 0, 0.01
    run, learned, drawn = twin_of[0].Run(args), [], []

    def ahead(steps, sampler, **how):
        """Yield steps three draws late, like a loader that prefetches."""
        for place in sampler:
            drawn.append(place)
            if len(drawn) > 3:
                yield *drawn[-4], {}
        for place in drawn[-3:]:
            yield *place, {}

    monkeypatch.setattr(torch.utils.data, "DataLoader", ahead)
    run.learn = lambda stage, step, batch: learned.append((stage.name, step)) or 1
    run.judge, run.save = (lambda *about: None), (lambda *about, **more: None)
    run.train()
    assert learned == [(stage.name, 0) for stage in STAGES]
    assert len(drawn) <= 4 * len(STAGES)


def test_a_stopped_training_leaves_weights(twin_of, prepared, monkeypatch):
    _, folder = prepared
    short = (dataclasses.replace(STAGES[0], steps=3, batch=2),)
    monkeypatch.setattr(twin_of[0], "STAGES", short)
    monkeypatch.setattr(twin_of[0], "_EVERY", (0.0, 0.0))
    asked = ["train", "--folder", str(folder), "--output", str(folder / "out")]
    run, judged = twin_of[0].Run(twin_of[0].build_parser().parse_args(asked)), []
    run.args.workers = 0

    def stop(stage, step):
        judged.append(run.student.arrays())
        if len(judged) == 2:
            raise KeyboardInterrupt

    run.judge = stop
    with pytest.raises(KeyboardInterrupt):
        run.train()
    saved = np.load(folder / "out" / "weights.npz")
    assert {n: a.shape for n, a in saved.items()} == {
        n: a.shape for n, a in np.load(folder / "start.npz").items()
    }
    assert all(np.array_equal(saved[n], a) for n, a in judged[0].items())


def test_a_killed_training_goes_on_at_a_stage_s_beginning(
    twin_of, prepared, monkeypatch
):
    """A killed and resumed training ends with the weights of a whole training."""
    _, folder = prepared
    kinds = (STAGES[1], STAGES[2])  # with noise, of which every stage has its own
    short = tuple(dataclasses.replace(s, steps=2, batch=2) for s in kinds)
    monkeypatch.setattr(twin_of[0], "STAGES", short)
    monkeypatch.setattr(twin_of[0].time, "time", lambda: 0.0)  # rates follow it, too
    parser, ends = twin_of[0].build_parser(), []
    for name in ("whole", "parts", "parts"):
        about = ["--folder", str(folder), "--output", str(folder / name)]
        run = twin_of[0].Run(parser.parse_args(["train", *about, "--workers", "0"]))
        run.judge = lambda *about: None
        learn = run.learn

        def killed(stage, step, batch, run=run, learn=learn):
            if (run.number, step, len(ends)) == (1, 1, 1):
                raise KeyboardInterrupt
            return learn(stage, step, batch)

        run.learn = killed
        try:
            run.train()
        except KeyboardInterrupt:
            assert name == "parts"
        ends.append(run.student.arrays())
    assert run.number == 2
    assert all(np.array_equal(ends[0][n], a) for n, a in ends[2].items())
    assert not all(np.array_equal(ends[0][n], a) for n, a in ends[1].items())


def test_what_is_missing_is_said(twin_of, tmp_path, capsys):
    asked = ["--folder", str(tmp_path), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        twin_of[0].main(["train", *asked])
    assert ended.value.code == 2
    assert "has no start.npz; run prepare first" in capsys.readouterr().err


def test_training_needs_nothing_of_mlx(twin_of):
    code = (
        "import sys; sys.modules['mlx'] = None; import recipes.demo.in_torch; "
        "print([n for n in sys.modules if n.startswith('mlx.')])"
    )
    about = {"capture_output": True, "text": True, "check": True}
    where = Path(twin_of[0].__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", code], cwd=where, **about).stdout
    assert said.strip() == "[]"
