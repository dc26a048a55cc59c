"""Prompt-stage pruners equal plain NumPy written from their descriptions."""

from dataclasses import replace

import numpy as np
import pytest

import mlx.core as mx  # isort: skip

from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.errors import InputError
from mlx_tokprune.features import Features, Selection
from mlx_tokprune.pipeline import Scene, run
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import Pruner, register
from mlx_tokprune.pruners.text import prompt_scores


def drawn(batch: int = 3, tokens: int = 30, words: int = 6, seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return mx.array(rng.normal(size=shape).astype(np.float32))

    return Features(
        draw(batch, tokens, 16),
        (5, 6) if tokens == 30 else (10, 20),
        extras={
            "text": draw(batch, words, 16),
            "queries": 2 * draw(batch, 4, tokens, 8),
            "text_keys": 2 * draw(batch, 4, words, 8),
        },
    )


def of_sample(given: Features, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Return queries and keys of one sample."""
    return tuple(np.array(given.extras[n][i]) for n in ("queries", "text_keys"))


def plain_scores(queries, keys, temperature: float) -> np.ndarray:
    scores = np.zeros(queries.shape[1])
    for head in range(queries.shape[0]):
        for n in range(queries.shape[1]):
            products = [
                queries[head, n] @ key / np.sqrt(len(key)) for key in keys[head]
            ]
            total = sum(np.exp(np.float64(p) / temperature) for p in products)
            scores[n] += temperature * np.log(total) / queries.shape[0]
    return scores


def plain_coverage(scores, coverage, least: int, temperature=0.1) -> list[int]:
    shares = np.exp((scores - scores.max()) / temperature)
    shares /= shares.sum()
    kept, reached = [], 0.0
    for n in np.argsort(-scores, kind="stable"):
        if len(kept) >= least and reached >= coverage:
            break
        kept.append(int(n))
        reached += shares[n]
    return sorted(kept)


def plain_lightvla(tokens, text) -> list[int]:
    def norm(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    tokens, text = norm(tokens), norm(text)
    kept = set()
    for token in tokens:
        logits = text @ token / np.sqrt(len(token))
        weights = np.exp(logits - logits.max())
        query = norm((weights / weights.sum()) @ text)
        kept.add(int(np.argmax(tokens @ query)))
    return sorted(kept)


def kept(selection, sample: int) -> list[int]:
    indices = np.array(selection.indices)[sample]
    if selection.mask is None:
        return indices.tolist()
    return indices[np.array(selection.mask)[sample]].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_trimvla_scores(temperature):
    given = drawn()
    queries, keys = given.extras["queries"], given.extras["text_keys"]
    scores = np.array(prompt_scores(queries, keys, temperature))
    for i in range(3):
        plain = plain_scores(*of_sample(given, i), temperature)
        np.testing.assert_allclose(scores[i], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("coverage", "least"), [(0.15, 0.1), (0.5, 0.1), (0.9, 0.02)])
def test_trimvla_keeps_the_smallest_set_that_covers(coverage, least):
    given = drawn(batch=4)
    options = {"coverage": coverage, "min_keep_ratio": least}
    options["coverage_temperature"] = 1
    selection = Pruner("trimvla", options=options)(given)
    sizes = set()
    for i in range(4):
        scores = plain_scores(*of_sample(given, i), 1.0)
        expected = plain_coverage(scores, coverage, max(1, int(30 * least)), 1)
        assert kept(selection, i) == expected
        sizes.add(len(expected))
    assert len(sizes) > 1 or coverage < 0.5  # samples of a batch differ in count


def test_trimvla_s_defaults_are_the_reference_s():
    """Defaults are coverage 0.15, temperature 0.1, and at least a tenth of tokens."""
    given = drawn(batch=2, tokens=200)
    weak = {"queries": given.extras["queries"] / 200}
    flat = replace(given, extras=given.extras | weak)
    for features in (given, flat):
        selection = Pruner("trimvla")(features)
        for i in range(2):
            scores = plain_scores(*of_sample(features, i), 1.0)
            expected = plain_coverage(scores, 0.15, 20)
            assert kept(selection, i) == expected
    assert len(kept(selection, 0)) > 20  # of nearly equal scores, more are needed


def test_trimvla_with_a_budget_keeps_that_many():
    given = drawn()
    selection = Pruner("trimvla", keep_tokens=7)(given)
    for i in range(3):
        scores = plain_scores(*of_sample(given, i), 1.0)
        assert kept(selection, i) == sorted(np.argsort(-scores)[:7].tolist())


def test_lightvla_keeps_the_union_of_votes():
    given = drawn(batch=4, tokens=30)
    selection = Pruner("lightvla")(given)
    for i in range(4):
        plain = plain_lightvla(
            np.array(given.tokens[i]), np.array(given.extras["text"][i])
        )
        assert kept(selection, i) == plain


@pytest.mark.parametrize("method", ["trimvla", "lightvla"])
def test_one_sample_of_a_batch_alone_keeps_the_same(method):
    given = drawn(batch=3)
    together = Pruner(method)(given)
    for i in range(3):
        extras = {name: array[i : i + 1] for name, array in given.extras.items()}
        alone = Pruner(method)(Features(given.tokens[i : i + 1], (5, 6), extras=extras))
        assert alone.mask is None
        assert kept(alone, 0) == kept(together, i)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lightvla", "keep_ratio": 0.5}, "decides itself"),
        ({"method": "trimvla", "options": {"coverag": 1}}, "Did you mean 'coverage'"),
        ({"method": "norm", "keep_ratio": 0.5, "options": {"coverage": 1}}, "takes no"),
        (
            {"method": "trimvla", "keep_ratio": 0.5, "options": {"coverage": 0.2}},
            "a budget or coverage, not both",
        ),
        ({"method": "trimvla", "options": {"temperature": 0}}, "expected > 0"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Pruner(**arguments)


@pytest.mark.parametrize("coverage", [0, 1.5])
def test_coverage_out_of_range_is_refused(coverage):
    with pytest.raises(InputError, match=r"outside \(0, 1\]"):
        Pruner("trimvla", options={"coverage": coverage})(drawn())


def test_the_prompt_s_text_is_that_after_the_last_picture(demo):
    model, processor = demo
    lengths = []

    @register("words", needs=("text",), at="prompt")
    def words(features: Features, *, keep: int) -> Selection:
        """Keep the first tokens."""
        lengths.append(features.extras["text"].shape[1])
        shape = (len(features.tokens), keep)
        return Selection(mx.broadcast_to(mx.arange(keep), shape))

    image = load_image(PICTURES[0].path)
    prompt = processor.prompt("<image>What is in the <image>centre?", 2)
    scene = Scene(mx.array(processor.pixels([image] * 2)), prompt)
    run(model, scene, (Pruner("words", keep_tokens=3),))
    _, between, after = map(len, prompt.segments)
    assert between != after
    assert set(lengths) == {after}
