"""Robot units: each reference's formula, also where statistics have no width."""

import dataclasses

import numpy as np
import pytest

from mlx_tokprune.errors import InputError
from mlx_tokprune.processing.actions import (
    Bounds,
    bin_values,
    choose_statistics,
    read_bounds,
    read_deviations,
)

# A wide dimension, one of width 1e-6, and one without any.
LOW, HIGH = np.array([-1.0, 0.0, 0.25]), np.array([3.0, 1e-6, 0.25])
MEAN, STD = np.array([1.0, 0.0, 0.25]), np.array([2.0, 1e-6, 0.0])
STATISTICS = {
    part: {
        name: values.tolist()
        for name, values in zip(
            ("q01", "q99", "mean", "std"), (LOW, HIGH, MEAN, STD), strict=True
        )
    }
    for part in ("action", "proprio")
}
NORMALIZED = np.array([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5]])
STATES = np.array([[-1.0, 0.0, 0.25], [2.0, 1e-6, 0.25], [5.0, -3e-6, 0.25000024]])


def scales(tiny_chunks, dialect: str, rule: str):
    """Return the scales of actions and of states."""
    processor = dataclasses.replace(
        tiny_chunks[1],
        dialect=dialect,
        norm_stats={"toy": STATISTICS},
        rules={"action": rule, "proprio": rule},
    )
    return [processor.bounds(part, "toy") for part in ("action", "proprio")]


def test_openpi_s_quantiles(tiny_chunks):
    """openpi adds 1e-6 to the range, in both directions."""
    action, state = scales(tiny_chunks, "openpi", "bounds_q99")
    width = HIGH - LOW + 1e-6
    expected = (NORMALIZED + 1) / 2 * width + LOW
    np.testing.assert_allclose(action.to_units(NORMALIZED), expected, rtol=0, atol=1e-9)
    expected = (STATES.astype(np.float32) - LOW) / width * 2 - 1
    found = state.from_units_unclipped(STATES)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_openpi_s_mean_and_deviation(tiny_chunks):
    """openpi adds 1e-6 to the deviation, and nothing else."""
    action, state = scales(tiny_chunks, "openpi", "mean_std")
    expected = NORMALIZED * (STD + 1e-6) + MEAN
    np.testing.assert_allclose(action.to_units(NORMALIZED), expected, rtol=0, atol=1e-9)
    expected = (STATES.astype(np.float32) - MEAN) / (STD + 1e-6)
    found = state.from_units_unclipped(STATES)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_lerobot_s_quantiles(tiny_chunks):
    """lerobot divides by 1e-8 where the range is zero, and by the range elsewhere."""
    action, state = scales(tiny_chunks, "lerobot", "bounds_q99")
    expected = (NORMALIZED + 1) / 2 * (HIGH - LOW) + LOW
    np.testing.assert_allclose(
        action.to_units(NORMALIZED), expected, rtol=0, atol=1e-12
    )
    width = np.array([4.0, 1e-6, 1e-8])
    expected = 2 * (STATES.astype(np.float32) - LOW) / width - 1
    found = state.from_units_unclipped(STATES)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert found[0].tolist() == [-1, -1, -1]


def test_lerobot_s_mean_and_deviation(tiny_chunks):
    """lerobot adds 1e-8 to the deviation of states, and nothing to that of actions."""
    action, state = scales(tiny_chunks, "lerobot", "mean_std")
    expected = NORMALIZED * STD + MEAN
    np.testing.assert_allclose(
        action.to_units(NORMALIZED), expected, rtol=0, atol=1e-12
    )
    expected = (STATES.astype(np.float32) - MEAN) / (STD + 1e-8)
    found = state.from_units_unclipped(STATES)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert found[0].tolist() == [-1, 0, 0]


def test_openvla_s_bounds():
    """A dimension without width has one value; OpenVLA-OFT adds 1e-8 for states."""
    bounds = read_bounds(STATISTICS, "action")
    assert bounds.to_units(NORMALIZED)[:, 2].tolist() == [0.25] * 3
    found = bounds.from_units(STATES)
    assert found[:, 1] == pytest.approx([-1, 1 / 1.01 * 2 - 1, -1], abs=1e-9)
    assert found[:, 2].tolist() == [-1, -1, 1]


@pytest.mark.parametrize("width", [0.0, 2.0])
def test_masked_numbers_are_not_scaled(width):
    """A gripper's number passes as it is; OpenVLA-OFT still clips a state."""
    bounds = Bounds(np.zeros(2), np.full(2, width), np.array([False, False]))
    values = np.array([0.3, -7.0])
    assert bounds.to_units(values).tolist() == [0.3, -7.0]
    assert bounds.from_units(values).tolist() == [0.3, -1.0]
    assert bounds.from_units_unclipped(values) == pytest.approx([0.3, -7.0])


def test_deviations_as_bounds():
    """Mean and deviation show the units of -1 and 1, and clip as bounds do."""
    scale = read_deviations(STATISTICS, "proprio")
    assert scale.low.tolist() == pytest.approx([-1, -1e-6, 0.25])
    assert scale.high.tolist() == pytest.approx([3, 1e-6, 0.25])
    assert scale.from_units(STATES)[2].tolist() == [1, -1, 1]


def test_bins_are_the_last_tokens_in_reverse():
    """A bin's centre lies between its edges: 5 edges from -1 to 1 make 4 bins."""
    ids = np.array([[102, 99, 98], [97, 96, 95]])
    expected = [[-0.75, -0.75, -0.25], [0.25, 0.75, 0.75]]
    assert bin_values(ids, 100, bins=5).tolist() == expected
    assert bin_values(ids[:, 1], 100)[0] == pytest.approx(-1 + 1 / 255)
    assert bin_values(np.array([0]), 100_000)[0] == pytest.approx(1 - 1 / 255)


@pytest.mark.parametrize("key", ["robot_1x", 1, 1.5, b"robot_01"])
@pytest.mark.parametrize(("sets", "ending"), [(20, "'robot_19'"), (23, " and 3 more")])
def test_an_unknown_data_set_is_refused_with_20_names(key, sets, ending):
    stats = {f"robot_{number:02}": {} for number in range(sets)}
    with pytest.raises(InputError) as refused:
        choose_statistics(stats, key)
    names = str(refused.value).partition("the keys are ")[2].partition(".")[0]
    assert names.count("robot_") == 20
    assert names.startswith("'robot_00', ")
    assert names.endswith(ending)
    with pytest.raises(InputError, match=f"knows {sets} data sets"):
        choose_statistics(stats, None)
    assert choose_statistics(stats | {"mine": {"action": 1}}, "mine") == {"action": 1}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"q99": [1.0]}, "no q01 and q99 of action; expected both"),
        ({"q01": [0.0] * 65, "q99": [1.0] * 65}, "a list of 1 to 64 finite numbers"),
        ({"q01": [], "q99": []}, "a list of 1 to 64 finite numbers"),
        ({"q01": [True], "q99": [2]}, r"q01 of action \[True\]; expected"),
        ({"q01": [-1e12], "q99": [2]}, r"q01 of action \[-1000000000000.0\]; e"),
        ({"q01": [0], "q99": [1e12]}, r"q99 of action \[1000000000000.0\]; e"),
        ({"q01": [0], "q99": [1, 2]}, "q01 has 1 numbers, q99 2 and mask 1"),
        ({"q01": [0], "q99": [1], "mask": [True] * 2}, "q99 1 and mask 2"),
        ({"q01": [0], "q99": [1], "mask": [1]}, r"mask \[1\] of action; expected bool"),
        ({"q01": [0], "q99": [1], "mask": True}, "mask True of action; expected bool"),
        ({"q01": [2], "q99": [1]}, "have q01 above q99"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(entry, message):
    with pytest.raises(InputError, match=message):
        read_bounds({"action": entry}, "action")


def test_a_deviation_below_zero_is_refused():
    with pytest.raises(InputError, match="of action have a std below 0"):
        read_deviations({"action": {"mean": [0, 0], "std": [0, -1e-9]}}, "action")


def test_64_numbers_of_any_size_fit():
    entry = {"q01": [-9e11] * 64, "q99": [-9e11] * 63 + [9e11]}
    assert read_bounds({"action": entry}, "action").low.shape == (64,)
