"""What is measured: a model that answers or one that acts, behind one face."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import mlx.core as mx
import numpy as np

from ..act.episode import first_inputs
from ..act.heads import Head, head_of
from ..act.inputs import check_images, observe, tell
from ..act.predict import predict_action
from ..errors import InputError
from ..features import Selection
from ..generate.drafts import Drafts
from ..generate.stream import stream_generate
from ..models.language import TokenSequence
from ..models.protocol import VisionModel
from ..pipeline import Scene, VisualTokens, ask, encode, look, prune_at_prompt
from ..pipeline.limits import check_memory
from ..processing.processor import ActionProcessor, Processor
from ..pruners import Counts, Plan, Pruner, count_tokens, get_method, list_pruners
from .cost import Cost, count

LOWER_SIZES = (256, 512, 768)  # rows without pruning, to compare with


@dataclass(frozen=True)
class Asked:
    """Pictures and a prompt, and what is done to the visual tokens.

    drafts: what drafts an answer.
    """

    images: Sequence
    prompt: str
    plan: Plan
    positions: str
    drafts: Drafts | None = None


@dataclass(frozen=True)
class Counted:
    """The cost of each stage up to the first token, and visual tokens.

    cache_bytes: keys and values of the prompt, of all layers.
    """

    costs: dict[str, Cost]
    cache_bytes: int
    tokens: Counts

    @property
    def flops(self) -> float:
        return sum(cost.flops for cost in self.costs.values())


def _budgeted(pruner: Pruner) -> Pruner:
    """A scorer's with a budget in the place of its own count."""
    learned = pruner.has_own_count and pruner.scorer is not None
    return dataclasses.replace(pruner, keep_tokens=1) if learned else pruner


@dataclass(frozen=True)
class _Subject:
    """A model under the name it has in the table."""

    name: str
    model: VisionModel
    processor: Processor | ActionProcessor
    default_places: ClassVar[tuple[str, ...]] = ()
    _counted: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def image_size(self) -> int:
        return self.processor.image_size

    def default_methods(self, everywhere: bool = False) -> list[str]:
        """Methods with a budget that this kind of model is pruned by.

        everywhere: at all places, not only those usual for this kind.
        """
        provided = self.model.provides
        return [
            m.name
            for m in map(get_method, list_pruners())
            if (everywhere or m.at in self.default_places)
            and set(m.needs) <= set(provided.get(m.place, ()))
            and m.name != "none"
            and m.counts != "own"
        ]

    def total(self, images: Sequence) -> int:
        """Visual tokens of a picture before pruning."""
        _, height, width, _ = self.processor.pixels(images[:1]).shape
        return (height // self.model.stride) * (width // self.model.stride)

    def count(self, asked: Asked) -> Counted:
        """The cost of every stage; looks at the picture only where a method counts."""
        scene, kept = self.scene(asked.images, asked.prompt), None
        if any(pruner.has_own_count for pruner in asked.plan):
            visual = look(self.model, scene, asked.plan)
            kept = prune_at_prompt(self.model, scene, asked.plan, visual).keep
        return self.count_shapes(scene, asked.plan, kept)

    def count_shapes(self, scene: Scene, plan: Plan, kept: int | None) -> Counted:
        """The same from shapes alone. kept: of a group, where a method counts."""
        pictures, height, width, _ = scene.pixels.shape
        stride, groups = self.model.stride, scene.batch * scene.prompt.places
        grid, per_group = (height // stride, width // stride), pictures // groups
        depth, places = len(self.model.decoder.layers), scene.prompt.places
        counts = count_tokens(plan, grid, per_group, depth, kept, places)
        texts = [text.shape[1] for text in self.model.text(scene.prompt, scene.state)]
        some = counts.projected // per_group
        tokens = mx.zeros((pictures, some, self.model.feature_size))
        sequence = self._blank(scene.batch, texts, counts.given)
        read, held = self._prefill(sequence, plan)
        costs = {
            "vision": self._vision(scene, plan),
            "prune": self._pruning(scene, plan, counts),
            "project": self._once(("project", tokens.shape), self._project, tokens),
            "prefill": read,
        }
        return Counted(costs, held, counts)

    def _once(self, key: tuple, function, *args):
        """What `function(*args)` gives, once for each key."""
        if key not in self._counted:
            self._counted[key] = function(*args)
        return self._counted[key]

    def _vision(self, scene: Scene, plan: Plan) -> Cost:
        def encoded(pixels):
            seen = dataclasses.replace(scene, pixels=pixels)
            return encode(self.model, seen, plan).arrays()

        needs = tuple(p.reads for p in plan if p.place == "tower")
        key = ("vision", scene.pixels.shape, needs)
        return self._once(key, count, encoded, scene.pixels)

    def _pruning(self, scene: Scene, plan: Plan, counts: Counts) -> Cost:
        """Of choosing; what is chosen in the language model is part of its prefill.

        Nothing for methods that count for themselves: they look at the picture. But a
        scorer takes what it takes, however many it keeps.
        """
        early = [_budgeted(p) for p in plan if p.place != "layer"]
        if not early or any(pruner.has_own_count for pruner in early):
            return Cost()
        asked = tuple(text.shape for text in self.model.text(scene.prompt, scene.state))
        key = ("prune", scene.pixels.shape, asked, *(p.key for p in early))
        return self._once(key, self._count_pruning, scene, early, counts)

    def _count_pruning(self, scene: Scene, early: list[Pruner], counts: Counts) -> Cost:
        cost, features = Cost(), encode(self.model, scene, tuple(early))
        names, groups = list(features.extras), scene.batch * scene.prompt.places
        blank = [mx.zeros(array.shape) for array in features.arrays()]

        def choose_early(tokens, *extras):
            given = dict(zip(names, extras, strict=True))
            seen = dataclasses.replace(features, tokens=tokens, extras=given)
            return [early[0](seen).apply(tokens)]

        def choose_late(embeddings, *state):
            seen = VisualTokens(embeddings, indices, selection, grid, pictures)
            told = dataclasses.replace(scene, state=state[0] if state else None)
            return [prune_at_prompt(self.model, told, tuple(early), seen).embeddings]

        if early[0].place == "tower":
            cost += count(choose_early, *blank)
        if early[-1].place == "prompt":
            grid, pictures = features.grid, features.tokens.shape[0] // groups
            shape = (groups, counts.projected)
            indices = mx.broadcast_to(mx.arange(shape[1], dtype=mx.int32), shape)
            selection = Selection(indices)
            size = self.model.args.text["hidden_size"]
            state = [] if scene.state is None else [scene.state]
            cost += count(choose_late, mx.zeros((*shape, size)), *state)
        return cost

    def _project(self, tokens: mx.array) -> Cost:
        return count(self.model.project, tokens)

    def _blank(self, batch: int, texts: list[int], kept: int) -> TokenSequence:
        """A sequence of these lengths."""
        slices, length = [], texts[0]
        for text in texts[1:]:
            slices.append(slice(length, length + kept))
            length += kept + text
        size = (batch, length, self.model.args.text["hidden_size"])
        return TokenSequence(
            mx.zeros(size), None, length, self.model.attends, tuple(slices)
        )

    def _prefill(self, sequence: TokenSequence, plan: Plan) -> tuple[Cost, int]:
        """Of reading a sequence, and the bytes of its keys and values."""
        decoder, cache = self.model.decoder, self.model.decoder.make_cache()
        layers = [pruner for pruner in plan if pruner.place == "layer"]

        def first(embeddings):
            given = dataclasses.replace(sequence, embeddings=embeddings)
            kept = None if self.model.attends == "full" else cache
            found = decoder.read(given, kept, rows=self.rows, plan=layers)
            return decoder.logits(found.hidden) if kept else found.hidden

        def counted():
            return count(first, sequence.embeddings), sum(map(_bytes_held, cache))

        keys = tuple(pruner.key for pruner in layers)
        return self._once(("prefill", sequence.embeddings.shape, keys), counted)


def _bytes_held(cache) -> int:
    """Keys and values of the tokens in a layer's cache."""
    if cache.keys is None:
        return 0
    batch, heads, _, size = cache.keys.shape
    return 2 * batch * heads * cache.offset * size * cache.keys.dtype.size


class Answering(_Subject):
    """A model that answers."""

    kind = "answering"
    default_places = ("tower",)
    rows = 1

    @property
    def lower_sizes(self) -> tuple[int, ...]:
        """Input sizes to compare pruning with."""
        return tuple(size for size in LOWER_SIZES if size < self.image_size)

    def at(self, size: int, padding: str | None = None) -> "Answering":
        """The same with pictures of another size, or other padding."""
        check_memory(self.model, size)
        return dataclasses.replace(self, processor=self.processor.at(size, padding))

    def scene(self, images: Sequence, prompt: str) -> Scene:
        return ask(self.processor, images, prompt)

    def run(self, asked: Asked, tokens: int, stages: bool = False) -> dict:
        """Times of an answer of at most `tokens`; fenced with `stages`."""
        start = time.perf_counter()
        pieces = list(
            stream_generate(
                *(self.model, self.processor, asked.images, asked.prompt),
                pruner=asked.plan,
                positions=asked.positions,
                draft=asked.drafts,
                max_tokens=tokens,
                stages=stages,
            )
        )
        last = pieces[-1]
        return {
            "ttft_ms": last.ttft_ms,
            "total_ms": (time.perf_counter() - start) * 1e3,
            "decode_tokens_per_second": last.decode_tokens_per_second or None,
            "calls": last.calls,
            "tokens": len(pieces),
            "stages_ms": last.stages_ms,
        }


class Acting(_Subject):
    """A policy. One of several pictures sees the picture as often as it wants them."""

    kind = "acting"
    default_places = ("tower", "prompt")
    lower_sizes = ()

    @property
    def _actions(self) -> int:
        """Numbers of an action."""
        return len(self.processor.bounds("action", self.unnorm_key).low)

    @property
    def head(self) -> Head:
        return head_of(self.model, self.processor, self._actions)

    @property
    def rows(self) -> int:
        return self.head.rows

    def at(self, size: int, padding: str | None = None) -> "Acting":
        if padding == "skip":
            raise InputError(f"{self.name} stretches pictures, so there is no padding")
        if size != self.image_size:
            raise InputError(
                f"{self.name} sees pictures of {self.image_size} px only, not {size}"
            )
        return self

    def scene(self, images: Sequence, prompt: str) -> Scene:
        state = self._state
        states = None if state is None else [state]
        images = check_images(self.model, self._wanted(images))
        told = tell(self.head, self.model, prompt, states, self.unnorm_key)
        return observe(self.processor, [images], *told, first_inputs(1, self._actions))

    def run(self, asked: Asked, tokens: int, stages: bool = False) -> dict:
        """Times of one action, fenced with `stages`; `tokens` does not matter."""
        action = predict_action(
            *(self.model, self.processor, self._wanted(asked.images), asked.prompt),
            unnorm_key=self.unnorm_key,
            proprio=self._state,
            pruner=asked.plan,
            positions=asked.positions,
            stages=stages,
        )
        said = len(action.token_ids or (0,))
        more = said - 1
        seconds = (action.total_ms - action.ttft_ms) / 1e3
        return {
            "ttft_ms": action.ttft_ms,
            "total_ms": action.total_ms,
            "decode_tokens_per_second": more / seconds if more > 0 else None,
            "calls": said,
            "tokens": said,
            "stages_ms": action.stages_ms,
        }

    def _wanted(self, images: Sequence) -> list:
        return [images[0]] * (self.model.pictures or len(self.model.cameras))

    @property
    def unnorm_key(self) -> str | None:
        """The first data set: times do not depend on it."""
        return next(iter(self.processor.norm_stats), None)

    @property
    def _state(self) -> np.ndarray | None:
        """The middle of what the robot's state can be, where it is read."""
        if not self.model.args.state_size:
            return None
        bounds = self.processor.bounds("proprio", self.unnorm_key)
        return (bounds.low + bounds.high) / 2


OwnSubject = Answering | Acting


class Subject(Protocol):
    """What bench and evaluate measure: a model in our runtime or in mlx-vlm's.

    kind: `answering` or `acting`.
    """

    name: str
    kind: str
    model: Any

    def default_methods(self) -> list[str]:
        """Methods that are measured unless others are given."""
        ...


def subject_of(name: str, model: VisionModel, processor) -> OwnSubject:
    """Return a loaded model as a subject."""
    kind = Answering if isinstance(processor, Processor) else Acting
    return kind(name, model, processor)
