"""Operations in forms that are fast on MLX's CPU backend; `layers.py` selects them.

MLX's CPU backend runs grouped convolutions, `erf` and `exp` slowly, each on one core.
Here depthwise convolutions are matrix products (large kernels) or shifted
multiply-adds, GELU and softmax polynomials, all split over the cores.
"""

import functools
import math
import operator
import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np


@functools.lru_cache(maxsize=1)
def cpu_streams() -> list[mx.ThreadLocalStream]:
    """Return one stream per core: MLX's CPU backend runs a stream on one thread."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(min(cores, 8))]


def on_all_cores(part: Callable[[int, int], mx.array], shape: tuple) -> mx.array:
    """Compute a result of `shape` in parts of axis 1, one CPU stream per part.

    part: called with the start and stop of a range of axis 1.
    """
    streams, rows = cpu_streams(), shape[1]
    # Small results take less time than a switch of streams.
    if math.prod(shape) < 1 << 16 or rows < len(streams):
        return part(0, rows)
    edges = [rows * i // len(streams) for i in range(len(streams) + 1)]
    parts = []
    for stream, start, stop in zip(streams, edges, edges[1:], strict=False):
        with mx.stream(stream):
            parts.append(part(start, stop))
    return mx.concatenate(parts, axis=1)


# GELU and softmax -------------------------------------------------------------------

_ERF_LIMIT = 3.7  # erf is 1 within float32 from here on
_EXP_LIMIT = 32  # exp(-32) is negligible beside the largest weight, 1


def _fit(function: Callable[[float], float], degree: int) -> list[float]:
    """Return coefficients, lowest first, of a polynomial fit on [-1, 1]."""
    chebyshev = np.polynomial.chebyshev
    fit = chebyshev.chebinterpolate(np.vectorize(function), degree)
    return [float(c) for c in chebyshev.cheb2poly(fit)]


def _evaluate(terms: list[Any], power: mx.array) -> mx.array:
    """Evaluate a polynomial by Estrin's scheme; Horner's deep chain would not fuse.

    terms: numbers, lowest first.
    """
    while len(terms) > 1:
        last = terms[-1:] if len(terms) % 2 else []
        pairs = zip(terms[::2], terms[1::2], strict=False)
        terms = [low + high * power for low, high in pairs] + last
        power = power * power
    return terms[0]


@functools.lru_cache(maxsize=1)
def _erf_terms() -> list[float]:
    """Return coefficients of erf(u) / u as a polynomial in t = 2 (u / limit)**2 - 1."""

    def ratio(t: float) -> float:
        u = _ERF_LIMIT * math.sqrt((t + 1) / 2)
        return math.erf(u) / u if u else 2 / math.sqrt(math.pi)

    return _fit(ratio, 14)


@functools.lru_cache(maxsize=1)
def _exp_terms() -> list[float]:
    """Return coefficients of exp((t - 1) / 2) as a polynomial in t."""
    return _fit(lambda t: math.exp((t - 1) / 2), 7)


@mx.compile
def _gelu(x: mx.array) -> mx.array:
    u = x * math.sqrt(0.5)  # `mx.clip` would keep the kernel from being vectorized
    u = mx.where(u > _ERF_LIMIT, _ERF_LIMIT, mx.where(u < -_ERF_LIMIT, -_ERF_LIMIT, u))
    return 0.5 * x * (1 + u * _evaluate(_erf_terms(), u * u * (2 / _ERF_LIMIT**2) - 1))


def _exp_below(x: mx.array, largest: mx.array) -> mx.array:
    """Return exp(x - largest) for x <= largest."""
    return _polynomial_exp(mx.maximum(x - largest, -_EXP_LIMIT))


@mx.compile
def _polynomial_exp(x: mx.array) -> mx.array:
    """Return exp(x) for -_EXP_LIMIT <= x <= 0, as exp(x / 32)**32.

    The caller clips: a clip in the kernel would keep it from being vectorized.
    """
    root = _evaluate(_exp_terms(), x * (2 / _EXP_LIMIT) + 1)
    for _ in range(5):
        root = root * root
    return root


def polynomial_gelu(x: mx.array) -> mx.array:
    """Apply the exact GELU to (B, rows, ...), within 1e-6 max(1, |x|)."""
    return on_all_cores(lambda start, stop: _gelu(x[:, start:stop]), x.shape)


def softmax_powers(q: mx.array, k: mx.array, scale: float) -> tuple[mx.array, mx.array]:
    """Return unnormalised attention weights and their row sums.

    q, k: (B, heads, N, D). Weights (B, heads, N, N) are exp(scaled products), up to a
    factor per row; sums (B, heads, N, 1).
    """
    scores = (q * scale) @ k.swapaxes(-1, -2)

    def part(start: int, stop: int) -> mx.array:
        chunk = scores[:, start:stop]
        return _exp_below(chunk, mx.max(chunk, axis=-1, keepdims=True))

    powers = on_all_cores(part, scores.shape)
    return powers, mx.sum(powers, axis=-1, keepdims=True)


# Convolutions -----------------------------------------------------------------------

_TILE = 16  # output columns of one band matrix
LARGE = 5  # kernels of this size and larger are faster as matrix products


def _bands(weight: mx.array) -> mx.array:
    """Return each kernel row as a band matrix.

    (C, k, k, 1) -> (C, k, _TILE, _TILE + k - 1). Row r of a matrix has the kernel row
    from column r on: flattened, the matrix repeats the kernel row and `_TILE` zeros.
    """
    channels, size = weight.shape[:2]
    zeros = mx.zeros((channels, size, _TILE), weight.dtype)
    period = mx.concatenate([weight[..., 0], zeros], axis=-1)
    width = _TILE + size - 1
    flat = mx.tile(period, (1, 1, _TILE))[..., : _TILE * width]
    return flat.reshape(channels, size, _TILE, width)


def _banded_products(x: mx.array, weight: mx.array) -> mx.array:
    """Convolve (H, W, C) depthwise with stride 1, by matrix products.

    Channels first, a picture is cut into tiles of `_TILE` columns and their borders.
    Each kernel row is one product of all tiles' rows with its band matrix. Rows between
    two tiles are computed, too, and dropped.
    """
    (height, width, channels), size = x.shape, weight.shape[1]
    pad, tiles = size // 2, -(-width // _TILE)
    high, wide = height + 2 * pad, tiles * _TILE + 2 * pad
    border = [(0, 0), (pad, pad), (pad, wide - width - pad)]
    picture = mx.contiguous(mx.pad(x.transpose(2, 0, 1), border))
    cut = (channels, tiles, high, _TILE + 2 * pad)
    rows = mx.as_strided(picture, cut, (high * wide, _TILE, wide, 1))
    rows = mx.contiguous(rows).reshape(channels, tiles * high, -1)
    bands, count = _bands(weight).swapaxes(-1, -2), tiles * high - 2 * pad
    total = rows[:, :count] @ bands[:, 0]
    for i in range(1, size):
        total = mx.addmm(total, rows[:, i : i + count], bands[:, i])
    total = mx.pad(total, [(0, 0), (0, 2 * pad), (0, 0)])
    total = total.reshape(channels, tiles, high, _TILE)[:, :, :height]
    return total.transpose(2, 1, 3, 0).reshape(height, -1, channels)[:, :width]


def banded_convolution(x: mx.array, weight: mx.array) -> mx.array:
    """Convolve (B, H, W, C) depthwise with stride 1, channels split over the cores."""
    streams, channels = cpu_streams(), x.shape[-1]
    edges = [channels * i // len(streams) for i in range(len(streams) + 1)]
    pictures = []
    for picture in x:
        parts = []
        for stream, start, stop in zip(streams, edges, edges[1:], strict=False):
            if start < stop:
                with mx.stream(stream):
                    channel_part = picture[..., start:stop]
                    parts.append(_banded_products(channel_part, weight[start:stop]))
        pictures.append(mx.concatenate(parts, axis=-1))
    return mx.stack(pictures)


def shifted_convolution(x: mx.array, weight: mx.array, stride: int) -> mx.array:
    """Convolve depthwise, (B, H, W, C) -> (B, H', W', C), rows split over the cores."""
    size = weight.shape[1]
    pad = size // 2
    height, width = ((n - 1) // stride + 1 for n in x.shape[1:3])
    padded = mx.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])

    def rows(start: int, stop: int) -> mx.array:
        band = padded[:, stride * start : stride * (stop - 1) + size]
        return _shifted_multiply_adds(stop - start, width, stride)(band, weight)

    return on_all_cores(rows, (1, height, width, weight.shape[0]))


@functools.lru_cache(maxsize=256)
def _shifted_multiply_adds(height: int, width: int, stride: int) -> Callable:
    """Return a compiled depthwise convolution with outputs of (height, width).

    It takes a padded picture.
    """

    def convolve(padded: mx.array, weight: mx.array) -> mx.array:
        size = weight.shape[1]
        down, across = stride * (height - 1) + 1, stride * (width - 1) + 1
        terms = []
        for i in range(size):
            for j in range(size):
                shifted = padded[:, i : i + down : stride, j : j + across : stride]
                terms.append(shifted * weight[:, i, j, 0])
        return functools.reduce(operator.add, terms)

    return mx.compile(convolve)
