"""Repeated groups of patches, found by hand and by invariants."""

import numpy as np
import pytest

from mlx_tokprune import InputError
from mlx_tokprune.attach.pixels import (
    Pixels,
    RepeatPruner,
    TemporalPruner,
    changed,
    repeated,
)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_what_repeats_is_left_out_and_nothing_else(seed, threshold):
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 2, (5, 6, 1)) / 2 + rng.random((5, 6, 80)) * threshold / 2
    new = rng.random((5, 6)) < (1.0 if seed % 2 else 0.7)
    found, groups = repeated(frame, new, threshold), frame.reshape(30, -1)

    def near(one: int, other: int) -> bool:
        return np.abs(groups[one] - groups[other]).max() <= threshold

    for (i, j), source in np.ndenumerate(found):
        own = i * 6 + j
        assert found.ravel()[source] == source
        if source != own:
            assert new[i, j]
            assert new.ravel()[source]
            assert near(own, source)
            continue
        beside = [p for p in ((i, j - 1), (i - 1, j)) if min(p) >= 0 and new[p]]
        assert not new[i, j] or not any(near(own, found[p]) for p in beside)
    assert 2 < len(np.unique(found)) < 30


def test_a_border_leaves_its_first_group():
    frame = np.random.default_rng(0).random((5, 6, 80))
    frame[0], frame[-1], frame[:, 0], frame[:, -1] = 0.5, 0.5, 0.5, 0.5
    frame[2, 3] = 0.5  # within: as the border, but no neighbour of it
    found = repeated(frame, np.ones((5, 6), bool), 0.0)
    inner = np.arange(30).reshape(5, 6)[1:-1, 1:-1]
    assert np.unique(found).tolist() == [0, *inner.ravel()]


def test_a_slow_change_is_compared_with_what_was_kept():
    steps = np.arange(6)[:, None, None, None] * np.array([0.02, 0.06])[:, None]
    frames = np.broadcast_to(steps, (6, 1, 2, 3))
    found = changed(frames, TemporalPruner(0.05))
    assert found[:, 0, 0].tolist() == [True, False, False, True, False, False]
    assert found[:, 0, 1].all()
    aged = changed(np.zeros((6, 1, 1, 3)), TemporalPruner(0.05, max_age=2))
    assert aged.ravel().tolist() == [True, False] * 3


def test_what_repeats_an_unchanged_group_stays():
    """A changed group that repeats an unchanged group is kept."""
    frames = np.random.default_rng(0).random((2, 2, 2, 12)).astype(np.float32)
    frames[1] = frames[0]
    frames[1, 0, 1] = frames[0, 0, 0]
    both = Pixels(TemporalPruner(0.0), RepeatPruner(0.0))
    stays, sources = both.look(frames.reshape(32, 3), [(2, 4, 4)], 2)
    assert np.flatnonzero(stays).tolist() == [0, 1, 2, 3, 5]
    assert sources.tolist() == list(range(8))


def test_settings_that_say_nothing_are_refused():
    for wrong in ({"spatial": {}}, {"repeats": {"limit": 1}}, {"repeats": 3}, [1]):
        with pytest.raises(InputError, match="says no pruners of pixels"):
            Pixels.read(wrong)
