"""`Policy`: a compiled robot policy in a control loop, for one robot or a batch."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..features import Features, Selection
from ..models.protocol import VisionModel
from ..pipeline import (
    DEFAULT_POSITIONS,
    Scene,
    VisualTokens,
    check_positions,
    encode,
    prune_at_prompt,
    prune_at_tower,
)
from ..pipeline.planning import plan_for
from ..processing.processor import AnyProcessor, check_acts
from ..processing.prompt import Prompt, check_text
from ..pruners import Plan, Pruners, count_tokens
from ..runtime import end_streams_with_thread
from .action_drafts import correct_draft, draft_chunk, read_draft
from .episode import EpisodeInputs, check_robots
from .heads import Chunks, head_of
from .inputs import (
    check_action,
    check_images,
    check_scorers,
    observe,
    tell,
)

_BUCKET = 8  # varying token counts are padded to multiples of it, to compile less
_WARM_UP = 3  # first steps of an episode that keep every token, as in VLA-Pruner
_DECAY = 0.8  # weight of earlier actions' attention, as in VLA-Pruner


class Policy:
    """A policy in a control loop: `action = policy(images, instruction)`.

    Arguments:
    pruner: one pruner, or several at different places; `None` uses the checkpoint's
    own pruners, mostly none.
    positions: positions of the kept tokens, `original` or `contiguous`.
    unnorm_key: data set whose action units are used.
    compile: compile each shape (batch, length of the instruction, and for methods with
    their own count the multiple of 8 above it) at its first call, which fixes the
    weights of that shape.
    draft: speculative decoding; actions do not change. `True` proposes the tokens of
    the previous action, "shifted" those of the previous chunk after its `first`
    actions, "ngram" n-gram continuations of the previous chunk. Another `Policy`, such
    as a smaller or a pruned one, proposes its own action for the same images.
    first: number of a chunk's actions to return and execute before the next
    observation; `None` for all.

    After a call, `kept` is the number of visual tokens, mean over robots and layers,
    `kept_each` that of each robot, `calls` the number of language model calls and
    `wrong` the fault of a pi0-FAST answer, else `None`.

    Observations are independent, except for drafts, methods that read the previous
    step's attention and scorers that read the previous action (zeros in an episode's
    first step). Call `reset` between episodes. pi0-FAST policies read one robot's
    state as text and end their answers themselves, so they are not compiled, and the
    robots of a batch act one after the other.

    Raises `InputError` for arguments that do not fit the policy.
    """

    def __init__(
        self,
        model: VisionModel,
        processor: AnyProcessor,
        *,
        pruner: Pruners = None,
        positions: str = DEFAULT_POSITIONS,
        unnorm_key: str | None = None,
        compile: bool = True,
        draft: "bool | Literal['shifted', 'ngram'] | Policy" = False,
        first: int | None = None,
    ):
        processor = check_acts(processor)
        check_positions(positions)
        self.plan = plan_for(model, pruner)
        self.model, self.processor, self.positions = model, processor, positions
        self.unnorm_key = unnorm_key
        self.bounds = processor.bounds("action", unnorm_key)
        self._head = head_of(model, processor, len(self.bounds.low))
        self._head.check(self.bounds)
        self._head.first(first)
        self.first = first
        self._has_own_count = any(pruner.has_own_count for pruner in self.plan)
        check_scorers(self.plan, len(self.bounds.low))
        self._looks_back = any("scores_previous" in p.reads for p in self.plan)
        self._inputs = EpisodeInputs(self.plan, len(self.bounds.low))
        alone = self._has_own_count or self._looks_back
        if draft and (alone or not self._head.has_tokens):
            raise InputError(
                "drafts are for policies that decode tokens, under a method with a "
                "budget that does not look back; leave out draft"
            )
        _check_draft(self, draft)
        compile = compile and self._head.compiles
        # `mx.compile` caches a graph per input shape and takes trees of arrays only, so
        # a call passes a dict of arrays and sets `_robot_images` beside it. Weights are
        # captured as constants. Each path is a function of its own, because a graph
        # cannot branch on values and a traced function may not evaluate arrays.
        wrap = mx.compile if compile else (lambda function: function)
        # Budgets are static: pixels to actions in one graph.
        self._whole = wrap(self._act_on_pixels)
        # Own counts depend on values: one graph before the pruner runs, one after.
        self._features = wrap(self._encode)
        self._rest = wrap(self._act_on_tokens)
        # Prompt and draft in one graph; corrections depend on values and run outside.
        self._read = wrap(self._read_draft)
        # Actions and their attention; in the warm-up without pruners.
        self._noted = wrap(self._act_and_note)
        self._noted_warm_up = wrap(functools.partial(self._act_and_note, plan=()))
        self._drafts = draft
        self.kept, self.kept_each, self.calls = 0.0, [0.0], 0
        self.wrong: str | None = None
        self._robot_images = model.pictures or 1  # images of a robot
        self._answer: mx.array | None = None  # tokens of the last call
        self.reset()

    def reset(self) -> None:
        """Begin an episode: forget the previous step and the cached prompts."""
        # Steps repeat the instruction, so it is tokenized once.
        self._prompt = functools.lru_cache(maxsize=16)(self.processor.prompt)
        # Kept between the steps of an episode:
        self._last: mx.array | None = None  # (B, A) previous tokens, to draft from
        self._attended: mx.array | None = None  # (B, N) decayed mean attention
        self._inputs.reset()  # previous action, for scorers that read it
        self._steps = 0  # done with a method that reads attention; ends the warm-up
        if isinstance(self._drafts, Policy):
            self._drafts.reset()

    def keep_robots(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the previous batch: the other episodes have ended."""
        kept_rows = mx.array(list(rows))
        for name in ("_attended", "_last"):
            batch = getattr(self, name)
            if batch is not None:
                setattr(self, name, batch[kept_rows])
        self._inputs.keep(kept_rows)
        if isinstance(self._drafts, Policy):
            self._drafts.keep_robots(rows)

    def __call__(
        self,
        images: Sequence | Mapping,
        instruction: str,
        proprio: Sequence[float] | None = None,
    ) -> np.ndarray:
        """Return an action (A,) in robot units, or (chunk, A) from a chunk policy.

        OpenVLA-OFT and pi0-FAST are chunk policies; they return the `first` actions.
        images: in the policy's order, or by the names of its cameras. proprio: robot
        state in its own units. Raises `InputError` for inputs that do not fit the
        policy and for actions that are not finite.
        """
        states = None if proprio is None else [proprio]
        return self.act_on_batch([images], instruction, states)[0]

    def act_on_batch(
        self,
        batch: Sequence[Sequence | Mapping],
        instruction: str,
        proprio: Sequence[Sequence[float]] | None = None,
    ) -> np.ndarray:
        """Return (B, A) or (B, chunk, A) actions of B robots with one instruction.

        batch: the images of each robot. proprio: the state of each robot. Raises
        `InputError` as a call for one robot does.
        """
        if not isinstance(batch, Sequence) or not len(batch):
            raise InputError("the batch is empty; expected the pictures of one robot")
        if self._head.alone and len(batch) > 1:
            return self._one_after_the_other(batch, instruction, proprio)
        end_streams_with_thread()
        robots = [check_images(self.model, images) for images in batch]
        check_text(instruction, "the instruction")
        prompt, state = tell(
            *(self._head, self.model, instruction, proprio),
            *(self.unnorm_key, len(batch), self._prompt),
        )
        extras = self._inputs.of(len(batch))
        scene = observe(self.processor, robots, prompt, state, extras)
        self._robot_images = len(robots[0])
        self.calls = self._head.calls
        self.kept_each = []
        if isinstance(self._drafts, Policy):
            self._drafts.act_on_batch(batch, instruction, proprio)
            self._last = self._drafts._answer
        answer = self._act(scene, self._arrays(scene))
        self.kept_each = self.kept_each or [self.kept] * len(batch)
        normalized = check_action(self._head.normalized(np.array(answer)))
        self.wrong = self._head.wrong(np.array(answer[0]))
        self._answer = answer
        self._last = answer if self._drafts else None
        self._inputs.note(normalized, self.first)
        return self.bounds.to_units(normalized)[:, : self.first]

    def _one_after_the_other(
        self,
        batch: Sequence[Sequence | Mapping],
        instruction: str,
        proprio: Sequence[Sequence[float]] | None,
    ) -> np.ndarray:
        """Return (B, chunk, A), robot by robot: their prompts differ in length."""
        if self._drafts or self._looks_back or self._inputs.names:
            raise InputError(
                "drafts, and methods that look back or read the last action, support "
                "one robot of such a policy; give each robot a Policy of its own"
            )
        states = [None] * len(batch) if proprio is None else proprio
        if len(states) != len(batch):
            raise InputError(f"proprio has no state for each of {len(batch)} robots")
        rows = zip(batch, states, strict=True)
        actions, kept = [], []
        for images, state in rows:
            actions.append(self(images, instruction, state))
            kept.append(self.kept)
        self.kept_each = kept
        return np.stack(actions)

    def _act(self, scene: Scene, arrays: dict) -> mx.array:
        """Return the tokens of all robots by the path that fits plan and drafts."""
        if self._has_own_count:
            return self._act_with_own_count(scene, arrays)
        if self._looks_back:
            return self._act_in_episode(scene.batch, arrays)
        if self._last is not None and isinstance(self._head, Chunks):
            return self._draft_chunk(self._head, self._last[0], scene)
        if self._last is not None and len(self._last) == scene.batch:
            return self._act_with_draft(self._last, arrays)
        answer = self._whole(arrays)
        self.kept = self._mean_kept()
        if isinstance(self._head, Chunks):
            self.calls = answer.shape[1]
        return answer

    def _draft_chunk(self, head: Chunks, last: mx.array, scene: Scene) -> mx.array:
        previous = list(head.ids(np.array(last)))
        if self._drafts == "shifted":
            previous = head.shifted(previous, self.first or self.model.args.horizon)
        ids, self.calls = draft_chunk(
            *(head, self.model, scene, self.plan, previous),
            first=[] if self._drafts == "ngram" else previous,
            positions=self.positions,
        )
        self.kept = self._mean_kept()
        return mx.array([ids], mx.int32)

    @property
    def _total(self) -> int:
        """Visual tokens of a robot before pruning."""
        return self._grid[0] * self._grid[1] * self._robot_images

    def _mean_kept(self) -> float:
        """Return the kept visual tokens of a robot, mean over layers."""
        layers = len(self.model.decoder.layers)
        return count_tokens(self.plan, self._grid, self._robot_images, layers).mean

    # Compiled calls take and return arrays only, so scenes are unpacked and rebuilt.

    def _arrays(self, scene: Scene) -> dict:
        state = {} if scene.state is None else {"state": scene.state}
        segments = list(map(mx.array, scene.prompt.segments))
        extras = dict(scene.extras)
        return {"pixels": scene.pixels, "segments": segments, "extras": extras} | state

    def _scene(self, arrays: dict) -> Scene:
        pixels, prompt = arrays["pixels"], Prompt(tuple(arrays["segments"]))
        batch = pixels.shape[0] // self._robot_images
        return Scene(pixels, prompt, batch, arrays.get("state"), arrays["extras"])

    def _act_on_pixels(self, arrays: dict) -> mx.array:
        scene = self._scene(arrays)
        parts, _ = self._head.decode(
            self.model, scene, self.plan, positions=self.positions
        )
        return self._head.joined(parts)

    def _act_in_episode(self, batch: int, arrays: dict) -> mx.array:
        """Return tokens of a step with a method that reads previous attention.

        The warm-up keeps every visual token. Later steps also keep tokens that the
        previous actions attended to.
        """
        before = self._attended
        if before is not None:
            check_robots(before, batch)
        warm_up = before is None or self._steps < _WARM_UP
        if before is None or warm_up:
            answer, attended = self._noted_warm_up(mx.zeros((batch, 0)), arrays)
        else:
            answer, attended = self._noted(before, arrays)
        if before is not None:
            attended = _DECAY * before + (1 - _DECAY) * attended
        mx.eval(answer, attended)  # else the lazy mean would hold every earlier step
        self._attended, self._steps = attended, self._steps + 1
        self.kept = self._mean_kept() if not warm_up else self._total
        return answer

    def _act_and_note(
        self, before: mx.array, arrays: dict, plan: Plan | None = None
    ) -> tuple[mx.array, mx.array]:
        """Return tokens, and their mean attention (B, N) to visual tokens in one layer.

        before: (B, N) attention of previous steps; (B, 0) in the warm-up. The layer is
        the middle one, or the one before the first pruner inside the language model if
        that comes earlier: behind a pruner, dropped tokens get no attention.
        """
        plan = self.plan if plan is None else plan
        scene = self._scene(arrays)
        if before.shape[1]:
            extras = {**scene.extras, "scores_previous": before}
            scene = dataclasses.replace(scene, extras=extras)
        inside = [pruner.at for pruner in plan if isinstance(pruner.at, int)]
        layers = len(self.model.decoder.layers)
        layer = min([layers // 2, *(at - 1 for at in inside)])
        parts, visual = self._head.decode(
            self.model, scene, plan, attention_of=layer, positions=self.positions
        )
        if visual.attended is None:
            raise ValueError("the head noted no attention")
        mean = mx.mean(visual.attended, axis=1)
        empty = mx.zeros((len(mean), visual.total))
        attended = mx.put_along_axis(empty, visual.indices, mean, axis=1)
        return self._head.joined(parts), attended

    def _read_draft(self, draft: mx.array, arrays: dict) -> tuple:
        scene = self._scene(arrays)
        return read_draft(self.model, scene, self.plan, self.positions, draft)

    def _act_with_draft(self, draft: mx.array, arrays: dict) -> mx.array:
        """Check the draft in the compiled call, then decode what it got wrong."""
        check = self._read(draft, arrays)
        self.kept = self._mean_kept()
        tokens, more = correct_draft(self.model, draft, check)
        self.calls = 1 + more
        return tokens

    def _encode(self, arrays: dict) -> tuple[mx.array, dict]:
        features = encode(self.model, self._scene(arrays), self.plan)
        return features.tokens, dict(features.extras)

    def _act_on_tokens(
        self, embeddings: mx.array, indices: mx.array, mask: mx.array, arrays: dict
    ) -> mx.array:
        selection = Selection(indices, mask=mask)
        parts = (embeddings, indices, selection, self._grid, self._robot_images, mask)
        visual = VisualTokens(*parts)
        options = {"positions": self.positions, "vision": lambda *_: visual}
        parts, _ = self._head.decode(self.model, self._scene(arrays), (), **options)
        return self._head.joined(parts)

    def _act_with_own_count(self, scene: Scene, arrays: dict) -> mx.array:
        """Return tokens under a method with its own count, which runs uncompiled.

        Its number of tokens depends on values, so it runs between two compiled calls.
        """
        tokens, extras = self._features(arrays)
        features = Features(tokens, self._grid, extras=extras)
        visual = prune_at_tower(self.model, scene, self.plan, features)
        visual = prune_at_prompt(self.model, scene, self.plan, visual)
        self.kept = visual.keep
        if visual.mask is not None:
            counts = mx.sum(visual.mask, axis=1)
            self.kept, self.kept_each = mx.mean(counts).item(), counts.tolist()
        return self._rest(*_padded(visual), arrays)

    @property
    def _grid(self) -> tuple[int, int]:
        side = self.model.image_size // self.model.stride
        return side, side


def _check_draft(policy: Policy, draft: "bool | str | Policy") -> None:
    """Raise `InputError` unless `draft` can draft for the policy."""
    if isinstance(draft, Policy):
        kinds = [
            f"{one._head.kind} of {len(one.bounds.low)} numbers, in "
            f"{one.model.args.text['vocab_size']} tokens"
            for one in (draft, policy)
        ]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"a policy that answers {kinds[0]}, cannot draft for one that answers "
                f"{kinds[1]}; expected one of the same family and robot"
            )
    elif draft not in (False, True, "shifted", "ngram"):
        raise InputError(
            f"drafts are True, False, 'shifted', 'ngram' or a Policy, not {draft!r}"
        )
    elif draft not in (False, True) and not isinstance(policy._head, Chunks):
        raise InputError(
            f"only the answers of pi0-FAST are drafted {draft!r}; expected True "
            "(--draft last)"
        )


def _padded(visual: VisualTokens) -> tuple[mx.array, mx.array, mx.array]:
    """Pad embeddings, indices and mask to the next multiple of `_BUCKET` tokens.

    Few lengths mean few compiled graphs; the mask hides the padding.
    """
    batch, kept = visual.indices.shape
    more = min(-kept % _BUCKET, visual.total - kept)
    mask = visual.mask
    mask = mx.ones((batch, kept), mx.bool_) if mask is None else mask
    return (
        mx.pad(visual.embeddings, [(0, 0), (0, more), (0, 0)]),
        mx.pad(visual.indices, [(0, 0), (0, more)]),
        mx.pad(mask, [(0, 0), (0, more)]),
    )
