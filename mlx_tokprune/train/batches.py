"""Batches of questions about pictures, with a cache of the pictures' features."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..features import Features
from ..models.protocol import VisionModel
from ..processing.processor import AnyProcessor, check_answers
from .packing import Questions, padded
from .samples import Sample

MOST_BYTES = 4 << 30  # limit of the feature cache


@dataclass(frozen=True)
class Batch:
    """Training batch: B pictures with Q questions each.

    samples: the B drawn samples. pairs: Q pairs of question and answer for each.
    features: of the pictures, before the projector. prefix: token ids before a picture.
    questions: token ids of prompts with their answers. prompt: (B, Q, L) bool, true for
    the prompt's tokens in `questions`.
    """

    samples: tuple[Sample, ...]
    pairs: tuple[tuple[tuple[str, str], ...], ...]
    features: Features
    prefix: tuple[int, ...]
    questions: Questions
    prompt: mx.array


class Batches:
    """Source of batches: draws samples by seed, and encodes each picture once.

    needs: extras of `Features` that the tower must return. Raises `InputError` for a
    processor of a policy, which does not answer in words.
    """

    def __init__(
        self,
        model: VisionModel,
        processor: AnyProcessor,
        samples: Sequence[Sample],
        needs: tuple[str, ...] = (),
    ):
        processor = check_answers(processor)
        self._model, self._processor, self._needs = model, processor, needs
        self.samples = tuple(samples)
        # By picture, oldest first; dropped beyond `MOST_BYTES`.
        self._cache: OrderedDict[Hashable, Features] = OrderedDict()
        self._cached_bytes = 0
        (self._end,) = processor.tokenizer.encode(
            "<|im_end|>", add_special_tokens=False
        )

    def draw(self, seed: tuple[int, ...], pictures: int, questions: int) -> Batch:
        """Draw a batch of `pictures`, with `questions` about each.

        Both repeat where the samples have fewer.
        """
        rng = np.random.default_rng(seed)
        count = len(self.samples)
        chosen = rng.choice(count, pictures, replace=pictures > count)
        items = [self.samples[number] for number in chosen]
        pairs = []
        for item in items:
            repeat = questions > len(item.pairs)
            picked = rng.choice(len(item.pairs), questions, replace=repeat)
            pairs.append([item.pairs[number] for number in picked])
        return self.of(items, pairs)

    def of(
        self, items: Sequence[Sample], pairs: Sequence[Sequence[tuple[str, str]]]
    ) -> Batch:
        """Return the batch of these pictures and their pairs of question and answer."""
        rows = [[self._ids(*pair) for pair in row] for row in pairs]
        prefix = rows[0][0][0]
        ids = [[(before, answer) for _, before, answer in row] for row in rows]
        drawn = tuple(items), tuple(map(tuple, pairs))
        return Batch(*drawn, self._features(items), prefix, *padded(ids))

    def _ids(self, question: str, answer: str) -> tuple[tuple, tuple, list[int]]:
        """Return token ids before the picture, after it, and of the answer."""
        before, after = map(tuple, self._processor.prompt(question, 1).segments)
        encode = self._processor.tokenizer.encode
        return before, after, [*encode(answer, add_special_tokens=False), self._end]

    def _features(self, items: Sequence[Sample]) -> Features:
        """Return the features of these pictures, joined; encode the new ones."""
        new = {item.picture: item for item in items if item.picture not in self._cache}
        with ThreadPoolExecutor() as pool:  # pictures are decoded or drawn on all cores
            every = pool.map(lambda i: self._processor.pixels([i.load()]), new.values())
            # One by one, so that features do not depend on the rest of the batch.
            for picture, pixels in zip(new, every, strict=True):
                encoded = self._model.encode(mx.array(pixels), self._needs)
                self._cache[picture] = encoded
                self._cached_bytes += sum(array.nbytes for array in encoded.arrays())
        mx.eval([self._cache[picture].arrays() for picture in new])
        parts = [self._cache[item.picture] for item in items]
        while self._cached_bytes > MOST_BYTES and len(self._cache) > len(items):
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= sum(array.nbytes for array in dropped.arrays())
        extras = {
            name: mx.concatenate([features.extras[name] for features in parts])
            for name in parts[0].extras
        }
        tokens = mx.concatenate([features.tokens for features in parts])
        return Features(tokens, parts[0].grid, extras=extras)
