"""Vision transformers with timm's names: DINOv2, SigLIP and CLIP, up to the features.

Attribute names equal the checkpoint's keys. Prismatic models take the patch tokens of
the second to last block, without prefix tokens and without the final norm, so the last
block and the norm are built with `complete` only, and SigLIP's pooling never.
PaliGemma takes the patch tokens of the last block after the norm (`whole`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError, nearest
from .checks import is_number
from .layers import attend, attention_weights, gelu, gelu_tanh, patch_convolution


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of one tower.

    class_token, reg_tokens: prefix tokens. embeds_class: the position embedding has a
    row for the class token (CLIP). layer_scale: DINOv2's. pre_norm: CLIP's, which also
    has no bias in the patch embedding. quick_gelu: CLIP's x * sigmoid(1.702 x). whole:
    features come from the last block after the final norm. split: queries, keys and
    values have a matrix each, and the position embedding has no batch axis, as in
    transformers. tanh_gelu: GELU by tanh.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    class_token: bool = False
    reg_tokens: int = 0
    embeds_class: bool = False
    layer_scale: bool = False
    pre_norm: bool = False
    quick_gelu: bool = False
    norm_eps: float = 1e-6
    whole: bool = False
    split: bool = False
    tanh_gelu: bool = False

    @property
    def side(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch_size

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches."""
        return int(self.class_token) + self.reg_tokens

    @property
    def hidden(self) -> int:
        """Channels inside a block's MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def last(self) -> int:
        """Number of the block that features come from."""
        return self.depth - 1 if self.whole else self.depth - 2


_DINOV2 = {"patch_size": 14, "class_token": True, "layer_scale": True}
_SIGLIP = {"patch_size": 14, "embed_dim": 1152, "depth": 27, "num_heads": 16}
_CLIP = {
    **{"patch_size": 14, "class_token": True, "embeds_class": True, "pre_norm": True},
    "norm_eps": 1e-5,
}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_SIZES: dict[str, dict] = {
    "vit_large_patch14_reg4_dinov2": _DINOV2 | _LARGE | {"reg_tokens": 4},
    "vit_large_patch14_dinov2": _DINOV2 | _LARGE | {"embeds_class": True},
    "vit_so400m_patch14_siglip_224": _SIGLIP | {"mlp_ratio": 3.7362},
    "vit_so400m_patch14_siglip_384": _SIGLIP | {"mlp_ratio": 3.7362},
    "vit_base_patch16_siglip_224": {
        **{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    },
    "vit_large_patch14_clip_224": _CLIP | _LARGE,
    "vit_large_patch14_clip_336": _CLIP | _LARGE,
}


def tower_config(
    timm_id: str, image_size: int, act_layer: str | None, sizes: Mapping | None
) -> ViTConfig:
    """Return the sizes of timm's tower with this id; `sizes` overrides them.

    Raises `InputError` for an unknown id without sizes, or impossible sizes.
    """
    name = str(timm_id).split(".")[0]
    if sizes is None and name not in _SIZES:
        raise InputError(
            f"config.json names the vision tower {timm_id!r}, which is not supported; "
            f"expected one of {', '.join(_SIZES)}.{nearest(name, _SIZES)}"
        )
    if act_layer not in (None, "gelu", "quick_gelu"):
        raise InputError(
            f"config.json gives a vision tower the activation {act_layer!r}; expected "
            "gelu or quick_gelu"
        )
    ours = {"image_size", "quick_gelu", "whole", "split", "tanh_gelu"}
    fields = ViTConfig.__dataclass_fields__.keys() - ours
    options = dict(_SIZES.get(name, {})) | {
        k: v for k, v in (sizes or {}).items() if k in fields
    }
    quick = act_layer == "quick_gelu"
    try:
        config = ViTConfig(image_size=image_size, quick_gelu=quick, **options)
    except TypeError as error:
        raise InputError(f"config.json does not describe a tower ({error})") from None
    check_tower(config)
    return config


def check_tower(config: ViTConfig) -> None:
    """Raise `InputError` for impossible sizes."""
    for name in ("image_size", "patch_size", "embed_dim", "depth", "num_heads"):
        value = getattr(config, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not 0 < value < 1 << 16:
            raise InputError(
                f"config.json gives a vision tower {name} {value!r}; expected a "
                "positive whole number"
            )
    ratio, extra, eps = config.mlp_ratio, config.reg_tokens, config.norm_eps
    whole = isinstance(extra, int) and not isinstance(extra, bool)
    for name, value, right, expected in (
        ("mlp_ratio", ratio, is_number(ratio) and 0 < ratio <= 64, "up to 64"),
        ("reg_tokens", extra, whole and 0 <= extra < 1 << 10, "below 1024"),
        ("norm_eps", eps, is_number(eps) and 0 < eps < 1, "between 0 and 1"),
    ):
        if not right:
            raise InputError(
                f"config.json gives a vision tower {name} {value!r}; expected a number "
                f"{expected}"
            )
    for name in ("class_token", "embeds_class", "layer_scale", "pre_norm"):
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise InputError(
                f"config.json gives a vision tower {name} {value!r}; expected true or "
                "false"
            )
    if config.depth < 2:
        raise InputError(
            f"config.json gives a vision tower of depth {config.depth}; expected at "
            "least 2, since features come from the second to last block"
        )
    if config.embed_dim % config.num_heads:
        raise InputError(
            f"config.json gives a vision tower embed_dim {config.embed_dim}; expected "
            f"a multiple of num_heads {config.num_heads}"
        )
    if config.image_size < config.patch_size:
        raise InputError(
            f"config.json gives a vision tower image size {config.image_size}; "
            f"expected at least patch_size {config.patch_size}"
        )


class PatchEmbed(nn.Module):
    """Embedding of disjoint patches; `proj.weight` (C, p, p, 3) as on disk."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(3, config.embed_dim, size, size, bias=not config.pre_norm)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Embed (B, S, S, 3) as (B, N, C); pixels after the last patch are cut."""
        tokens = patch_convolution(pixels, self.proj.weight).flatten(1, 2)
        return tokens + self.proj.bias if "bias" in self.proj else tokens


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.num_heads, dim = config.num_heads, config.embed_dim
        if config.split:
            self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: mx.array) -> list[mx.array]:
        """Return q, k and v, each (B, heads, T, D), of (B, T, C)."""
        heads = (*x.shape[:2], self.num_heads, -1)
        if "qkv" in self:
            parts = mx.split(self.qkv(x), 3, axis=-1)
        else:
            parts = [self.q(x), self.k(x), self.v(x)]
        return [part.reshape(heads).swapaxes(1, 2) for part in parts]

    def __call__(self, x: mx.array) -> mx.array:
        """Attend over (B, T, C)."""
        q, k, v = self.heads(x)
        y = attend(q, k, v, q.shape[-1] ** -0.5)
        return self.proj(y.swapaxes(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    """Two linear layers with the tower's GELU."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.embed_dim)
        self._quick, self._tanh = config.quick_gelu, config.tanh_gelu

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, T, C)."""
        x = self.fc1(x)
        if self._tanh:
            return self.fc2(gelu_tanh(x))
        return self.fc2(x * mx.sigmoid(1.702 * x) if self._quick else gelu(x))


class LayerScale(nn.Module):
    """Learned factor per channel; OpenVLA saves it as `scale_factor`."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale_factor = mx.ones((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        """Scale the channels of (B, T, C)."""
        return x * self.scale_factor


class Block(nn.Module):
    """Pre-norm block, with OpenVLA-OFT's FiLM (`scale`, `shift`) given a `film_dim`."""

    def __init__(self, config: ViTConfig, film_dim: int | None):
        super().__init__()
        dim, eps = config.embed_dim, config.norm_eps
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=eps) for _ in range(2))
        self.attn, self.mlp = Attention(config), Mlp(config)
        if config.layer_scale:
            self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)
        if film_dim:
            self.scale, self.shift = (nn.Linear(film_dim, dim) for _ in range(2))

    def __call__(self, x: mx.array, language: mx.array | None = None) -> mx.array:
        """Return (B, T, C); language: (B, D), the mean prompt embedding for FiLM."""
        y = self.attn(self.norm1(x))
        x = x + (self.ls1(y) if "ls1" in self else y)
        if "scale" in self:
            if language is None:
                raise ValueError("FiLM needs the mean prompt embedding; got none")
            x = x * (1 + self.scale(language)[:, None]) + self.shift(language)[:, None]
        y = self.mlp(self.norm2(x))
        return x + (self.ls2(y) if "ls2" in self else y)

    def attention_received(
        self, x: mx.array, prefix: int, from_class: bool
    ) -> mx.array:
        """Return the attention (B, N) that each patch receives, mean over heads.

        from_class: attention from the class token, else the mean over the patches.
        """
        q, k, _ = self.attn.heads(self.norm1(x))
        q = q[:, :, :1] if from_class else q[:, :, prefix:]
        weights = attention_weights(q, k, q.shape[-1] ** -0.5)
        return mx.mean(weights[..., prefix:], axis=(1, 2))

    def patch_keys(self, x: mx.array, prefix: int) -> mx.array:
        """Return the keys (B, N, C) of the patches, heads joined."""
        _, k, _ = self.attn.heads(self.norm1(x))
        return k[:, :, prefix:].swapaxes(1, 2).flatten(2)


class ViT(nn.Module):
    """Tower up to the block of the features.

    film_dim: channels of the language embedding for FiLM, `None` without. complete: add
    the checkpoint's remaining blocks and final norm.
    """

    def __init__(
        self, config: ViTConfig, film_dim: int | None = None, complete: bool = False
    ):
        super().__init__()
        self.config = config
        dim = config.embed_dim
        rows = config.side**2 + int(config.embeds_class)
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = mx.zeros((rows, dim) if config.split else (1, rows, dim))
        if config.class_token:
            self.cls_token = mx.zeros((1, 1, dim))
        if config.reg_tokens:
            self.reg_token = mx.zeros((1, config.reg_tokens, dim))
        if config.pre_norm:
            self.norm_pre = nn.LayerNorm(dim, eps=config.norm_eps)
        depth = config.depth if complete else config.last + 1
        self.blocks = [Block(config, film_dim) for _ in range(depth)]
        if complete or config.whole:
            self.norm = nn.LayerNorm(dim, eps=config.norm_eps)

    def _embed(self, pixels: mx.array) -> mx.array:
        """Embed (B, S, S, 3) as (B, prefix + N, C), positions added."""
        x = self.patch_embed(pixels)

        def repeat(token: mx.array) -> mx.array:
            return mx.broadcast_to(token, (x.shape[0], *token.shape[1:]))

        first = [repeat(self.cls_token)] if self.config.class_token else []
        registers = [repeat(self.reg_token)] if self.config.reg_tokens else []
        if self.config.embeds_class:
            x = mx.concatenate([*first, x], axis=1) + self.pos_embed
            x = mx.concatenate([x[:, :1], *registers, x[:, 1:]], axis=1)
        else:
            x = mx.concatenate([*first, *registers, x + self.pos_embed], axis=1)
        return self.norm_pre(x) if "norm_pre" in self else x

    def __call__(
        self,
        pixels: mx.array,
        language: mx.array | None = None,
        needs: tuple[str, ...] = (),
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Return patch tokens (B, N, C) of normalised pixels (B, S, S, 3), and extras.

        language: (B, D), the mean prompt embedding for FiLM. needs: names of the
        extras. `attention` and `keys` come from the last block that runs,
        `attention_middle` from the block at three eighths of the depth, as in HiPrune
        (9 of 24).
        """
        x, extras, prefix = self._embed(pixels), {}, self.config.prefix
        last, from_class = self.config.last, self.config.class_token
        places = {"attention": last, "attention_middle": self.config.depth * 3 // 8}
        for number, block in enumerate(self.blocks[: last + 1]):
            for name, place in places.items():
                if name in needs and number == place:
                    received = block.attention_received(x, prefix, from_class)
                    extras[name] = received
            if "keys" in needs and number == last:
                extras["keys"] = block.patch_keys(x, prefix)
            x = block(x, language)
        x = self.norm(x) if self.config.whole else x
        return x[:, prefix:], extras
