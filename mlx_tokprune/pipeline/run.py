"""The path of a picture: encode -> prune -> project -> assemble -> read.

The only module that combines models, pruners and prompts. All code that answers, acts,
measures, exports or trains calls `run` or one of its steps; training builds its own
sequences where it packs questions behind one picture or gates tokens
(`train/packing.py`, `train/policy`). Everything is lazy, except the chunks of a long
prompt, methods with their own count, and the stages of a clock.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..features import PER_TOKEN, Features, Selection
from ..models.language import PREFILL_STEP, ReadResult, TokenSequence
from ..models.protocol import VisionModel
from ..processing.processor import Processor
from ..processing.prompt import Prompt
from ..pruners import Place, Plan, Pruner
from .timing import NO_CLOCK, NoClock

POSITIONS = ("original", "contiguous")
DEFAULT_POSITIONS = "original"


@dataclass(frozen=True)
class Scene:
    """The pixels, prompt and run-time inputs of B samples.

    pixels: (B * G * n, h, w, 3), ordered by sample, then by the G places of the prompt,
        then by the n pictures of a place; `None` if `vision` provides visual tokens.
    state: (B, p) normalised robot states, or `None`.
    extras: inputs of pruners at the prompt from outside picture and prompt, by their
        names in `Features`, batch first.
    """

    pixels: mx.array | None
    prompt: Prompt
    batch: int = 1
    state: mx.array | None = None
    extras: Mapping[str, mx.array] = field(default_factory=dict)


@dataclass(frozen=True)
class VisualTokens:
    """The kept visual tokens, ready for a prompt.

    A group is one place of the prompt: `pictures` pictures, with tokens numbered
    through all of them.

    embeddings: (groups, K, D).
    indices: (groups, K), the numbers of the kept tokens among the N of a group.
    mask: (groups, K) bool, false for padding where groups keep different counts, else
        `None`.
    selection: of the last pruner before the language model, by picture or by group.
    grid: (H, W) of one picture. A grid that is not square is the middle of a square
        one, without its padding.
    choices: for each pruner its place and its kept tokens: (groups, K), among the N
        tokens; inside the language model (B, K), among the tokens of all groups that
        reached the place.
    attended: (B, R, M) attention from the last R tokens to all M visual tokens of the
        language model's input; `None` without `attention_of`.
    """

    embeddings: mx.array
    indices: mx.array
    selection: Selection
    grid: tuple[int, int]
    pictures: int = 1
    mask: mx.array | None = None
    choices: tuple[tuple[Place, mx.array], ...] = ()
    attended: mx.array | None = None

    @property
    def keep(self) -> int:
        """K, the visual tokens of a group that reach the language model."""
        return self.indices.shape[1]

    @property
    def total(self) -> int:
        """N, the visual tokens of a group before pruning."""
        return self.pictures * self.grid[0] * self.grid[1]

    def left(self) -> list[list[int]]:
        """Return the tokens left after all places, by group of one sample."""
        places = self.by_place()
        return places[-1][1] if places else self._real(self.indices)

    def by_place(self) -> list[tuple[Place, list[list[int]]]]:
        """Return each place with the tokens left after it, by group of one sample."""
        left_after, (groups, keep) = [], self.indices.shape
        group = np.repeat(np.arange(groups), keep)
        index = np.array(self.indices).reshape(-1)
        for place, chosen in self.choices:
            if isinstance(place, str):
                left_after.append((place, self._real(chosen)))
                continue
            rows = np.array(chosen[0])
            group, index = group[rows], index[rows]
            by_group = [index[group == i].tolist() for i in range(groups)]
            left_after.append((place, by_group))
        return left_after

    def _real(self, indices: mx.array) -> list[list[int]]:
        """Remove padding, which only the indices of the last pruner can have."""
        rows = np.array(indices)
        if self.mask is None or rows.shape != self.mask.shape:
            return rows.tolist()
        return [r[m].tolist() for r, m in zip(rows, np.array(self.mask), strict=True)]

    def per_picture(self, groups: list[list[int]]) -> list[np.ndarray]:
        """Return the tokens of groups, numbered within each picture."""
        each, pictures = self.grid[0] * self.grid[1], range(self.pictures)
        kept = [np.array(group, int) for group in groups]
        return [group[group // each == i] % each for group in kept for i in pictures]

    def chosen_at(self, place: Place) -> "VisualTokens":
        """Return a copy that records the present tokens as the choice at `place`."""
        choices = (*self.choices, (place, self.indices))
        return dataclasses.replace(self, choices=choices)

    def on_squares(self) -> tuple[mx.array, int]:
        """Return positions (groups, K) on square grids, and the cells of a group."""
        rows, columns = self.grid
        if rows == columns:
            return self.indices, self.total
        side, each = max(self.grid), rows * columns
        top, left = (side - rows) // 2, (side - columns) // 2
        picture, index = self.indices // each, self.indices % each
        row, column = index // columns + top, index % columns + left
        square = picture * side * side + row * side + column
        return square, self.pictures * side * side


_ALL = Pruner("none")
# A replacement of `look`: for frames of a video, or a Core ML package.
VisionStep = Callable[[VisionModel, Scene, Plan, NoClock], VisualTokens]


def run(
    model: VisionModel,
    scene: Scene,
    plan: Plan = (),
    *,
    positions: str = DEFAULT_POSITIONS,
    vision: VisionStep | None = None,
    after: mx.array | None = None,
    rows: int = 1,
    cache: list | None = None,
    cached: int = 0,
    step: int = PREFILL_STEP,
    attention_of: int | None = None,
    clock: NoClock = NO_CLOCK,
) -> tuple[ReadResult, VisualTokens]:
    """Run the language model on a scene, pruned by a plan.

    vision: replaces `look`, the model's tower and its pruner.
    after: (B, L) token ids to read behind the prompt.
    rows: last tokens of the prompt to return states for, besides all of `after`.
    cache, cached, step, attention_of: arguments of `Decoder.read`.

    Raises `InputError` if a pruner follows a tower whose pictures keep different
    numbers of tokens.
    """
    visual = (vision or look)(model, scene, plan, clock)
    if visual.mask is not None and any(pruner.place != "tower" for pruner in plan):
        raise InputError(
            "a method that keeps a different number of visual tokens of each picture "
            "cannot be followed by a pruner at a later place"
        )
    visual = prune_at_prompt(model, scene, plan, visual, clock)
    with clock.stage("prefill") as done:
        sequence = assemble(model, scene, visual, plan, positions)
        if after is not None:
            sequence = sequence.extended(model.decoder.embed(after))
            rows += after.shape[1]
        layers = [pruner for pruner in plan if pruner.place == "layer"]
        read = model.decoder.read(
            sequence,
            cache,
            rows=rows,
            plan=layers,
            cached=cached,
            step=step,
            attention_of=attention_of,
        )
        done.append(read.hidden)
    later = tuple((layer, selection.indices) for layer, selection in read.choices)
    choices = visual.choices + later
    visual = dataclasses.replace(visual, choices=choices, attended=read.attended)
    return read, visual


def ask(processor: Processor, images: Sequence, text: str) -> Scene:
    """Return the scene of decoded pictures and a question about them."""
    pixels = mx.array(processor.pixels(images))
    return Scene(pixels, processor.prompt(text, len(images)))


# The steps --------------------------------------------------------------------------


def look(
    model: VisionModel, scene: Scene, plan: Plan, clock: NoClock = NO_CLOCK
) -> VisualTokens:
    """Encode the pictures, prune at the tower and project."""
    return prune_at_tower(model, scene, plan, encode(model, scene, plan, clock), clock)


def encode(
    model: VisionModel, scene: Scene, plan: Plan, clock: NoClock = NO_CLOCK
) -> Features:
    """Return the tower's features of every picture, with the plan's extras."""
    needs = tower_needs(plan)
    with clock.stage("vision") as done:
        features = model.encode(_pixels(scene), needs, scene.prompt)
        done += features.arrays()
    return features


def tower_needs(plan: Plan) -> tuple[str, ...]:
    """Return the extras of `Features` that a plan reads at the tower."""
    read = [pruner.reads for pruner in plan if pruner.place == "tower"]
    return tuple(dict.fromkeys(itertools.chain(*read)))


def _pixels(scene: Scene) -> mx.array:
    if scene.pixels is None:
        raise ValueError("the scene has no pixels to encode")
    return scene.pixels


def prune_at_tower(
    model: VisionModel,
    scene: Scene,
    plan: Plan,
    features: Features,
    clock: NoClock = NO_CLOCK,
) -> VisualTokens:
    """Prune at the tower, each picture by itself, and project the kept tokens."""
    pruner = _at(plan, "tower") or _ALL
    with clock.stage("prune") as done:
        selection = pruner(features)
        tokens = features.tokens
        kept = tokens if selection.keep == features.total else selection.apply(tokens)
        done += [kept, *selection.arrays().values()]
    with clock.stage("project") as done:
        embeddings = model.project(kept)
        done.append(embeddings)
    groups = scene.batch * scene.prompt.places
    grid = features.grid or (1, features.total)
    visual = grouped(embeddings, selection, grid, groups)
    return visual if pruner is _ALL else visual.chosen_at("tower")


def grouped(
    embeddings: mx.array, selection: Selection, grid: tuple[int, int], groups: int
) -> VisualTokens:
    """Join the projected tokens (pictures, K, D) of each group."""
    pictures, kept, size = embeddings.shape
    each = pictures // groups
    offsets = mx.arange(pictures) % each * (grid[0] * grid[1])
    indices = (selection.indices + offsets[:, None]).reshape(groups, each * kept)
    mask = selection.mask
    return VisualTokens(
        embeddings.reshape(groups, each * kept, size),
        indices.astype(mx.int32),
        selection,
        grid,
        each,
        None if mask is None else mask.reshape(groups, each * kept),
    )


def prune_at_prompt(
    model: VisionModel,
    scene: Scene,
    plan: Plan,
    visual: VisualTokens,
    clock: NoClock = NO_CLOCK,
) -> VisualTokens:
    """Prune by the prompt, among the tokens of all pictures of a group."""
    pruner = _at(plan, "prompt")
    if pruner is None:
        return visual
    with clock.stage("prune") as done:
        selection = pruner(_prompt_features(model, scene, pruner, visual).fixed)
        embeddings = selection.apply(visual.embeddings)
        indices = mx.take_along_axis(visual.indices, selection.indices, axis=1)
        done += [embeddings, indices]
    if visual.keep < visual.total:  # a pruner at the tower ran before
        selection = Selection(indices, mask=selection.mask)
    return dataclasses.replace(
        visual,
        embeddings=embeddings,
        indices=indices,
        selection=selection,
        mask=selection.mask,
    ).chosen_at("prompt")


def _prompt_features(
    model: VisionModel, scene: Scene, pruner: Pruner, visual: VisualTokens
) -> Features:
    """Return visual tokens at the language model's input, with the pruner's extras."""
    tokens, reads, extras = visual.embeddings, pruner.reads, {}
    text = model.text(scene.prompt, scene.state)[-1].astype(tokens.dtype)
    if "text" in reads:
        shape = (tokens.shape[0], *text.shape[1:])
        extras["text"] = mx.broadcast_to(text, shape)
    if "queries" in reads or "text_keys" in reads:
        prepared = pruner.prepare(tokens), pruner.prepare(text)
        queries, keys = model.decoder.queries_and_keys(*prepared)
        keys = mx.broadcast_to(keys, (tokens.shape[0], *keys.shape[1:]))
        extras |= {"queries": queries, "text_keys": keys}
    for name in scene.extras.keys() & set(reads):
        array = scene.extras[name]
        if name in PER_TOKEN:
            array = mx.take_along_axis(array, visual.indices, axis=1)
        extras[name] = array
    whole = visual.keep == visual.total
    grid = visual.grid if whole else None
    return Features(tokens, grid, visual.pictures if whole else 1, extras)


def assemble(
    model: VisionModel,
    scene: Scene,
    visual: VisualTokens,
    plan: Plan = (),
    positions: str = DEFAULT_POSITIONS,
) -> TokenSequence:
    """Join texts and visual tokens to one sequence.

    positions: `original` keeps the positions of the unpruned sequence, `contiguous`
    numbers the kept tokens without gaps.
    """
    texts, batch = model.text(scene.prompt, scene.state), scene.batch
    where, total = visual.on_squares()
    # Groups are ordered by sample, then by place in the prompt.
    tokens, where = (
        array.reshape(batch, -1, *array.shape[1:])
        for array in (visual.embeddings, where)
    )
    masks = None
    if visual.mask is not None:
        masks = visual.mask.reshape(batch, -1, visual.keep)
    parts, places, keys, slices, start, length = [], [], [], [], 0, 0
    for number, text in enumerate(texts):
        size = text.shape[1]
        parts.append(mx.broadcast_to(text, (batch, *text.shape[1:])))
        places.append(mx.broadcast_to(start + mx.arange(size), (batch, size)))
        keys.append(mx.ones((batch, size), mx.bool_))
        start, length = start + size, length + size
        if number < scene.prompt.places:
            parts.append(tokens[:, number].astype(text.dtype))
            places.append(start + where[:, number])
            keys += [] if masks is None else [masks[:, number]]
            slices.append(slice(length, length + visual.keep))
            start, length = start + total, length + visual.keep
    embeddings = mx.concatenate(parts, axis=1)
    mask, valid, gap = model.attends, None, model.gap
    if masks is not None:
        valid = mx.concatenate(keys, axis=1)
        mask = _attention_mask(valid, model.attends)
    drops = any(pruner.place == "layer" for pruner in plan)
    if positions == "original" and (length < start or valid is not None or drops):
        original = mx.concatenate([p.astype(mx.int32) for p in places], axis=1)
        original = original[0] if batch == 1 else original
        return TokenSequence(embeddings, original, start + gap, mask, tuple(slices))
    if valid is None:
        return TokenSequence(embeddings, None, length + gap, mask, tuple(slices))
    # Padding takes no position: only the kept tokens of each sample count.
    counted = mx.cumsum(valid.astype(mx.int32), axis=1)
    ends = counted[:, -1] + gap
    return TokenSequence(embeddings, counted - 1, ends, mask, tuple(slices))


def _attention_mask(valid: mx.array, attends: str) -> mx.array:
    """Return a mask (B, T, T) bool that hides padding: false values of (B, T)."""
    batch, length = valid.shape
    mask = mx.broadcast_to(valid[:, None], (batch, length, length))
    return mask & mx.tri(length, length, 0, mx.bool_) if attends == "causal" else mask


def _at(plan: Plan, place: str) -> Pruner | None:
    return next((pruner for pruner in plan if pruner.place == place), None)


def check_positions(positions: str) -> None:
    """Raise `InputError` unless `positions` is one of `POSITIONS`."""
    if positions not in POSITIONS:
        raise InputError(f"positions are {' or '.join(POSITIONS)}, not {positions!r}")
