"""The benchmark: timing with a fake clock, and counts checked by hand."""

import json
import shutil
import time
import types

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, TINY_POLICY
from PIL import Image

from mlx_tokprune import load, predict_action, stream_generate
from mlx_tokprune.act import predict
from mlx_tokprune.bench import benchmark, plots
from mlx_tokprune.bench import speed_table as table
from mlx_tokprune.bench.__main__ import main
from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME
from mlx_tokprune.errors import InputError
from mlx_tokprune.features import Selection
from mlx_tokprune.generate import stream
from mlx_tokprune.measure.results import read_result
from mlx_tokprune.measure.subject import AnswerSubject, Request, subject_of
from mlx_tokprune.measure.tables import Table
from mlx_tokprune.pipeline import timing
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import Pruner, as_plan
from mlx_tokprune.pruners.registry import temporary

SLEEP = 50.0  # ms


# The clock --------------------------------------------------------------------------


class FakeTime:
    """Clock that only moves while a slowed stage runs."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for module in (timing, stream, predict):
            clock = types.SimpleNamespace(perf_counter=lambda: self.now)
            monkeypatch.setattr(module, "time", clock)

    def slow(self, function):
        def sleepy(*args, **options):
            self.now += SLEEP / 1e3
            return function(*args, **options)

        return sleepy


@pytest.fixture
def slowed(monkeypatch):
    """Return a factory of (model, processor, pruner) with one slow stage."""

    def make(folder, stage: str, fake: FakeTime):
        model, processor = load(folder)
        pruner = Pruner("norm", 0.5)
        if stage == "preprocess":
            slow = fake.slow(processor.pixels)
            monkeypatch.setattr(
                type(processor), "pixels", lambda _, images: slow(images)
            )
        elif stage == "prune":
            slow = fake.slow(Pruner.__call__)
            monkeypatch.setattr(Pruner, "__call__", lambda *args: slow(*args))
        elif stage != "none":
            name = {"vision": "encode", "project": "project", "prefill": "read"}[stage]
            part = model.decoder if stage == "prefill" else model
            object.__setattr__(part, name, fake.slow(getattr(part, name)))
        return model, processor, pruner

    return make


@pytest.mark.parametrize("stage", ["none", *timing.STAGES])
def test_a_stage_that_sleeps_moves_ttft_and_itself(slowed, monkeypatch, stage):
    fake = FakeTime(monkeypatch)
    model, processor, pruner = slowed(TINY, stage, fake)
    asked = (model, processor, [load_image(TINY / "image_0.png")], "Hi")
    how = {"pruner": pruner, "max_tokens": 1}
    stages = next(stream_generate(*asked, **how, stages=True)).stages_ms
    assert tuple(stages) == timing.STAGES
    for name, taken in stages.items():
        if name == stage:
            assert taken >= SLEEP - 1e-6
            assert taken % SLEEP == pytest.approx(0, abs=1e-6)
        else:
            assert taken == 0
    first = next(stream_generate(*asked, **how))
    assert first.ttft_ms == pytest.approx(sum(stages.values()), abs=1e-6)
    assert first.stages_ms is None


@pytest.mark.parametrize("stage", ["none", *timing.STAGES])
def test_the_same_for_actions(slowed, monkeypatch, stage):
    fake = FakeTime(monkeypatch)
    model, processor, pruner = slowed(TINY_POLICY, stage, fake)
    image = load_image(TINY_POLICY / "image_0.png")
    asked = (model, processor, [image], "pick up the cup")
    stages = predict_action(*asked, pruner=pruner, stages=True).stages_ms
    moved = {name for name, taken in stages.items() if taken}
    assert moved == (set() if stage == "none" else {stage})
    action = predict_action(*asked, pruner=pruner)
    assert action.ttft_ms == pytest.approx(sum(stages.values()), abs=1e-6)
    assert action.stages_ms is None


def test_the_whole_time_is_that_of_the_answer(tiny):
    subject = AnswerSubject("tiny", *tiny)
    images, start = [load_image(TINY / "image_0.png")], time.perf_counter()
    times = subject.run(Request(images, "Hi", (), "original"), 2)
    assert times["ttft_ms"] <= times["total_ms"]
    assert times["total_ms"] <= (time.perf_counter() - start) * 1e3


# Measuring --------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def known_rates():
    """Replace the measured rates by constants, because measuring takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        rates = {"flops_per_second": 1e11, "bytes_per_second": 1e10}
        patch.setattr(benchmark, "measure_rates", lambda: rates)
        yield


@pytest.fixture
def bench(tmp_path, tiny):
    def make(file="bench.json", ratios=(1.0, 0.5), tokens=2):
        subject = subject_of("tiny", *tiny)
        rows = benchmark.make_cases([subject], ["norm"], ratios, [], ["Hi"], "original")
        images = [load_image(TINY / "image_0.png")]
        return benchmark.Benchmark(tmp_path / file, [subject], rows, images, tokens)

    return make


def read_bench(file) -> dict:
    return read_result(file, benchmark.SCHEMA, benchmark.SHAPE)


def counts(result: dict) -> list[int]:
    return [len(row["samples"]["ttft_ms"]) for row in result["rows"]]


def test_a_stopped_run_goes_on_and_loses_nothing(bench, monkeypatch):
    started = bench()
    run_once, calls = benchmark.run_once, []

    def fail_in_the_third_round(*args):
        calls.append(args)
        if len(calls) == 3 + 7:  # three to warm up, two rounds, one more
            raise KeyboardInterrupt
        return run_once(*args)

    monkeypatch.setattr(benchmark, "run_once", fail_in_the_third_round)
    with pytest.raises(KeyboardInterrupt):
        started.run(4)
    monkeypatch.undo()
    kept = read_bench(started.file)
    assert counts(kept) == [2, 2, 2]
    result = bench().run(4)
    assert counts(result) == [4, 4, 4]
    for before, after in zip(kept["rows"], result["rows"], strict=True):
        assert after["samples"]["ttft_ms"][:2] == before["samples"]["ttft_ms"]
    assert counts(bench().run(3)) == [4, 4, 4]  # nothing to do
    with pytest.raises(InputError, match="a benchmark of other rows"):
        bench(ratios=(1.0, 0.25))


def test_the_table_says_what_was_measured(bench):
    result = bench().run(2)
    shown = table.tabulate(result).markdown()
    assert "| norm 0.5 | 32/64 |" in shown
    assert "not a TTFT" in shown
    *_, none, pruned = (
        sum(cost["flops"] for cost in row["costs"].values()) for row in result["rows"]
    )
    norm = next(line for line in shown.splitlines() if "norm 0.5" in line)
    assert norm.split(" | ")[6] == f"{100 * (1 - pruned / none):.1f} %"
    row = next(r for r in result["rows"] if r["method"] == "norm")
    base = table.unpruned(row, result["rows"])
    assert base["kept"] == 64
    assert table.flops(row) < table.flops(base)
    assert row["limit_ms"] < base["limit_ms"]
    assert all(sample > 0 for sample in row["samples"]["peak_memory_mb"])


def test_columns_of_what_is_saved(bench, tiny):
    """Savings and cache bytes are exact; an impossible saving is marked as noise."""
    result = bench().run(1)
    base, norm = result["rows"][1:]
    for times, factor, cell in (([9.9], "1.01x", "1.0 %"), ([1.0], "10.00x", "~ 90")):
        base["samples"]["ttft_ms"], norm["samples"]["ttft_ms"] = [10.0], times
        shown = {line["method"]: line for line in lines(table.tabulate(result))}
        assert shown["norm 0.5"]["faster"] == factor
        assert shown["norm 0.5"]["saved"].startswith(cell)
        assert shown["none"]["faster"] == shown["none"]["saved"] == ""
    model, processor = tiny
    text = model.args.text
    size = text["hidden_size"] // text["num_attention_heads"]
    each = 2 * 4 * text["num_hidden_layers"] * text["num_key_value_heads"] * size
    words = sum(map(len, processor.prompt("Hi", 1).segments))
    for row, kept in ((base, 64), (norm, 32)):
        assert row["cache_bytes"] == each * (words + kept)
    assert shown["norm 0.5"]["cache MB"] == f"{each * (words + 32) / 1e6:.2f}"


def lines(shown: Table) -> list[dict]:
    """Return the rows of a table by column."""
    return [dict(zip(shown.columns, row, strict=True)) for row in shown.rows]


def test_what_is_saved_is_compared_within_a_round():
    """The saving is the median of the savings of single rounds."""
    whole = {"samples": {"ttft_ms": [10.0, 20.0, 1000.0]}}
    row = {"samples": {"ttft_ms": [5.0, 15.0, 800.0]}}
    assert table.saved(row, whole) == pytest.approx(1 - 0.75)


def test_pictures_of_a_benchmark(bench, tmp_path):
    result = bench().run(1)
    about = result["options"]["weights"]["tiny"], "original"
    known = {(*about, "none", 512): 1.0, (*about, "norm 0.5", 512): 0.9}
    drawn = plots.draw_all(result, tmp_path / "plots", known)
    assert [path.stem for path in drawn] == [
        "ttft_by_stage",
        "ttft_by_tokens",
        "pareto",
    ]
    for path in drawn:
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 5


def test_the_command_measures_sizes_too(tmp_path, capsys):
    output = tmp_path / "b.json"
    options = ["--model", str(TINY), "--methods", "norm", "--keep-ratios", "0.5"]
    options += ["--image-sizes", "256", "--runs", "1", "--tokens", "2"]
    main([*options, "--output", str(output)])
    out = capsys.readouterr().out
    assert "| 256 | norm 0.5 | 8/16 |" in out
    assert "| 512 | none | 64/64 |" in out
    result = json.loads(output.read_text())
    assert result["schema"] == benchmark.SCHEMA
    assert {"device", "versions", "commit", "power"} <= result["machine"].keys()


def test_every_picture_is_timed_alone(tmp_path, monkeypatch):
    """Each image is timed alone, including the images of a folder."""
    for picture in PICTURES:
        shutil.copy(picture.path, tmp_path)
    seen, run = [], benchmark.run_once

    def watched(subject, asked, tokens):
        seen.append([np.asarray(image).mean() for image in asked.images])
        return run(subject, asked, tokens)

    monkeypatch.setattr(benchmark, "run_once", watched)
    output, one = tmp_path / "b.json", TINY / "image_0.png"
    options = ["--model", str(TINY), "--methods", "norm", "--keep-ratios", "0.5"]
    options += ["--image", str(one), "--image", str(tmp_path), "--runs", "1"]
    main([*options, "--tokens", "1", "--output", str(output)])
    rows = read_bench(output)["rows"]
    assert [row.get("picture", 0) for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    files = [one, *(picture.path for picture in PICTURES)]
    means = [[np.asarray(load_image(file)).mean()] for file in files]
    wanted = [mean for mean in means for _ in range(3)]
    assert seen == wanted * 2  # to warm up, and a round
    bases = [table.unpruned(row, rows) for row in rows if row["method"] == "norm"]
    assert [rows.index(base) for base in bases] == [1, 4, 7]


def test_methods_that_count_have_one_row(tmp_path, capsys, demo_policy):
    output, frame = tmp_path / "b.json", POLICY_FRAME
    options = ["--model", "demo-policy", "--runs", "1", "--output", str(output)]
    main([*options, "--methods", "lightvla"])
    pruner = Pruner("lightvla")
    action = predict_action(*demo_policy, [frame.path], frame.question, pruner=pruner)
    assert 0 < action.visual.keep < 64
    shown = f"| lightvla own count | {action.visual.keep}/64 |"
    assert shown in capsys.readouterr().out


def test_options_of_methods(tmp_path, capsys, tiny_policy):
    output, picture = tmp_path / "b.json", TINY_POLICY / "image_0.png"
    options = ["--model", str(TINY_POLICY), "--runs", "1", "--output", str(output)]
    options += ["--image", str(picture), "--prompt", "pick up the cup"]
    options += ["--methods", "norm", "trimvla", "--keep-ratios", "0.5"]
    options += ["--option", "min_keep_ratio=0.01", "--option"]
    main([*options, "coverage=0.3"])
    given = {"min_keep_ratio": 0.01, "coverage": 0.3}
    kept = []
    for own in (given, given | {"coverage": 0.15}):
        pruner = Pruner("trimvla", options=own)
        asked = (*tiny_policy, [picture], "pick up the cup")
        kept.append(predict_action(*asked, pruner=pruner).visual.keep)
    assert kept[0] > kept[1]
    assert f"| trimvla own count | {kept[0]}/64 |" in capsys.readouterr().out
    rows = read_bench(output)["rows"]
    assert [row.get("options") for row in rows] == [None, None, given]
    with pytest.raises(SystemExit):
        main([*options, "coverage=0.2"])
    assert "a benchmark of other rows" in capsys.readouterr().err


DAMAGES = {
    "rows[0].limit_ms is missing": lambda r: r["rows"][0].pop("limit_ms"),
    "rows[0].kept is 'x'": lambda r: r["rows"][0].update(kept="x"),
    "flops_per_second is 'nan'": lambda r: r["rates"].update(flops_per_second=np.nan),
    "rows is 'None'; expected a list": lambda r: r.update(rows=None),
    "is damaged": lambda r: r["rows"][1]["samples"].update(ttft_ms=[]),
    "is no result": lambda r: [r],
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_file_is_not_resumed(tmp_path, capsys, whole_bench, message):
    file, options = whole_bench
    result = json.loads(file.read_text())
    damaged = DAMAGES[message](result)
    damaged = damaged if message == "is no result" else result
    again = tmp_path / "b.json"
    again.write_text(json.dumps(damaged))
    with pytest.raises(SystemExit) as stop:
        main([*options, "--runs", "2", "--output", str(again)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert again.read_text() == json.dumps(damaged)


@pytest.fixture(scope="module")
def whole_bench(tmp_path_factory):
    """Return a result file written by the command, and the command's options."""
    file = tmp_path_factory.mktemp("bench") / "b.json"
    options = ["--model", str(TINY), "--methods", "norm", "--keep-ratios", "0.5"]
    main([*options, "--runs", "1", "--output", str(file)])
    return file, options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-ratios", "0.5", "0"], "keep ratio 0 is outside"),
        (["--model", str(TINY), "--model", f"{TINY}/."], "was given twice"),
        (["--runs", "0"], "whole numbers from 1"),
        (["--methods", "nrm"], "Did you mean 'norm'?"),
        (["--methods", "learned"], "chooses by a scorer"),
        (["--option", "coverage=0.3"], "has an option 'coverage'"),
        (["--option", "coverage"], "NAME=VALUE, not 'coverage'"),
        (["--model", "demo", "--model", "demo-policy"], "not both"),
        (["--model", "demo-policy", "--image-sizes", "64"], "112 px only"),
        (["--image-sizes", "500"], "a multiple of 64, such as 512"),
        (["--output", "nowhere/b.json"], "which does not exist"),
        (["--output", __file__], "is no result"),
        (["--image", "nowhere.png"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_policies_are_measured_too(oft_folder, tmp_path, capsys):
    for model, kept in (("demo-policy", "32/64"), (str(oft_folder), "64/128")):
        output = tmp_path / f"{kept[:2]}.json"
        options = ["--model", model, "--methods", "trimvla", "--keep-ratios", "0.5"]
        main([*options, "--runs", "1", "--output", str(output)])
        assert f"| trimvla 0.5 | {kept} |" in capsys.readouterr().out
        rows = read_bench(output)["rows"]
        costs = [row["costs"] for row in rows]
        # Prompt-stage methods project every token.
        assert costs[0]["project"]["flops"] == costs[1]["project"]["flops"]
        assert costs[1]["prefill"]["flops"] < costs[0]["prefill"]["flops"]


def test_lower_resolutions_are_rows_of_every_table(bench):
    sizes = {(row.image_size, row.method) for row in bench().cases}
    assert sizes == {(256, "none"), (512, "none"), (512, "norm")}


def test_a_pruner_of_one_s_own_can_be_measured(tiny):
    with temporary("every_other") as register:

        @register
        def every_other(features, *, keep):
            """Keep every other token."""
            indices = 2 * mx.arange(keep, dtype=mx.int32)
            shape = (features.tokens.shape[0], keep)
            return Selection(mx.broadcast_to(indices, shape))

        subject = subject_of("tiny", *tiny)
        images = [load_image(TINY / "image_0.png")]
        plan = as_plan(Pruner("every_other", 0.5))
        asked = Request(images, "Hi", plan, "original")
        assert benchmark.run_once(subject, asked, 2)["ttft_ms"] > 0


@pytest.mark.parametrize("more", [[], ["--plots", "plots"]])
def test_accuracy_is_read_before_anything_is_timed(tmp_path, capsys, more):
    asked = ["--accuracy", str(tmp_path / "nowhere.json"), *more]
    with pytest.raises(SystemExit) as stop:
        main([*asked, "--output", str(tmp_path / "b.json")])
    assert stop.value.code == 2
    said = "is no JSON file" if more else "give --plots FOLDER"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()
