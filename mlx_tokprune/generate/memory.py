"""`Memory`: reuse of visual tokens and prompt caches between questions about images.

The key of an image is its pixels and everything that changes its visual tokens before
the prompt is used. The memory keeps the visual tokens. Unless a pruner reads the prompt
and may keep other tokens for another question, it also keeps the language model's cache
up to the last visual token, so that only the rest of the prompt is read.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from ..errors import InputError
from ..models.protocol import VisionModel
from ..pipeline import Scene, VisionStep, VisualTokens, look
from ..pipeline.timing import NoClock
from ..processing.processor import Processor
from ..processing.prompt import Prompt
from ..pruners import Plan


@dataclass
class Picture:
    """A remembered image, or set of images.

    opening: the prompt up to the last image, and the positions. layers: keys and values
    of each layer after reading it.
    """

    visual: VisualTokens | None = None
    opening: Hashable = None
    layers: tuple[tuple[mx.array, mx.array], ...] = ()


class Memory:
    """Memory of the last `size` images (or sets of images) with a question.

    It belongs to one model and its present weights: another model empties it, and after
    a change of weights `clear` must be called. Each image takes the memory of its
    visual tokens and of its part of the prompt cache.
    """

    def __init__(self, size: int = 4):
        if not isinstance(size, int) or size < 1:
            raise InputError(f"cannot remember {size} pictures; the least is 1")
        self._size = size
        self._model = None
        self._pictures: OrderedDict[Hashable, Picture] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pictures)

    def clear(self) -> None:
        """Forget every image."""
        self._pictures.clear()

    def about(
        self,
        model: VisionModel,
        processor: Processor,
        images: Sequence[Image.Image],
        plan: Plan,
        vision: VisionStep | None,
    ) -> "Recollection":
        """Return the recollection of decoded RGB images under `plan` and `vision`.

        New images are remembered when they are encoded.
        """
        if self._model is not model:
            self.clear()
            self._model = model
        early = tuple(
            (pruner.key, weights_digest(pruner.scorer))
            for pruner in plan
            if pruner.place == "tower"
        )
        size, padding = processor.image_size, processor.padding
        key = (images_digest(images), size, padding, early, vision)
        picture = self._pictures.get(key) or Picture()

        def remember() -> None:
            self._pictures[key] = picture
            self._pictures.move_to_end(key)
            while len(self._pictures) > self._size:
                self._pictures.popitem(last=False)

        if picture.visual is not None:
            remember()
        later = any(pruner.place != "tower" for pruner in plan)
        return Recollection(picture, remember, keeps_cache=not later)


class Recollection:
    """The remembered tokens and cache of one question's images.

    keeps_cache: whether the cache may be reused: no pruner after the tower.
    """

    def __init__(
        self, picture: Picture, remember: Callable[[], None], keeps_cache: bool
    ):
        self._picture, self._remember = picture, remember
        self._keeps_cache = keeps_cache

    @property
    def visual(self) -> VisualTokens | None:
        """Remembered visual tokens; `None` for images that are not encoded yet."""
        return self._picture.visual

    def look(self, vision: VisionStep | None) -> VisionStep:
        """Return a step that encodes with `vision` (or the model) only new images."""

        def recall(
            model: VisionModel, scene: Scene, plan: Plan, clock: NoClock
        ) -> VisualTokens:
            if self._picture.visual is None:
                visual = (vision or look)(model, scene, plan, clock)
                mx.eval(visual.embeddings, visual.indices)
                self._picture.visual = visual
                self._remember()
            return self._picture.visual

        return recall

    def fill(self, cache: list, prompt: Prompt, positions: str) -> int:
        """Fill `cache` with the remembered part of a prompt; return its token count."""
        picture = self._picture
        same = picture.opening == (prompt.segments[:-1], positions)
        if not (self._keeps_cache and picture.layers and same):
            return 0
        length = 0
        for layer, (keys, values) in zip(cache, picture.layers, strict=True):
            # Slices are new arrays: a cache writes into the arrays it holds.
            length = layer.offset = keys.shape[2]
            layer.keys, layer.values = keys[..., :length, :], values[..., :length, :]
        return length

    def keep(self, cache: list, prompt: Prompt, positions: str) -> None:
        """Remember `cache` up to the last visual token of the prompt."""
        if not self._keeps_cache:
            return
        picture, opening = self._picture, prompt.segments[:-1]
        length = sum(map(len, opening)) + prompt.places * picture.visual.keep
        layers = tuple(
            (_copied(layer.keys, length), _copied(layer.values, length))
            for layer in cache
        )
        mx.eval(layers)
        picture.opening, picture.layers = (opening, positions), layers


def _copied(array: mx.array, length: int) -> mx.array:
    """Copy the first tokens of (..., T, D); a slice would keep the whole array."""
    return mx.contiguous(array[..., :length, :]) + 0


def weights_digest(scorer: nn.Module | None) -> str:
    """Return a digest of a scorer's weights, because training changes its choice."""
    digest = hashlib.blake2b(digest_size=16)
    weights = dict(tree_flatten(scorer.parameters())) if scorer else {}
    for name, array in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()


def images_digest(images: Sequence[Image.Image]) -> str:
    """Return a digest of decoded RGB images, as hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=32)
    for image in images:
        digest.update(repr(image.size).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
