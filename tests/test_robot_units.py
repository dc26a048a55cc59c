"""Robot units: each reference's formula, also where statistics have no width."""

import dataclasses

import numpy as np
import pytest

from mlx_tokprune.processing.actions import Bounds, read_bounds, read_deviations

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
