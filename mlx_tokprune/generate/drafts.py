"""Drafts of answers: speculative decoding of text about images.

Drafts come from an n-gram of the prompt, from another model with its own image input,
or from the model itself with fewer visual tokens in its cache. They do not change the
answer; `models/speculative.py` gives the reason.
"""

from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import InputError
from ..models.language import ReadResult
from ..models.protocol import VisionModel
from ..models.speculative import Drafter, ModelDrafter, NgramDrafter, Sampling
from ..pipeline import Scene, VisualTokens, prune_at_prompt, run
from ..pipeline.planning import plan_for
from ..processing.processor import AnyProcessor, Processor, check_answers
from ..processing.prompt import Prompt
from ..pruners import Plan, Pruner, Pruners, as_plan
from .settings import Settings


@dataclass(frozen=True)
class PrefillResult:
    """Result of reading a question's prompt, from which drafts begin."""

    model: VisionModel
    images: list[Image.Image]
    prompt: Prompt
    read: ReadResult
    visual: VisualTokens
    settings: Settings

    @property
    def sampling(self) -> Sampling:
        """Sampling method of the answer."""
        return Sampling(self.settings.temp, self.settings.top_p)

    @property
    def vocabulary(self) -> int:
        """Tokens in the model's vocabulary."""
        return self.model.args.text["vocab_size"]


class Drafts(Protocol):
    """Method that drafts the tokens of answers."""

    @property
    def tokens(self) -> int:
        """Drafted tokens per call of the model."""
        ...

    def check(self, model: VisionModel, processor: AnyProcessor, plan: Plan) -> None:
        """Raise `InputError` unless it can draft for this model under this plan."""

    def begin(self, prefill: PrefillResult) -> Drafter:
        """Return the drafter of one answer."""
        ...


@dataclass(frozen=True)
class NgramDrafts:
    """Drafts by n-gram lookup in the prompt and in the answer so far.

    tokens: drafted tokens per call of the model.
    """

    tokens: int = 8

    def __post_init__(self):
        _check_tokens(self.tokens)

    def check(self, model: VisionModel, processor: AnyProcessor, plan: Plan) -> None:
        """Accept any model: n-grams need only its token ids."""

    def begin(self, prefill: PrefillResult) -> Drafter:
        """Return the drafter of one answer."""
        return NgramDrafter(prefill.prompt.ids())


@dataclass(frozen=True)
class ModelDrafts:
    """Drafts by another model with the same tokenizer, mostly a smaller one.

    It encodes the images itself, at its own input size and under its own `pruner`,
    after the first token; so this time counts as decoding. tokens: drafted tokens per
    call of the model.
    """

    model: VisionModel = field(repr=False)
    processor: Processor = field(repr=False)
    pruner: Pruners = None
    tokens: int = 3

    def __post_init__(self):
        _check_tokens(self.tokens)
        check_answers(self.processor)
        plan_for(self.model, self.pruner)

    def check(self, model: VisionModel, processor: AnyProcessor, plan: Plan) -> None:
        """Raise `InputError` unless both tokenizers have the same tokens."""
        own, other = self.processor.tokenizer, processor.tokenizer
        if own is other or own.get_vocab() == other.get_vocab():
            return
        raise InputError(
            f"the draft model's tokenizer has other tokens ({len(own.get_vocab())}) "
            f"than the model's ({len(other.get_vocab())}); expected a smaller model of "
            "the same family, such as FastVLM-0.5B for FastVLM-7B"
        )

    def begin(self, prefill: PrefillResult) -> Drafter:
        """Read the prompt with the draft model and return the drafter of one answer."""
        model, settings = self.model, prefill.settings
        pixels = mx.array(self.processor.pixels(prefill.images))
        read, _ = run(
            model,
            Scene(pixels, prefill.prompt),  # its ids are those of this model, too
            plan_for(model, self.pruner),
            positions=settings.positions,
            cache=model.decoder.make_cache(),
            step=settings.prefill_step_size,
        )
        return ModelDrafter(
            *(model.decoder, read.cache, prefill.sampling, prefill.vocabulary)
        )


@dataclass(frozen=True)
class SelfDrafts:
    """Drafts by the model itself, from a cache with fewer visual tokens.

    The prompt is not read again: the drafter's cache is a copy of the keys and values
    of all text tokens and of the visual tokens that `pruner` keeps at the prompt.
    tokens: drafted tokens per call of the model.
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

    def check(self, model: VisionModel, processor: AnyProcessor, plan: Plan) -> None:
        """Raise `InputError` for a plan after which layers hold different tokens."""
        if any(pruner.place != "tower" or pruner.has_own_count for pruner in plan):
            raise InputError(
                "a model drafts for itself under pruning at the tower, with a budget, "
                "or under none; leave out the draft, or choose such a method"
            )
        plan_for(model, (*plan, self.pruner))

    def begin(self, prefill: PrefillResult) -> Drafter:
        """Copy the kept part of the cache and return the drafter of one answer."""
        model, visual, cache = prefill.model, prefill.visual, prefill.read.cache
        scene, plan = Scene(None, prefill.prompt), as_plan(self.pruner)
        kept = prune_at_prompt(model, scene, plan, visual).indices
        rows = mx.array(_rows(prefill.prompt, np.array(visual.indices), np.array(kept)))
        dropped = cache[0].inner.offset - len(rows)
        layers = []
        for layer in cache:
            keys, values = layer.keys_and_values()
            layers.append((mx.take(keys, rows, axis=2), mx.take(values, rows, axis=2)))
        # The shift makes up for dropped rows, so that new tokens keep their positions.
        shifts = [layer.shift + dropped for layer in cache]
        parts = model.decoder.cache_of(layers, shifts)
        return ModelDrafter(
            *(model.decoder, parts, prefill.sampling, prefill.vocabulary)
        )


def _rows(prompt: Prompt, cached: np.ndarray, kept: np.ndarray) -> list[int]:
    """Return the cache rows of all text tokens and of the `kept` visual tokens.

    cached: (groups, N) indices of the visual tokens in the cache, ascending.
    """
    rows, start = list(range(len(prompt.segments[0]))), len(prompt.segments[0])
    for before, after, text in zip(cached, kept, prompt.segments[1:], strict=True):
        rows += (start + np.searchsorted(before, after)).tolist()
        start += len(before)
        rows += range(start, start + len(text))
        start += len(text)
    return rows


def _check_tokens(tokens: int) -> None:
    if not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"cannot draft {tokens!r} tokens at once; the least is 1")
