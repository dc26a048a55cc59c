"""Vision transformers equal plain NumPy, written from timm's description of them."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_tokprune.models.vit import Block, ViT, ViTConfig, tower_config

SIZES = {"image_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 4, "num_heads": 3}
EXTRAS = ("attention_middle", "attention", "keys")
MIDDLE = 1  # of four blocks, of which three run
TOWERS = {
    "dinov2": {"class_token": True, "reg_tokens": 2, "layer_scale": True},
    "dinov2 without registers": {
        **{"class_token": True, "embeds_class": True, "layer_scale": True}
    },
    "siglip": {"mlp_ratio": 3.5},
    "siglip of 30 px": {"image_size": 30},
    "clip": {
        **{"class_token": True, "embeds_class": True, "pre_norm": True},
        **{"quick_gelu": True, "norm_eps": 1e-5},
    },
}


def random_tower(config: ViTConfig, film: int | None = None) -> ViT:
    tower = ViT(config, film)
    rng = np.random.default_rng(0)
    drawn = [
        (name, mx.array(0.3 * rng.normal(size=array.shape).astype(np.float32)))
        for name, array in tree_flatten(tower.parameters())
    ]
    # Sharp attention, so that who looks at whom matters.
    drawn = [(n, a * (3 if "qkv" in n else 1)) for n, a in drawn]
    # Small activations, so that the epsilon of the first norm shows.
    drawn = [(n, a * (0.05 if "embed" in n or "token" in n else 1)) for n, a in drawn]
    tower.update(tree_unflatten(drawn))
    return tower


class Plain:
    """Vision transformer in float64 NumPy with the weights of `tower`."""

    def __init__(self, tower: ViT):
        flat = tree_flatten(tower.parameters())
        self.w = {name: np.array(array).astype(np.float64) for name, array in flat}
        self.config = tower.config
        self.attention, self.keys = [], []  # of each block

    def linear(self, name, x):
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w.get(f"{name}.bias", 0)

    def norm(self, name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.norm_eps)
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attend(self, name, x):
        c = self.config
        qkv = self.linear(f"{name}.qkv", x).reshape(len(x), 3, c.num_heads, -1)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        weights = powers / powers.sum(-1, keepdims=True)
        rows = slice(0, 1) if c.class_token else slice(c.prefix, None)
        self.attention.append(weights[:, rows, c.prefix :].mean((0, 1)))
        self.keys.append(k[c.prefix :].reshape(-1, c.embed_dim))
        mixed = np.einsum("hij,jhd->ihd", weights, v).reshape(x.shape)
        return self.linear(f"{name}.proj", mixed)

    def mlp(self, name, x):
        x = self.linear(f"{name}.fc1", x)
        if self.config.quick_gelu:
            x = x / (1 + np.exp(-1.702 * x))
        else:
            erf = np.vectorize(math.erf)
            x = x * 0.5 * (1 + erf(x / np.sqrt(2)))
        return self.linear(f"{name}.fc2", x)

    def patches(self, picture):
        size, weight = self.config.patch_size, self.w["patch_embed.proj.weight"]
        bias = self.w.get("patch_embed.proj.bias", 0)
        tokens = []
        for row in range(self.config.side):
            for column in range(self.config.side):
                top, left = row * size, column * size
                patch = picture[top : top + size, left : left + size]
                tokens.append(np.einsum("hwc,ohwc->o", patch, weight) + bias)
        return np.array(tokens)

    def __call__(self, picture, language=None):
        c, x = self.config, self.patches(picture)
        positions = self.w["pos_embed"][0]
        first = self.w["cls_token"][0] if c.class_token else np.zeros((0, c.embed_dim))
        registers = np.zeros((0, c.embed_dim))
        if c.reg_tokens:
            registers = self.w["reg_token"][0]
        if c.embeds_class:
            first, x = first + positions[:1], x + positions[1:]
        else:
            x = x + positions
        x = np.concatenate([first, registers, x])
        if c.pre_norm:
            x = self.norm("norm_pre", x)
        for i in range(c.depth - 1):
            name = f"blocks.{i}"
            y = self.attend(f"{name}.attn", self.norm(f"{name}.norm1", x))
            x = x + y * self.w.get(f"{name}.ls1.scale_factor", 1)
            if language is not None:
                scale = self.linear(f"{name}.scale", language)
                x = x * (1 + scale) + self.linear(f"{name}.shift", language)
            y = self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x))
            x = x + y * self.w.get(f"{name}.ls2.scale_factor", 1)
        return x[c.prefix :]


@pytest.mark.parametrize("film", [None, 5])
@pytest.mark.parametrize("kind", TOWERS)
def test_towers_equal_numpy(kind, film):
    tower = random_tower(ViTConfig(**(SIZES | TOWERS[kind])), film)
    rng = np.random.default_rng(1)
    side = tower.config.image_size
    pictures = 0.1 * rng.normal(size=(2, side, side, 3)).astype(np.float32)
    language = rng.normal(size=(2, film)).astype(np.float32) if film else None
    given = None if language is None else mx.array(language)
    tokens, extras = tower(mx.array(pictures), given, EXTRAS)
    assert set(extras) == set(EXTRAS)
    for i, picture in enumerate(pictures):
        plain = Plain(tower)
        expected = plain(picture, None if language is None else language[i])
        np.testing.assert_allclose(np.array(tokens[i]), expected, rtol=1e-3, atol=1e-3)
        middle, _ = wanted = plain.attention[MIDDLE], plain.attention[-1]
        for name, attention in zip(EXTRAS, wanted, strict=False):
            np.testing.assert_allclose(
                np.array(extras[name][i]), attention, rtol=1e-3, atol=1e-6
            )
            assert attention.max() > 1.1 * attention.min()
        assert np.abs(middle - plain.attention[-1]).max() > 1e-3
        keys = np.array(extras["keys"][i])
        np.testing.assert_allclose(keys, plain.keys[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("depth", "middle", "last"), [(2, 0, 0), (4, 1, 2), (12, 4, 10), (24, 9, 22)]
)
def test_which_blocks_extras_are_of(monkeypatch, depth, middle, last):
    """Extras come from the documented blocks, such as block 9 of 24 in HiPrune."""
    tower = ViT(ViTConfig(**(SIZES | {"depth": depth})))
    asked = []
    for name in ("attention_received", "patch_keys"):
        original = getattr(Block, name)

        def spy(block, x, *how, name=name, original=original):
            found = next(i for i, b in enumerate(tower.blocks) if b is block)
            asked.append((name, found))
            return original(block, x, *how)

        monkeypatch.setattr(Block, name, spy)
    for extra, of in (("attention_middle", middle), ("attention", last)):
        asked.clear()
        _, found = tower(mx.zeros((1, 28, 28, 3)), None, (extra,))
        assert list(found) == [extra]
        assert asked == [("attention_received", of)]
    asked.clear()
    tower(mx.zeros((1, 28, 28, 3)), None, ("keys",))
    assert asked == [("patch_keys", last)]
    assert tower(mx.zeros((1, 28, 28, 3)))[1] == {}


@pytest.mark.parametrize(
    ("timm_id", "size", "sizes", "prefix", "patches", "eps"),
    [
        ("vit_large_patch14_reg4_dinov2.lvd142m", 224, (1024, 24, 16), 5, 256, 1e-6),
        ("vit_so400m_patch14_siglip_224", 224, (1152, 27, 16), 0, 256, 1e-6),
        ("vit_so400m_patch14_siglip_384", 384, (1152, 27, 16), 0, 729, 1e-6),
        ("vit_large_patch14_clip_336.openai", 336, (1024, 24, 16), 1, 576, 1e-5),
    ],
)
def test_towers_that_timm_builds(timm_id, size, sizes, prefix, patches, eps):
    """Sizes are those of `timm.create_model` in timm 1.0.31."""
    tower = tower_config(timm_id, size, None, None)
    assert (tower.embed_dim, tower.depth, tower.num_heads) == sizes
    assert (tower.prefix, tower.side**2, tower.norm_eps) == (prefix, patches, eps)


def test_film_needs_the_prompt():
    block = Block(ViTConfig(**SIZES), film_dim=8)
    with pytest.raises(ValueError, match="FiLM needs the mean prompt embedding"):
        block(mx.zeros((1, 4, SIZES["embed_dim"])))
