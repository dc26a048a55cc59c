"""`Policy`: a robot policy in a control loop, compiled, for one robot or for many."""

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
from ..processing.chunks import ChunkProcessor
from ..processing.processor import ActionProcessor
from ..processing.prompt import Prompt, check_text
from ..pruners import Pruners, count_tokens
from ..runtime import end_streams_with_thread
from .action_drafts import Checked, correct_draft, draft_chunk, read_draft
from .episode import EpisodeInputs, check_robots
from .heads import Chunks, head_of
from .inputs import (
    check_action,
    check_acts,
    check_images,
    check_scorers,
    observe,
    tell,
)

_BUCKET = 8  # visual tokens by which compiled shapes grow where counts vary
_WARM_UP = 3  # first steps of an episode that keep every token, as in VLA-Pruner
_DECAY = 0.8  # of what earlier actions attended to, of the same


class Policy:
    """A policy in a control loop: `action = policy(images, instruction)`.

    Holds model, data set and pruner, which is that of the checkpoint, mostly none, when
    `None`. Each shape is compiled once, so that the second call of a shape (batch,
    length of the instruction, and for methods with a count of their own its multiple
    of 8) does not compile again. Nothing of one observation reaches the next, but for
    drafts, methods that look back and scorers that read the last action (zeros in an
    episode's first step); weights are those of the first call of a shape.
    `reset` between episodes forgets the tokens of past instructions.
    first: how many actions of a chunk are given back, those that are done before the
    policy looks again; `None` for all.
    draft: guess that tokens are those of the last action, or go on as they did there,
    and have the model check them in one call; actions stay the same. "shifted" guesses
    what a chunk had left after its `first` actions, with the last one held; "ngram"
    only goes on as the last chunk did. Another `Policy` drafts by what it would do,
    from its own look at the pictures; it may be a smaller one, or this one pruned.
    `kept` is
    how many visual tokens the last call had, mean over robots and layers, `kept_each`
    that of each robot; `calls` how often it ran the language model; `wrong` what was
    wrong with its answer, of pi0-FAST policies. Those read one robot's state as text
    and end their answers themselves, so they are not compiled, and robots of a batch
    act one after the other.
    """

    def __init__(
        self,
        model: VisionModel,
        processor: ActionProcessor | ChunkProcessor,
        *,
        pruner: Pruners = None,
        positions: str = DEFAULT_POSITIONS,
        unnorm_key: str | None = None,
        compile: bool = True,
        draft: "bool | Literal['shifted', 'ngram'] | Policy" = False,
        first: int | None = None,
    ):
        check_acts(processor)
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
        wrap = mx.compile if compile else (lambda function: function)
        self._whole = wrap(self._act_on_pixels)
        self._features = wrap(self._encode)
        self._rest = wrap(self._act_on_tokens)
        self._read = wrap(self._read_draft)
        self._noted = wrap(self._act_and_note)
        self._noted_warm_up = wrap(functools.partial(self._act_and_note, plan=()))
        self._drafts = draft
        self.kept, self.kept_each, self.calls = 0.0, [0.0], 0
        self.wrong: str | None = None
        self._seen = model.pictures or 1  # pictures of a robot
        self.reset()

    def reset(self) -> None:
        """Begin an episode."""
        self._prompt = functools.lru_cache(maxsize=16)(self.processor.prompt)
        self._last: mx.array | None = None
        self._attended: mx.array | None = None
        self._inputs.reset()
        self._steps = 0
        if isinstance(self._drafts, Policy):
            self._drafts.reset()

    def keep_robots(self, rows: Sequence[int]) -> None:
        """Go on with these robots of the last batch: the episodes of others ended."""
        kept_rows = mx.array(list(rows))
        for name in ("_attended", "_last"):
            known = getattr(self, name)
            if known is not None:
                setattr(self, name, known[kept_rows])
        self._inputs.keep(kept_rows)
        if isinstance(self._drafts, Policy):
            self._drafts.keep_robots(rows)

    def __call__(
        self,
        images: Sequence | Mapping,
        instruction: str,
        proprio: Sequence[float] | None = None,
    ) -> np.ndarray:
        """(A,) action in robot units, or (chunk, A) from OpenVLA-OFT and pi0-FAST.

        Of chunks, only the `first` actions.
        images: in the policy's order, or by the names of its cameras.
        """
        states = None if proprio is None else [proprio]
        return self.act_on_batch([images], instruction, states)[0]

    def act_on_batch(
        self,
        batch: Sequence[Sequence | Mapping],
        instruction: str,
        proprio: Sequence[Sequence[float]] | None = None,
    ) -> np.ndarray:
        """(B, A) or (B, chunk, A) for B robots that were told the same.

        batch: the pictures of each robot. proprio: the state of each.
        """
        if not isinstance(batch, Sequence) or not len(batch):
            raise InputError("the batch is empty; expected the pictures of one robot")
        if self._head.alone and len(batch) > 1:
            return self._one_after_the_other(batch, instruction, proprio)
        end_streams_with_thread()
        robots = [check_images(self.model, images) for images in batch]
        check_text(instruction, "the instruction")
        about = (instruction, proprio, self.unnorm_key, len(batch), self._prompt)
        told = tell(self._head, self.model, *about)
        extras = self._inputs.of(len(batch))
        scene = observe(self.processor, robots, *told, extras)
        self._seen = len(robots[0])
        self.calls = self._head.calls
        self.kept_each = []
        if isinstance(self._drafts, Policy):
            self._drafts.act_on_batch(batch, instruction, proprio)
            self._last = self._drafts._said
        said = self._act(scene, self._arrays(scene))
        self.kept_each = self.kept_each or [self.kept] * len(batch)
        normalized = check_action(self._head.normalized(np.array(said)))
        self.wrong = self._head.wrong(np.array(said[0]))
        self._said = said
        self._last = said if self._drafts else None
        self._inputs.note(normalized, self.first)
        return self.bounds.to_units(normalized)[:, : self.first]

    def _one_after_the_other(self, batch, instruction: str, proprio) -> np.ndarray:
        """(B, chunk, A): each robot's state is a text of its own length."""
        if self._drafts or self._looks_back or self._inputs.names:
            raise InputError(
                "drafts, and methods that look back or read the last action, know one "
                "robot of such a policy; give each a Policy of its own"
            )
        states = [None] * len(batch) if proprio is None else proprio
        if len(states) != len(batch):
            raise InputError(f"{len(batch)} robots need as many states")
        rows = zip(batch, states, strict=True)
        actions, kept = [], []
        for images, state in rows:
            actions.append(self(images, instruction, state))
            kept.append(self.kept)
        self.kept_each = kept
        return np.stack(actions)

    def _act(self, scene: Scene, arrays: dict) -> mx.array:
        if self._has_own_count:
            return self._act_with_own_count(scene, arrays)
        if self._looks_back:
            return self._act_in_episode(scene.batch, arrays)
        if self._last is not None and isinstance(self._head, Chunks):
            return self._draft_chunk(self._head, self._last[0], scene)
        if self._last is not None and len(self._last) == scene.batch:
            return self._act_with_draft(self._last, arrays)
        said = self._whole(arrays)
        self.kept = self._counted()
        if isinstance(self._head, Chunks):
            self.calls = said.shape[1]
        return said

    def _draft_chunk(self, head: Chunks, last: mx.array, scene: Scene) -> mx.array:
        answer = list(head.ids(np.array(last)))
        if self._drafts == "shifted":
            answer = head.shifted(answer, self.first or self.model.args.horizon)
        said, self.calls = draft_chunk(
            *(head, self.model, scene, self.plan, answer),
            first=[] if self._drafts == "ngram" else answer,
            positions=self.positions,
        )
        self.kept = self._counted()
        return mx.array([said], mx.int32)

    @property
    def _total(self) -> int:
        return self._grid[0] * self._grid[1] * self._seen

    def _counted(self, own: int | None = None) -> float:
        """Visual tokens of a robot, mean over layers."""
        layers = len(self.model.decoder.layers)
        return count_tokens(self.plan, self._grid, self._seen, layers, own).mean

    # What compiled calls take: a scene as arrays.

    def _arrays(self, scene: Scene) -> dict:
        state = {} if scene.state is None else {"state": scene.state}
        segments = list(map(mx.array, scene.prompt.segments))
        extras = dict(scene.extras)
        return {"pixels": scene.pixels, "segments": segments, "extras": extras} | state

    def _scene(self, arrays: dict) -> Scene:
        pixels, prompt = arrays["pixels"], Prompt(tuple(arrays["segments"]))
        batch = pixels.shape[0] // self._seen
        return Scene(pixels, prompt, batch, arrays.get("state"), arrays["extras"])

    def _act_on_pixels(self, arrays: dict) -> mx.array:
        scene = self._scene(arrays)
        parts, _ = self._head.decode(
            self.model, scene, self.plan, positions=self.positions
        )
        return self._head.joined(parts)

    def _act_in_episode(self, batch: int, arrays: dict) -> mx.array:
        """Every token at first, then also those that the last actions attended to."""
        before = self._attended
        if before is not None:
            check_robots(before, batch)
        warm = before is None or self._steps < _WARM_UP
        if warm:
            said, attended = self._noted_warm_up(mx.zeros((batch, 0)), arrays)
        else:
            said, attended = self._noted(before, arrays)
        if before is not None:
            attended = _DECAY * before + (1 - _DECAY) * attended
        mx.eval(said, attended)
        self._attended, self._steps = attended, self._steps + 1
        self.kept = self._counted() if not warm else self._total
        return said

    def _act_and_note(
        self, before, arrays: dict, plan=None
    ) -> tuple[mx.array, mx.array]:
        """Actions, and (B, N) what they attended to in a middle layer."""
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
        seen = mx.mean(visual.attended, axis=1)
        empty = mx.zeros((len(seen), visual.total))
        found = mx.put_along_axis(empty, visual.indices, seen, axis=1)
        return self._head.joined(parts), found

    def _read_draft(self, draft, arrays: dict) -> tuple:
        scene = self._scene(arrays)
        return tuple(read_draft(self.model, scene, self.plan, self.positions, draft))

    def _act_with_draft(self, draft: mx.array, arrays: dict) -> mx.array:
        """Only what the draft had wrong is decoded after the compiled call."""
        checked = Checked(*self._read(draft, arrays))
        self.kept = self._counted()
        tokens, more = correct_draft(self.model, draft, checked)
        self.calls = 1 + more
        return tokens

    def _encode(self, arrays: dict) -> tuple[mx.array, dict]:
        features = encode(self.model, self._scene(arrays), self.plan)
        return features.tokens, dict(features.extras)

    def _act_on_tokens(self, embeddings, indices, mask, arrays: dict) -> mx.array:
        visual = self._visual(embeddings, indices, mask)
        how = {"positions": self.positions, "vision": lambda *_: visual}
        parts, _ = self._head.decode(self.model, self._scene(arrays), (), **how)
        return self._head.joined(parts)

    def _act_with_own_count(self, scene: Scene, arrays: dict) -> mx.array:
        """The count is only known once the pruner has run: compile around it."""
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

    def _visual(self, embeddings, indices, mask) -> VisualTokens:
        selection = Selection(indices, mask=mask)
        return VisualTokens(
            *(embeddings, indices, selection, self._grid, self._seen, mask)
        )


def _check_draft(policy: Policy, draft) -> None:
    """Raise `InputError` unless this can draft for the policy."""
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
    """Embeddings, indices and mask of the next multiple of `_BUCKET` tokens."""
    batch, kept = visual.indices.shape
    more = min(-kept % _BUCKET, visual.total - kept)
    mask = visual.mask
    mask = mx.ones((batch, kept), mx.bool_) if mask is None else mask
    return (
        mx.pad(visual.embeddings, [(0, 0), (0, more), (0, 0)]),
        mx.pad(visual.indices, [(0, 0), (0, more)]),
        mx.pad(mask, [(0, 0), (0, more)]),
    )
