"""What drafts the tokens of an answer about pictures.

An n-gram of the prompt, another model with a picture of its own, or the model itself
with fewer visual tokens in its cache. None of them changes the answer; `speculative.py`
says why.
"""

from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import InputError
from ..models.language import Read
from ..models.protocol import VisionModel
from ..models.speculative import Drafter, ReadingAlong, Repeating, Sampling
from ..pipeline import Scene, VisualTokens, ask, prune_at_prompt, run
from ..pipeline.planning import plan_for
from ..processing.processor import Processor
from ..processing.prompt import Prompt
from ..pruners import Plan, Pruner, Pruners, as_plan
from .settings import Settings


@dataclass(frozen=True)
class Begun:
    """A question whose prompt has been read."""

    model: VisionModel
    images: list[Image.Image]
    text: str
    prompt: Prompt
    read: Read
    visual: VisualTokens
    settings: Settings

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.settings.temp, self.settings.top_p)

    @property
    def vocabulary(self) -> int:
        return self.model.args.text["vocab_size"]


class Drafts(Protocol):
    """What can draft an answer. tokens: how many at once."""

    @property
    def tokens(self) -> int: ...

    def check(self, model: VisionModel, processor: Processor, plan: Plan) -> None:
        """Raise `InputError` unless it can draft for this model under this plan."""

    def begin(self, begun: Begun) -> Drafter: ...


@dataclass(frozen=True)
class NgramDrafts:
    """Drafts what followed the same tokens in the prompt or earlier in the answer."""

    tokens: int = 8

    def __post_init__(self):
        _check_tokens(self.tokens)

    def check(self, model: VisionModel, processor: Processor, plan: Plan) -> None:
        """Every model can be drafted for."""

    def begin(self, begun: Begun) -> Drafter:
        segments = begun.prompt.segments
        return Repeating([int(token) for part in segments for token in part])


@dataclass(frozen=True)
class ModelDrafts:
    """Drafts by another model, mostly a smaller one, of the same tokens.

    It looks at the pictures itself, in its own size and under its own `pruner`; that
    happens after the first token, and so counts as decoding.
    """

    model: VisionModel = field(repr=False)
    processor: Processor = field(repr=False)
    pruner: Pruners = None
    tokens: int = 3

    def __post_init__(self):
        _check_tokens(self.tokens)
        if not isinstance(self.processor, Processor):
            raise InputError("a policy cannot draft words; give a model that answers")
        plan_for(self.model, self.pruner)

    def check(self, model: VisionModel, processor: Processor, plan: Plan) -> None:
        """Raise `InputError` unless both have the same tokens."""
        own, other = self.processor.tokenizer, processor.tokenizer
        if own is other or own.get_vocab() == other.get_vocab():
            return
        raise InputError(
            f"the draft model's tokenizer has other tokens ({len(own.get_vocab())}) "
            f"than the model's ({len(other.get_vocab())}); expected a smaller model of "
            "the same family, such as FastVLM-0.5B for FastVLM-7B"
        )

    def begin(self, begun: Begun) -> Drafter:
        model, settings = self.model, begun.settings
        read, _ = run(
            model,
            ask(self.processor, begun.images, begun.text),
            plan_for(model, self.pruner),
            positions=settings.positions,
            cache=model.decoder.make_cache(),
            step=settings.prefill_step_size,
        )
        known = (begun.sampling, begun.vocabulary)
        return ReadingAlong(model.decoder, read.cache, *known)


@dataclass(frozen=True)
class SelfDrafts:
    """Drafts by the model itself, from a cache with fewer visual tokens.

    No prompt is read again: keys and values of those that `pruner` chooses, at the
    prompt, and of all text are copied.
    """

    pruner: Pruner = field(default_factory=lambda: Pruner("norm", 0.25, at="prompt"))
    tokens: int = 3

    def __post_init__(self):
        _check_tokens(self.tokens)
        if self.pruner.place != "prompt" or self.pruner.has_own_count:
            raise InputError(
                "a model's own drafts are pruned at the prompt, with a budget; say "
                "such as norm:0.25@prompt"
            )

    def check(self, model: VisionModel, processor: Processor, plan: Plan) -> None:
        """Raise `InputError` where layers hold different tokens."""
        if any(pruner.place != "tower" or pruner.has_own_count for pruner in plan):
            raise InputError(
                "a model drafts for itself under pruning at the tower, with a budget, "
                "or under none; leave out the draft, or choose such a method"
            )
        plan_for(model, (*plan, self.pruner))

    def begin(self, begun: Begun) -> Drafter:
        decoder, visual, cache = begun.model.decoder, begun.visual, begun.read.cache
        scene, plan = Scene(None, begun.prompt), as_plan(self.pruner)
        kept = prune_at_prompt(begun.model, scene, plan, visual).indices
        rows = mx.array(_rows(begun.prompt, np.array(visual.indices), np.array(kept)))
        dropped = cache[0].inner.offset - len(rows)
        layers = []
        for layer in cache:
            keys, values = layer.keys_and_values()
            layers.append((mx.take(keys, rows, axis=2), mx.take(values, rows, axis=2)))
        parts = decoder.cache_of(layers, [layer.shift + dropped for layer in cache])
        return ReadingAlong(decoder, parts, begun.sampling, begun.vocabulary)


def _rows(prompt: Prompt, there: np.ndarray, kept: np.ndarray) -> list[int]:
    """Of a cache with text and visual tokens (groups, N): those of text and `kept`."""
    rows, start = list(range(len(prompt.segments[0]))), len(prompt.segments[0])
    for before, after, text in zip(there, kept, prompt.segments[1:], strict=True):
        rows += (start + np.searchsorted(before, after)).tolist()
        start += len(before)
        rows += range(start, start + len(text))
        start += len(text)
    return rows


def _check_tokens(tokens: int) -> None:
    if not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"cannot draft {tokens!r} tokens at once; the least is 1")
