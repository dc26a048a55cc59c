"""Answers of our runtime; features are computed once for each picture."""

import itertools
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..features import Features
from ..generate.settings import Settings
from ..measure.results import Row
from ..measure.subject import ActionSubject, OwnSubject
from ..models.language import ReadResult
from ..models.protocol import VisionModel
from ..pipeline import Scene, VisualTokens, encode, prune_at_tower, run
from ..pipeline.planning import plan_for
from ..pruners import Plan
from .evaluator import Answer
from .items import Item
from .judge_actions import ActionJudge
from .judge_words import WordJudge


class OwnRuntime:
    """Model in our runtime, with the features of the last picture.

    rows: every row that `answer` will be called with.
    """

    def __init__(self, subject: OwnSubject, rows: Sequence[Row], settings: Settings):
        settings.check(subject.model)
        self.subject, self.settings = subject, settings
        self.model = subject.model
        if isinstance(subject, ActionSubject):
            self._judge = ActionJudge(subject, settings.max_tokens)
        else:
            self._judge = WordJudge(subject, settings.max_tokens)
        self.judge = self._judge.judge
        # Every extra that a row needs, computed at once.
        self._all = tuple(p for row in rows for p in self._plan(row))
        self._last: tuple[str, Features] | None = None

    def begin(self, item: Item) -> None:
        """Tokenize the question, and encode the picture unless it is the last one."""
        self._scene = self.subject.scene([item.load()], item.question)
        self._current = self._features(self._scene, item)

    def answer(self, row: Row, item: Item, unpruned: Answer | None) -> Answer:
        """Answer greedily under a row.

        unpruned: the answer whose tokens the logits are for, `None` for the first row.
        """
        plan, scene = self._plan(row), self._scene
        question = _Question(self.model, scene, plan, self.settings, self._current)
        ids, logits = self._ids_and_logits(question, unpruned)
        own = question.kept if any(p.has_own_count for p in plan) else None
        cost = self.subject.count_shapes(scene, plan, own)
        needed = question.share_of(item.needed)
        logs = _log_softmax(logits)
        return Answer(ids, logs, cost.tokens.mean, cost.flops, needed)

    def _plan(self, row: Row) -> Plan:
        return plan_for(self.model, row.pruners)

    def _features(self, scene: Scene, item: Item) -> Features:
        """Return the features of the item's picture, kept for the next question."""
        if not self._last or self._last[0] != item.picture:
            features = encode(self.model, scene, self._all)
            mx.eval(features.arrays())
            self._last = (item.picture, features)
        return self._last[1]

    def _ids_and_logits(
        self, question: "_Question", unpruned: Answer | None
    ) -> tuple[list[int], mx.array]:
        """Return the answer's ids, and logits (T, V) for the unpruned answer's tokens.

        The prompt is encoded once: the unpruned answer follows it, and the cache is
        trimmed to the first token that this row chooses differently.
        """
        from mlx_lm.generate import maybe_quantize_kv_cache
        from mlx_lm.models.cache import trim_prompt_cache

        decoder = self.model.decoder
        read = question.read(decoder.make_cache())
        cache, logits = read.cache, decoder.logits(read.hidden)[0, -1:]
        maybe_quantize_kv_cache(cache, **self.settings.quantization)
        if unpruned is None:
            ids, logits = self._greedy(
                [cast(int, mx.argmax(logits).item())], cache, logits
            )
            return ids, logits
        ids = unpruned.ids
        if len(ids) > 1:
            behind = decoder.follow(mx.array([ids[:-1]]), cache)
            logits = mx.concatenate([logits, decoder.logits(behind)[0]])
        chosen = np.array(mx.argmax(logits, axis=-1)).tolist()
        if chosen == ids:
            return ids, logits
        same = next(n for n, own in enumerate(chosen) if own != ids[n])
        trim_prompt_cache(cache, len(ids) - 1 - same)
        own, _ = self._greedy([*ids[:same], chosen[same]], cache, logits)
        return own, logits

    def _greedy(
        self, ids: list[int], cache: list, logits: mx.array
    ) -> tuple[list[int], mx.array]:
        """Return token ids to the one that stops, included, and their logits (T, V).

        ids: the first ones, of which the last is not in the cache yet. logits: theirs.
        """
        decoder, ids, parts = self.model.decoder, list(ids), [logits]
        while ids[-1] not in self._judge.stops and len(ids) < self._judge.most:
            hidden = decoder.follow(mx.array([ids[-1:]]), cache)
            parts.append(decoder.logits(hidden)[0])
            ids.append(cast(int, mx.argmax(parts[-1]).item()))
        return ids, mx.concatenate(parts)


class _Question:
    """Question under one plan; pruning at the tower is done once."""

    def __init__(
        self,
        model: VisionModel,
        scene: Scene,
        plan: Plan,
        settings: Settings,
        features: Features,
    ):
        self._model, self._scene, self._plan = model, scene, plan
        self._positions = settings.positions
        self._visual = prune_at_tower(model, scene, plan, features)
        self.kept, self._chosen = 0, self._visual

    def share_of(self, needed: tuple[int, ...]) -> float | None:
        """Return the kept share of the needed tokens, after `read`."""
        left = set(itertools.chain(*self._chosen.left()))
        return len(left.intersection(needed)) / len(needed) if needed else None

    def read(self, cache: list) -> ReadResult:
        """Run the prompt into the cache."""

        def cached_vision(*_: Any) -> VisualTokens:
            return self._visual

        options = {"positions": self._positions, "vision": cached_vision}
        read, visual = run(self._model, self._scene, self._plan, **options, cache=cache)
        self.kept = visual.keep
        self._chosen = visual
        return read


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
