"""`attach` in mlx-lm's own picture model, on embeddings: its layers need Metal."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm.processors")

from mlx.utils import tree_map
from mlx_lm.models.muse_spark import Model, ModelArgs
from mlx_lm.processors import load_processor
from vlm.muse import SPARK

from mlx_tokprune import InputError, Pruner
from mlx_tokprune.attach import attach
from mlx_tokprune.features import Features

HALF = Pruner("divprune", 0.5)  # norms are equal behind its norm
PATCH = SPARK.image_token_id


@pytest.fixture(scope="module")
def loaded():
    """Return (model, processor, two pictures) of a tiny Muse Spark."""
    text = SPARK.config["text_config"] | {"vocab_size": 64}
    config = SPARK.config | {"text_config": text}
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    model.update(
        tree_map(lambda x: x + 0.1 * mx.random.normal(x.shape), model.parameters())
    )
    draw = np.random.default_rng(0).integers
    sizes = [(40, 48, 3), (40, 24, 3)]
    pictures = [draw(0, 256, size, np.uint8) for size in sizes]
    return model, load_processor(model, config), pictures


def ids_of(text: str) -> mx.array:
    """Return ids of words, and of placeholders."""
    words = text.replace("<|patch|>", " <|patch|> ").split()
    return mx.array([PATCH if w == "<|patch|>" else 20 + len(w) for w in words])


def embedded(loaded) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and embeddings of a prompt with both pictures."""
    model, processor, pictures = loaded
    prompt = "see <|patch|> or <|patch|> which is red"
    text, pixels = processor(prompt, images=pictures)
    ids = ids_of(text)
    return np.array(ids), np.array(model.embed_inputs(ids, pixel_values=pixels))


def test_rows_are_those_of_the_full_prompt(loaded):
    model, processor, _ = loaded
    kinds = type(model), type(processor)
    ids, full = embedded(loaded)
    visual = np.flatnonzero(ids == PATCH)
    handle = attach(model, processor, HALF)
    try:
        short, rows = embedded(loaded)
        kept = handle.last
    finally:
        handle.detach()
    assert [(k.total, k.keep) for k in kept] == [(30, 15), (15, 7)]
    starts = (0, 30)
    for one, start in zip(kept, starts, strict=True):
        own = mx.array(full[visual[start : start + one.total]])[None]
        wanted = dataclasses.replace(HALF, at="prompt")(Features(own, None))
        assert one.indices.tolist() == np.array(wanted.indices[0]).tolist()
    chosen = [visual[s + k.indices] for s, k in zip(starts, kept, strict=True)]
    left = np.union1d(np.flatnonzero(ids != PATCH), np.concatenate(chosen))
    assert np.allclose(rows, full[left], atol=1e-5)
    assert short.tolist() == ids[left].tolist()
    assert (type(model), type(processor)) == kinds
    assert np.array_equal(embedded(loaded)[1], full)


def test_a_budget_of_all_and_merging(loaded):
    model, processor, _ = loaded
    ids, full = embedded(loaded)
    handle = attach(model, processor, Pruner("norm", keep_tokens=100))
    assert np.array_equal(embedded(loaded)[1], full)
    handle.detach()
    handle = attach(model, processor, Pruner("similarity", 0.5))
    short, rows = embedded(loaded)
    handle.detach()
    assert len(rows) == len(short) < len(ids)


def test_what_cannot_be_attached_is_refused(loaded):
    model, processor, _ = loaded
    for pruner, positions, match in [
        (HALF, "original", "contiguous positions"),
        (Pruner("attention", 0.5), None, "needs attention"),
        (Pruner("lightvla"), None, "decides itself how many"),
    ]:
        with pytest.raises(InputError, match=match):
            attach(model, processor, pruner, positions)
    text, pixels = processor("see <|patch|>", images=loaded[2][:1])
    handle = attach(model, processor, HALF)
    with pytest.raises(InputError, match="detach the other one"):
        attach(model, processor, HALF)
    with pytest.raises(InputError, match="30 placeholders for 15 visual tokens"):
        model.embed_inputs(ids_of(text), pixel_values=pixels)
    handle.detach()
