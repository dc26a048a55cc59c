"""FastViTHD, the vision tower of FastVLM (arXiv 2412.13303).

A convolutional stem, three stages of RepMixer blocks and two of attention blocks, then
a squeeze-and-excite expansion; total stride 64 and no CLS token. Attribute names are
those of the MLX checkpoints. In `inference` form batch norms are folded into the layers
before them, and in float32 also layer scales; the other form has the exact tensors of a
checkpoint.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..features import Features
from .layers import DepthwiseConv, PointwiseConv, attend, attention_weights, gelu

BATCH_NORM_EPS = 1e-5
TOTAL_STRIDE = 64  # pixels per side of a visual token


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a tower; the defaults are those of Apple's FastViTHD."""

    layers: tuple[int, ...] = (2, 12, 24, 4, 2)
    embed_dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4, 4)
    token_mixers: tuple[str, ...] = ("repmixer",) * 3 + ("attention",) * 2
    pos_embs_shapes: tuple = (None, None, None, (7, 7), (7, 7))
    image_size: int = 1024
    head_dim: int = 32
    cls_ratio: float = 2.0

    @property
    def output_dim(self) -> int:
        """C, channels of a visual token."""
        return int(self.embed_dims[-1] * self.cls_ratio)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Numbers per visual token that go into each attention block.

        A finer stage has several of its tokens in the cell of one visual token.
        """
        stages, last = range(len(self.layers)), len(self.layers) - 1
        return tuple(
            self.embed_dims[i] * 4 ** (last - i)
            for i in stages
            for _ in range(self.layers[i])
            if self.token_mixers[i] == "attention"
        )


class MobileOneBlock(nn.Module):
    """Convolution, optional squeeze-and-excite, and GELU."""

    def __init__(self, conv: nn.Module, squeeze: nn.Module | None = None):
        super().__init__()
        self.reparam_conv = conv
        if squeeze is not None:
            self.se = squeeze

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, H', W', C')."""
        x = self.reparam_conv(x)
        return gelu(self.se(x) if "se" in self else x)


class SqueezeExcite(nn.Module):
    """Gate for each channel, computed from the mean over the picture."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = PointwiseConv(channels, channels // 16)
        self.expand = PointwiseConv(channels // 16, channels)

    def __call__(self, x: mx.array) -> mx.array:
        """Scale the channels of (B, H, W, C)."""
        mean = mx.mean(x, axis=(1, 2), keepdims=True)
        return x * mx.sigmoid(self.expand(nn.relu(self.reduce(mean))))


class RepConv(nn.Module):
    """Depthwise convolution with its skip connection folded in."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.reparam_conv = DepthwiseConv(channels, channels, size)

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve (B, H, W, C)."""
        return self.reparam_conv(x)


class NormalizedConv(nn.Module):
    """7x7 depthwise convolution and its batch norm, folded for inference."""

    def __init__(self, channels: int, inference: bool):
        super().__init__()
        self.conv = DepthwiseConv(channels, channels, 7, bias=inference)
        if not inference:
            self.bn = nn.BatchNorm(channels, eps=BATCH_NORM_EPS)

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve (B, H, W, C) and normalise."""
        x = self.conv(x)
        return self.bn(x) if "bn" in self else x


class ConvFFN(nn.Module):
    """Feed-forward layers of a block, behind a depthwise convolution."""

    def __init__(self, channels: int, hidden: int, inference: bool):
        super().__init__()
        self.conv = NormalizedConv(channels, inference)
        self.fc1 = PointwiseConv(channels, hidden)
        self.fc2 = PointwiseConv(hidden, channels)

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, H, W, C)."""
        return self.fc2(gelu(self.fc1(self.conv(x))))


class Attention(nn.Module):
    """Multi-head self-attention over all positions of the picture."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)
        self.head_dim = head_dim

    def __call__(
        self, x: mx.array, needs: tuple[str, ...] = ()
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Return (B, H, W, C), and the extras `attention` and `keys` that are needed.

        Attention weights are computed for `attention` only: fused attention is faster.
        """
        batch, height, width, channels = x.shape
        heads = (batch, height * width, -1, self.head_dim)
        parts = mx.split(self.qkv(x), 3, axis=-1)
        q, k, v = (part.reshape(heads).swapaxes(1, 2) for part in parts)
        scale, extras = self.head_dim**-0.5, {}
        if "attention" in needs:
            weights = attention_weights(q, k, scale)
            y = weights @ v
            extras["attention"] = mx.mean(weights.astype(mx.float32), axis=(1, 2))
        else:
            y = attend(q, k, v, scale)
        if "keys" in needs:
            extras["keys"] = parts[1].flatten(1, 2)
        y = y.swapaxes(1, 2).reshape(batch, height, width, channels)
        return self.proj(y), extras


class RepMixerBlock(nn.Module):
    """Block that mixes tokens by a 3x3 depthwise convolution."""

    def __init__(self, channels: int, hidden: int, inference: bool):
        super().__init__()
        self.token_mixer = RepConv(channels, 3)
        self.convffn = ConvFFN(channels, hidden, inference)
        self.layer_scale = mx.ones((1, 1, channels))

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, H, W, C)."""
        x = self.token_mixer(x)
        return x + _scaled(self, "layer_scale", self.convffn(x))


class AttentionBlock(nn.Module):
    """Block that mixes tokens by self-attention."""

    def __init__(self, channels: int, hidden: int, head_dim: int, inference: bool):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-5)
        self.token_mixer = Attention(channels, head_dim)
        self.convffn = ConvFFN(channels, hidden, inference)
        self.layer_scale_1 = mx.ones((1, 1, channels))
        self.layer_scale_2 = mx.ones((1, 1, channels))

    def attend(
        self, x: mx.array, needs: tuple[str, ...] = ()
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Return (B, H, W, C), and the extras of the attention that are needed."""
        mixed, extras = self.token_mixer(self.norm(x), needs)
        x = x + _scaled(self, "layer_scale_1", mixed)
        return x + _scaled(self, "layer_scale_2", self.convffn(x)), extras

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, H, W, C)."""
        return self.attend(x)[0]


def _scaled(block: nn.Module, name: str, x: mx.array) -> mx.array:
    return block[name] * x if name in block else x


class LargeKernelConv(nn.Module):
    """7x7 grouped convolution of stride 2, and GELU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.lkb_reparam = DepthwiseConv(inputs, outputs, 7, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, H / 2, W / 2, C')."""
        return gelu(self.lkb_reparam(x))


class PatchEmbed(nn.Module):
    """Downsampling between two stages."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.proj = [
            LargeKernelConv(inputs, outputs),
            MobileOneBlock(PointwiseConv(outputs, outputs)),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, H / 2, W / 2, C')."""
        for layer in self.proj:
            x = layer(x)
        return x


class Stem(nn.Module):
    """First convolutions, of stride 4 in total."""

    def __init__(self, channels: int):
        super().__init__()
        self.blocks = [
            MobileOneBlock(nn.Conv2d(3, channels, 3, stride=2, padding=1)),
            MobileOneBlock(DepthwiseConv(channels, channels, 3, stride=2)),
            MobileOneBlock(PointwiseConv(channels, channels)),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, S / 4, S / 4, C) of pixels (B, S, S, 3)."""
        for block in self.blocks:
            x = block(x)
        return x


def _stages(config: VisionConfig, inference: bool) -> list:
    """Return position convolutions, lists of blocks and downsamplings, in order.

    The order and the nesting give the parameter names of the checkpoint.
    """
    network: list = []
    for i, (depth, channels) in enumerate(
        zip(config.layers, config.embed_dims, strict=True)
    ):
        hidden = int(channels * config.mlp_ratios[i])
        if config.pos_embs_shapes[i] is not None:
            network.append(RepConv(channels, config.pos_embs_shapes[i][0]))
        if config.token_mixers[i] == "attention":
            options = (channels, hidden, config.head_dim, inference)
            network.append([AttentionBlock(*options) for _ in range(depth)])
        else:
            options = (channels, hidden, inference)
            network.append([RepMixerBlock(*options) for _ in range(depth)])
        if i + 1 < len(config.layers):
            network.append(PatchEmbed(channels, config.embed_dims[i + 1]))
    return network


class FastViTHD(nn.Module):
    """Vision tower of FastVLM, from pixels to visual tokens."""

    def __init__(self, config: VisionConfig, inference: bool = True):
        super().__init__()
        self.patch_embed = Stem(config.embed_dims[0])
        self.network = _stages(config, inference)
        self.conv_exp = MobileOneBlock(
            DepthwiseConv(config.embed_dims[-1], config.output_dim, 3),
            SqueezeExcite(config.output_dim),
        )

    def __call__(self, pixels: mx.array, needs: tuple[str, ...] = ()) -> Features:
        """Encode pixels (B, S, S, 3) in [0, 1] as tokens (B, N, C).

        N = (S / 64)**2 and C = `config.output_dim`. needs: names of the extras.
        """
        x, extras, received = self.patch_embed(pixels), {}, None
        blocks = [block for part in self.network for block in _as_list(part)]
        last, middle, block_inputs = blocks[-1], self._middle, []
        for block in blocks:
            if "blocks" in needs and isinstance(block, AttentionBlock):
                block_inputs.append(x)
            halfway = block is middle and "attention_middle" in needs
            wanted = needs if block is last else ()
            wanted += ("attention",) if halfway else ()
            if not wanted:
                x = block(x)
                continue
            x, new = block.attend(x, wanted)
            if halfway:
                received = new["attention"].reshape(x.shape[:3])
            if block is last:
                extras |= {name: new[name] for name in new if name in needs}
        x = self.conv_exp(x)
        grid = (x.shape[1], x.shape[2])
        if received is not None:
            extras["attention_middle"] = _pooled(received, grid).flatten(1)
        if block_inputs:
            cells = [_in_cells(part, grid) for part in block_inputs]
            extras["blocks"] = mx.concatenate(cells, axis=-1)
        return Features(x.flatten(1, 2), grid, extras=extras)

    @property
    def _middle(self) -> nn.Module:
        """Block of `attention_middle`: the last of the stage before the last.

        Four of its tokens are one of the last stage. If that stage has no attention,
        the first block of the last stage.
        """
        before, last = [part for part in self.network if isinstance(part, list)][-2:]
        return before[-1] if isinstance(before[-1], AttentionBlock) else last[0]


def _pooled(finer: mx.array, grid: tuple[int, int]) -> mx.array:
    """Sum (B, h, w) over the cells of a grid (H, W); H divides h, and W divides w."""
    (rows, columns), (height, width) = finer.shape[1:], grid
    cells = finer.reshape(-1, height, rows // height, width, columns // width)
    return mx.sum(cells, axis=(2, 4))


def _in_cells(finer: mx.array, grid: tuple[int, int]) -> mx.array:
    """Join the tokens of each cell of a grid (H, W).

    (B, h, w, C) -> (B, H * W, h * w / (H * W) * C).
    """
    batch, rows, columns, channels = finer.shape
    height, width = grid
    cells = (batch, height, rows // height, width, columns // width, channels)
    return finer.reshape(cells).swapaxes(2, 3).reshape(batch, height * width, -1)


def drop_layer_scales(tower: nn.Module) -> None:
    """Remove the layer scales, for weights that have them folded in."""
    for module in tower.modules():
        for name in [key for key in module if key.startswith("layer_scale")]:
            del module[name]


def _as_list(part: nn.Module | list) -> list:
    return part if isinstance(part, list) else [part]


def fold(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return the tensors of the `inference` form of a checkpoint's tensors.

    Each `*.bn.*` is folded into the bias-free `*.conv.weight` beside it. Each layer
    scale is folded into the last layer of its branch, only in float32: small scales
    would cost half precision weights their digits. Idempotent.
    """
    return _fold_layer_scales(_fold_batch_norms(weights))


def _fold_layer_scales(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    scales = {k for k in weights if ".layer_scale" in k}
    if any(weights[name].dtype != mx.float32 for name in scales):
        return weights
    folded = {k: v for k, v in weights.items() if k not in scales}
    for name in scales:
        block, _, which = name.rpartition(".")
        last = "token_mixer.proj" if which == "layer_scale_1" else "convffn.fc2"
        scale = weights[name].reshape(-1)
        for part in ("weight", "bias"):
            key = f"{block}.{last}.{part}"
            shape = (-1, *(1,) * (folded[key].ndim - 1))
            folded[key] = folded[key] * scale.reshape(shape)
    return folded


def _fold_batch_norms(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    norms = {k[: -len("bn.weight")] for k in weights if k.endswith(".bn.weight")}
    folded = {k: v for k, v in weights.items() if ".bn." not in k}
    for prefix in norms:
        part = {k: weights[f"{prefix}bn.{k}"].astype(mx.float32) for k in _BN_PARTS}
        weight = weights[f"{prefix}conv.weight"]
        scale = part["weight"] * mx.rsqrt(part["running_var"] + BATCH_NORM_EPS)
        bias = part["bias"] - part["running_mean"] * scale
        scaled = weight.astype(mx.float32) * scale[:, None, None, None]
        folded[f"{prefix}conv.weight"] = scaled.astype(weight.dtype)
        folded[f"{prefix}conv.bias"] = bias.astype(weight.dtype)
    return folded


_BN_PARTS = ("weight", "bias", "running_mean", "running_var")
