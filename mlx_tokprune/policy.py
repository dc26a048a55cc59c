"""`Policy`: a robot policy in a control loop, compiled, for one robot or for many."""

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from . import control
from .act_inputs import (
    action_bounds,
    check_finite,
    check_images,
    check_model,
    check_positions,
    check_pruner,
    normalize_states,
)
from .commands import DEFAULT_POSITIONS
from .control import Observation, Patches
from .drafting import correct_draft, read_draft
from .errors import InputError
from .features import Features, Selection
from .models.openvla import OpenVLA
from .prompt import check_text
from .pruners import Pruner

_BUCKET = 8  # visual tokens by which compiled shapes grow where counts vary


class Policy:
    """A policy in a control loop: `action = policy(images, instruction)`.

    Holds model, pruner and data set. Each shape is compiled once, so that the second
    call of a shape (batch, length of the instruction, and for methods with a count of
    their own its multiple of 8) does not compile again. Nothing of one observation
    reaches the next; `reset` between episodes forgets the tokens of past instructions.
    draft: guess that tokens are those of the last action, and have the model check them
    in one call; actions stay the same. `kept` is how many visual tokens the last call
    had per robot, on average; `calls` how often it ran the language model.
    """

    def __init__(
        self,
        model: OpenVLA,
        processor,
        *,
        pruner: Pruner | None = None,
        positions: str = DEFAULT_POSITIONS,
        unnorm_key: str | None = None,
        compile: bool = True,
        draft: bool = False,
    ):
        check_model(model, processor)
        check_positions(positions)
        self.model, self.processor = model, processor
        self.pruner = check_pruner(pruner)
        self.positions = positions
        self.unnorm_key = unnorm_key
        self.bounds = action_bounds(model, processor, unnorm_key)
        self._pictures = model.args.pictures
        wrap = mx.compile if compile else (lambda function: function)
        self._whole = wrap(self._act_on_pixels)
        self._features = wrap(self._encode)
        self._rest = wrap(self._act_on_patches)
        self._read = wrap(self._read_draft)
        if draft and (model.args.oft or self.pruner.has_own_count):
            raise InputError(
                "drafts are for policies that decode tokens, under a method with a "
                "budget; leave out draft"
            )
        self._drafts = draft
        self.kept, self.calls = 0.0, 0
        self.reset()

    def reset(self) -> None:
        """Begin an episode."""
        self._prompt = functools.lru_cache(maxsize=16)(self.processor.prompt)
        self._last: mx.array | None = None

    def __call__(
        self, images: Sequence, instruction: str, proprio: Sequence[float] | None = None
    ) -> np.ndarray:
        """(A,) action in robot units, or (chunk, A) from OpenVLA-OFT."""
        states = None if proprio is None else [proprio]
        return self.act_on_batch([images], instruction, states)[0]

    def act_on_batch(
        self,
        batch: Sequence[Sequence],
        instruction: str,
        proprio: Sequence[Sequence[float]] | None = None,
    ) -> np.ndarray:
        """(B, A) or (B, chunk, A) for B robots that were told the same.

        batch: the pictures of each robot. proprio: the state of each.
        """
        if not isinstance(batch, Sequence) or not len(batch):
            raise InputError("the batch is empty; expected the pictures of one robot")
        robots = [check_images(self.model, images) for images in batch]
        state = normalize_states(
            self.model, self.processor, proprio, self.unnorm_key, len(batch)
        )
        pixels = mx.array(self.processor.pixels([i for some in robots for i in some]))
        check_text(instruction, "the instruction")
        start, prompt = self._prompt(instruction)
        args = (pixels, mx.array([start]), mx.array(prompt))
        args += () if state is None else (state,)
        steps = len(self.bounds.low)
        self.calls = 1 if self.model.args.oft else steps
        if self.pruner.has_own_count:
            result = self._act_with_own_count(args)
        elif self._last is not None and len(self._last) == len(batch):
            result = self._act_with_draft(self._last, args)
        else:
            result, indices = self._whole(*args)
            self.kept = indices.shape[1]
        if self._drafts:
            self._last = result
        normalized = self._normalized(result)
        return self.bounds.to_units(normalized)

    def _normalized(self, result: mx.array) -> np.ndarray:
        if self.model.args.oft:
            return check_finite(np.array(result.astype(mx.float32)))
        return self.processor.values(np.array(result))

    def _observation(self, pixels, start, prompt, *state) -> Observation:
        return Observation(pixels, start, prompt, self._pictures, *state)

    def _finish(self, observation: Observation, patches: Patches) -> mx.array:
        sequence = control.assemble(self.model, observation, patches, self.positions)
        if self.model.args.oft:
            return control.regress(self.model, sequence)
        steps = len(self.bounds.low)
        return mx.stack(control.decode(self.model, sequence, steps), axis=1)

    def _act_on_pixels(self, *args) -> tuple[mx.array, mx.array]:
        observation = self._observation(*args)
        features = control.encode(self.model, observation, self.pruner.needs)
        patches = control.see(self.model, observation, self.pruner, features)
        return self._finish(observation, patches), patches.indices

    def _read_draft(self, draft, *args) -> tuple:
        observation = self._observation(*args)
        features = control.encode(self.model, observation, self.pruner.needs)
        patches = control.see(self.model, observation, self.pruner, features)
        sequence = control.assemble(self.model, observation, patches, self.positions)
        greedy, layers = read_draft(self.model, sequence, draft)
        where = [] if sequence.positions is None else [sequence.positions]
        return greedy, layers, patches.indices, sequence.embeddings, where

    def _act_with_draft(self, draft: mx.array, args: tuple) -> mx.array:
        """Only what the draft had wrong is decoded after the compiled call."""
        greedy, layers, indices, embeddings, where = self._read(draft, *args)
        self.kept = indices.shape[1]
        sequence = control.Sequence(embeddings, where[0] if where else None, None)
        tokens, more = correct_draft(self.model, sequence, draft, greedy, layers)
        self.calls = 1 + more
        return tokens

    def _encode(self, *args) -> mx.array:
        return control.encode(self.model, self._observation(*args)).tokens

    def _act_on_patches(self, embeddings, indices, mask, *args) -> mx.array:
        side = self.model.args.towers[0].side
        total = side * side * self._pictures
        selection = Selection(indices, mask=mask)
        patches = Patches(embeddings, indices, mask, total, (side, side), selection)
        return self._finish(self._observation(*args), patches)

    def _act_with_own_count(self, args: tuple) -> mx.array:
        """The count is only known once the pruner has run: compile around it."""
        observation = self._observation(*args)
        side = self.model.args.towers[0].side
        features = Features(self._features(*args), (side, side))
        patches = control.see(self.model, observation, self.pruner, features)
        self.kept = patches.indices.shape[1]
        if patches.mask is not None:
            self.kept = mx.mean(mx.sum(patches.mask, axis=1)).item()
        return self._rest(*_padded(patches), *args)


def _padded(patches: Patches) -> tuple[mx.array, mx.array, mx.array]:
    """Embeddings, indices and mask of the next multiple of `_BUCKET` tokens."""
    batch, kept = patches.indices.shape
    more = min(-kept % _BUCKET, patches.total - kept)
    mask = patches.mask
    mask = mx.ones((batch, kept), mx.bool_) if mask is None else mask
    return (
        mx.pad(patches.embeddings, ((0, 0), (0, more), (0, 0))),
        mx.pad(patches.indices, ((0, 0), (0, more))),
        mx.pad(mask, ((0, 0), (0, more))),
    )
