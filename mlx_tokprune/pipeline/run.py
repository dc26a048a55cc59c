"""The way of a picture: encode -> prune -> project -> assemble -> read.

The only place that knows models, pruners and prompts together. Everything that
answers, acts, measures, exports or trains calls `run`, or one of the steps it is made
of; but training makes sequences of its own where it packs questions behind one picture
or gates tokens (`train/packing.py`, `train/policy`). All of it is lazy, but for the
chunks of a long prompt, methods that choose their own count, and what a clock fences.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..features import PER_TOKEN, Features, Selection
from ..models.language import PREFILL_STEP, Read, TokenSequence
from ..models.protocol import VisionModel
from ..processing.processor import Processor
from ..processing.prompt import Prompt
from ..pruners import Place, Plan, Pruner
from .timing import NO_CLOCK, NoClock

POSITIONS = ("original", "contiguous")
DEFAULT_POSITIONS = "original"


@dataclass(frozen=True)
class Scene:
    """B samples: their pixels, prompt and run-time inputs.

    pixels: (B * G * n, h, w, 3), for each sample and each of the G places of the prompt
    its n pictures after each other; `None` where their visual tokens are known. state:
    (B, p) normalised robot states, or `None`. extras: inputs of pruners at the prompt
    that neither picture nor prompt holds, by their names in `Features`, batch first.
    """

    pixels: mx.array | None
    prompt: Prompt
    batch: int = 1
    state: mx.array | None = None
    extras: Mapping[str, mx.array] = field(default_factory=dict)


@dataclass(frozen=True)
class VisualTokens:
    """The kept visual tokens, ready to go into a prompt.

    A group is what stands at one place of the prompt: `pictures` pictures, whose tokens
    are numbered on through all of them.

    embeddings: (groups, K, D). indices: (groups, K), which of the N tokens they are.
    mask: (groups, K) bool, false for padding where groups keep different counts, else
    `None`. selection: of the last pruner before the language model, of each picture or
    of each group. grid: of one picture; one that is not square is the middle of one
    whose padding was left out. choices: of each pruner its place, and (groups, K) which
    of the N tokens went on; inside the language model (B, K), which of the tokens of
    all groups that came there. attended: (B, R, M) what the R last tokens attended to
    of all M that the language model was given, where somebody asked.
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
        """Of each group of one sample, the tokens that are left after every place."""
        places = self.by_place()
        return places[-1][1] if places else self._real(self.indices)

    def by_place(self) -> list[tuple[Place, list[list[int]]]]:
        """After each place, the tokens that are left of each group of one sample."""
        found, (groups, keep) = [], self.indices.shape
        group = np.repeat(np.arange(groups), keep)
        index = np.array(self.indices).reshape(-1)
        for place, chosen in self.choices:
            if isinstance(place, str):
                found.append((place, self._real(chosen)))
                continue
            some = np.array(chosen[0])
            group, index = group[some], index[some]
            found.append((place, [index[group == i].tolist() for i in range(groups)]))
        return found

    def _real(self, indices: mx.array) -> list[list[int]]:
        """Without padding, which only those of the last pruner can have."""
        rows = np.array(indices)
        if self.mask is None or rows.shape != self.mask.shape:
            return rows.tolist()
        return [r[m].tolist() for r, m in zip(rows, np.array(self.mask), strict=True)]

    def per_picture(self, groups: list[list[int]]) -> list[np.ndarray]:
        """Tokens of groups as those of each picture."""
        each, pictures = self.grid[0] * self.grid[1], range(self.pictures)
        kept = [np.array(group, int) for group in groups]
        return [group[group // each == i] % each for group in kept for i in pictures]

    def chosen_at(self, place: Place) -> "VisualTokens":
        """The same, noting that what is there now was chosen at `place`."""
        choices = (*self.choices, (place, self.indices))
        return dataclasses.replace(self, choices=choices)

    def on_squares(self) -> tuple[mx.array, int]:
        """(groups, K) places of the tokens on square grids, and how many those have."""
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
# What can stand in for `look`: a part of a video, a Core ML package.
Look = Callable[[VisionModel, Scene, Plan, NoClock], VisualTokens]


def run(
    model: VisionModel,
    scene: Scene,
    plan: Plan = (),
    *,
    positions: str = DEFAULT_POSITIONS,
    vision: Look | None = None,
    after: mx.array | None = None,
    rows: int = 1,
    cache: list | None = None,
    known: int = 0,
    step: int = PREFILL_STEP,
    attention_of: int | None = None,
    clock: NoClock = NO_CLOCK,
) -> tuple[Read, VisualTokens]:
    """From a scene to what the language model makes of it.

    vision: looks in the place of the model's tower. after: (B, L) token ids read behind
    the prompt. rows: how many of the prompt's last tokens are answered for; all of
    `after` are, besides. cache, known, step, attention_of: as `Decoder.read` takes
    them.
    """
    visual = (vision or look)(model, scene, plan, clock)
    if visual.mask is not None and any(pruner.place != "tower" for pruner in plan):
        raise InputError(
            "a method that keeps other numbers of visual tokens of each picture cannot "
            "be followed by a pruner at a later place"
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
            known=known,
            step=step,
            attention_of=attention_of,
        )
        done.append(read.hidden)
    later = tuple((layer, selection.indices) for layer, selection in read.choices)
    choices = visual.choices + later
    visual = dataclasses.replace(visual, choices=choices, attended=read.attended)
    return read, visual


def ask(processor: Processor, images: Sequence, text: str) -> Scene:
    """Decoded pictures and a question about them."""
    pixels = mx.array(processor.pixels(images))
    return Scene(pixels, processor.prompt(text, len(images)))


# The steps --------------------------------------------------------------------------


def look(
    model: VisionModel, scene: Scene, plan: Plan, clock: NoClock = NO_CLOCK
) -> VisualTokens:
    """What the picture alone decides: encode it, prune at the tower, project."""
    return prune_at_tower(model, scene, plan, encode(model, scene, plan, clock), clock)


def encode(
    model: VisionModel, scene: Scene, plan: Plan, clock: NoClock = NO_CLOCK
) -> Features:
    """The tower's features of every picture, with the extras that the plan needs."""
    needs = tower_needs(plan)
    with clock.stage("vision") as done:
        features = model.encode(_pixels(scene), needs, scene.prompt)
        done += features.arrays()
    return features


def tower_needs(plan: Plan) -> tuple[str, ...]:
    """The extras of `Features` that a plan reads at the tower."""
    read = [pruner.reads for pruner in plan if pruner.place == "tower"]
    return tuple(dict.fromkeys(itertools.chain(*read)))


def _pixels(scene: Scene) -> mx.array:
    if scene.pixels is None:
        raise ValueError("the scene has no pixels to look at")
    return scene.pixels


def prune_at_tower(
    model: VisionModel,
    scene: Scene,
    plan: Plan,
    features: Features,
    clock: NoClock = NO_CLOCK,
) -> VisualTokens:
    """Prune at the tower, each picture by itself, and project what is left."""
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
    """(pictures, K, D) projected tokens, those of a group joined."""
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
        selection = pruner(_asked(model, scene, pruner, visual).fixed)
        embeddings = selection.apply(visual.embeddings)
        indices = mx.take_along_axis(visual.indices, selection.indices, axis=1)
        done += [embeddings, indices]
    if visual.keep < visual.total:  # a pruner at the tower was there before
        selection = Selection(indices, mask=selection.mask)
    return dataclasses.replace(
        visual,
        embeddings=embeddings,
        indices=indices,
        selection=selection,
        mask=selection.mask,
    ).chosen_at("prompt")


def _asked(
    model: VisionModel, scene: Scene, pruner: Pruner, visual: VisualTokens
) -> Features:
    """Visual tokens at the language model's input, and the prompt behind them."""
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
    """Texts and visual tokens in one sequence.

    positions: `original` as if no visual token had been dropped, or `contiguous`.
    """
    texts, batch = model.text(scene.prompt, scene.state), scene.batch
    where, total = visual.on_squares()
    # A group's row in a batch is that of its place in the prompt.
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
    mask, seen, gap = model.attends, None, model.gap
    if masks is not None:
        seen = mx.concatenate(keys, axis=1)
        mask = _visible(seen, model.attends)
    drops = any(pruner.place == "layer" for pruner in plan)
    if positions == "original" and (length < start or seen is not None or drops):
        found = mx.concatenate([p.astype(mx.int32) for p in places], axis=1)
        found = found[0] if batch == 1 else found
        return TokenSequence(embeddings, found, start + gap, mask, tuple(slices))
    if seen is None:
        return TokenSequence(embeddings, None, length + gap, mask, tuple(slices))
    # Padding takes no place: only what each sample kept is counted.
    counted = mx.cumsum(seen.astype(mx.int32), axis=1)
    ends = counted[:, -1] + gap
    return TokenSequence(embeddings, counted - 1, ends, mask, tuple(slices))


def _visible(seen: mx.array, attends: str) -> mx.array:
    """(B, T, T) bool: everybody sees the tokens (B, T) that are not padding."""
    batch, length = seen.shape
    mask = mx.broadcast_to(seen[:, None], (batch, length, length))
    return mask & mx.tri(length, length, 0, mx.bool_) if attends == "causal" else mask


def _at(plan: Plan, place: str) -> Pruner | None:
    return next((pruner for pruner in plan if pruner.place == place), None)


def check_positions(positions: str) -> None:
    if positions not in POSITIONS:
        raise InputError(f"positions are {' or '.join(POSITIONS)}, not {positions!r}")
