"""FAST's code equals the published algorithm, also on damaged token strings."""

import json

import numpy as np
import pytest
from conftest import TINY_CHUNKS
from scipy.fft import dct, idct
from tokenizers import Tokenizer

from mlx_tokprune.errors import InputError
from mlx_tokprune.processing.fast import FastCode

FOLDER = TINY_CHUNKS / "fast"
TOKENIZER, SETTINGS = FOLDER / "tokenizer.json", FOLDER / "processor_config.json"
SHAPE = (4, 3)


@pytest.fixture(scope="module")
def code() -> FastCode:
    return FastCode.read(TOKENIZER, SETTINGS)


@pytest.fixture(scope="module")
def published():
    """Return FAST's published functions chunk -> ids and ids -> chunk."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    settings = json.loads(SETTINGS.read_text())
    scale, least = settings["scale"], settings["min_token"]

    def encode(chunk: np.ndarray) -> list[int]:
        found = np.around(dct(chunk, axis=0, norm="ortho") * scale)
        text = "".join(map(chr, np.maximum(found.flatten() - least, 0).astype(int)))
        return tokenizer.encode(text).ids

    def decode(ids: list[int], shape=SHAPE) -> np.ndarray:
        text = tokenizer.decode(ids, skip_special_tokens=False)
        found = np.array([ord(c) for c in text], float) + least
        size = shape[0] * shape[1]
        found = np.pad(found[:size], (0, max(0, size - len(found))))
        return idct(found.reshape(shape) / scale, axis=0, norm="ortho")

    return encode, decode


def draw(count: int) -> np.ndarray:
    """Return (count, horizon, size) chunks like those that trained the code."""
    random = np.random.default_rng(5)
    steps = random.normal(0, 0.3, (count, *SHAPE)).cumsum(axis=1)
    return np.clip(steps, -1.2, 1.2)


def test_1000_chunks_come_back_as_published(code, published):
    encode, decode = published
    for chunk in draw(1000):
        ids = encode(chunk)
        assert code.encode(chunk) == ids
        found, wrong = code.decode(ids, *SHAPE)
        assert wrong is None
        np.testing.assert_allclose(found, decode(ids), atol=1e-12)
        # Rounding moves a coefficient by half of 1 / scale at most.
        assert np.abs(found - chunk).max() < 0.05 * np.sqrt(SHAPE[0]) + 1e-9


@pytest.mark.parametrize("seed", range(50))
def test_damaged_answers_are_padded_or_cut_as_published(code, published, seed):
    """Random ids give the published chunk, and an error unless they are valid."""
    random = np.random.default_rng(seed)
    ids = random.integers(
        0, code.tokenizer.get_vocab_size() + 40, random.integers(0, 20)
    ).tolist()
    found, wrong = code.decode(ids, *SHAPE)
    np.testing.assert_allclose(found, published[1](ids), atol=1e-12)
    count = len(code.coefficients(ids))
    unknown = sum(number >= code.tokenizer.get_vocab_size() for number in ids)
    assert (wrong is None) == (count == 12 and not unknown)
    strict, _ = code.decode(ids, *SHAPE, relaxed=False)
    np.testing.assert_array_equal(strict, found if count == 12 else np.zeros(SHAPE))


def test_what_is_wrong_is_said(code, published):
    ids = published[0](draw(1)[0])
    short, wrong = code.decode(ids[:1], *SHAPE)
    assert "instead of 12" in wrong
    assert np.abs(short).max() > 0
    assert "none of FAST's" in code.decode([*ids, 9999], *SHAPE)[1]
    nothing, wrong = code.decode([*ids, -1], *SHAPE)
    assert not nothing.any()
    assert "outside FAST's" in wrong


def test_an_empty_answer_is_a_chunk_of_zeros(code):
    found, wrong = code.decode([], *SHAPE)
    assert not found.any()
    assert wrong == "an answer with 0 coefficients instead of 12"


@pytest.mark.parametrize(
    ("tokenizer", "settings", "message"),
    [
        ({"model": {"type": "Unigram"}}, {}, "expected FAST's, BPE"),
        (
            {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
            {},
            "no vocabulary",
        ),
        (
            {"model": {"type": "BPE", "vocab": {"a": "1"}, "merges": []}},
            {},
            "no vocabulary",
        ),
        ({"added_tokens": [3]}, {}, "no vocabulary"),
        ({}, {"scale": 0}, "scale 0 and min_token 0"),
        ({}, {"scale": "10"}, "scale '10'"),
        ({}, {"min_token": 1.5}, "min_token 1.5"),
    ],
)
def test_what_is_no_code_is_refused(tokenizer, settings, message):
    right = json.loads(TOKENIZER.read_text())
    with pytest.raises(InputError, match=message):
        FastCode.from_json(right | tokenizer, settings, "tokenizer.json")
