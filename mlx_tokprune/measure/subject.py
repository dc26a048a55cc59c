"""Subjects of bench and evaluate: text models and policies with one interface."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
from ..processing.processor import AnyProcessor, PolicyProcessor, Processor
from ..pruners import Counts, Plan, Pruner, count_tokens, get_method, list_pruners
from .cost import Cost, count

LOWER_SIZES = (256, 512, 768)  # input sizes of unpruned rows to compare with


@dataclass(frozen=True)
class Request:
    """Images and a prompt, with the pruning of the visual tokens.

    positions: `original` or `contiguous`. drafts: speculative decoding of the answer.
    """

    images: Sequence
    prompt: str
    plan: Plan
    positions: str
    drafts: Drafts | None = None


@dataclass(frozen=True)
class StageCosts:
    """Cost of each stage up to the first token, and token counts.

    costs: by stage ("vision", "prune", "project", "prefill"). cache_bytes: keys and
    values of the prompt in all layers. tokens: visual tokens at each place.
    """

    costs: dict[str, Cost]
    cache_bytes: int
    tokens: Counts

    @property
    def flops(self) -> float:
        """FLOPs of all stages."""
        return sum(cost.flops for cost in self.costs.values())


def _budgeted(pruner: Pruner) -> Pruner:
    """Return the pruner; a scorer's own count becomes a budget, for equal cost."""
    learned = pruner.has_own_count and pruner.scorer is not None
    return dataclasses.replace(pruner, keep_tokens=1) if learned else pruner


@dataclass(frozen=True)
class _Subject:
    """Base of subjects: a loaded model under its name in tables."""

    name: str
    model: VisionModel
    processor: AnyProcessor
    default_places: ClassVar[tuple[str, ...]] = ()
    # Costs by input shape, kept between calls: rows and pictures share most of them.
    _costs: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """Last positions of the prompt whose states are read."""
        return 1

    def scene(self, images: Sequence, prompt: str) -> Scene:
        """Return the scene of images and a prompt."""
        raise NotImplementedError

    @property
    def image_size(self) -> int:
        """Input size in pixels per side."""
        return self.processor.image_size

    def default_methods(self, everywhere: bool = False) -> list[str]:
        """Return the methods with a budget that fit this kind of model.

        everywhere: include all places, not only the usual ones of this kind.
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
        """Return the visual tokens of an image before pruning."""
        _, height, width, _ = self.processor.pixels(images[:1]).shape
        return (height // self.model.stride) * (width // self.model.stride)

    def count(self, request: Request) -> StageCosts:
        """Return the cost of every stage up to the first token.

        Encodes the images only for methods with their own count.
        """
        scene, kept = self.scene(request.images, request.prompt), None
        if any(pruner.has_own_count for pruner in request.plan):
            visual = look(self.model, scene, request.plan)
            kept = prune_at_prompt(self.model, scene, request.plan, visual).keep
        return self.count_shapes(scene, request.plan, kept)

    def count_shapes(self, scene: Scene, plan: Plan, kept: int | None) -> StageCosts:
        """Return the cost of every stage from shapes alone.

        kept: visual tokens of a group, for methods with their own count.
        """
        pictures, height, width, _ = scene.pixels.shape
        stride, groups = self.model.stride, scene.batch * scene.prompt.places
        grid, per_group = (height // stride, width // stride), pictures // groups
        depth, places = len(self.model.decoder.layers), scene.prompt.places
        counts = count_tokens(plan, grid, per_group, depth, kept, places)
        texts = [text.shape[1] for text in self.model.text(scene.prompt, scene.state)]
        projected = counts.projected // per_group
        tokens = mx.zeros((pictures, projected, self.model.feature_size))
        sequence = self._blank(scene.batch, texts, counts.entering)
        read, cache_bytes = self._prefill(sequence, plan)
        costs = {
            "vision": self._vision(scene, plan),
            "prune": self._pruning(scene, plan, counts),
            "project": self._once(
                ("project", tokens.shape), count, self.model.project, tokens
            ),
            "prefill": read,
        }
        return StageCosts(costs, cache_bytes, counts)

    def _once(self, key: tuple, function: Callable, *args: Any) -> Any:
        """Return `function(*args)`, computed once for each key."""
        if key not in self._costs:
            self._costs[key] = function(*args)
        return self._costs[key]

    def _vision(self, scene: Scene, plan: Plan) -> Cost:
        def encoded(pixels: mx.array) -> list[mx.array]:
            traced = dataclasses.replace(scene, pixels=pixels)
            return encode(self.model, traced, plan).arrays()

        needs = tuple(p.reads for p in plan if p.place == "tower")
        key = ("vision", scene.pixels.shape, needs)
        return self._once(key, count, encoded, scene.pixels)

    def _pruning(self, scene: Scene, plan: Plan, counts: Counts) -> Cost:
        """Return the cost of pruning before the language model.

        Pruning inside the language model is part of its prefill. Zero for methods with
        their own count, which depends on values. A scorer is counted with a budget,
        because its cost does not depend on the number of kept tokens.
        """
        early = [_budgeted(p) for p in plan if p.place != "layer"]
        if not early or any(pruner.has_own_count for pruner in early):
            return Cost()
        texts = tuple(text.shape for text in self.model.text(scene.prompt, scene.state))
        key = ("prune", scene.pixels.shape, texts, *(p.key for p in early))
        return self._once(key, self._count_pruning, scene, early, counts)

    def _count_pruning(self, scene: Scene, early: list[Pruner], counts: Counts) -> Cost:
        cost, features = Cost(), encode(self.model, scene, tuple(early))
        names, groups = list(features.extras), scene.batch * scene.prompt.places
        blank = [mx.zeros(array.shape) for array in features.arrays()]

        def choose_early(tokens: mx.array, *arrays: mx.array) -> list[mx.array]:
            extras = dict(zip(names, arrays, strict=True))
            traced = dataclasses.replace(features, tokens=tokens, extras=extras)
            return [early[0](traced).apply(tokens)]

        def choose_late(embeddings: mx.array, *state: mx.array) -> list[mx.array]:
            visual = VisualTokens(embeddings, indices, selection, grid, pictures)
            traced = dataclasses.replace(scene, state=state[0] if state else None)
            visual = prune_at_prompt(self.model, traced, tuple(early), visual)
            return [visual.embeddings]

        if early[0].place == "tower":
            cost += count(choose_early, *blank)
        if early[-1].place == "prompt":
            grid = features.grid or (1, features.total)
            pictures = features.tokens.shape[0] // groups
            shape = (groups, counts.projected)
            indices = mx.broadcast_to(mx.arange(shape[1], dtype=mx.int32), shape)
            selection = Selection(indices)
            size = self.model.args.text["hidden_size"]
            state = [] if scene.state is None else [scene.state]
            cost += count(choose_late, mx.zeros((*shape, size)), *state)
        return cost

    def _blank(self, batch: int, texts: list[int], kept: int) -> TokenSequence:
        """Return a sequence of zeros. texts: lengths. kept: visual tokens per group."""
        slices, length = [], texts[0]
        for text in texts[1:]:
            slices.append(slice(length, length + kept))
            length += kept + text
        size = (batch, length, self.model.args.text["hidden_size"])
        return TokenSequence(
            mx.zeros(size), None, length, self.model.attends, tuple(slices)
        )

    def _prefill(self, sequence: TokenSequence, plan: Plan) -> tuple[Cost, int]:
        """Return the cost of reading a sequence, and the bytes of its cache."""
        decoder, cache = self.model.decoder, self.model.decoder.make_cache()
        layers = [pruner for pruner in plan if pruner.place == "layer"]

        def first(embeddings: mx.array) -> mx.array:
            traced = dataclasses.replace(sequence, embeddings=embeddings)
            # Models with full attention answer in one pass, without cache and logits.
            used = None if self.model.attends == "full" else cache
            read = decoder.read(traced, used, rows=self.rows, plan=layers)
            return decoder.logits(read.hidden) if used else read.hidden

        def counted() -> tuple[Cost, int]:
            return count(first, sequence.embeddings), sum(map(_cached_bytes, cache))

        keys = tuple(pruner.key for pruner in layers)
        return self._once(("prefill", sequence.embeddings.shape, keys), counted)


def _cached_bytes(cache: Any) -> int:
    """Return the bytes of keys and values of the tokens in a layer's cache."""
    if cache.keys is None:
        return 0
    batch, heads, _, size = cache.keys.shape
    return 2 * batch * heads * cache.offset * size * cache.keys.dtype.size


class AnswerSubject(_Subject):
    """A model that answers in text."""

    kind = "answering"
    default_places = ("tower",)
    processor: Processor

    @property
    def lower_sizes(self) -> tuple[int, ...]:
        """Input sizes to compare pruning with."""
        return tuple(size for size in LOWER_SIZES if size < self.image_size)

    def at(self, size: int, padding: str | None = None) -> "AnswerSubject":
        """Return the subject with another input size or padding.

        Raises `InputError` for a size that does not fit the model or the memory.
        """
        check_memory(self.model, size)
        return dataclasses.replace(self, processor=self.processor.at(size, padding))

    def scene(self, images: Sequence, prompt: str) -> Scene:
        """Return the scene of images and a prompt."""
        return ask(self.processor, images, prompt)

    def run(self, request: Request, tokens: int, stages: bool = False) -> dict:
        """Return the times of an answer of at most `tokens` tokens.

        stages: fence the run and time its stages.
        """
        start = time.perf_counter()
        pieces = list(
            stream_generate(
                *(self.model, self.processor, request.images, request.prompt),
                pruner=request.plan,
                positions=request.positions,
                draft=request.drafts,
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


class ActionSubject(_Subject):
    """A policy. One with several cameras gets the first image for each of them."""

    kind = "acting"
    default_places = ("tower", "prompt")
    processor: PolicyProcessor
    lower_sizes = ()

    @property
    def _actions(self) -> int:
        """Dimensions of an action."""
        return len(self.processor.bounds("action", self.unnorm_key).low)

    @property
    def head(self) -> Head:
        """Action head of the policy."""
        return head_of(self.model, self.processor, self._actions)

    @property
    def rows(self) -> int:
        """Last positions of the prompt that the action head reads."""
        return self.head.rows

    def at(self, size: int, padding: str | None = None) -> "ActionSubject":
        """Return the subject itself; raise `InputError` for another size or padding."""
        if padding == "skip":
            raise InputError(f"{self.name} stretches pictures, so there is no padding")
        if size != self.image_size:
            raise InputError(
                f"{self.name} takes pictures of {self.image_size} px only, not {size}"
            )
        return self

    def scene(self, images: Sequence, prompt: str) -> Scene:
        """Return the scene of an instruction, with the first image for each camera."""
        values = self._state
        states = None if values is None else [values]
        images = check_images(self.model, self._repeated(images))
        told, state = tell(self.head, self.model, prompt, states, self.unnorm_key)
        extras = first_inputs(1, self._actions)
        return observe(self.processor, [images], told, state, extras)

    def run(self, request: Request, tokens: int, stages: bool = False) -> dict:
        """Return the times of one action; `tokens` is not used.

        stages: fence the run and time its stages.
        """
        action = predict_action(
            *(self.model, self.processor),
            *(self._repeated(request.images), request.prompt),
            unnorm_key=self.unnorm_key,
            proprio=self._state,
            pruner=request.plan,
            positions=request.positions,
            stages=stages,
        )
        length = len(action.token_ids or (0,))
        more = length - 1
        seconds = (action.total_ms - action.ttft_ms) / 1e3
        return {
            "ttft_ms": action.ttft_ms,
            "total_ms": action.total_ms,
            "decode_tokens_per_second": more / seconds if more > 0 else None,
            "calls": length,
            "tokens": length,
            "stages_ms": action.stages_ms,
        }

    def _repeated(self, images: Sequence) -> list:
        """Return the first image once for each image that the policy takes."""
        return [images[0]] * (self.model.pictures or len(self.model.cameras))

    @property
    def unnorm_key(self) -> str | None:
        """Name of the first data set; times do not depend on the choice."""
        return next(iter(self.processor.norm_stats), None)

    @property
    def _state(self) -> np.ndarray | None:
        """Robot state in the middle of its bounds; `None` if the policy reads none."""
        if not self.model.args.state_size:
            return None
        bounds = self.processor.bounds("proprio", self.unnorm_key)
        return (bounds.low + bounds.high) / 2


OwnSubject = AnswerSubject | ActionSubject


def subject_of(name: str, model: VisionModel, processor: AnyProcessor) -> OwnSubject:
    """Return a loaded model as a subject under a name."""
    kind = AnswerSubject if isinstance(processor, Processor) else ActionSubject
    return kind(name, model, processor)
