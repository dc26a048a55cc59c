"""Each method equals plain NumPy from its description, on 200 random cases.

Vectors whose cosines decide are integers of a length that is a power of two, and
attention is a multiple of 1/1024: such scores are exact in float32 in whatever order
they are summed, so equal scores are equal everywhere.
"""

import functools
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import references

import mlx.core as mx  # isort: skip

from mlx_tokprune.features import Features
from mlx_tokprune.pruners import Pruner, get_method, list_pruners

CASES = 200

# batch, grid, channels, budgets: few, as every one is compiled anew
SHAPES = [
    (1, (2, 2), 4, (1, 2, 3, 4)),
    (2, (2, 3), 8, (1, 4, 5)),
    (1, (1, 9), 8, (2, 6, 8)),
    (2, (3, 5), 16, (1, 7, 12)),
    (2, (3, 4), 8, (3, 6, 11)),
    (1, (4, 4), 8, (2, 8, 16)),
    (2, (5, 4), 32, (5, 13, 19)),
    (1, (6, 6), 16, (9, 30)),
    (2, (9, 7), 8, (16, 52)),
    (1, (8, 8), 16, (21, 32, 64)),
]
LARGE = (1, (24, 24), 16, (64, 150))


@functools.cache
def four_squares() -> dict[int, tuple[int, ...]]:
    """Map each n up to 256 to four numbers whose squares sum to n."""
    found = {}
    for four in itertools.combinations_with_replacement(range(17), 4):
        found.setdefault(sum(i * i for i in four), four)
    return found


def whole(rng, count: int, channels: int) -> np.ndarray:
    """Return (count, C) integer vectors of length 16, 32 or 64."""
    vectors = []
    for _ in range(count):
        entries = rng.integers(-5, 6, channels - 4)
        while (square := int(np.sum(entries**2))) > 256:
            entries[rng.integers(len(entries))] = 0
        signed = rng.choice([-1, 1], 4) * four_squares()[256 - square]
        vector = rng.permutation([*entries, *signed])
        vectors.append(vector * 2 ** rng.integers(3))
    return np.array(vectors, np.float32)


def real(rng, count: int, channels: int) -> np.ndarray:
    vectors = rng.normal(size=(count, channels)) * 2.0 ** rng.integers(3)
    return vectors.astype(np.float32)


def twins(draw, rng, count: int, channels: int) -> np.ndarray:
    """Return drawn vectors with frequent duplicates and rare zeros."""
    vectors = draw(rng, count, channels)
    if rng.random() < 0.7:
        few = max(1, int(count * rng.choice([0.3, 0.8])))
        vectors = vectors[rng.integers(few, size=count)]
    if rng.random() < 0.2:
        vectors[rng.integers(count)] = 0
    return vectors


def scaled(draw, rng, count: int, channels: int) -> np.ndarray:
    """Return `twins`, each vector times 1 or 2."""
    lengths = 2 ** rng.integers(2, size=(count, 1)).astype(np.float32)
    return lengths * twins(draw, rng, count, channels)


def received(rng, *shape: int) -> np.ndarray:
    """Return random attention in multiples of 1/1024, from flat to peaked."""
    levels = np.exp(rng.normal(size=shape)) * rng.choice([1, 4, 64])
    return np.floor(levels).astype(np.float32) / 1024


def drawn(rng, needs, tokens, total: int, channels: int, words: int) -> dict:
    """Return the tokens and the extras in `needs` of one sample."""

    def sixteenths(*shape: int) -> np.ndarray:
        return rng.integers(-24, 25, shape).astype(np.float32) / 16

    draws = {
        "attention": lambda: received(rng, total),
        "attention_middle": lambda: received(rng, total),
        "scores_previous": lambda: received(rng, total),
        "keys": lambda: scaled(whole, rng, total, 8),
        "text": lambda: real(rng, words, channels) / 4,
        "text_attention": lambda: received(rng, words, total),
        "queries": lambda: sixteenths(2, total, 16)[:, rng.integers(total, size=total)],
        "text_keys": lambda: sixteenths(2, words, 16),
    }
    made = {name: draws[name]() for name in needs if name in draws}
    return {"tokens": tokens(rng, total, channels), **made}


BUDGET = [{}]
# name: (reference, tokens, options by turns, whether there is a budget). After a
# method's name: `own` count, `real` tokens, `one` without what it only wants.
SCALED = functools.partial(scaled, whole)
CHECKS = {
    "norm": (references.norm, SCALED, BUDGET, True),
    "attention": (references.attention, SCALED, BUDGET, True),
    "mean_similarity": (
        references.mean_similarity,
        functools.partial(scaled, real),
        BUDGET,
        True,
    ),
    "similarity": (references.similarity, SCALED, BUDGET, True),
    "similarity threshold": (
        references.similarity,
        SCALED,
        [{"threshold": t} for t in (0.25, 0.5, 0.8, 1)],
        False,
    ),
    "spatial": (references.spatial, SCALED, BUDGET, True),
    "uniform": (references.uniform, SCALED, BUDGET, True),
    "divprune": (references.divprune, SCALED, BUDGET, True),
    "divprune real": (references.divprune, real, BUDGET, True),
    "cdpruner": (references.cdpruner, SCALED, [{}, {"sign": -1}], True),
    "dart": (references.dart, SCALED, [{}, {"pivots": 1}, {"pivots": 7}], True),
    "dart real": (references.dart, real, BUDGET, True),
    "visionzip": (references.visionzip, SCALED, BUDGET, True),
    "prumerge": (references.prumerge, SCALED, [{}, {"rest": 1}], True),
    "prumerge own": (references.prumerge, SCALED, [{}, {"rest": 1}], False),
    "prumerge_plus": (references.prumerge_plus, SCALED, BUDGET, True),
    "prumerge_plus own": (references.prumerge_plus, SCALED, BUDGET, False),
    "hiprune": (
        references.hiprune,
        SCALED,
        [{}, *({"alpha": a} for a in (0, 0.4, 1))],
        True,
    ),
    "hiprune one": (
        references.hiprune,
        SCALED,
        [{}, *({"alpha": a} for a in (0.7, 1))],
        True,
    ),
    "fastv": (references.attention, SCALED, BUDGET, True),
    "pyramiddrop": (references.attention, SCALED, BUDGET, True),
    "sparsevlm": (references.sparsevlm, lambda *a: SCALED(*a) / 32, BUDGET, True),
    "trimvla": (
        references.trimvla,
        SCALED,
        [
            {},
            {"aggregation": "max"},
            {"aggregation": "mean"},
            {"temperature": 0.5},
        ],
        True,
    ),
    "trimvla own": (
        references.trimvla,
        SCALED,
        [
            {},
            {"aggregation": "max", "coverage": 0.62, "coverage_temperature": 1},
            {"aggregation": "mean", "coverage": 0.37, "min_keep_ratio": 0.3},
            {"coverage_temperature": 1, "coverage": 0.91},
        ],
        False,
    ),
    "vlapruner": (references.vlapruner, SCALED, BUDGET, True),
    "vlapruner one": (references.vlapruner, SCALED, BUDGET, True),
    "lightvla": (references.lightvla, real, BUDGET, False),
    "lightvla twins": (
        *(references.lightvla, functools.partial(twins, real)),
        *(BUDGET, False),
    ),
}


def arrays(selection, tokens) -> list[tuple[list[int], np.ndarray]]:
    """Return the kept indices and tokens of each sample."""
    indices, values = np.array(selection.indices), np.array(selection.apply(tokens))
    real = np.ones(indices.shape, bool)
    if selection.mask is not None:
        real = np.array(selection.mask)
    return [
        (i[r].tolist(), v[r]) for i, v, r in zip(indices, values, real, strict=True)
    ]


def agrees(found, given, plain) -> bool:
    """Return whether the kept indices are equal; check the merged tokens if so."""
    (indices, values), (kept, merged) = found, plain
    if indices != sorted(kept):
        return False
    expected = np.stack(
        [(given.tokens if merged is None else merged)[i] for i in indices]
    )
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(values, expected, rtol=0, atol=references.NEAR * scale)
    return True


def test_every_method_is_checked():
    chance = {"none", "random"}
    assert {name.split()[0] for name in CHECKS} == set(list_pruners()) - chance


@pytest.mark.parametrize("name", CHECKS)
def test_a_method_does_what_its_description_says(name):
    reference, tokens, turns, budget = CHECKS[name]
    method, near = get_method(name.split()[0]), 0
    needs = (*method.needs, *(() if name.endswith("one") else method.wants))
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        large = seed % 40 == 39
        shape = LARGE if large else SHAPES[rng.integers(len(SHAPES))]
        batch, grid, channels, budgets = shape
        total, words = math.prod(grid), int(rng.choice([1, 2, 4, 8]))
        keep = int(rng.choice(budgets)) if budget else None
        options = turns[seed // 40 % len(turns) if large else seed % len(turns)]
        samples = [
            drawn(rng, needs, tokens, total, channels, words) for _ in range(batch)
        ]
        stacked = {n: mx.array(np.stack([s[n] for s in samples])) for n in samples[0]}
        together = Features(stacked.pop("tokens"), grid, extras=stacked)
        selection = Pruner(method.name, keep_tokens=keep, options=options)(together)
        exact = True
        for sample, found in zip(
            samples, arrays(selection, together.tokens), strict=True
        ):
            given = SimpleNamespace(grid=grid, **sample)
            if keep == total:
                assert agrees(found, given, (range(total), None)), seed
                continue
            if agrees(
                found, given, reference(given, keep, references.Choice(), **options)
            ):
                continue
            exact = False
            plain = reference(given, keep, references.Choice(found[0]), **options)
            assert agrees(found, given, plain), (seed, found[0], sorted(plain[0]))
        near += not exact
    print(f"{name}: {CASES - near} of {CASES} exact")
    # Products of equal rows differ by rounding at the edges of some BLAS kernels, so
    # that either of two equal tokens may have the best vote.
    assert name.endswith("twins") or near <= CASES * 0.05
