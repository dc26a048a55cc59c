"""The benchmark: a clock that can be trusted, counts that can be checked by hand."""

import dataclasses
import json
import sys
import types

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, TINY_POLICY
from PIL import Image

from mlx_tokprune import act, answering, control, load, pipeline
from mlx_tokprune.bench import graph, machine, measure, plots, table
from mlx_tokprune.bench.__main__ import main
from mlx_tokprune.bench.subjects import Asked, subject_of
from mlx_tokprune.errors import InputError
from mlx_tokprune.features import Selection
from mlx_tokprune.image import load_image
from mlx_tokprune.pruners import Pruner
from mlx_tokprune.pruners.registry import temporary

SLEEP = 50.0  # ms
STAGES = ("preprocess", "vision", "prune", "project", "prefill")


# The clock --------------------------------------------------------------------------


class FakeTime:
    """A clock that stands still but for the stages that are made to sleep."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for module in (pipeline, answering, act):
            clock = types.SimpleNamespace(perf_counter=lambda: self.now)
            monkeypatch.setattr(module, "time", clock)

    def slow(self, function):
        def sleepy(*args, **options):
            self.now += SLEEP / 1e3
            return function(*args, **options)

        return sleepy


@pytest.fixture
def slowed(monkeypatch):
    """(model, processor, pruner) of a checkpoint with one stage that sleeps."""

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
            name = {"vision": "encode", "project": "project", "prefill": "embed"}[stage]
            slow = fake.slow(getattr(model, name))
            object.__setattr__(model, name, slow)
        return model, processor, pruner

    return make


@pytest.mark.parametrize("stage", ["none", *STAGES])
def test_a_stage_that_sleeps_moves_ttft_and_itself(slowed, monkeypatch, stage):
    fake = FakeTime(monkeypatch)
    model, processor, pruner = slowed(TINY, stage, fake)
    image = load_image(TINY / "image_0.png")
    stages = pipeline.measure_stages(
        model, processor, [image], "Hi", pruner, "original"
    )
    for name, taken in dataclasses.asdict(stages).items():
        if name == stage:
            assert taken >= SLEEP - 1e-6
            assert taken % SLEEP == pytest.approx(0, abs=1e-6)
        else:
            assert taken == 0
    asked = (model, processor, [image], "Hi")
    first = next(answering.stream_generate(*asked, pruner=pruner, max_tokens=1))
    assert first.ttft_ms == pytest.approx(sum(vars(stages).values()), abs=1e-6)


@pytest.mark.parametrize("stage", ["none", *STAGES])
def test_the_same_for_actions(slowed, monkeypatch, stage):
    fake = FakeTime(monkeypatch)
    model, processor, pruner = slowed(TINY_POLICY, stage, fake)
    image = load_image(TINY_POLICY / "image_0.png")
    asked = (model, processor, [image], "pick up the cup")
    stages = dataclasses.asdict(
        control.measure_stages(*asked, pruner, "original", None, 1)
    )
    moved = {name for name, taken in stages.items() if taken}
    assert moved == (set() if stage == "none" else {stage})
    action = act.predict_action(*asked, pruner=pruner)
    assert (action.ttft_ms > 0) == (stage != "none")


# Counting ---------------------------------------------------------------------------


def test_flops_of_single_operations():
    a, b = mx.zeros((2, 5, 8)), mx.zeros((8, 3))
    assert graph.count(lambda a, b: a @ b, a, b).flops == 2 * 10 * 8 * 3
    added = graph.count(lambda a, b: mx.addmm(mx.zeros(3), a, b), a, b)
    assert added.flops == 2 * 10 * 8 * 3
    x, w = mx.zeros((1, 8, 8, 4)), mx.zeros((6, 3, 3, 2))
    conv = graph.count(lambda x, w: mx.conv2d(x, w, 2, 1, groups=2), x, w)
    assert conv.flops == 2 * (4 * 4 * 6) * (3 * 3 * 2)
    q = mx.zeros((1, 2, 5, 8))

    def attend(q):
        return mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)

    attention = graph.count(attend, q)
    assert (attention.flops, attention.launches) == (4 * 2 * 5 * 5 * 8, 1)


def test_bytes_and_launches_leave_views_out():
    x = mx.zeros((4, 6))
    cost = graph.count(lambda x: mx.exp(x.T.reshape(2, 1, 12).squeeze(1)), x)
    assert cost.launches == 1
    assert cost.bytes == 2 * x.nbytes


def test_compiling_fuses_launches():
    x = mx.zeros((4, 6))

    def several(x):
        return mx.exp(x) * mx.sin(x) + mx.cos(x)

    assert graph.count(several, x).launches == 5
    assert graph.launches_compiled(several, x) == 1


def test_counting_leaves_mlx_as_it_was():
    before = mx.fast.rms_norm
    with pytest.raises(ZeroDivisionError):
        graph.count(lambda x: x / (1 // 0), mx.zeros(3))
    assert mx.fast.rms_norm is before


def test_flops_of_a_policy_are_those_of_its_sizes():
    """Written out from the sizes of the tiny policy, two per multiply-add."""
    model, processor = load(TINY_POLICY)
    image = load_image(TINY_POLICY / "image_0.png")
    asked = Asked([image], "pick up the cup", Pruner("norm", 0.25), "original")
    counted = subject_of("tiny", model, processor).count(asked)
    costs = counted.costs
    assert (counted.total, counted.kept) == (64, 16)
    vision = 0
    for dim, hidden, prefix in ((48, 192, 5), (64, 224, 0)):
        tokens = 64 + prefix
        vision += 2 * 64 * (3 * 14 * 14) * dim  # patches
        weights = 4 * dim**2 + 2 * dim * hidden
        vision += 3 * (2 * tokens * weights + 4 * tokens**2 * dim)  # three of 4 blocks
    assert costs["vision"].flops == vision
    assert costs["project"].flops == 2 * 16 * (112 * 448 + 448 * 96 + 96 * 96)
    tokens = 1 + 16 + len(processor.prompt("pick up the cup")[1])
    layer = 2 * tokens * (4 * 96**2 + 3 * 96 * 192) + 4 * tokens**2 * 96
    assert costs["prefill"].flops == 3 * layer + 2 * 96 * 640


# Measuring --------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    def make(file="bench.json", ratios=(1.0, 0.5), tokens=2):
        model, processor = load(TINY)
        subject = subject_of("tiny", model, processor)
        rows = measure.make_rows([subject], ["norm"], ratios, [], ["Hi"], "original")
        images = [load_image(TINY / "image_0.png")]
        return measure.Benchmark(tmp_path / file, [subject], rows, images, tokens)

    return make


def counts(result: dict) -> list[int]:
    return [len(row["samples"]["ttft_ms"]) for row in result["rows"]]


def test_a_stopped_run_goes_on_and_loses_nothing(bench, monkeypatch):
    started = bench()
    run_once, calls = measure.run_once, []

    def fail_in_the_third_round(*args):
        calls.append(args)
        if len(calls) == 3 + 7:  # three to warm up, two rounds, one more
            raise KeyboardInterrupt
        return run_once(*args)

    monkeypatch.setattr(measure, "run_once", fail_in_the_third_round)
    with pytest.raises(KeyboardInterrupt):
        started.run(4)
    monkeypatch.undo()
    kept = measure.read_result(started.file)
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
    shown = table.markdown(result)
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


def test_what_is_saved_is_compared_within_a_round():
    """A machine that slows down between rounds slows both."""
    whole = {"samples": {"ttft_ms": [10.0, 20.0, 1000.0]}}
    row = {"samples": {"ttft_ms": [5.0, 15.0, 800.0]}}
    assert table.saved(row, whole) == pytest.approx(1 - 0.75)


def test_pictures_of_a_benchmark(bench, tmp_path):
    result = bench().run(1)
    drawn = plots.draw_all(
        result, tmp_path / "plots", {("none", 512): 1.0, ("norm 0.5", 512): 0.9}
    )
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
    assert result["schema"] == measure.SCHEMA
    assert {"device", "versions", "commit", "power"} <= result["machine"].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-ratios", "0.5", "0"], "keep ratio 0 is outside"),
        (["--model", str(TINY), "--model", f"{TINY}/."], "was given twice"),
        (["--runs", "0"], "whole numbers from 1"),
        (["--methods", "nrm"], "Did you mean 'norm'?"),
        (["--methods", "trimvla"], "cannot be given a budget with demo"),
        (["--model", "demo", "--model", "demo-policy"], "not both"),
        (["--model", "demo-policy", "--image-sizes", "64"], "112 px only"),
        (["--image-sizes", "500"], "a multiple of 64, such as 512"),
        (["--output", "nowhere/b.json"], "which does not exist"),
        (["--output", __file__], "no JSON file"),
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
        rows = measure.read_result(output)["rows"]
        costs = [row["costs"] for row in rows]
        # Prompt-stage methods project every token.
        assert costs[0]["project"]["flops"] == costs[1]["project"]["flops"]
        assert costs[1]["prefill"]["flops"] < costs[0]["prefill"]["flops"]


def test_lower_resolutions_are_rows_of_every_table(bench):
    sizes = {(row.image_size, row.method) for row in bench().rows}
    assert sizes == {(256, "none"), (512, "none"), (512, "norm")}


def test_a_pruner_of_one_s_own_can_be_measured(bench):
    with temporary("every_other") as register:

        @register
        def every_other(features, *, keep):
            """Every other token."""
            indices = 2 * mx.arange(keep, dtype=mx.int32)
            shape = (features.tokens.shape[0], keep)
            return Selection(mx.broadcast_to(indices, shape))

        model, processor = load(TINY)
        subject = subject_of("tiny", model, processor)
        images = [load_image(TINY / "image_0.png")]
        asked = Asked(images, "Hi", Pruner("every_other", 0.5), "original")
        assert measure.run_once(subject, asked, 2)["ttft_ms"] > 0


@pytest.mark.parametrize(
    ("source", "settings", "power"),
    [
        ("Now drawing from 'AC Power'", " lowpowermode         0", "AC"),
        ("Now drawing from 'Battery Power'", "", "battery"),
        ("'Battery Power'", " lowpowermode 1", "battery, low power mode"),
        (None, None, None),
    ],
)
def test_power_mode_as_macos_says_it(monkeypatch, source, settings, power):
    """On what `pmset` prints; a Mac runs the command itself."""
    said = {("pmset", "-g", "batt"): source, ("pmset", "-g"): settings}
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine, "_output", lambda *command: said[command])
    assert machine._power() == power


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS")
def test_a_mac_says_what_powers_it():
    assert machine.describe()["power"].startswith(("AC", "battery"))


def test_rates_are_those_of_this_machine():
    rates = machine.measure_rates(runs=1)
    assert 1e8 < rates["flops_per_second"] < 1e15
    assert 1e8 < rates["bytes_per_second"] < 1e14
