"""What is kept of the last pictures, so that another question about one is quick.

A picture is known by its pixels, and by everything that shapes what is made of them
before the prompt is looked at. Its visual tokens are kept; and, unless a pruner looks
at the prompt and may choose others for another question, the language model's cache up
to its last token, so that what follows in the prompt is all that has to be read.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from ..errors import InputError
from ..pipeline import Look, Scene, VisualTokens, look
from ..pipeline.timing import NoClock
from ..processing.prompt import Prompt
from ..pruners import Plan


@dataclass
class _Picture:
    """Visual tokens, and keys and values of each layer after the prompt `opening`."""

    visual: VisualTokens | None = None
    opening: Hashable = None
    layers: tuple[tuple[mx.array, mx.array], ...] = ()


class Memory:
    """The last `size` pictures (or sets of pictures) that were asked about.

    Belongs to one model with its weights as they are: another model empties it, and
    after changing weights `clear` must be called. Memory for each picture is that of
    its visual tokens and of its part of the prompt cache.
    """

    def __init__(self, size: int = 4):
        if not isinstance(size, int) or size < 1:
            raise InputError(f"cannot remember {size} pictures; the least is 1")
        self._size = size
        self._model = None
        self._pictures: OrderedDict[Hashable, _Picture] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pictures)

    def clear(self) -> None:
        self._pictures.clear()

    def about(
        self, model, processor, images: Sequence[Image.Image], plan: Plan, vision
    ) -> "Recollection":
        """What is known of these decoded RGB pictures, as `plan` and `vision` see them.

        Pictures that are new are remembered once somebody looks at them.
        """
        if self._model is not model:
            self.clear()
            self._model = model
        early = tuple(
            (pruner.key, _weights(pruner.scorer))
            for pruner in plan
            if pruner.place == "tower"
        )
        key = _picture_key(
            images, processor.image_size, processor.padding, early, vision
        )
        picture = self._pictures.get(key) or _Picture()

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
    """What a memory knows of the pictures of one question."""

    def __init__(self, picture: _Picture, remember, keeps_cache: bool):
        self._picture, self._remember = picture, remember
        self._keeps_cache = keeps_cache

    @property
    def visual(self) -> VisualTokens | None:
        return self._picture.visual

    def look(self, vision: Look | None) -> Look:
        """Looks as `vision` (or the model) does, unless the tokens are known."""

        def recall(model, scene: Scene, plan: Plan, clock: NoClock) -> VisualTokens:
            if self._picture.visual is None:
                visual = (vision or look)(model, scene, plan, clock)
                mx.eval(visual.embeddings, visual.indices)
                self._picture.visual = visual
                self._remember()
            return self._picture.visual

        return recall

    def fill(self, cache: list, prompt: Prompt, positions: str) -> int:
        """Fill `cache` with what is known of a prompt; gives how many tokens."""
        picture = self._picture
        same = picture.opening == (prompt.segments[:-1], positions)
        if not (self._keeps_cache and picture.layers and same):
            return 0
        known = 0
        for layer, (keys, values) in zip(cache, picture.layers, strict=True):
            # New arrays: a cache writes into those it holds.
            known = layer.offset = keys.shape[2]
            layer.keys, layer.values = keys[..., :known, :], values[..., :known, :]
        return known

    def keep(self, cache: list, prompt: Prompt, positions: str) -> None:
        """Remember the tokens of `cache` up to the last picture's."""
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
    """The first tokens of (..., T, D); a mere slice would keep all of them alive."""
    return mx.contiguous(array[..., :length, :]) + 0


def _weights(scorer: nn.Module | None) -> str:
    """Of a scorer as it is: one that has learned more chooses others."""
    digest = hashlib.blake2b(digest_size=16)
    weights = dict(tree_flatten(scorer.parameters())) if scorer else {}
    for name, array in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()


def _picture_key(images: Sequence[Image.Image], *settings: Hashable) -> Hashable:
    """Of decoded RGB pictures and of what else shapes their visual tokens."""
    digest = hashlib.blake2b(digest_size=32)
    for image in images:
        digest.update(repr(image.size).encode())
        digest.update(image.tobytes())
    return (digest.hexdigest(), *settings)
