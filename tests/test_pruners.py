"""Every registered method keeps the contract of pruners."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_tokprune.errors import InputError
from mlx_tokprune.features import Features, Selection
from mlx_tokprune.pruners import Pruner, as_plan, get_method, list_pruners
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
    extras = {"attention": received, "text": text, "queries": queries}
    extras |= {"text_keys": keys, "keys": tokens[..., :16]}
    extras["text_attention"] = mx.random.uniform(shape=(batch, 5, side * side), key=key)
    return Features(tokens, (side, side), extras=extras)


def sample(given: Features, i: int) -> Features:
    """Return one sample of a batch."""
    extras = {name: array[i : i + 1] for name, array in given.extras.items()}
    return replace(given, tokens=given.tokens[i : i + 1], extras=extras)


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
        sums = np.array(selection.weights).sum(-1)
        if method in MERGING:
            np.testing.assert_allclose(sums, 1, rtol=1e-5)
        else:  # they publish sums that are no averages
            assert sums.min() >= 1 - 1e-5
        own = np.take_along_axis(np.array(selection.weights), indices[..., None], 2)
        assert (own > 0).all()


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
    received = mx.array([[0.1, 0.4, 0.2, 0.3]])
    given = Features(tokens, (2, 2), extras={"attention": received})
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


class Scorer(nn.Module):
    """Scorer that weighs the received attention by a linear map of the token."""

    needs = ("attention",)

    def __init__(self):
        super().__init__()
        self.weight = mx.zeros((24,))

    def __call__(self, given: Features) -> mx.array:
        return given.tokens @ self.weight * given.extras["attention"]


def test_a_scorer_chooses_by_its_weights_of_today():
    scorer, given, found = Scorer(), features(), []
    pruner = Pruner("learned", 0.25, scorer=scorer)
    assert pruner.needs == ("attention",)
    assert "learned" not in list_pruners()
    for seed in (1, 2):
        scorer.weight = weight = mx.random.normal((24,), key=mx.random.key(seed))
        found.append(np.array(pruner(given).indices))
        best = np.argsort(-np.array(scorer(given)), axis=1)[:, :16]
        assert np.array_equal(found[-1], np.sort(best, axis=1))
        assert scorer.weight is weight  # nothing of the compiled call is left in it
    assert not np.array_equal(*found)
    with pytest.raises(InputError, match="chooses by a scorer; say its folder"):
        Pruner("learned", 0.25)
    with pytest.raises(InputError, match="reads no scores"):
        Pruner("norm", 0.25, scorer=scorer)


def test_plans_are_in_the_order_of_their_places():
    tower, prompt = Pruner("norm", 0.5), Pruner("trimvla")
    early, late = (Pruner("attention", 0.5, at=k) for k in (2, 10))
    assert [p.place for p in (tower, prompt, early)] == ["tower", "prompt", "layer"]
    given = [late, Pruner("none"), prompt, early, Pruner("norm", 1.0, at=3), tower]
    assert as_plan(given) == (tower, prompt, early, late)
    assert as_plan(None) == as_plan(Pruner("none")) == ()
    assert as_plan(tower) == as_plan(iter([tower])) == (tower,)
    with pytest.raises(InputError, match="both prune at 2"):
        as_plan([early, Pruner("norm", 0.5, at=2)])
    with pytest.raises(InputError, match="not str"):
        as_plan(["norm"])


def test_what_is_described_makes_an_equal_pruner():
    options = {"coverage": 0.5}
    for pruner in (Pruner("trimvla", options=options), Pruner("random", 0.5, seed=3)):
        assert Pruner(**json.loads(json.dumps(pruner.described()))) == pruner


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": mx.zeros((64, 24))}, r"tokens are \(B, N, C\)"),
        ({"grid": (8, 7)}, "have other than 64 tokens"),
        ({"pictures": 2}, "have other than 64 tokens"),
        ({"extras": {"attention": mx.zeros((2, 63))}}, "attention has shape"),
        ({"extras": {"text": mx.zeros((1, 5, 24))}}, "text has shape"),
    ],
)
def test_features_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(features(), **changes)


def test_features_that_a_method_lacks_are_named():
    bare = replace(features(), extras={}, grid=None)
    with pytest.raises(ValueError, match=r"attention needs features with .*attention"):
        Pruner("attention", 0.5)(bare)
    with pytest.raises(InputError, match="'spatial' needs the whole grid of one"):
        Pruner("spatial", 0.5)(bare)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_gives_the_same_tokens_a_place(method):
    given = features()
    half = replace(given, tokens=given.tokens.astype(mx.float16))
    selection = Pruner(method, 0.5)(half)
    assert selection.apply(half.tokens).dtype == mx.float16
    whole = replace(given, tokens=half.tokens.astype(mx.float32))
    assert mx.array_equal(selection.indices, Pruner(method, 0.5)(whole).indices)
