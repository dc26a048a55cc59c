"""The cheapest plan within a loss, and the interval of the loss."""

import json

import numpy as np
import pytest

from mlx_tokprune import Pruner
from mlx_tokprune.evaluate.__main__ import main as evaluate
from mlx_tokprune.evaluate.items import Item
from mlx_tokprune.evaluate.recommend import recommend, sentence
from mlx_tokprune.measure.intervals import of_loss
from mlx_tokprune.measure.results import Row

ROWS = [
    Row("none", (Pruner("none"),)),
    Row("norm 0.5", (Pruner("norm", 0.5),)),
    Row("norm 0.25", (Pruner("norm", 0.25),)),
    Row("random 0.1", (Pruner("random", 0.1),)),
]


def records(count, wrong):
    """Return records by question, with `wrong[label]` errors and costs by label."""
    flops = {"none": 10, "norm 0.5": 8, "norm 0.25": 5, "random 0.1": 1}
    return {
        number: {
            label: {"accuracy": float(number >= wrong[label]), "flops": cost}
            for label, cost in flops.items()
        }
        for number in range(count)
    }


def items(count):
    return [Item(str(number), "What?", ("x",)) for number in range(count)]


def test_the_cheapest_that_is_sure_enough():
    wrong = {"none": 0, "norm 0.5": 0, "norm 0.25": 30, "random 0.1": 0}
    found = recommend(items(1000), records(1000, wrong), ROWS, 0.02)
    assert found["choice"] == "norm 0.5"  # cheaper ones lose more, or are controls
    assert [row["label"] for row in found["rows"]] == ["norm 0.5", "norm 0.25"]
    assert [row["fine"] for row in found["rows"]] == [True, False]
    assert found["rows"][1]["loss"] == pytest.approx(0.03)
    assert found["rows"][1]["flops"] == 0.5
    assert sentence(found).startswith("Within 2 points the cheapest is norm 0.5: it")
    found = recommend(items(1000), records(1000, wrong), ROWS, 0.06)
    assert found["choice"] == "norm 0.25"


def test_few_questions_make_nothing_sure():
    wrong = dict.fromkeys(("none", "norm 0.5", "norm 0.25", "random 0.1"), 0)
    found = recommend(items(20), records(20, wrong), ROWS, 0.02)
    assert found["choice"] is None
    assert found["rows"][0]["loss"] == 0
    assert "No plan is sure" in sentence(found)
    assert "ask more questions" in sentence(found)


def test_without_right_answers_the_unpruned_ones_count():
    known = {
        n: {
            row.label: {
                "accuracy": None,
                "agrees": row.label != "norm 0.25",
                "flops": 1,
            }
            for row in ROWS
        }
        for n in range(500)
    }
    found = recommend(items(500), known, ROWS, 0.5)
    assert [row["loss"] for row in found["rows"]] == [0, 1]


def test_intervals_of_losses():
    """Intervals equal Agresti and Min's; groups and rows widen them."""
    losses = [1.0] * 6 + [-1.0] * 2 + [0.0] * 92
    value, low, high = of_loss(losses, range(100))
    centre = 4 / 102
    half = 1.959964 * np.sqrt((9 / 102 - centre**2) / 102)
    assert value == pytest.approx(0.04)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-6)
    _, _, many = of_loss(losses, range(100), rows=20)
    assert many > high
    grouped = of_loss(losses, [n // 10 for n in range(100)])
    assert grouped[2] > high
    zero = of_loss([0.0] * 50, range(50))
    assert zero[0] == 0
    assert 0 < zero[2] < 0.1


def test_it_holds_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        drawn = rng.choice([1.0, -1.0, 0.0], 120, p=[0.08, 0.03, 0.89])
        _, low, high = of_loss(drawn.tolist(), range(120))
        inside += low <= 0.05 <= high
    assert inside >= 0.93 * 400


def test_on_the_command_line(tmp_path, capsys):
    out = str(tmp_path / "r.json")
    few = ["--pictures", "1", "--methods", "norm", "random", "--keep-ratios", "0.5"]
    evaluate([*few, "--recommend", "1", "--output", out])
    said = capsys.readouterr().out
    assert "Within 100 points the cheapest is norm 0.5" in said
    found = json.loads((tmp_path / "r.json").read_text())["recommendation"]
    assert found["choice"] == "norm 0.5"
    with pytest.raises(SystemExit) as stopped:
        evaluate([*few, "--recommend", "2", "--output", out])
    assert stopped.value.code == 2
    assert "0.02 is 2 points" in capsys.readouterr().err
