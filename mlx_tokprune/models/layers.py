"""Operations whose fastest implementation depends on the device.

On a GPU they are MLX's own operations, on a CPU the forms of `cpu.py`.
`plain_operations()` turns the CPU forms off, so that tests can compare both.
"""

import contextlib
import math
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from . import cpu

_PLAIN = False


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Use MLX's own operations on every device inside a `with` block."""
    global _PLAIN
    before, _PLAIN = _PLAIN, True
    try:
        yield
    finally:
        _PLAIN = before


def use_cpu_forms() -> bool:
    """Return whether operations run in the forms for MLX's CPU backend."""
    return not _PLAIN and mx.default_device().type == mx.DeviceType.cpu


def gelu(x: mx.array) -> mx.array:
    """Apply the exact GELU to (B, rows, ...); on CPU within 1e-6 max(1, |x|)."""
    if not use_cpu_forms() or x.dtype != mx.float32:
        return nn.gelu(x)
    return cpu.polynomial_gelu(x)


class Gelu(nn.Module):
    """`gelu` as a module."""

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the exact GELU."""
        return gelu(x)


def projector(inputs: int, outputs: int) -> list[nn.Module]:
    """Return LLaVA's projector: two layers from visual tokens to embeddings."""
    return [nn.Linear(inputs, outputs), Gelu(), nn.Linear(outputs, outputs)]


def gelu_tanh(x: mx.array) -> mx.array:
    """Apply PaliGemma's GELU with tanh, which is written as a sigmoid."""
    return x * mx.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def attention_weights(q: mx.array, k: mx.array, scale: float) -> mx.array:
    """Return attention weights (B, heads, N, N) of q and k (B, heads, N, D)."""
    if not use_cpu_forms() or q.dtype != mx.float32:
        return mx.softmax((q * scale) @ k.swapaxes(-1, -2), axis=-1, precise=True)
    powers, sums = cpu.softmax_powers(q, k, scale)
    return powers / sums


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Apply full attention; q, k, v and the result are (B, heads, N, D)."""
    if not use_cpu_forms() or q.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    powers, sums = cpu.softmax_powers(q, k, scale)
    return (powers @ v) / sums


def depthwise_convolution(x: mx.array, weight: mx.array, stride: int = 1) -> mx.array:
    """Convolve each channel on its own, with padding k // 2.

    x (B, H, W, C), weight (C * m, k, k, 1) -> (B, H', W', C * m). The channel
    multiplier m is a whole number; k is odd.
    """
    channels, size = x.shape[-1], weight.shape[1]
    if not use_cpu_forms():
        return mx.conv2d(x, weight, stride, size // 2, groups=channels)
    if size >= cpu.LARGE and stride == 1 and weight.shape[0] == channels:
        return cpu.banded_convolution(x, weight)
    if weight.shape[0] != channels:
        x = mx.repeat(x, weight.shape[0] // channels, axis=-1)
    return cpu.shifted_convolution(x, weight, stride)


def patch_convolution(x: mx.array, weight: mx.array) -> mx.array:
    """Convolve non-overlapping patches (stride p).

    x (B, H, W, 3), weight (C, p, p, 3) -> (B, H // p, W // p, C).
    """
    channels, size = weight.shape[:2]
    if not use_cpu_forms():
        return mx.conv2d(x, weight, size)
    batch, rows, columns = x.shape[0], x.shape[1] // size, x.shape[2] // size
    x = x[:, : rows * size, : columns * size]
    patches = x.reshape(batch, rows, size, columns, size, 3).swapaxes(2, 3)
    patches = patches.reshape(batch, rows, columns, size * size * 3)
    return patches @ weight.reshape(channels, -1).T


class DepthwiseConv(nn.Module):
    """Depthwise convolution; `weight` (out, k, k, 1), optional `bias` (out,)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        stride: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        scale = 1 / size
        self.weight = mx.random.uniform(-scale, scale, (outputs, size, size, 1))
        if bias:
            self.bias = mx.zeros((outputs,))
        self.stride = stride

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve (B, H, W, C)."""
        y = depthwise_convolution(x, self.weight, self.stride)
        return y + self.bias if "bias" in self else y


class PointwiseConv(nn.Module):
    """1x1 convolution as a matmul; `weight` (out, 1, 1, in) as on disk."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        scale = math.sqrt(1 / inputs)
        self.weight = mx.random.uniform(-scale, scale, (outputs, 1, 1, inputs))
        self.bias = mx.zeros((outputs,))

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply (..., C) by the weight."""
        weight = self.weight.reshape(self.weight.shape[0], -1)
        return mx.addmm(self.bias, x, weight.T)
