"""Answers of our runtime; features are computed once for each picture."""

import itertools
from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..features import Features
from ..generate.settings import Settings
from ..measure.results import Row
from ..measure.subject import ActionSubject, OwnSubject
from ..models.language import ReadResult
from ..pipeline import Scene, encode, prune_at_tower, run
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
            judge, self._most = ActionJudge(subject.head), subject.head.calls
        else:
            tokenizer = subject.processor.tokenizer
            judge = WordJudge(tokenizer, tokenizer.eos_token_ids)
            self._most = settings.max_tokens
        self.judge, self._stops = judge.judge, judge.stops
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
        at_tower = prune_at_tower(self.model, scene, plan, self._current)
        read, visual = run(
            *(self.model, scene, plan),
            positions=self.settings.positions,
            vision=lambda *_: at_tower,
            cache=self.model.decoder.make_cache(),
        )
        ids, logits = self._ids_and_logits(read, unpruned)
        own = visual.keep if any(p.has_own_count for p in plan) else None
        cost = self.subject.count_shapes(scene, plan, own)
        left = set(itertools.chain(*visual.left())).intersection(item.needed)
        needed = len(left) / len(item.needed) if item.needed else None
        logs = nn.log_softmax(logits.astype(mx.float32))
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
        self, read: ReadResult, unpruned: Answer | None
    ) -> tuple[list[int], mx.array]:
        """Return the answer's ids, and logits (T, V) for the unpruned answer's tokens.

        The prompt is encoded once: the unpruned answer follows it, and the cache is
        trimmed to the first token that this row chooses differently.
        """
        from mlx_lm.generate import maybe_quantize_kv_cache
        from mlx_lm.models.cache import trim_prompt_cache

        decoder = self.model.decoder
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
        while ids[-1] not in self._stops and len(ids) < self._most:
            hidden = decoder.follow(mx.array([ids[-1:]]), cache)
            parts.append(decoder.logits(hidden)[0])
            ids.append(cast(int, mx.argmax(parts[-1]).item()))
        return ids, mx.concatenate(parts)
