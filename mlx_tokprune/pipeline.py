"""The way of a picture: encode -> prune -> project -> splice -> prefill.

The only place that knows models, pruners and prompts together; every command calls
these functions. All but `measure_stages` are lazy and evaluate nothing, except the
chunks of a long prompt.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
from PIL import Image

from .features import Selection, StageTimes
from .models.fastvlm import FastVLM
from .prompt import Prompt, original_positions, splice
from .pruners import Pruner

POSITIONS = ("original", "contiguous")
PREFILL_STEP = 2048  # tokens of a prompt that are read at once, as in mlx-lm


@dataclass(frozen=True)
class VisualTokens:
    """The kept tokens of B pictures, ready to be spliced into a prompt.

    embeddings: (B, K, D). selection: which of the N tokens on `grid` they are. A grid
    that is not square is the middle of one whose padding was not encoded.
    """

    embeddings: mx.array
    selection: Selection
    grid: tuple[int, int]

    @property
    def total(self) -> int:
        """N, the tokens of one picture before pruning."""
        return self.grid[0] * self.grid[1]

    def places(self) -> tuple[mx.array, int]:
        """(B, K) places of the kept tokens on the square grid, and how many it has."""
        rows, columns = self.grid
        side, indices = max(self.grid), self.selection.indices
        if rows == columns:
            return indices, self.total
        top, left = (side - rows) // 2, (side - columns) // 2
        row, column = indices // columns + top, indices % columns + left
        return row * side + column, side * side


# What can stand in for `see`: a Core ML package.
Vision = Callable[[FastVLM, mx.array], VisualTokens]


@dataclass(frozen=True)
class Prefill:
    """A spliced prompt: embeddings (1, T, D), and positions (T,) unless contiguous.

    shift: what later tokens add to their cache offset.
    """

    embeddings: mx.array
    positions: mx.array | None
    shift: int


def see(model: FastVLM, pixels: mx.array, pruner: Pruner) -> VisualTokens:
    """(B, S, S, 3) pixels -> kept and projected visual tokens."""
    features = model.encode(pixels, pruner.needs)
    selection = pruner(features)
    embeddings = model.project(selection.apply(features.tokens))
    return VisualTokens(embeddings, selection, features.grid)


def assemble(
    model: FastVLM, prompt: Prompt, visual: VisualTokens, positions: str
) -> Prefill:
    """Splice pictures into the prompt, with `original` or `contiguous` positions."""
    embeddings = splice(prompt, model.embed, visual.embeddings)
    places, total = visual.places()
    if positions == "contiguous" or places.shape[1] == total:
        return Prefill(embeddings, None, 0)
    where, shift = original_positions(prompt, list(places), total)
    return Prefill(embeddings, where, shift)


def first_logits(
    model: FastVLM,
    prefill: Prefill,
    cache: list | None = None,
    known: int = 0,
    step: int = PREFILL_STEP,
) -> mx.array:
    """(1, V) logits after the last prompt token, filling `cache` when given.

    known: tokens of the prompt that are in `cache` already. step: tokens read at once.
    mlx-lm would read the weights twice, for the prompt and for its last token; here
    only that token goes through the output head, in the same call.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = cache or make_prompt_cache(model)
    embeddings, hidden = prefill.embeddings[:, known:], None
    with model.positions.using(prefill.positions, prefill.shift):
        for start in range(0, embeddings.shape[1], step):
            if hidden is not None:
                mx.eval([layer.state for layer in cache])
            part = embeddings[:, start : start + step]
            hidden = model.last_hidden_state(part, cache)
    return model.logits(hidden)[:, -1]


class Clock:
    """Milliseconds of named stages, each between evaluated results."""

    def __init__(self):
        self.times: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[list]:
        results: list = []
        start = time.perf_counter()
        yield results
        mx.eval(results)
        mx.synchronize()
        self.times[name] = (time.perf_counter() - start) * 1e3


def measure_stages(
    model: FastVLM,
    processor,
    images: Sequence[Image.Image],
    text: str,
    pruner: Pruner,
    positions: str,
    vision: Vision | None = None,
) -> StageTimes:
    """Run the path once from decoded pictures to the first token, fencing each stage.

    On a warm model the sum is a little larger than the time to first token without
    fences; the first run of a process is slower than both. All of `vision` counts as
    vision.
    """
    clock = Clock()
    with clock.stage("preprocess") as done:
        pixels = mx.array(processor.pixels(images))
        prompt = processor.prompt(text, len(images))
        done.append(pixels)
    if vision:
        with clock.stage("vision") as done:
            visual = vision(model, pixels)
            done.append(visual.embeddings)
        clock.times |= {"prune": 0.0, "project": 0.0}
    else:
        visual = _see_in_stages(model, pixels, pruner, clock)
    with clock.stage("prefill") as done:
        prefill = assemble(model, prompt, visual, positions)
        logits = first_logits(model, prefill)
        done.append(mx.argmax(logits, axis=-1))
    return StageTimes(**clock.times)


def _see_in_stages(
    model: FastVLM, pixels: mx.array, pruner: Pruner, clock: Clock
) -> VisualTokens:
    with clock.stage("vision") as done:
        features = model.encode(pixels, pruner.needs)
        done += [a for a in (features.tokens, features.attention) if a is not None]
    with clock.stage("prune") as done:
        selection = pruner(features)
        kept = selection.apply(features.tokens)
        done += [kept, selection.indices]
    with clock.stage("project") as done:
        visual = VisualTokens(model.project(kept), selection, features.grid)
        done.append(visual.embeddings)
    return visual
