"""What is kept of the last pictures, so that another question about one is quick.

A picture is known by its pixels, and by everything that shapes what is made of them.
Its visual tokens are kept, and the language model's cache up to its last token: what
follows in the prompt is all that a second question has to read.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from PIL import Image

from .errors import InputError
from .pipeline import Prefill, VisualTokens
from .prompt import Prompt


@dataclass
class _Picture:
    """Visual tokens, and keys and values of each layer after the prompt `opening`."""

    visual: VisualTokens
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

    def see(
        self, model, key: Hashable, look: Callable[[], VisualTokens]
    ) -> VisualTokens:
        """The visual tokens under `key`, from `look` when they are not known."""
        if self._model is not model:
            self.clear()
            self._model = model
        if key not in self._pictures:
            visual = look()
            mx.eval(visual.embeddings, visual.selection.indices)
            self._pictures[key] = _Picture(visual)
            while len(self._pictures) > self._size:
                self._pictures.popitem(last=False)
        self._pictures.move_to_end(key)
        return self._pictures[key].visual

    def recall(self, key: Hashable, opening: Hashable, cache: list) -> int:
        """Fill `cache` with what is known of a prompt; gives how many tokens that is.

        opening: what tells prompts apart up to the end of their last picture.
        """
        picture = self._pictures[key]
        if not picture.layers or picture.opening != opening:
            return 0
        known = picture.layers[0][0].shape[2]
        for layer, (keys, values) in zip(cache, picture.layers, strict=True):
            # New arrays: a cache writes into those it holds.
            layer.keys, layer.values = keys[..., :known, :], values[..., :known, :]
            layer.offset = known
        return known

    def keep(self, key: Hashable, opening: Hashable, cache: list, length: int) -> None:
        """Remember the first `length` tokens of `cache`; nothing if it is quantized."""
        from mlx_lm.models.cache import KVCache

        if all(type(layer) is KVCache for layer in cache):
            picture = self._pictures[key]
            picture.opening = opening
            picture.layers = tuple(
                (_copied(layer.keys, length), _copied(layer.values, length))
                for layer in cache
            )
            mx.eval(picture.layers)


def _copied(array: mx.array, length: int) -> mx.array:
    """The first tokens of (..., T, D); a mere slice would keep all of them alive."""
    return mx.contiguous(array[..., :length, :]) + 0


def picture_key(images: Sequence[Image.Image], *settings: Hashable) -> Hashable:
    """Of decoded RGB pictures and of what else shapes their visual tokens."""
    digest = hashlib.blake2b(digest_size=32)
    for image in images:
        digest.update(repr(image.size).encode())
        digest.update(image.tobytes())
    return (digest.hexdigest(), *settings)


def opening_of(prompt: Prompt, prefill: Prefill, positions: str) -> tuple:
    """(what tells prompts apart up to their last picture, how many tokens that is)."""
    rest = len(prompt.segments[-1])
    opening = (prompt.segments[:-1], positions)
    return opening, prefill.embeddings.shape[1] - rest
