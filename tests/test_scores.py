"""Correct answers, and intervals of shares and means."""

import numpy as np
import pytest

from mlx_tokprune.evaluate.judge_words import accuracy, normalize
from mlx_tokprune.measure.intervals import bootstrap, of_share, wilson


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Cat", "cat"),
        ("a  dog,\n and an owl!", "dog and owl"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("yes.", "yes"),
        ("don't", "dont"),
        ("dont", "dont"),
        ("red/blue", "red blue"),
        ("5-10", "5 10"),
        ("e-mail", "e mail"),
        ("3 - 2", "3 2"),
        ("well-known.", "well known"),
        ("...", "..."),
        (" \n", ""),
    ],
)
def test_what_does_not_count(answer, normal):
    assert normalize(answer) == normal


@pytest.mark.parametrize(
    ("text", "answer", "equal"),
    [
        *[("", "A", False), ("?", "A", False), ("The", "A", False), ("a.", "A", True)],
        *[("", "?", False), ("", "the", False), ("The a", "", False), ("", "", True)],
        *[(".5", "0.5", True), (".5", "5", False), ("$.50", "$0.50", True)],
        *[("-.5", "-0.5", True), ("-5", "5", False), ("(-5)", "-5", True)],
        *[("\u22125", "-5", True), ("-$5", "$5", False), ("-1,000", "-1000", True)],
        *[("e\u0301te\u0301", "\u00e9t\u00e9", True), ("A\u030a", "\u00e5", True)],
        *[("10\u00b2", "102", False), ("ete", "\u00e9t\u00e9", False)],
        *[("是。", "是", True), ("हाँ।", "हाँ", True), ("نعم۔", "نعم", True)],  # noqa: RUF001
        *[("「猫」", "猫", True), ("５", "5", True), ("왜？", "왜", True)],  # noqa: RUF001
        *[("¿rojo?", "rojo", True), ("“red”…", "red", True)],
    ],
)
def test_what_counts(text, answer, equal):
    assert accuracy(text, [answer]) == equal


def test_accuracy_of_ten_people():
    """The VQA accuracy is the mean over all ways to leave one annotator out."""
    for agreeing, right in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        answers = ["cat"] * agreeing + ["dog"] * (10 - agreeing)
        assert accuracy("the cat", answers) == pytest.approx(right)


def test_accuracy_of_few_people():
    assert accuracy("Two", ["2"]) == 1
    assert accuracy("cat", ["dog", "cat"]) == 1
    assert accuracy("cow", ["dog", "cat"]) == 0


def test_intervals_of_shares():
    """Independent yes/no values get Wilson's interval, others a bootstrap."""
    values = [1.0] * 9 + [0.0]
    assert wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert of_share(values, range(10)) == wilson(9, 10)
    together = [number // 2 for number in range(10)]
    for some, groups in (([0.3, *values[1:]], range(10)), (values, together)):
        assert of_share(some, groups) == bootstrap(some, groups)
        assert of_share(some, groups) != wilson(sum(some), 10)
    # Four questions about each of two pictures are no eight pictures.
    twice = [1.0] * 4 + [0.0] * 4
    low, high = of_share(twice, [0] * 4 + [1] * 4)
    assert (low, high) == (0, 1)
    # Nothing to draw differently: Wilson's, of as many as there are pictures.
    assert of_share([1.0] * 8, [0] * 4 + [1] * 4) == wilson(2, 2)
    assert of_share([0.6] * 4, range(4)) == wilson(2.4, 4)


def test_intervals_of_means():
    assert bootstrap([2.0], ["a"]) == (2.0, 2.0)
    values = np.arange(200) % 4 * 1.0
    low, high = bootstrap(values, range(200))
    half = 1.96 * np.std(values) / 200**0.5
    assert (low, high) == pytest.approx((1.5 - half, 1.5 + half), abs=0.03)
    grouped = bootstrap(values, np.arange(200) % 4)
    assert grouped[1] - grouped[0] > 3 * (high - low)


def test_a_bootstrap_s_interval_leaves_50_of_2000_means_on_each_side():
    values, random = np.arange(40) ** 0.5, np.random.default_rng(0)
    means = sorted(values[random.integers(40, size=40)].mean() for _ in range(2000))
    low, high = bootstrap(values, range(40))
    assert means[49] < low < means[50]
    assert means[1949] < high < means[1950]


def test_a_bootstrap_draws_whole_groups():
    """Nine values of one picture weigh nine times as much as the other's one."""
    assert bootstrap([1.0] * 9 + [0.0], [0] * 9 + [1]) == (0, 1)
    random = np.random.default_rng(0)
    draws = [random.integers(3, size=3) for _ in range(2000)]
    sums, counts = np.array([9.0, 0, 1]), np.array([9, 1, 2])
    means = [sums[draw].sum() / counts[draw].sum() for draw in draws]
    found = bootstrap([1.0] * 9 + [0.0, 0.0, 1.0], [*"aaaaaaaaa", *"bcc"])
    assert found == pytest.approx(np.percentile(means, (2.5, 97.5)))
