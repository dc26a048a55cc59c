"""The model `mlx_tokprune` of lmms-eval: arguments, answers, and the harness.

The last part runs lmms-eval where it is installed, in a subprocess because it
imports torch.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_tokprune
from mlx_tokprune import InputError, Pruner, generate
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.evaluate.lmms_eval import (
    OwnRuntime,
    open_runtime,
    read_generation_options,
    read_pruners,
    seed_of,
    until,
)
from mlx_tokprune.generate.settings import Settings
from mlx_tokprune.processing.image import load_image

TASK = Path(__file__).parents[1] / "examples" / "lmms_eval"
NORM = Pruner("norm", 0.25)
FEW = Pruner("uniform", keep_tokens=4)  # so few that answers are others


# What the arguments mean ------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "plan"),
    [
        ({}, None),
        ({"method": "none"}, (Pruner("none"),)),
        ({"keep_ratio": 0.25}, (NORM,)),
        ({"method": "norm", "keep_tokens": 16}, (Pruner("norm", keep_tokens=16),)),
        (
            {"method": "attention", "keep_ratio": 0.5, "at": 2},
            (Pruner("attention", 0.5, at=2),),
        ),
        ({"keep_ratio": 0.5, "at": "prompt"}, (Pruner("norm", 0.5, at="prompt"),)),
        (
            {"prune": "norm:0.5@tower+attention:0.5@2"},
            (Pruner("norm", 0.5), Pruner("attention", 0.5, at=2)),
        ),
        (
            {"method": "dart", "keep_ratio": 0.5, "options": {"pivots": 4}},
            (Pruner("dart", 0.5, options={"pivots": 4}),),
        ),
    ],
)
def test_arguments_are_pruners(told, plan):
    assert read_pruners(**told) == plan


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"method": "norm"}, "needs a budget: give keep_ratio or keep_tokens"),
        ({"at": 2}, "needs a budget"),
        ({"prune": "norm:0.5", "method": "norm"}, "leave out method"),
        ({"keep_ratio": 0.5, "keep_tokens": 3}, "not both"),
        ({"method": "nrom", "keep_ratio": 0.5}, "'norm'"),
        ({"options": {"keepratio": 0.5}}, "no argument 'keepratio'"),
        ({"method": "dart", "keep_ratio": 0.5, "options": {"x": 1}}, "pivots, too"),
        ({"runtime": "torch"}, "own or mlx-vlm, not 'torch'"),
        ({"positions": "some"}, "original or contiguous"),
        ({"runtime": "mlx-vlm", "memory": 1}, "no memory"),
        ({"runtime": "mlx-vlm", "prune": "norm:0.5+attention:0.5@2"}, "one place"),
        ({"pretrained": "demo-policy"}, "answers in actions"),
    ],
)
def test_what_cannot_be_meant_is_refused(told, reason):
    told = dict(told)
    with pytest.raises(InputError, match=reason):
        open_runtime(**told.pop("options", {}), **told)


def test_tasks_ask_greedily_unless_they_say_otherwise():
    assert read_generation_options({}) == Settings(max_tokens=1024)
    pope = {"max_new_tokens": 128, "temperature": 0, "top_p": 1.0, "num_beams": 1}
    pope |= {"do_sample": False, "until": ["\n\n"]}
    assert read_generation_options(pope) == Settings(
        max_tokens=128, top_p=1.0, stop="\n\n"
    )
    sampled = {"temperature": 0.7, "top_p": 0.95, "do_sample": True, "until": "\n"}
    assert read_generation_options(sampled) == Settings(
        max_tokens=1024, temp=0.7, top_p=0.95, stop="\n"
    )
    assert read_generation_options({"temperature": 1, "do_sample": False}).temp == 0
    assert read_generation_options({"temperature": 1, "top_k": 1}).temp == 0
    nothing = {"temperature": None, "top_p": None, "num_beams": None, "until": None}
    assert read_generation_options(nothing) == Settings(max_tokens=1024)
    for told in ({"num_beams": 3}, {"repetition_penalty": 1.2}):
        with pytest.raises(InputError, match=f"wants {next(iter(told))}"):
            read_generation_options(told)
    with pytest.raises(InputError, match="from the best 20"):
        read_generation_options({"temperature": 0.7, "top_k": 20})


def test_an_answer_ends_before_the_first_stop():
    given = []

    def pieces():
        for piece in ("a re", "d ci", "rcle", "\n", "never"):
            given.append(piece)
            yield piece

    assert until(pieces(), ("circle", "red c")) == "a "
    assert given == ["a re", "d ci"]
    assert until(pieces(), ("square",)) == "a red circle\nnever"


def test_seeds_are_of_the_question():
    first = seed_of(0, 3, "task", "test", 1)
    assert first == seed_of(0, 3, "task", "test", 1)
    others = {seed_of(1, 3, "task", "test", 1), seed_of(0, 3, "task", "test", 2)}
    assert first not in others


# What answers -----------------------------------------------------------------------


def own(**told) -> OwnRuntime:
    return open_runtime(**told)


def test_answers_are_those_of_generate(demo):
    runtime = own(method="uniform", keep_tokens=4, positions="contiguous", memory=2)
    answers, whole = [], []
    for picture in PICTURES:
        seen = [load_image(picture.path)]
        answers += [
            "".join(runtime.answer(seen, picture.question, Settings(max_tokens=16), 0))
        ]
        how = {"pruner": FEW, "positions": "contiguous", "max_tokens": 16}
        assert answers[-1] == generate(*demo, seen, picture.question, **how)
        whole += [generate(*demo, seen, picture.question)]
    assert answers != whole


def test_several_pictures_and_samples(demo):
    """Images are read in order; samples depend only on their seed."""
    seen = [load_image(picture.path) for picture in PICTURES]
    runtime, text = own(keep_ratio=0.5), PICTURES[0].question
    pruner = Pruner("norm", 0.5)
    for images in (seen, seen[::-1]):
        given = "".join(runtime.answer(images, text, Settings(max_tokens=16), 0))
        assert given == generate(*demo, images, text, pruner=pruner, max_tokens=16)

    def sample(seed, top_p=0.0):
        hot = Settings(max_tokens=8, temp=20.0, top_p=top_p)
        return "".join(runtime.answer(seen[:1], text, hot, seed))

    samples = [sample(seed) for seed in range(3)]
    assert len(set(samples)) == 3
    assert samples[::-1] == [sample(seed) for seed in reversed(range(3))]
    how = {"pruner": pruner, "temp": 20.0, "seed": 1, "max_tokens": 8}
    assert samples[1] == generate(*demo, seen[:1], text, **how)
    assert sample(1, 0.9) == generate(*demo, seen[:1], text, **how, top_p=0.9)
    assert sample(1, 0.9) != samples[1]


def test_losses_are_those_of_the_steps(demo):
    """The loss is the mean -log p of step-by-step decoding; the answer's is lowest."""
    picture, runtime = PICTURES[0], own(method="norm", keep_ratio=0.25)
    seen, (model, processor) = [load_image(picture.path)], demo
    answer = "".join(runtime.answer(seen, picture.question, Settings(max_tokens=16), 0))
    loss, greedy = runtime.loss(seen, picture.question, answer)
    other, no = runtime.loss(seen, picture.question, "blue blue")
    assert (greedy, no) == (True, False)
    assert 0 <= loss < other
    ids = processor.tokenizer.encode("blue blue", add_special_tokens=False)
    assert len(ids) > 1
    scene = mlx_tokprune.pipeline.Scene(
        mx.array(processor.pixels(seen)), processor.prompt(picture.question, 1)
    )
    cache, found = model.decoder.make_cache(), []
    read, _ = mlx_tokprune.pipeline.run(model, scene, (NORM,), cache=cache)
    hidden = read.hidden
    for number in ids:
        logits = model.decoder.logits(hidden)[0, -1]
        found.append((mx.logsumexp(logits) - logits[number]).item())
        hidden = model.decoder.follow(mx.array([[number]]), read.cache)
    assert other == pytest.approx(sum(found) / len(found), abs=1e-4)
    with pytest.raises(InputError, match="is empty"):
        runtime.loss(seen, picture.question, "")


def test_a_question_without_a_picture_is_refused():
    with pytest.raises(InputError, match="no picture"):
        own().answer([], "What is this?", Settings(), 0)


def test_in_mlx_vlm_answers_are_those_of_attach(tmp_path):
    mlx_vlm = pytest.importorskip("mlx_vlm")
    from vlm.families import FAMILIES, prompt
    from vlm.loaded import LENGTH, QUESTION, Loaded

    qwen = Loaded(FAMILIES["qwen2_vl"], tmp_path / "m")
    told = {"pretrained": str(qwen.folder), "runtime": "mlx-vlm"}
    runtime = open_runtime(**told, method="norm", keep_ratio=0.5)
    files = qwen.files[:2]
    with qwen.pruned(Pruner("norm", 0.5)):
        for seen in (files[:1], files):
            asked = prompt(qwen.processor, qwen.model.config, QUESTION, len(seen))
            how = {"image": seen, "max_tokens": LENGTH, "temperature": 0.0}
            made = mlx_vlm.stream_generate(qwen.model, qwen.processor, asked, **how)
            expected = "".join(piece.text for piece in made)
            marked = "<image>" * len(seen) + QUESTION  # as LLaVA's tasks do
            given = runtime.answer(seen, marked, Settings(max_tokens=LENGTH), 0)
            assert "".join(given) == expected
            assert expected.strip()
    with pytest.raises(InputError, match="not supported in mlx-vlm"):
        runtime.loss(files, QUESTION, "x")


# In lmms-eval -----------------------------------------------------------------------

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)
ALONE = """
import json, sys
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from PIL import Image

arguments, docs = sys.argv[1], json.loads(sys.argv[2])
model = get_model("mlx_tokprune").create_from_arg_string(arguments, {"batch_size": 8})
model.task_dict = {"task": {"test": docs}}


def pictures(doc):
    return [Image.open(doc["image"])]


def ask(kind, number, argument):
    metadata = {"task": "task", "doc_id": number, "repeats": 1}
    where = (pictures, number, "task", "test")
    asked = (docs[number]["question"], argument, *where)
    return Instance(kind, asked, 0, metadata)


until = [ask("generate_until", i, {"until": ["\\n\\n"]}) for i in range(len(docs))]
choices = [ask("loglikelihood", 0, word) for word in docs[0]["choices"]]
found = [model.generate_until(until), model.loglikelihood(choices)]
print(json.dumps(found))
"""


def alone(*command, cwd: Path) -> str:
    """Return the output of Python with these arguments, without a network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf")}
    env = os.environ | offline | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_lmms_eval
def test_the_harness_finds_the_model_which_answers_like_generate(demo, tmp_path):
    docs = [{"image": str(p.path), "question": p.question} for p in PICTURES]
    assert len(docs) == 2
    first = generate(*demo, [PICTURES[0].path], PICTURES[0].question, pruner=FEW)
    docs[0]["choices"] = [first, "no no"]
    arguments = "pretrained=demo,method=uniform,keep_tokens=4"
    out = alone("-c", ALONE, arguments, json.dumps(docs), cwd=tmp_path)
    answers, losses = json.loads(out.splitlines()[-1])
    asked = [([p.path], p.question) for p in PICTURES]
    assert answers == [generate(*demo, *question, pruner=FEW) for question in asked]
    assert answers != [generate(*demo, *question) for question in asked]
    assert losses[0][0] < losses[1][0]  # the smallest is taken
    assert [greedy for _, greedy in losses] == [True, False]


@needs_lmms_eval
def test_the_command_gives_the_scores_of_evaluate(tmp_path):
    pytest.importorskip("matplotlib")  # draws the questions
    alone(TASK / "make_questions.py", 6, cwd=tmp_path)
    data = ("--data", "questions/all.jsonl", "--plans", "demo-adaptive:0.11")
    evaluate = ("-m", "mlx_tokprune.evaluate", *data, "--output", "ours.json")
    alone(*evaluate, cwd=tmp_path)
    ours = json.loads((tmp_path / "ours.json").read_text())["answers"]
    arguments = "pretrained=demo,method=demo-adaptive,keep_ratio=0.11"
    run = ("-m", "lmms_eval", "--model", "mlx_tokprune", "--model_args", arguments)
    run += ("--tasks", "own_questions", "--include_path", TASK, "--log_samples")
    alone(*run, "--output_path", "out", cwd=tmp_path)
    (file,) = (tmp_path / "out").rglob("*samples*.jsonl")
    theirs = [json.loads(line) for line in file.read_text().splitlines()]
    label = "demo-adaptive:0.11"
    expected = [(a["given"][label], a["scores"][label]) for a in ours]
    found = [(s["filtered_resps"], s["vqa_accuracy"]) for s in theirs]
    assert len(found) == 6
    assert found == expected


def test_importing_the_package_imports_neither_torch_nor_lmms_eval(tmp_path):
    code = (
        "import sys, mlx_tokprune, mlx_tokprune.evaluate.lmms_eval; "
        "print([m for m in ('torch', 'lmms_eval') if m in sys.modules])"
    )
    assert alone("-c", code, cwd=tmp_path).strip() == "[]"
