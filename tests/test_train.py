"""Generated scenes, and the recipe on a student small enough for a test."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_tokprune
from mlx_tokprune.checkpoints.hub import EMBEDDED
from mlx_tokprune.errors import InputError
from mlx_tokprune.scenes import pictures as scenes
from mlx_tokprune.scenes import questions
from mlx_tokprune.scenes.held_out import HELD_OUT, TRAINING
from mlx_tokprune.train.loop import Loop
from recipes.demo.batches import make_batch
from recipes.demo.export import export
from recipes.demo.labels import CHARACTERS, cell_labels, fine_labels
from recipes.demo.recipe import STAGES, Trainer
from recipes.demo.student import DEMO_CONFIG, Student

SMALL = DEMO_CONFIG | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "mm_hidden_size": 64,
    "vision_config": DEMO_CONFIG["vision_config"]
    | {"layers": [1] * 5, "embed_dims": [4, 8, 16, 32, 32], "mlp_ratios": [1] * 5},
}


def test_a_seed_is_a_scene():
    one, again, other = (
        make_batch((TRAINING, 3, s), 2, 256, 2, questions=4) for s in (1, 1, 2)
    )
    assert mx.array_equal(one.pixels, again.pixels)
    assert one.questions == again.questions
    assert not mx.array_equal(one.pixels, other.pixels)
    assert HELD_OUT != TRAINING


@pytest.mark.parametrize("kind", [*questions.KINDS, questions.SIDE])
def test_answers_follow_from_the_scene(kind):
    rng = np.random.default_rng(0)
    asked = 0
    for _ in range(200):
        scene = scenes.sample_scene(rng)
        question = questions.ask(rng, scene, kind)
        if question is not None:
            asked += 1
            assert question.answer == truth(scene, question.prompt)
            if kind == questions.SIDE:
                assert {"left", "right"} & set(question.prompt.split())
    assert asked > 50


def truth(scene: scenes.Scene, prompt: str) -> str:
    """Return the answer that the words of the question imply."""
    words = prompt.rstrip("?").split()

    def find(noun: list[str]) -> scenes.Thing:
        match = [
            t
            for t in scene.things
            if t.shape == noun[-1] and (len(noun) == 1 or t.color == noun[0])
        ]
        assert len(match) == 1
        return match[0]

    if words[:2] == ["What", "color"]:
        return find(words[4:]).color
    if words[:2] == ["What", "shape"]:
        return next(t.shape for t in scene.things if t.color == words[3])
    if words[0] == "How":
        if words[2] == "shapes" and words[-1] in scenes.COLORS:
            return str(sum(t.color == words[-1] for t in scene.things))
        if words[2] == "shapes":
            return str(len(scene.things))
        singular = {"crosses": "cross"}.get(words[2], words[2][:-1])
        return str(sum(t.shape == singular for t in scene.things))
    if words[0] == "Where":
        thing = find(words[3:])
        row = "top" if thing.y < scene.canvas / 2 else "bottom"
        return f"{row} {'left' if thing.x < scene.canvas / 2 else 'right'}"
    if words[0] == "Is":
        nouns = " ".join(words[2:]).split(" the ")
        sides = {"left", "right", "above", "below"} & set(nouns[0].split())
        first = [
            w for w in nouns[0].split() if w in scenes.COLORS or w in scenes.SHAPES
        ]
        a, b = find(first), find(nouns[1].split())
        true = {
            "left": a.x < b.x,
            "right": a.x > b.x,
            "above": a.y < b.y,
            "below": a.y > b.y,
        }
        if " or " in nouns[0]:
            return next(s for s in sides if true[s])
        return "yes" if true[sides.pop()] else "no"
    return scene.sign.text


def test_labels_say_what_is_drawn():
    rng = np.random.default_rng(1)
    for _ in range(20):
        scene = scenes.sample_scene(rng)
        picture = scenes.render(rng, scene)
        assert picture.size == (scene.width, scene.height)
        assert max(picture.size) == scene.canvas
        labels, fine = cell_labels(scene), fine_labels(scene)
        assert (labels["shape"] > 0).sum() == len(scene.things) + bool(scene.sign)
        for thing in scene.things:
            cell = int(thing.y // 64) * 8 + int(thing.x // 64)
            assert labels["shape"][cell] == 1 + scenes.SHAPES.index(thing.shape)
            row, column = int(thing.y // 16), int(thing.x // 16)
            assert fine["shape"][row, column] == labels["shape"][cell]
        if scene.sign:
            chars = set(np.unique(fine["char"])) - {0}
            letters = {CHARACTERS[c - 1] for c in chars}
            assert letters <= set(scene.sign.text)
            assert letters


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Run on the CPU, where two runs give equal gradients."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def short(steps: int = 2):
    return tuple(
        dataclasses.replace(s, steps=steps, batch=2, learning_rate=1e-3) for s in STAGES
    )


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """Return the shipped tokenizer, which saves the time of training one."""
    return EMBEDDED["demo"] / "tokenizer.json"


def trainer(folder, tokenizer_file, steps=2):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    mx.random.seed(0)
    return Trainer(folder, short(steps), Student(SMALL))


def test_every_stage_runs_and_the_export_loads(tmp_path, tokenizer_file):
    run = trainer(tmp_path / "run", tokenizer_file)
    run.run()
    export(run.student, run.tokenizer, tmp_path / "out", SMALL)
    model, _ = mlx_tokprune.load(tmp_path / "out")
    run.student.eval()
    pixels = mx.random.uniform(shape=(1, 128, 128, 3))
    ours, theirs = model.encode(pixels).tokens, run.student.see(pixels)[0]
    np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=2e-2, rtol=2e-2)


def test_a_stopped_run_goes_on_where_it_was(tmp_path, tokenizer_file, monkeypatch):
    """A run stopped in the second stage resumes to equal weights."""
    monkeypatch.setattr("recipes.demo.recipe._SAVE_EVERY", 1)

    def run(name: str) -> dict[str, mx.array]:
        made = trainer(tmp_path / name, tokenizer_file, 3)
        made.stages = made.stages[:2]
        made.run()
        return dict(tree_flatten(made.student.parameters()))

    def stop(loop, step):
        save(loop, step)
        if (loop.folder.name, step) == ("stage-1", 1):
            raise KeyboardInterrupt

    save, expected = Loop._save, run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    for name, array in run("stopped").items():
        assert mx.array_equal(array, expected[name]), name


def test_a_stage_with_frozen_weights_goes_on_where_it_was(tmp_path, tokenizer_file):
    """A finished training is restored from the states of all stages."""
    ends = []
    for _ in range(2):
        run = trainer(tmp_path / "run", tokenizer_file)
        run.run()
        ends.append(dict(tree_flatten(run.student.parameters())))
    assert all(mx.array_equal(ends[1][name], a) for name, a in ends[0].items())


def test_learning_lowers_the_loss(tmp_path, tokenizer_file):
    import mlx.nn as nn
    import mlx.optimizers as optim

    run = trainer(tmp_path / "run", tokenizer_file)
    stage = next(s for s in run.stages if s.loss == "language")
    batch = make_batch((TRAINING, 0, 0), 4, 512, 3, False, 4)
    optimizer = optim.Adam(3e-3)
    gradient = nn.value_and_grad(run.student, lambda m: run.language_loss(batch, stage))
    losses = []
    for _ in range(12):
        value, gradients = gradient(run.student)
        optimizer.update(run.student, gradients)
        mx.eval(run.student.parameters(), optimizer.state)
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_folder_of_other_stages_is_refused(tmp_path, tokenizer_file):
    run = trainer(tmp_path, tokenizer_file, 1)
    run.stages = run.stages[1:2]
    run.run()
    with pytest.raises(InputError, match="other settings"):
        Trainer(tmp_path, STAGES, student=Student(SMALL))
