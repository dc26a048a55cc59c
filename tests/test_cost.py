"""Counted FLOPs, bytes and launches, and the description of the machine."""

import itertools
import runpy
import sys
import types
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import TINY_POLICY

from mlx_tokprune.measure import cost, machine
from mlx_tokprune.measure.subject import Request, subject_of
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import Counts, Pruner, as_plan

ROOT = Path(__file__).parents[1]


def test_flops_of_single_operations():
    a, b = mx.zeros((2, 5, 8)), mx.zeros((8, 3))
    assert cost.count(lambda a, b: a @ b, a, b).flops == 2 * 10 * 8 * 3
    added = cost.count(lambda a, b: mx.addmm(mx.zeros(3), a, b), a, b)
    assert added.flops == 2 * 10 * 8 * 3
    x, w = mx.zeros((1, 8, 8, 4)), mx.zeros((6, 3, 3, 2))
    conv = cost.count(lambda x, w: mx.conv2d(x, w, 2, 1, groups=2), x, w)
    assert conv.flops == 2 * (4 * 4 * 6) * (3 * 3 * 2)
    q = mx.zeros((1, 2, 5, 8))

    def attend(q):
        return mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)

    attention = cost.count(attend, q)
    assert (attention.flops, attention.launches) == (4 * 2 * 5 * 5 * 8, 1)


def test_bytes_and_launches_leave_views_out():
    x = mx.zeros((4, 6))
    found = cost.count(lambda x: mx.exp(x.T.reshape(2, 1, 12).squeeze(1)), x)
    assert found.launches == 1
    assert found.bytes == 2 * x.nbytes


def test_compiling_fuses_launches():
    x = mx.zeros((4, 6))

    def several(x):
        return mx.exp(x) * mx.sin(x) + mx.cos(x)

    assert cost.count(several, x).launches == 5
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "metal_cost.py"))
    assert benchmark["launches_compiled"](several, x) == 1


def test_counting_leaves_mlx_as_it_was():
    before = mx.fast.rms_norm
    with pytest.raises(ZeroDivisionError):
        cost.count(lambda x: x / (1 // 0), mx.zeros(3))
    assert mx.fast.rms_norm is before


def test_flops_of_a_policy_are_those_of_its_sizes(tiny_policy):
    """FLOPs equal the formulas of the tiny policy's sizes, two per multiply-add."""
    model, processor = tiny_policy
    image = load_image(TINY_POLICY / "image_0.png")
    plan = as_plan(Pruner("norm", 0.25))
    asked = Request([image], "pick up the cup", plan, "original")
    counted = subject_of("tiny", model, processor).count(asked)
    costs = counted.costs
    assert counted.tokens == Counts(64, 16, 16, 16, 16)
    assert costs["prune"].flops == 0  # norms are no products
    vision = 0
    for dim, hidden, prefix in ((48, 192, 5), (64, 224, 0)):
        tokens = 64 + prefix
        vision += 2 * 64 * (3 * 14 * 14) * dim  # patches
        weights = 4 * dim**2 + 2 * dim * hidden
        vision += 3 * (2 * tokens * weights + 4 * tokens**2 * dim)  # three of 4 blocks
    assert costs["vision"].flops == vision
    assert costs["project"].flops == 2 * 16 * (112 * 448 + 448 * 96 + 96 * 96)
    tokens = 1 + 16 + len(processor.prompt("pick up the cup").segments[1])
    layer = 2 * tokens * (4 * 96**2 + 3 * 96 * 192) + 4 * tokens**2 * 96
    # The last layer: keys and values of all tokens, the rest for the last one.
    last = 2 * (2 * tokens + 2) * 96**2 + 2 * 3 * 96 * 192 + 4 * tokens * 96
    assert costs["prefill"].flops == 2 * layer + last + 2 * 96 * 640
    assert counted.cache_bytes == 3 * 2 * tokens * 96 * 4


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
    """The power mode is read from the output of `pmset`."""
    said = {("pmset", "-g", "batt"): source, ("pmset", "-g"): settings}
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine, "_output", lambda *command: said[command])
    assert machine._power() == power


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS")
def test_a_mac_says_what_powers_it():
    assert machine.describe()["power"].startswith(("AC", "battery"))


def test_rates_are_those_of_the_quickest_run(monkeypatch):
    """The rates are those of the fastest run after one warm-up run."""
    spent = [0.1, 2, 1, 4, 0.1, 8, 2, 5]
    ticks = itertools.chain.from_iterable((0, seconds) for seconds in spent)
    clock = types.SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(machine, "time", clock)
    rates = machine.measure_rates(runs=3)
    assert rates["flops_per_second"] == 2 * 1024**3 / 1
    assert rates["bytes_per_second"] == 2 * (4 << 26) / 2
