"""The tower, its CPU forms, folding, and rotary positions."""

import dataclasses
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_tokprune.models import layers
from mlx_tokprune.models.fastvithd import (
    FastViTHD,
    VisionConfig,
    drop_layer_scales,
    fold,
)
from mlx_tokprune.models.language import PositionedRoPE, TokenPositions, TokenSequence
from mlx_tokprune.models.layers import plain_operations

SMALL = VisionConfig(
    layers=(1, 1, 1, 1, 2),
    embed_dims=(16, 32, 32, 64, 64),
    mlp_ratios=(2, 2, 2, 2, 2),
    image_size=128,
)


def difference(a, b) -> float:
    return float(mx.max(mx.abs(a - b)) / mx.max(mx.abs(b)))


def test_gelu_forms_agree():
    x = mx.concatenate([mx.linspace(-9, 9, 100_001), mx.array([-1e4, 0.0, 1e4])])
    x = x[None, :, None]
    with plain_operations():
        exact = layers.gelu(x)
    error = mx.abs(layers.gelu(x) - exact) / mx.maximum(mx.abs(x), 1)
    assert float(mx.max(error)) < 1e-6


@pytest.mark.parametrize(
    ("size", "stride", "multiplier"), [(3, 1, 1), (7, 1, 1), (7, 2, 2), (3, 2, 1)]
)
@pytest.mark.parametrize("shape", [(2, 9, 12, 16), (1, 64, 64, 32)])
def test_depthwise_forms_agree(size, stride, multiplier, shape):
    x = mx.random.normal(shape, key=mx.random.key(0))
    weights = (shape[-1] * multiplier, size, size, 1)
    weight = mx.random.normal(weights, key=mx.random.key(1))
    with plain_operations():
        plain = layers.depthwise_convolution(x, weight, stride)
    ours = layers.depthwise_convolution(x, weight, stride)
    assert ours.shape == plain.shape
    assert difference(ours, plain) < 1e-5


def test_cpu_forms_run_in_any_thread():
    results = []

    def work():
        results.append(layers.gelu(mx.ones((1, 4096, 32))).sum().item())

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(results) == 2
    assert results[0] == results[1]


def test_attention_forms_agree():
    q, k, v = mx.random.normal((3, 2, 4, 96, 32), key=mx.random.key(2))
    with plain_operations():
        plain = layers.attend(q, k, v, 0.5)
        weights = layers.attention_weights(q, k, 0.5)
    assert difference(layers.attend(q, k, v, 0.5), plain) < 1e-5
    assert difference(layers.attention_weights(q, k, 0.5), weights) < 1e-5


def trained_like(inference: bool) -> FastViTHD:
    """Return a small tower with random batch norms and layer scales."""
    mx.random.seed(0)
    tower = FastViTHD(SMALL, inference)
    for name, module in tower.named_modules():
        if name.endswith(".bn"):
            module.running_mean = 0.3 * mx.random.normal(module.running_mean.shape)
            module.running_var = mx.random.uniform(0.5, 2, module.running_var.shape)
            module.weight = mx.random.uniform(0.5, 2, module.weight.shape)
            module.bias = 0.3 * mx.random.normal(module.bias.shape)
        for part in [key for key in module if key.startswith("layer_scale")]:
            module[part] = mx.random.uniform(0.5, 2, module[part].shape)
    return tower.eval()


def test_folded_tower_equals_the_unfolded_one():
    plain, folded = trained_like(inference=False), FastViTHD(SMALL)
    weights = dict(tree_flatten(plain.parameters()))
    once = fold(weights)
    twice = fold(once)
    assert all(mx.array_equal(once[k], twice[k]) for k in once)
    drop_layer_scales(folded)
    folded.load_weights(list(once.items()))
    pixels = mx.random.uniform(shape=(2, 128, 128, 3))
    assert difference(folded(pixels).tokens, plain(pixels).tokens) < 1e-5


def test_half_precision_keeps_its_layer_scales():
    """Layer scales are folded in float32, and kept in half precision."""
    weights = dict(tree_flatten(trained_like(inference=False).parameters()))
    half = {name: array.astype(mx.float16) for name, array in weights.items()}
    scales = {k for k in half if ".layer_scale" in k}
    assert scales
    assert scales == {k for k in fold(half) if ".layer_scale" in k}
    assert not any(".layer_scale" in name for name in fold(weights))


def test_tower_shapes_and_plain_form():
    tower = FastViTHD(SMALL)
    pixels = mx.random.uniform(shape=(2, 128, 192, 3))
    features = tower(pixels, ("attention",))
    assert features.tokens.shape == (2, 6, SMALL.output_dim)
    assert features.grid == (2, 3)
    np.testing.assert_allclose(
        np.array(mx.sum(features.extras["attention"], 1)), 1, rtol=1e-5
    )
    with plain_operations():
        assert difference(features.tokens, tower(pixels).tokens) < 1e-4


def test_only_the_last_block_computes_weights_and_only_when_asked(monkeypatch):
    tower = FastViTHD(SMALL)
    asked = []

    def spy(block):
        original = block.attend
        return lambda x, needs=(): asked.append(needs) or original(x, needs)

    for stage in (tower.network[7], tower.network[10]):
        for block in stage:
            block.attend = spy(block)
    pixels = mx.zeros((1, 128, 128, 3))
    assert not tower(pixels).extras
    assert asked == [(), (), ()]
    asked.clear()
    assert set(tower(pixels, ("attention",)).extras) == {"attention"}
    assert asked == [(), (), ("attention",)]


def received_and_keys(block, x):
    """Return attention received (B, H, W) and keys of a block in NumPy."""
    mixer, (batch, height, width, channels) = block.token_mixer, x.shape
    values = np.array(block.norm(x), np.float64).reshape(batch, -1, channels)
    qkv = values @ np.array(mixer.qkv.weight, np.float64).T
    queries, keys = qkv[..., :channels], qkv[..., channels : 2 * channels]
    received, heads = 0, channels // mixer.head_dim
    for head in range(heads):
        part = slice(head * mixer.head_dim, (head + 1) * mixer.head_dim)
        scores = queries[..., part] @ keys[..., part].swapaxes(1, 2)
        scores = (scores - scores.max(-1, keepdims=True)) / np.sqrt(mixer.head_dim)
        scores = np.exp(scores)
        received += (scores / scores.sum(-1, keepdims=True)).mean(1) / heads
    return received.reshape(batch, height, width), keys


def sharp(config) -> FastViTHD:
    """Return a small tower with clearly uneven attention."""
    mx.random.seed(1)
    tower = FastViTHD(config)
    for _, module in tower.named_modules():
        if "bias" in module:
            module.bias = mx.zeros_like(module.bias)  # places would be alike
        if "qkv" in module:
            module.qkv.weight = 4 * module.qkv.weight
    return tower


MIXERS = ("repmixer",) * 3
CONVOLUTIONS_BEFORE = dataclasses.replace(
    SMALL,
    token_mixers=(*MIXERS, "repmixer", "attention"),
    pos_embs_shapes=(None, None, None, None, (7, 7)),
)
TWO_BEFORE = dataclasses.replace(SMALL, layers=(1, 1, 1, 2, 2))


@pytest.mark.parametrize("config", [SMALL, TWO_BEFORE, CONVOLUTIONS_BEFORE])
def test_extras_of_the_last_block_and_of_a_middle_one(config):
    """Extras equal NumPy; the middle attention sums four tokens of the stage before.

    Without attention in that stage, the middle is the last stage's first block.
    """
    tower = sharp(config)
    pixels = 1e5 * mx.random.normal((2, 128, 192, 3))
    x, found = tower.patch_embed(pixels), []
    for stage in tower.network:
        for block in stage if isinstance(stage, list) else [stage]:
            if hasattr(block, "attend"):
                found.append(received_and_keys(block, x))
            x = block(x)
    extras = tower(pixels, ("attention", "attention_middle", "keys")).extras
    assert extras.keys() == {"attention", "attention_middle", "keys"}
    (*_, before, (first, _), (last, keys)) = [(None, None), *found]
    middle = first
    if config is not CONVOLUTIONS_BEFORE:
        finer = before[0]
        assert finer.shape == (2, 4, 6)
        middle = np.array(
            [
                [
                    [
                        picture[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].sum()
                        for j in (0, 1, 2)
                    ]
                    for i in (0, 1)
                ]
                for picture in finer
            ]
        )
    for name, expected in (("attention", last), ("attention_middle", middle)):
        expected = expected.reshape(2, 6)
        np.testing.assert_allclose(np.array(extras[name]), expected, atol=1e-4)
        np.testing.assert_allclose(expected.sum(-1), 1)
        assert expected.max() > 1.05 * expected.min()
    assert extras["keys"].shape == (2, 6, 64)
    scale = np.abs(keys).max()
    np.testing.assert_allclose(np.array(extras["keys"]), keys, atol=1e-4 * scale)
    alone = [tower(pixels, (name,)).extras for name in extras]
    for name, one in zip(extras, alone, strict=True):
        assert list(one) == [name]
        assert difference(one[name], extras[name]) < 1e-4


@pytest.mark.parametrize("config", [SMALL, TWO_BEFORE, CONVOLUTIONS_BEFORE])
def test_what_goes_into_the_attention_blocks(config):
    """The blocks extra holds each token's cell of every attention input."""
    tower, pixels = sharp(config), 1e5 * mx.random.normal((2, 128, 192, 3))
    x, parts = tower.patch_embed(pixels), []
    for stage in tower.network:
        for block in stage if isinstance(stage, list) else [stage]:
            if hasattr(block, "attend"):
                parts.append(np.array(x))
            x = block(x)
    features = tower(pixels, ("blocks",))
    assert features.grid == (2, 3)
    found = np.array(features.extras["blocks"])
    for picture in range(2):
        for row in range(2):
            for column in range(3):
                expected = []
                for part in parts:
                    side = part.shape[1] // 2
                    for i in range(side * row, side * row + side):
                        for j in range(side * column, side * column + side):
                            expected.append(part[picture, i, j])
                expected = np.concatenate(expected)
                assert np.array_equal(found[picture, 3 * row + column], expected)
    sizes = np.cumsum([0, *config.block_sizes])
    assert sizes[-1] == found.shape[-1]
    for part, start, stop in zip(parts, sizes, sizes[1:], strict=False):
        alone = found[:, :, start:stop]
        assert np.isclose(np.abs(alone).sum(), np.abs(part).sum(), rtol=1e-4)


WHERE = [0, 1, 5, 6, 11]


def test_rope_at_given_positions_equals_rope_one_by_one():
    plain, rope = nn.RoPE(16), PositionedRoPE(nn.RoPE(16))
    x = mx.random.normal((2, 3, 5, 16), key=mx.random.key(0))
    assert mx.array_equal(rope(x, offset=4), plain(x, offset=4))
    together = rope(x, offset=TokenPositions(mx.array(WHERE)))
    rows = rope(x, offset=TokenPositions(mx.array([WHERE, WHERE[::-1]])))
    chunk = rope(x[:, :, 2:4], offset=TokenPositions(mx.array(WHERE[2:4])))
    assert difference(chunk, together[:, :, 2:4]) < 1e-6
    assert mx.array_equal(rows[0], together[0])
    for i, (position, other) in enumerate(zip(WHERE, WHERE[::-1], strict=True)):
        one = x[:, :, i : i + 1]
        assert difference(together[:, :, i : i + 1], plain(one, offset=position)) < 1e-6
        assert difference(rows[1:, :, i : i + 1], plain(one[1:], offset=other)) < 1e-6
    assert mx.array_equal(rope(x), plain(x))  # nothing is left behind


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("where", [WHERE, [WHERE, [2, 3, 4, 9, 11]]])
def test_a_sequence_is_read_in_chunks_at_its_positions(tiny, where, step):
    """Chunked reading equals one read; later tokens stand behind the end."""
    decoder, ids = tiny[0].decoder, mx.array([[5, 9, 70, 8, 3], [4, 4, 60, 7, 2]])
    after = mx.array([[11, 12, 13], [21, 22, 23]])
    sequence = TokenSequence(decoder.embed(ids), mx.array(where), 12)
    whole = decoder.read(sequence, rows=5).hidden
    read = decoder.read(sequence, decoder.make_cache(), rows=2, step=step)
    assert difference(read.hidden, whole[:, -2:]) < 1e-5
    for row, places in enumerate(np.broadcast_to(where, (2, 5))):
        alone = TokenSequence(sequence.embeddings[row : row + 1], mx.array(places), 12)
        assert difference(decoder.read(alone, rows=5).hidden, whole[row]) < 1e-5
    plain = TokenSequence(sequence.embeddings, None, 5)
    counted = TokenSequence(sequence.embeddings, mx.arange(5), 5)
    plain, counted = (decoder.read(s, rows=5).hidden for s in (plain, counted))
    assert difference(counted, plain) < 1e-5
    assert difference(whole, plain) > 1e-2
    longer = sequence.extended(decoder.embed(after))
    expected = decoder.read(longer, rows=3).hidden
    assert longer.end == 15
    assert difference(decoder.follow(after, read.cache), expected) < 1e-5


def test_chunks_see_each_other_without_a_cache(tiny):
    decoder = tiny[0].decoder
    sequence = TokenSequence(decoder.embed(mx.array([[5, 9, 70, 8, 3]])), None, 5)
    whole, chunked = decoder.read(sequence), decoder.read(sequence, step=2)
    assert difference(chunked.hidden, whole.hidden) < 1e-5
    assert chunked.cache == []
