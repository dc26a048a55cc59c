"""Every registered method, so a new one is tested when it is registered."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_tokprune.errors import InputError
from mlx_tokprune.features import Features, Selection
from mlx_tokprune.pruners import Pruner, get_method, list_pruners
from mlx_tokprune.pruners.merging import grid_within
from mlx_tokprune.pruners.registry import register, temporary

METHODS = [m for m in list_pruners() if m != "none" and get_method(m).counts != "own"]


MERGING = ["similarity", "spatial"]


def features(batch: int = 2, side: int = 8, channels: int = 24, seed: int = 0):
    key = mx.random.key(seed)
    tokens = mx.random.normal((batch, side * side, channels), key=key)
    received = mx.softmax(mx.random.normal((batch, side * side), key=key), axis=-1)
    text = mx.random.normal((batch, 5, channels), key=mx.random.key(seed + 1))
    queries, keys = (
        x.reshape(*x.shape[:2], 2, -1).swapaxes(1, 2) for x in (tokens, text)
    )
    return Features(tokens, (side, side), received, text, queries, keys)


def sample(given: Features, i: int) -> Features:
    """One picture of a batch."""
    names = ("tokens", "attention", "text", "queries", "keys")
    return replace(given, **{n: getattr(given, n)[i : i + 1] for n in names})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [1, 7, 16, 32, 63, 64])
def test_selection_keeps_the_contract(method, keep):
    given = features()
    selection = Pruner(method, keep_tokens=keep)(given)
    indices = np.array(selection.indices)
    assert indices.shape == (2, selection.keep)
    exact = method not in ("spatial", "uniform")
    assert selection.keep == keep if exact else 1 <= selection.keep <= keep
    assert (np.diff(indices) > 0).all()
    assert indices.min() >= 0
    assert indices.max() < 64
    assert selection.apply(given.tokens).shape == (2, selection.keep, 24)
    if selection.weights is not None:
        np.testing.assert_allclose(np.array(selection.weights).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_gives_what_single_pictures_give(method):
    given = features()
    together = Pruner(method, 0.25)(given)
    for i in range(2):
        one = Pruner(method, 0.25)(sample(given, i))
        assert mx.array_equal(one.indices[0], together.indices[i])


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("keep", [1, 5, 32, 63])
def test_merging_represents_every_token(method, keep):
    selection = Pruner(method, keep_tokens=keep)(features())
    weights = np.array(selection.weights)
    assert ((weights > 0).sum(axis=1) == 1).all()  # each token in exactly one group
    groups = np.array(selection.assignment())
    for b in range(2):
        assert sorted(set(groups[b])) == list(range(selection.keep))
        own = groups[b][np.array(selection.indices)[b]]
        assert (own == np.arange(selection.keep)).all()


def test_similarity_merges_duplicates_and_covers_the_bottom():
    # Four rows of the grid; every token of a row is the same.
    rows = mx.random.normal((4, 24), key=mx.random.key(3))
    tokens = mx.repeat(rows, 4, axis=0)[None]
    selection = Pruner("similarity", keep_tokens=4)(Features(tokens, (4, 4)))
    merged = np.array(selection.apply(tokens))[0]
    np.testing.assert_allclose(merged, np.array(rows), rtol=1e-5)


def test_worked_cases():
    tokens = mx.array([[[3.0, 0], [0, 1], [0, 5], [2, 0]]])
    given = Features(tokens, (2, 2), mx.array([[0.1, 0.4, 0.2, 0.3]]))
    assert Pruner("norm", 0.5)(given).indices.tolist() == [[0, 2]]
    assert Pruner("attention", 0.5)(given).indices.tolist() == [[1, 3]]
    # mean (1.25, 1.5): both (0, y) tokens are nearer in angle
    assert Pruner("mean_similarity", 0.5)(given).indices.tolist() == [[1, 2]]
    assert Pruner("none")(given).indices.tolist() == [[0, 1, 2, 3]]
    merged = Pruner("similarity", 0.5)(given)
    assert merged.indices.tolist() == [[0, 2]]
    np.testing.assert_allclose(
        np.array(merged.apply(tokens))[0], [[2.5, 0], [0, 3]], rtol=1e-6
    )


def test_kept_twins_keep_a_group_each():
    selection = Pruner("similarity", keep_tokens=4)(
        Features(mx.ones((1, 16, 3)), (4, 4))
    )
    np.testing.assert_allclose(np.array(selection.weights).sum(-1), 1)


def test_spatial_averages_neighbours():
    tokens = mx.arange(16, dtype=mx.float32).reshape(1, 16, 1)
    pooled = Pruner("spatial", keep_tokens=4)(Features(tokens, (4, 4))).apply(tokens)
    assert pooled.reshape(-1).tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize(
    ("keep", "cells"), [(128, (8, 16)), (64, (8, 8)), (28, (4, 7)), (1, (1, 1))]
)
def test_grid_within_is_the_largest_that_is_not_too_flat(keep, cells):
    assert sorted(grid_within((16, 16), keep)) == sorted(cells)


def test_ties_keep_the_earlier_token():
    given = Features(mx.ones((1, 256, 4)), (16, 16))
    assert Pruner("norm", 0.25)(given).indices.tolist() == [list(range(64))]


def test_random_is_seeded():
    first, again = (Pruner("random", 0.25, seed=5)(features()) for _ in range(2))
    other = Pruner("random", 0.25, seed=6)(features())
    assert mx.array_equal(first.indices, again.indices)
    assert not mx.array_equal(first.indices, other.indices)


def test_controls_say_so():
    said = {m for m in METHODS if get_method(m).summary.startswith("Control")}
    assert said == {"random", "uniform"}


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("topk_magnitude", "norm"),
        ("spatial_pool", "spatial"),
        ("attention_score", "mean_similarity"),
    ],
)
def test_names_of_the_reference_projects(alias, name):
    assert Pruner(alias, 0.5).method == name


def test_counts_follow_the_reference_projects():
    assert Pruner("norm", 0.11).count(256) == 28
    assert Pruner("norm", 0.001).count(256) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0}, r"outside \(0, 1\]"),
        ({"keep_ratio": 1.5}, r"outside \(0, 1\]"),
        ({"keep_ratio": float("nan")}, r"outside \(0, 1\]"),
        ({"keep_tokens": 0}, "expected a whole number from 1"),
        ({"keep_tokens": 2.5}, "expected a whole number from 1"),
        ({"keep_ratio": 0.5, "keep_tokens": 3}, "not both"),
        ({"method": "norn"}, "Did you mean 'norm'"),
        ({"method": "none", "keep_ratio": 0.5}, "needs another method"),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        Pruner(**options)


def test_more_than_there_are_is_refused():
    with pytest.raises(InputError, match="the most is 64"):
        Pruner("norm", keep_tokens=65)(features())


def test_a_known_name_cannot_be_registered_again():
    with pytest.raises(ValueError, match="already registered"):
        register("topk_magnitude")(lambda features, *, keep: None)


def test_a_method_is_one_function():
    def last(features: Features, *, keep: int) -> Selection:
        total = features.tokens.shape[1]
        return Selection(mx.arange(total - keep, total, dtype=mx.int32)[None])

    with temporary("last") as add:
        add(last)
        one = Features(mx.zeros((1, 9, 2)), (3, 3))
        assert Pruner("last", keep_tokens=2)(one).indices.tolist() == [[7, 8]]
    with pytest.raises(InputError):
        get_method("last")


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_gives_the_same_tokens_a_place(method):
    given = features()
    half = replace(given, tokens=given.tokens.astype(mx.float16))
    selection = Pruner(method, 0.5)(half)
    assert selection.apply(half.tokens).dtype == mx.float16
    whole = replace(given, tokens=half.tokens.astype(mx.float32))
    assert mx.array_equal(selection.indices, Pruner(method, 0.5)(whole).indices)
