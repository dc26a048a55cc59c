"""Methods in plain NumPy, written from their descriptions."""

import itertools

import numpy as np

NEAR = 1e-5


class Choice:
    """Choice of the highest scores; ties go in raster order.

    wanted: tokens that are taken first where their scores are within `NEAR` of the
        chosen ones, to show that a choice differs by rounding only.
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
    """Scale a vector to length 1; keep a zero vector."""
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
    """Yield, for each cell of the coarse grid, its middle token and all its tokens."""
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
    """Add to each kept token the 32 most similar by keys, times their attention."""
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
