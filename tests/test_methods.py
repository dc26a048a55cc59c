"""Each method against plain NumPy written from its description, on 200 random cases.

Vectors whose cosines decide are integers of a length that is a power of two, and
attention is a multiple of 1/1024: such scores are exact in float32 in whatever order
they are summed, so equal ones are equal everywhere.
"""

import functools
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

import mlx.core as mx  # isort: skip

from mlx_tokprune.features import Features
from mlx_tokprune.pruners import Pruner, get_method, list_pruners

CASES = 200
NEAR = 1e-5

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


# What the references are made of.


class Choice:
    """The highest scores, equal ones in raster order.

    wanted: tokens that are taken first where their scores are near enough to what
        would have been chosen, to show that a choice differs by rounding only.
    """

    def __init__(self, wanted=()):
        self.wanted = set(wanted)

    def best(self, scores) -> int:
        return self.near_best(scores)[0]

    def near_best(self, scores) -> list[int]:
        best = int(np.argmax(scores))
        near = [i for i in self.wanted if scores[i] >= scores[best] - NEAR]
        return sorted(near) or [best]

    def highest(self, scores, count: int) -> list[int]:
        if not count:
            return []
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        last = scores[order[count - 1]]

        def rank(i: int):
            near = i in self.wanted and abs(scores[i] - last) <= NEAR
            return (-(last + NEAR) if near else -scores[i], i)

        return sorted(order, key=rank)[:count]


def unit(vector: np.ndarray) -> np.ndarray:
    """Of length 1; a zero vector stays."""
    length = np.sqrt(np.sum(vector * vector))
    return vector / length if length else vector


def cosines(vectors) -> np.ndarray:
    units = np.stack([unit(v) for v in vectors])
    return np.stack([(units * u).sum(axis=1) for u in units])


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def root_mean_square_one(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt(np.mean(vector * vector) + np.float32(1e-6))


# The references: of one sample, the kept tokens and what is merged into each.


def norm(given, keep, choice):
    return choice.highest([np.sum(t * t) for t in given.tokens], keep), None


def attention(given, keep, choice):
    return choice.highest(given.attention, keep), None


def mean_similarity(given, keep, choice):
    mean = unit(given.tokens.mean(axis=0))
    return choice.highest([np.sum(unit(t) * mean) for t in given.tokens], keep), None


def similarity(given, keep, choice, threshold=None):
    tokens, cosine = given.tokens, cosines(given.tokens)
    size = [np.sum(t * t) for t in tokens]
    redundancy = []
    for i in range(len(tokens)):
        larger = [
            j
            for j in range(len(tokens))
            if size[j] > size[i] or (size[j] == size[i] and j < i)
        ]
        redundancy.append(max((cosine[i, j] for j in larger), default=-2))
    if threshold is None:
        kept = sorted(choice.highest([-r for r in redundancy], keep))
    else:
        kept = [i for i, r in enumerate(redundancy) if r < threshold]
    groups = {i: [i] for i in kept}
    for j in range(len(tokens)):
        if j not in kept:
            groups[kept[choice.best([cosine[j, i] for i in kept])]].append(j)
    return kept, {i: tokens[group].mean(axis=0) for i, group in groups.items()}


def cells(given, keep):
    """Lists of tokens, each with the one in the middle."""
    (height, width), best = given.grid, ((1, 0), 1, 1)
    for h, w in itertools.product(range(1, height + 1), range(1, width + 1)):
        out_of_square = (height * w) / (width * h)
        square = min(out_of_square, 1 / out_of_square)
        if h * w <= keep and square >= 0.5 and (h * w, square) > best[0]:
            best = (h * w, square), h, w
    _, h, w = best
    for i, j in itertools.product(range(h), range(w)):
        rows = [r for r in range(height) if r * h // height == i]
        columns = [c for c in range(width) if c * w // width == j]
        middle = rows[len(rows) // 2] * width + columns[len(columns) // 2]
        yield middle, [r * width + c for r in rows for c in columns]


def spatial(given, keep, choice):
    merged = {i: given.tokens[group].mean(axis=0) for i, group in cells(given, keep)}
    return list(merged), merged


def uniform(given, keep, choice):
    return [middle for middle, _ in cells(given, keep)], None


def divprune(given, keep, choice):
    return far_apart(given.tokens, keep, choice), None


def far_apart(tokens, keep, choice):
    distance = 1 - cosines(tokens)
    alone = [
        min(np.delete(row, i)) if len(row) > 1 else 0 for i, row in enumerate(distance)
    ]
    kept = [choice.best(alone)]
    nearest = distance[kept[0]].copy()
    while len(kept) < keep:
        nearest[kept] = -9
        kept.append(choice.best(nearest))
        nearest = np.minimum(nearest, distance[kept[-1]])
    return kept


def cdpruner(given, keep, choice, sign=1):
    text = [unit(t) for t in given.text]
    about = [np.mean([np.sum(unit(t) * w) for w in text]) for t in given.tokens]
    about = sign * np.array(about, np.float32)
    about -= about.min()
    about = about / (about.max() or 1) + np.float32(1e-6)
    kernel = about[:, None] * cosines(given.tokens) * about
    residual, kept, factors = kernel.diagonal().copy(), [], []
    while len(kept) < keep:
        left = np.ones(len(residual), bool)
        left[kept] = False
        independent = residual[left].max() > 1e-6
        pick = choice.best(np.where(left, residual if independent else about, -9))
        kept.append(pick)
        if independent:
            factor = kernel[pick].copy()
            for other in factors:
                factor -= other[pick] * other
            factor /= np.sqrt(residual[pick])
            factors.append(factor)
            residual -= factor * factor
    return kept, None


def dart(given, keep, choice, pivots=4):
    count = min(pivots, keep)
    kept = choice.highest([np.sum(np.abs(t)) for t in given.tokens], count)
    cosine = cosines(given.tokens)
    for number, pivot in enumerate(kept[:]):
        share = (keep - count) // count + (number < (keep - count) % count)
        left = [-9 if i in kept else -c for i, c in enumerate(cosine[pivot])]
        kept += choice.highest(left, share)
    return kept, None


def visionzip(given, keep, choice):
    tokens, contextual = given.tokens, keep * 10 // 64
    kept = choice.highest(given.attention, keep - contextual)
    merged = {i: tokens[i] for i in kept}
    left = [i for i in range(len(tokens)) if i not in merged]
    if not contextual:
        return kept, None
    targets = left[:: len(left) // contextual][:contextual]
    units = [unit(k) for k in given.keys]
    joined = {i: [] for i in targets}
    for j in left:
        if j not in joined:
            alike = [np.sum(units[j] * units[i]) for i in targets]
            joined[targets[choice.best(alike)]].append(j)
    for i, group in joined.items():
        merged[i] = tokens[i] + (tokens[group].mean(axis=0) if group else 0)
    return list(merged), merged


def outliers(attention) -> list[int]:
    first, third = np.percentile(attention, [25, 75])
    above = [i for i, a in enumerate(attention) if a > third + 1.5 * (third - first)]
    return above or [int(np.argmax(attention))]


def absorb(given, kept, choice):
    """Each kept token and the 32 with the most similar keys, times their attention."""
    units, merged = np.stack([unit(k) for k in given.keys]), {}
    for i in kept:
        alike = (units * units[i]).sum(axis=1)
        others = [j for j in range(len(units)) if j != i]
        near = choice.highest([alike[j] for j in others], min(32, len(others)))
        merged[i] = given.tokens[i].copy()
        for j in (others[n] for n in near):
            merged[i] += given.attention[j] * given.tokens[j]
    return merged


def prumerge(given, keep, choice, rest=0):
    if keep is None:
        kept = outliers(given.attention)
    else:
        rest = rest if keep > 1 else 0
        kept = choice.highest(given.attention, keep - rest)
    merged = absorb(given, kept, choice)
    if rest:
        dropped = [i for i in range(len(given.tokens)) if i not in kept]
        place = max(dropped, key=lambda i: (given.attention[i], -i))
        merged[place] = sum(given.attention[i] * given.tokens[i] for i in dropped)
    return list(merged), merged


def prumerge_plus(given, keep, choice):
    if keep is None:
        kept = outliers(given.attention)
        keep = min(3 * len(kept), len(given.tokens))
    else:
        kept = choice.highest(given.attention, max(1, keep // 3))
    left = [i for i in range(len(given.tokens)) if i not in kept]
    more = keep - len(kept)
    kept += [left[(2 * i + 1) * len(left) // (2 * more)] for i in range(more)]
    return kept, absorb(given, kept, choice)


def hiprune(given, keep, choice, alpha=0.1):
    (height, width), last = given.grid, given.attention
    middle = getattr(given, "attention_middle", last)
    kept = set()
    for anchor in choice.highest(middle, round(alpha * keep / 5)):
        row, column = divmod(anchor, width)
        for r, c in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)):
            if 0 <= row + r < height and 0 <= column + c < width:
                kept.add((row + r) * width + column + c)
    if len(kept) > keep:
        among = [a if i in kept else -9 for i, a in enumerate(last)]
        return choice.highest(among, keep), None
    left = [-9 if i in kept else a for i, a in enumerate(last)]
    return [*kept, *choice.highest(left, keep - len(kept))], None


def sparsevlm(given, keep, choice):
    like = np.mean([softmax(given.text @ t) for t in given.tokens], axis=0)
    raters = [i for i, value in enumerate(like) if value >= like.mean()]
    return choice.highest(given.text_attention[raters].mean(axis=0), keep), None


def trimvla(
    given,
    keep,
    choice,
    aggregation="logsumexp",
    coverage=0.15,
    min_keep_ratio=0.1,
    coverage_temperature=0.1,
    temperature=1.0,
):
    scores = prompt_scores(given, aggregation, temperature)
    if keep is None:
        shares = softmax(np.array(scores) / np.float32(coverage_temperature))
        order = choice.highest(scores, len(scores))
        keep, reached = 0, 0
        while keep < len(scores) and reached < coverage:
            reached += shares[order[keep]]
            keep += 1
        keep = max(keep, 1, int(len(scores) * min_keep_ratio))
    return choice.highest(scores, keep), None


def prompt_scores(given, aggregation="logsumexp", temperature=1.0):
    def joined(products):
        if aggregation == "logsumexp":
            powers = np.exp(products / np.float32(temperature))
            return np.float32(temperature) * np.log(powers.sum())
        return products.max() if aggregation == "max" else products.mean()

    scores = []
    for token in given.queries.swapaxes(0, 1):
        each = [
            joined(keys @ query / np.float32(np.sqrt(len(query))))
            for query, keys in zip(token, given.text_keys, strict=True)
        ]
        scores.append(np.mean(each))
    return scores


def vlapruner(given, keep, choice):
    among = set(choice.highest(prompt_scores(given), keep))
    if hasattr(given, "scores_previous"):
        among |= set(choice.highest(given.scores_previous, keep))
    among = sorted(among)
    inner = Choice(among.index(i) for i in choice.wanted if i in among)
    return [among[i] for i in far_apart(given.tokens[among], keep, inner)], None


def lightvla(given, keep, choice):
    tokens, text = (
        np.stack([root_mean_square_one(v) for v in vectors])
        for vectors in (given.tokens, given.text)
    )
    votes = set()
    for token in tokens:
        weights = softmax(text @ token / np.float32(np.sqrt(len(token))))
        asked = root_mean_square_one(weights @ text)
        votes.update(choice.near_best((tokens * asked).sum(axis=1)))
    return list(votes), None


# Cases.


@functools.cache
def four_squares() -> dict[int, tuple[int, ...]]:
    """n -> four numbers whose squares sum to it, up to 256."""
    found = {}
    for four in itertools.combinations_with_replacement(range(17), 4):
        found.setdefault(sum(i * i for i in four), four)
    return found


def whole(rng, count: int, channels: int) -> np.ndarray:
    """(count, C) integers, of length 16, 32 or 64."""
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
    """Some drawn more than once, now and then zeros."""
    vectors = draw(rng, count, channels)
    if rng.random() < 0.7:
        few = max(1, int(count * rng.choice([0.3, 0.8])))
        vectors = vectors[rng.integers(few, size=count)]
    if rng.random() < 0.2:
        vectors[rng.integers(count)] = 0
    return vectors


def scaled(draw, rng, count: int, channels: int) -> np.ndarray:
    """The same, in other lengths."""
    lengths = 2 ** rng.integers(2, size=(count, 1)).astype(np.float32)
    return lengths * twins(draw, rng, count, channels)


def received(rng, *shape: int) -> np.ndarray:
    """Multiples of 1/1024, few far above the others, few different or many."""
    levels = np.exp(rng.normal(size=shape)) * rng.choice([1, 4, 64])
    return np.floor(levels).astype(np.float32) / 1024


def drawn(rng, needs, tokens, total: int, channels: int, words: int) -> dict:
    """One sample: tokens, and what a method needs."""

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
    "norm": (norm, SCALED, BUDGET, True),
    "attention": (attention, SCALED, BUDGET, True),
    "mean_similarity": (mean_similarity, functools.partial(scaled, real), BUDGET, True),
    "similarity": (similarity, SCALED, BUDGET, True),
    "similarity threshold": (
        similarity,
        SCALED,
        [{"threshold": t} for t in (0.25, 0.5, 0.8, 1)],
        False,
    ),
    "spatial": (spatial, SCALED, BUDGET, True),
    "uniform": (uniform, SCALED, BUDGET, True),
    "divprune": (divprune, SCALED, BUDGET, True),
    "divprune real": (divprune, real, BUDGET, True),
    "cdpruner": (cdpruner, SCALED, [{}, {"sign": -1}], True),
    "dart": (dart, SCALED, [{}, {"pivots": 1}, {"pivots": 7}], True),
    "dart real": (dart, real, BUDGET, True),
    "visionzip": (visionzip, SCALED, BUDGET, True),
    "prumerge": (prumerge, SCALED, [{}, {"rest": 1}], True),
    "prumerge own": (prumerge, SCALED, [{}, {"rest": 1}], False),
    "prumerge_plus": (prumerge_plus, SCALED, BUDGET, True),
    "prumerge_plus own": (prumerge_plus, SCALED, BUDGET, False),
    "hiprune": (hiprune, SCALED, [{}, *({"alpha": a} for a in (0, 0.4, 1))], True),
    "hiprune one": (hiprune, SCALED, [{}, *({"alpha": a} for a in (0.7, 1))], True),
    "fastv": (attention, SCALED, BUDGET, True),
    "pyramiddrop": (attention, SCALED, BUDGET, True),
    "sparsevlm": (sparsevlm, lambda *a: SCALED(*a) / 32, BUDGET, True),
    "trimvla": (
        trimvla,
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
        trimvla,
        SCALED,
        [
            {},
            {"aggregation": "max", "coverage": 0.62, "coverage_temperature": 1},
            {"aggregation": "mean", "coverage": 0.37, "min_keep_ratio": 0.3},
            {"coverage_temperature": 1, "coverage": 0.91},
        ],
        False,
    ),
    "vlapruner": (vlapruner, SCALED, BUDGET, True),
    "vlapruner one": (vlapruner, SCALED, BUDGET, True),
    "lightvla": (lightvla, functools.partial(twins, real), BUDGET, False),
}


def arrays(selection, tokens) -> list[tuple[list[int], np.ndarray]]:
    """Of each sample, what it keeps."""
    indices, values = np.array(selection.indices), np.array(selection.apply(tokens))
    real = np.ones(indices.shape, bool)
    if selection.mask is not None:
        real = np.array(selection.mask)
    return [
        (i[r].tolist(), v[r]) for i, v, r in zip(indices, values, real, strict=True)
    ]


def agrees(found, given, plain) -> bool:
    """Whether the same tokens are kept; then what is merged has to be the same."""
    (indices, values), (kept, merged) = found, plain
    if indices != sorted(kept):
        return False
    expected = np.stack(
        [(given.tokens if merged is None else merged)[i] for i in indices]
    )
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(values, expected, rtol=0, atol=NEAR * scale)
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
            if agrees(found, given, reference(given, keep, Choice(), **options)):
                continue
            exact = False
            plain = reference(given, keep, Choice(found[0]), **options)
            assert agrees(found, given, plain), (seed, found[0], sorted(plain[0]))
        near += not exact
    print(f"{name}: {CASES - near} of {CASES} exact")
    assert near <= CASES * 0.05
