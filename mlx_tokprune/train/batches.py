"""Batches of questions about pictures, whose features are computed once and kept."""

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..features import Features
from ..models.protocol import VisionModel
from ..processing.processor import Processor
from .packing import Questions, padded
from .samples import Sample

MOST_BYTES = 4 << 30  # of features that are kept


@dataclass(frozen=True)
class Batch:
    """B pictures with Q questions each.

    samples, asked: what was drawn, and each one's questions with their answers.
    features: of the pictures, before the projector. prefix: token ids before a picture.
    questions: prompts with their answers. prompt: (B, Q, L) bool, where the tokens of
    `questions` are the prompt's.
    """

    samples: tuple[Sample, ...]
    asked: tuple[tuple[tuple[str, str], ...], ...]
    features: Features
    prefix: tuple[int, ...]
    questions: Questions
    prompt: mx.array


class Batches:
    """Draws batches from samples, each from its own seed."""

    def __init__(
        self,
        model: VisionModel,
        processor: Processor,
        samples: Sequence[Sample],
        needs: tuple[str, ...] = (),
    ):
        if not isinstance(processor, Processor):
            raise InputError("only models that answer in words are trained here")
        self._model, self._processor, self._needs = model, processor, needs
        self.samples = tuple(samples)
        self._known: OrderedDict[Hashable, Features] = OrderedDict()
        self._held = 0
        (self._end,) = processor.tokenizer.encode(
            "<|im_end|>", add_special_tokens=False
        )

    def draw(self, seed: tuple[int, ...], pictures: int, questions: int) -> Batch:
        """`questions` about each of `pictures`; they repeat where there are fewer."""
        rng = np.random.default_rng(seed)
        count = len(self.samples)
        chosen = rng.choice(count, pictures, replace=pictures > count)
        items = [self.samples[number] for number in chosen]
        asked = []
        for item in items:
            repeat = questions > len(item.pairs)
            picked = rng.choice(len(item.pairs), questions, replace=repeat)
            asked.append([item.pairs[number] for number in picked])
        return self.of(items, asked)

    def of(self, items: Sequence[Sample], asked: Sequence[Sequence[tuple]]) -> Batch:
        """These questions with their answers about these pictures."""
        rows = [[self._ids(*pair) for pair in pairs] for pairs in asked]
        prefix = rows[0][0][0]
        pairs = [[(before, answer) for _, before, answer in row] for row in rows]
        seen = self._features(items)
        known = tuple(items), tuple(map(tuple, asked))
        return Batch(*known, seen, prefix, *padded(pairs))

    def _ids(self, question: str, answer: str) -> tuple[tuple, tuple, list[int]]:
        before, after = self._processor.prompt(question, 1).segments
        encode = self._processor.tokenizer.encode
        return before, after, [*encode(answer, add_special_tokens=False), self._end]

    def _read(self, items: Collection[Sample]) -> Iterator[np.ndarray]:
        """Pixels of each picture, decoded or drawn on several cores."""
        with ThreadPoolExecutor() as pool:
            yield from pool.map(lambda i: self._processor.pixels([i.load()]), items)

    def _features(self, items: Sequence[Sample]) -> Features:
        new = {item.picture: item for item in items if item.picture not in self._known}
        # One by one, so that features are the same whoever is in the batch.
        for item, pixels in zip(new.values(), self._read(new.values()), strict=True):
            found = self._model.encode(mx.array(pixels), self._needs)
            self._known[item.picture] = found
            self._held += sum(array.nbytes for array in found.arrays())
        mx.eval([self._known[picture].arrays() for picture in new])
        seen = [self._known[item.picture] for item in items]
        while self._held > MOST_BYTES and len(self._known) > len(items):
            _, dropped = self._known.popitem(last=False)
            self._held -= sum(array.nbytes for array in dropped.arrays())
        extras = {
            name: mx.concatenate([features.extras[name] for features in seen])
            for name in seen[0].extras
        }
        tokens = mx.concatenate([features.tokens for features in seen])
        return Features(tokens, seen[0].grid, extras=extras)
