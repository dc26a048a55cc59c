"""Plans of several places: parsed, counted, shown and measured."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY_POLICY

from mlx_tokprune import InputError, Pruner, predict_action, stream_generate
from mlx_tokprune.act.__main__ import main as act
from mlx_tokprune.bench.__main__ import main as bench
from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME
from mlx_tokprune.evaluate.__main__ import main as evaluate
from mlx_tokprune.features import Selection
from mlx_tokprune.generate.__main__ import main as generate
from mlx_tokprune.measure.subject import Request, subject_of
from mlx_tokprune.pipeline import VisualTokens, run
from mlx_tokprune.pipeline.planning import plan_for
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import as_plan, count_tokens, read_plan, registry
from mlx_tokprune.report.__main__ import main as report

QUESTION = PICTURES[0].question
FILES = [str(picture.path) for picture in PICTURES]

# As text ----------------------------------------------------------------------------


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "edge_tokens.py").write_text(
        "import mlx.core as mx\n"
        "from mlx_tokprune import Selection\n"
        "def corner(features, *, keep):\n"
        "    indices = mx.arange(keep, dtype=mx.int32)\n"
        "    return Selection(mx.broadcast_to(indices, (len(features.tokens), keep)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("_METHODS", "_NAMES"):  # what this test registers goes with it
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    return "edge_tokens:corner"


DEPTHS = (0.25, 0.5, 0.75)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("norm:0.5", [("norm", 0.5, None, "tower")]),
        ("norm:1", [("norm", 1.0, None, "tower")]),
        ("norm:16@2", [("norm", None, 16, 2)]),
        ("norm:2.0@tower", [("norm", None, 2, "tower")]),
        ("trimvla", [("trimvla", None, None, "prompt")]),
        ("trimvla@tower", [("trimvla", None, None, "tower")]),
        ("spatial_pool:4", [("spatial", None, 4, "tower")]),
        ("fastv:.5@3", [("fastv", 0.5, None, 3)]),
        ("pyramiddrop:0.5", [("pyramiddrop", 0.5, None, DEPTHS)]),
        (
            "attention:0.5@2+norm:32@tower+trimvla:0.25",
            [
                ("attention", 0.5, None, 2),
                ("norm", None, 32, "tower"),
                ("trimvla", 0.25, None, "prompt"),
            ],
        ),
        (
            "edge_tokens:corner:4+edge_tokens:corner:0.5@prompt",
            [
                ("edge_tokens:corner", None, 4, "tower"),
                ("edge_tokens:corner", 0.5, None, "prompt"),
            ],
        ),
    ],
)
def test_plans_are_read_from_text(own_module, text, places):
    names = ("method", "keep_ratio", "keep_tokens", "at")
    found = [tuple(getattr(p, name) for name in names) for p in read_plan(text)]
    assert found == places
    assert all(isinstance(p.keep_tokens, int | None) for p in read_plan(text))


def test_options_and_seeds_go_to_those_that_have_them():
    options = {"aggregation": "max", "alpha": 0.5}
    plan = read_plan("hiprune:0.5+trimvla:0.5+random:0.5@2", options, 7)
    given = [dict(pruner.options) for pruner in plan]
    assert given == [{"alpha": 0.5}, {"aggregation": "max"}, {}]
    assert {pruner.seed for pruner in plan} == {7}
    own = read_plan("similarity", {"threshold": 0.7})[0]
    assert own.has_own_count


BAD = {
    "": "'' is no place of a plan; expected METHOD",
    "@2": "'@2' is no place of a plan",
    ":0.5": "':0.5' is no place of a plan",
    "norm:0.5@": "'norm:0.5@' is no place of a plan",
    "norm:0.5@tower+": "'' is no place of a plan",
    "norm": "method 'norm' needs a budget: say norm:0.5",
    "norm@2": "method 'norm' needs a budget",
    "edge_tokens:corner": "method 'edge_tokens:corner' needs a budget",
    "nrm:0.5": "Did you mean 'norm'",
    "norm:half": "expected package.module:function",
    "nowhere_at_all:f:0.5": "expected package.module:function",
    "norm:0@2": r"keep ratio 0 is outside \(0, 1\]",
    "norm:-1": r"keep ratio -1 is outside \(0, 1\]",
    "norm:2.5": "keeps 2.5 tokens; expected a ratio",
    "norm:nan": "keeps nan tokens",
    "norm:inf": "keeps inf tokens",
    "norm:0.5@lens": "cannot prune at 'lens'",
    "norm:0.5@-1": "cannot prune at '-1'",
    "norm:0.5@1.5": "cannot prune at '1.5'",
    "norm:0.5@0": "cannot prune at 0",
    "lightvla:0.5": "decides itself",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_plans_are_one_sentence(own_module, text):
    with pytest.raises(InputError, match=BAD[text]) as refused:
        read_plan(text)
    assert "\n" not in str(refused.value)


def refusal(capsys, command, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        command([*arguments])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("command", [generate, act])
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prune", "norm:0.5@"], "no place of a plan"),
        (["--prune", "nrm:0.5"], "Did you mean 'norm'"),
        (["--prune", "norm:0.5@9"], "cannot prune after layer 9 of 4"),
        (["--prune", "spatial:0.5@2"], "needs grid"),
        (["--prune", "norm:0.5", "--prune", "attention:0.5"], "both prune at 'tower'"),
        (["--prune", "pyramiddrop:0.5+norm:0.5@1"], "both prune at 1"),
        (["--prune", "trimvla", "--prune", "norm:0.5@2"], "decides itself"),
        (["--prune", "norm:0.5", "--method", "norm"], "leave out --method"),
        (["--prune", "norm:0.5", "--at", "2"], "leave out --method"),
        (["--prune", "norm:0.5", "--keep-ratio", "0.5"], "leave out --method"),
        (["--prune", "norm:0.5", "--keep-tokens", "5"], "leave out --method"),
        (["--prune", "norm:0.5", "--option", "alpha=1"], "no option"),
        (["--prune", "trimvla:0.5", "--option", "aggregation=mx"], "Did you mean"),
    ],
)
def test_the_commands_refuse_bad_plans(capsys, command, more, words):
    told = refusal(capsys, command, *more)
    assert words in told or (words == "no option" and "has an option" in told)


@pytest.mark.parametrize("command", [evaluate, bench])
def test_so_do_measuring_commands(capsys, command, tmp_path):
    output = ["--output", str(tmp_path / "out.json")]
    for text, words in (
        ("norm:0.5@", "no place of a plan"),
        ("norm", "needs a budget"),
        ("norm:0.5@9", "cannot prune after layer 9 of 4"),
    ):
        assert words in refusal(capsys, command, "--plans", text, *output)
    assert list(tmp_path.iterdir()) == []


# Counting ---------------------------------------------------------------------------

COUNTED = [
    "norm:1",
    "norm:0.5@tower",
    "trimvla:0.25",
    "attention:0.25@2",
    "norm:0.5@1+norm:0.5@3",
    "pyramiddrop:0.5",
    "norm:0.5@tower+trimvla:0.5@prompt+attention:0.5@1+norm:0.5@3",
]


def asked_of(request, name: str, plan, pictures: int):
    """Return a subject, and a request to it."""
    model, processor = request.getfixturevalue(name)
    subject = subject_of(name, model, processor)
    if subject.kind == "acting":
        images, text = [load_image(POLICY_FRAME.path)], POLICY_FRAME.question
    else:
        images, text = [load_image(file) for file in FILES[:pictures]], QUESTION
    return subject, Request(images, text, plan_for(model, plan), "original")


def held(subject, asked: Request) -> tuple[list[int], int]:
    """Return the visual tokens in each layer's cache after a run, and all bytes."""
    model, scene = subject.model, subject.scene(asked.images, asked.prompt)
    read, visual = run(model, scene, asked.plan, cache=model.decoder.make_cache())
    texts = sum(part.shape[1] for part in model.text(scene.prompt, scene.state))
    arrays = [
        part[..., : layer.inner.offset, :]
        for layer in read.cache
        for part in (layer.inner.keys, layer.inner.values)
    ]
    tokens = [array.shape[2] - texts for array in arrays[::2]]
    assert tokens[-1] == sum(map(len, visual.left()))
    return tokens, sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("text", COUNTED)
@pytest.mark.parametrize(
    ("name", "pictures"), [("demo", 1), ("demo", 2), ("demo_policy", 1)]
)
def test_counts_are_those_of_the_caches(request, name, pictures, text):
    subject, asked = asked_of(request, name, read_plan(text), pictures)
    tokens, held_bytes = held(subject, asked)
    counted = subject.count(asked)
    counts, per_place = counted.tokens, [count / pictures for count in tokens]
    assert counts.entering == per_place[0]
    assert counts.left == per_place[-1]
    assert counts.mean == np.mean(per_place)
    assert counts.total == 64
    assert counts.projected == (32 if "tower" in text else 64)
    assert counted.cache_bytes == held_bytes


@pytest.mark.parametrize("method", ["trimvla", "lightvla"])
def test_so_are_those_of_methods_that_count(request, method):
    subject, asked = asked_of(request, "demo", Pruner(method), 1)
    tokens, held_bytes = held(subject, asked)
    counted = subject.count(asked)
    assert counted.tokens.mean == np.mean(tokens)
    assert 0 < counted.tokens.left == tokens[-1] < counted.tokens.projected == 64
    assert counted.cache_bytes == held_bytes


def test_a_policy_keeps_what_is_counted_of_both_pictures(oft_policy):
    """The counts of two images equal a run: each at the tower, both later."""
    plan = read_plan("norm:0.5@tower+trimvla:20@prompt+attention:7@2")
    counts = count_tokens(plan, (8, 8), 2, 3)
    assert dataclasses.astuple(counts) == (128, 64, 20, 7, (20 + 20 + 7) / 3)
    model, processor = oft_policy
    image = load_image(TINY_POLICY / "image_0.png")
    action = predict_action(
        *(model, processor, [image, image.rotate(90)], "lift the block"),
        proprio=[0.1] * 5,
        pruner=plan,
    )
    assert [len(kept[0]) for _, kept in action.visual.by_place()] == [64, 20, 7]
    counted = subject_of("oft", model, processor).count(
        Request([image], "lift the block", plan, "original")
    )
    assert counted.tokens == counts


def test_depths_become_layers():
    pruner = Pruner("pyramiddrop", 0.5)
    assert [p.at for p in pruner.spread(32)] == [8, 16, 24]
    assert [p.at for p in pruner.spread(4)] == [1, 2, 3]
    assert [p.at for p in pruner.spread(2)][:1] == [1]  # those that meet are one
    plan = as_plan([Pruner("norm", 0.5), pruner], 28)
    assert [p.at for p in plan] == ["tower", 7, 14, 21]
    assert {p.keep_ratio for p in plan} == {0.5}
    assert [p.at for p in as_plan(pruner)] == [DEPTHS]


def test_flops_fall_the_more_the_earlier(request):
    def flops(text: str) -> float:
        subject, asked = asked_of(request, "demo", read_plan(text), 1)
        return subject.count(asked).costs["prefill"].flops

    by_layer = [flops(f"norm:0.25@{layer}") for layer in (1, 2, 3)]
    assert flops("norm:0.25@tower") < by_layer[0] < by_layer[1] < by_layer[2]
    assert by_layer[2] < flops("norm:1")
    by_ratio = [flops(f"norm:{ratio}@2") for ratio in (0.125, 0.25, 0.5, 0.75)]
    assert by_ratio == sorted(by_ratio)
    assert by_ratio[-1] < flops("norm:1")


def test_flops_of_choosing_are_those_of_its_products(request):
    """FLOPs of choosing equal those of the method's matrix products."""

    def flops(text: str, pictures: int = 1) -> float:
        subject, asked = asked_of(request, "demo", read_plan(text), pictures)
        return subject.count(asked).costs["prune"].flops

    subject, asked = asked_of(request, "demo", (), 1)
    model = subject.model
    segments = subject.scene(asked.images, asked.prompt).prompt.segments
    n, c, d, words = 64, model.feature_size, 192, len(segments[-1])
    keys = 192 // 6 * 2  # two heads of six
    assert flops("norm:0.5") == flops("norm:1") == flops("norm:0.5@2") == 0
    assert flops("divprune:0.25") == 2 * n * n * c
    assert flops("divprune:0.25", 2) == 2 * (2 * n * n * c)
    merged = 2 * 16 * n * c
    assert flops("similarity:16") == 2 * n * n * c + merged
    # Queries of the tokens, keys of the prompt, and their products.
    trimvla = 2 * n * d * d + 2 * words * d * keys + 2 * n * words * d
    assert flops("trimvla:0.25") == trimvla
    half = 2 * 32 * d * d + 2 * words * d * keys + 2 * 32 * words * d
    assert flops("norm:0.5+trimvla:0.25") == half
    assert flops("divprune:32+trimvla:0.25") == 2 * n * n * c + half


# Measuring --------------------------------------------------------------------------

BOTH = "norm:0.5@tower+attention:0.5@2"


def test_evaluate_has_rows_of_plans_and_layers(demo, tmp_path, capsys):
    data, file = tmp_path / "q.jsonl", tmp_path / "e.json"
    asked = [
        {"image": str(p.path), "question": p.question, "answer": p.answer}
        for p in PICTURES
    ]
    data.write_text("\n".join(map(json.dumps, asked)))
    plans = ["--plans", BOTH, "norm:1", "trimvla"]
    methods = ["--methods", "fastv", "--keep-ratios", "0.25"]
    evaluate(["--data", str(data), *methods, *plans, "--output", str(file)])
    result = json.loads(file.read_text())
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == ["none", "fastv 0.25", BOTH, "norm:1", "trimvla"]
    kept = [row["kept"] for row in rows.values()]
    assert kept[:4] == [64, (64 + 64 + 16 + 16) / 4, (32 + 32 + 16 + 16) / 4, 64]
    flops = {label: row["flops"] for label, row in rows.items()}
    assert flops[BOTH] < flops["fastv 0.25"] < flops["none"] == flops["norm:1"]
    assert rows["norm:1"]["divergence"]["value"] == 0
    described = result["run"]["rows"][2]
    assert described["pruner"]["method"] == "norm"
    assert [other["at"] for other in described["others"]] == [2]
    for picture, answer in zip(PICTURES, result["answers"], strict=True):
        for label, plan in (("fastv 0.25", Pruner("fastv", 0.25)), (BOTH, None)):
            pieces = stream_generate(
                *(*demo, [picture.path], picture.question),
                pruner=plan or read_plan(BOTH),
                max_tokens=32,
            )
            said = "".join(piece.text for piece in pieces)
            assert answer["given"][label].strip() == said.strip()
    page = tmp_path / "page.html"
    report([str(file), "--output", str(page), "--pictures", "2"])
    text = page.read_text()
    assert text.count("<figure>") == 2 * len(rows)
    assert f"{BOTH}: " in text
    assert f"<td>{BOTH}</td>" in text


def test_bench_has_rows_of_plans(tmp_path, capsys):
    file = tmp_path / "b.json"
    asked = ["--model", "demo", "--plans", BOTH, "trimvla:0.25", "--tokens", "1"]
    bench([*asked, "--runs", "1", "--output", str(file)])
    shown = capsys.readouterr().out
    found = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    row, sizes = found[BOTH], ("visual_tokens", "kept", "mean_kept")
    assert [row[name] for name in sizes] == [64, 16, 24]
    assert [found["trimvla:0.25"][name] for name in sizes] == [64, 16, 16]
    assert found["none"]["cache_bytes"] > row["cache_bytes"]
    assert f"| {BOTH} | 24/64 |" in shown
    prune = {name: found[name]["costs"]["prune"]["flops"] for name in found}
    assert prune["none"] == prune[BOTH] == 0 < prune["trimvla:0.25"]
    bench([*asked, "--runs", "2", "--output", str(file)])  # the rows are known again
    rows = json.loads(file.read_text())["rows"]
    assert {len(row["samples"]["ttft_ms"]) for row in rows} == {2}


def test_a_policy_is_evaluated_and_timed_under_plans(tmp_path, capsys):
    plan = "norm:0.5@tower+trimvla:0.5@prompt+attention:0.5@3"
    how = ["--model", "demo-policy", "--plans", plan]
    files = [str(tmp_path / name) for name in ("e.json", "b.json")]
    asked = tmp_path / "asked.jsonl"
    question = {"image": str(POLICY_FRAME.path), "question": POLICY_FRAME.question}
    asked.write_text(json.dumps(question | {"answer": POLICY_FRAME.answer}))
    evaluate([*how, "--data", str(asked), "--output", files[0]])
    bench([*how, "--runs", "1", "--output", files[1]])
    means = []
    for file, name in zip(files, ("kept", "mean_kept"), strict=True):
        with open(file) as stream:
            means.append(json.load(stream)["rows"][-1][name])
    assert means == [(16 * 3 + 8) / 4] * 2


def test_padding_is_no_kept_token():
    """Padding of the last pruner is left out; choices of other shapes have none."""
    indices, mask = mx.array([[0, 2, 0], [1, 3, 5]]), mx.array([[1, 1, 0], [1, 1, 1]])
    selection, before = Selection(indices), mx.array([[0, 1, 2, 3], [1, 3, 4, 5]])
    embeddings = mx.zeros((2, 3, 4))
    visual = VisualTokens(embeddings, indices, selection, (2, 3), mask=mask == 1)
    assert visual.left() == [[0, 2], [1, 3, 5]]
    chosen = dataclasses.replace(visual, choices=(("tower", before),))
    assert chosen.left() == [[0, 1, 2, 3], [1, 3, 4, 5]]
    assert chosen.chosen_at("prompt").left() == [[0, 2], [1, 3, 5]]
    assert dataclasses.replace(visual, mask=None).left() == [[0, 2, 0], [1, 3, 5]]
