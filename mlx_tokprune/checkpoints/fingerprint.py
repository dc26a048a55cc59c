"""Fingerprint of a model's weights, to tell two models apart."""

import hashlib
from typing import cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..features import HasParameters


def fingerprint(model: HasParameters) -> str:
    """Return a SHA-256 of all tensor names and bytes, cut to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    tensors = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    for name, array in sorted(tensors):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()[:16]
